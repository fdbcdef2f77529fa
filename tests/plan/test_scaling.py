"""docs/scaling.md says what benchmarks/scaling.py computes, and both agree with what `trl-apex plan` prints."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=pytest.mark.slow if t == "a sample" else ()) for t in scaling.TABLES]
)
def test_a_table_is_up_to_date(title):
    assert scaling.TABLES[title]() in PAGE


def test_every_table_of_numbers_is_checked():
    made = [table for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M) if table.split("\n")[1].startswith("| ---")]
    assert len(made) == len(scaling.TABLES)


@pytest.mark.slow
def test_the_sums_in_the_text_are_up_to_date():
    text = " ".join(PAGE.split())
    missing = [line for line in scaling.sums() if " ".join(line.split()) not in text]
    assert missing == []


def test_one_gpu_needs_the_same_under_every_stage_of_zero():
    for name in scaling.MODELS:
        for lora in (True, False):
            held = [scaling.held_bytes(name, lora, engine, 1) for engine in list(scaling.ENGINES)[1:]]
            assert max(held) - min(held) < 1.0
            assert scaling.update_traffic(name, lora, "DDP", 1) == 0.0
