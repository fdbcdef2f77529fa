"""Every recipe and every snippet for a real model fits, by the estimate of `plan`, the card that it names (80 GB if none)."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from trl_apex import APEXConfig, APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.cli import main
from trl_apex.plan import CONFIGS, PlanSettings, check_fit, load_shapes, plan_text, reward_gb
from trl_apex.rewards.registry import REWARDS

ROOT = Path(__file__).parents[2]
RECIPES = [path for path in sorted((ROOT / "examples/configs").glob("*.yaml")) if "tiny" not in path.stem]
FENCE = re.compile(r"^( *)```python *([^\n]*)\n(.*?)^\1``` *$", re.DOTALL | re.MULTILINE)
CARD = re.compile(r"(\d+)[ _-]?GB", re.IGNORECASE)


def snippets():
    """Python blocks of pages and class docstrings that build a trainer for a published model: where, fence, code."""
    pages = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "examples/README.md"]
    texts = [(str(page.relative_to(ROOT)), page.read_text()) for page in pages if page.is_file()]
    texts += [(cls.__name__, textwrap.dedent(cls.__doc__)) for cls in (APEXTrainer, DiffusionGRPOTrainer)]
    for where, text in texts:
        for match in FENCE.finditer(text):
            code = textwrap.dedent(match[3])
            if any(name in code for name in CONFIGS) and re.search(r"(APEX|DiffusionGRPO)Config\(", code):
                yield pytest.param(match[2], code, id=f"{where}:{text[: match.start()].count(chr(10)) + 1}")


def keywords(call):
    """Arguments of a call that are written out; others are ignored."""
    values = {}
    for keyword in call.keywords:
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return values


def estimate(code, gpu_memory_gb):
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = {node.func.id: node for node in calls if isinstance(node.func, ast.Name)}
    cls = APEXConfig if "APEXConfig" in named else DiffusionGRPOConfig
    config = cls(**{**keywords(named[cls.__name__]), "use_cpu": True, "bf16": True})
    rank = keywords(named["LoraConfig"]).get("r", 8) if "LoraConfig" in named else 0
    rewards = [name for name, path in REWARDS.items() if path.partition(":")[2] in named]
    (model,) = {name for name in CONFIGS if f'"{name}"' in code}
    shapes, settings = load_shapes(model), PlanSettings(config, rank, rewards_gb=reward_gb(rewards))
    check_fit(shapes, settings, gpu_memory_gb)
    return plan_text(shapes, settings)


@pytest.mark.filterwarnings("ignore")  # of a configuration that is made for a GPU and read on a CPU
@pytest.mark.parametrize("fence, code", list(snippets()))
def test_a_snippet_for_a_real_model_fits(fence, code):
    card = CARD.search(fence + code)
    assert "Peak" in estimate(code, float(card[1]) if card else 80.0)


def test_a_snippet_that_does_not_fit_is_found():
    assert len(list(snippets())) >= 3
    code = """
        from trl_apex import APEXConfig, APEXTrainer, DeQAReward
        APEXTrainer("stabilityai/stable-diffusion-3.5-medium", [DeQAReward(model="x")], peft_config=LoraConfig(r=32),
            args=APEXConfig(output_dir="x", height=1024, width=1024, gradient_checkpointing=False))
    """
    with pytest.raises(ValueError, match="must fit into 80 GB.*reward networks 16.4.*gradient_checkpointing=true"):
        estimate(textwrap.dedent(code), 80.0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_card_of_its_command(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = [line for line in path.read_text().splitlines() if line.startswith("#   trl-apex plan ")]
    card = float(command.split("--gpu_memory_gb ")[1].split()[0])
    assert f"{card:g} GB" in path.read_text().splitlines()[0]
    assert main(command.removeprefix("#   trl-apex ").split()) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "images, 2 optimizer step(s)" in printed
    assert printed.startswith("An estimate by arithmetic") and re.search(r"reward networks +[1-9]", printed)
