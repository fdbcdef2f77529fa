"""Shape annotations are checked in every test.

Not in the configurations: TRL annotates some of its fields otherwise than it fills them.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process: the tests run side by side

import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# A busy machine is no failure.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")
torch.set_num_threads(1)

# The options of the aggregation check themselves.
AGGREGATION = ("aggregator", "conflict", "metrics", "normalize", "priority", "rules", "state")
TRAINERS = ("adapters", "apex", "diffusion_grpo", "evaluation", "logs", "probe", "weights")
MODULES = [f"trl_apex.{folder}" for folder in ("diffusion", "evaluation", "prompts", "rewards", "serving", "tiny")]
MODULES += [f"trl_apex.aggregation.{name}" for name in AGGREGATION]
MODULES += [f"trl_apex.trainers.{name}" for name in TRAINERS]
for module in MODULES:  # the hook ignores a name that does not exist
    path = Path(__file__).parents[1] / module.replace(".", "/")
    assert path.is_dir() or path.with_suffix(".py").is_file(), f"{module} does not exist"
install_import_hook(["tools.tiny_world", *MODULES], "beartype.beartype")


def pytest_collection_finish():
    """Every training run looks for unreachable objects: not among the half a million that imports have made."""
    gc.collect()
    gc.freeze()
