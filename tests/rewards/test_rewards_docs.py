"""The examples of docs/rewards.md run, and the server needs no training stack."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

import trl_apex.rewards

BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks(pytestconfig) -> list[str]:
    return BLOCK.findall((pytestconfig.rootpath / "docs" / "rewards.md").read_text())


def test_examples_run(pytestconfig):
    found = blocks(pytestconfig)
    assert len(found) >= 6
    namespace: dict = {"__name__": "docs"}
    for block in found:
        exec(compile(block, "docs/rewards.md", "exec"), namespace)
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    redness = namespace["redness"](prompts=["red", "red", "green"], completions=[red, blue, red])
    assert redness == [1.0, -0.5, None]
    assert namespace["deqa"].__name__ == "deqa" and namespace["deqa"]._server is None


def test_own_reward_is_ten_lines(pytestconfig):
    block = next(block for block in blocks(pytestconfig) if "def redness" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "trl", "diffusers", "datasets", "accelerate", "peft"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from trl_apex.serving.server import make_server
def zero(prompts, **kwargs):
    return [0.0] * len(prompts)
print(make_server([zero, "jpeg_compressibility"]).config.port)
"""


def output_of(code: str) -> str:
    """What a new process prints."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_server_needs_no_training_stack():
    assert output_of(WITHOUT) == "8000"


def test_nothing_heavy_at_import():
    code = "import sys, trl_apex.rewards; print([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules])"
    assert output_of(code) == "[]"


def test_the_table_has_every_reward_of_the_registry(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "rewards.md").read_text()
    for name, path in trl_apex.rewards.REWARDS.items():
        shown = "its name on the server" if name == "remote" else f"`{name}`"
        assert f"| `{path.partition(':')[2]}` | {shown} |" in page, name


@pytest.mark.parametrize(
    "name",
    [
        "AestheticReward",
        "DeQAReward",
        "DINOSourceReward",
        "GenEvalReward",
        "HPSv2Reward",
        "HPSv3Reward",
        "ImageReward",
        "OCRReward",
        "PickScoreReward",
        "SafetyReward",
        "SourceReward",
        "UnifiedReward",
        "VLMYesReward",
    ],
)
def test_each_reward_states_range_and_licence(name, pytestconfig):
    reward = getattr(trl_apex.rewards, name)
    assert "larger is better" in reward.range and reward.weights_licence
    assert f"| `{name}` | `{reward.default_name}` |" in (pytestconfig.rootpath / "docs" / "rewards.md").read_text()
