"""Every block of Python in the documentation runs, or, where it needs a GPU, names only what exists."""

import re
import textwrap
from pathlib import Path

import pytest
from resolve import problems

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
]
PAGES = [page for page in PAGES if page.is_file()]
FENCE = re.compile(r"^( *)```python *([^\n]*)\n(.*?)^\1``` *$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The Python blocks of a page: what follows "python" on the fence, the code, its line."""
    text = page.read_text()
    found = FENCE.finditer(text)
    return [(m.group(2), textwrap.dedent(m.group(3)), text[: m.start()].count("\n") + 2) for m in found]


def needs_more_than_a_cpu(info: str, code: str) -> bool:
    """Says so on its fence, or names weights of the Hub."""
    return "needs" in info.lower() or '"stabilityai/' in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}  # the blocks of a page build on each other
    for info, code, line in blocks(page):
        where = f"{page.relative_to(ROOT)}:{line}"
        if needs_more_than_a_cpu(info, code):
            found = problems(code, names)
            assert not found, f"{where}: {found}"
        else:
            padded = "\n" * (line - 1) + code
            exec(compile(padded, where, "exec"), names)


def test_the_fence_is_found_also_when_indented():
    assert FENCE.search("text\n    ```python title='x'\n    a = 1\n    ```\n").group(3) == "    a = 1\n"


@pytest.mark.parametrize(
    "code, problem",
    [
        ("from trl_apex import Nothing", "trl_apex has no Nothing"),
        ("import torch\ntorch.nothing()", "torch.nothing does not exist"),
        (
            "from trl_apex import APEXConfig\nAPEXConfig(output_dir='x', nothing=1)",
            "APEXConfig takes no argument nothing",
        ),
        (
            "from trl_apex import APEXTrainer\nAPEXTrainer('m', reward_func=f)",
            "APEXTrainer takes no argument reward_func",
        ),
        ("print(undefined)", "the name undefined is not defined"),
        (
            "from trl_apex import OCRReward\nreward = OCRReward()\nreward.unload(now=True)",
            "reward.unload takes no argument now",
        ),
    ],
)
def test_what_does_not_exist_is_found(code, problem):
    assert problem in problems(code)


def test_correct_code_has_no_problems():
    code = """
        from datasets import Dataset
        from peft import LoraConfig
        from trl_apex import APEXConfig, APEXTrainer
        def reward(completions, **kwargs):
            return [len(c) for c in completions if c]
        t = APEXTrainer(model="m", reward_funcs=[reward], args=APEXConfig(output_dir="x", beta=0.1, need_coef=2.0),
                        train_dataset=Dataset.from_dict({"prompt": ["a"]}), peft_config=LoraConfig(r=4))
        t.train(resume_from_checkpoint=True)
    """
    assert problems(textwrap.dedent(code)) == []
