"""The tables of docs/scaling.md are what the script counts."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=pytest.mark.slow if t == "a sample" else ()) for t in scaling.TABLES]
)
def test_a_table_is_up_to_date(title):
    assert scaling.TABLES[title]() in DOCUMENT


def test_the_example_of_the_text():
    c = scaling.counts("SD3.5-M")
    assert scaling.state_bytes(c, False, "ZeRO-2", 8) / 1e9 == pytest.approx(8.41 + 0.45, abs=0.01)


def test_one_gpu_needs_the_same_under_every_engine():
    for name in scaling.MODELS:
        for lora in (True, False):
            held = {scaling.state_bytes(scaling.counts(name), lora, engine, 1) for engine in scaling.ENGINES}
            assert max(held) - min(held) < 1.0
            assert scaling.update_traffic(scaling.counts(name), lora, "DDP", 1, 4) == 0.0
