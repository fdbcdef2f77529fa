"""Shape annotations are checked in every test.

Not in the configurations: TRL annotates some of its fields otherwise than it fills them.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# A busy machine is no failure.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

AGGREGATION = (
    "aggregator",
    "conflict",
    "metrics",
    "normalize",
    "priority",
    "rules",
    "state",
)  # options check themselves
STAGES = ("evaluation", "loss", "policy", "prompts", "rewards", "rollout", "serving", "tiny", "types")
TRAINER = ("apex_trainer", "diffusion_grpo_trainer", "gradient_probe", "rows")
MODULES = [f"trl_apex.{stage}" for stage in STAGES] + [f"trl_apex.trainer.{name}" for name in TRAINER]
MODULES += [f"trl_apex.aggregation.{name}" for name in AGGREGATION]
install_import_hook(["tools.tiny_world", *MODULES], "beartype.beartype")
