"""The trade-off benchmark at its smallest, and its arithmetic on rows worked out by hand."""

import json
import sys
from pathlib import Path

import pytest

from trl_apex.aggregation.options import RULES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tradeoffs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tradeoffs

    return tradeoffs


def row(method: str, seed: int, worst: float, condition: str = "natural") -> dict:
    gains = {"ocr": worst, "pickscore": 1.0}
    return {
        "condition": condition, "method": method, "seed": seed, "gains": gains, "worst_gain": worst,
        "mean_gain": (worst + 1) / 2, "hypervolume": 0.0, "hypervolume_below_base": 2 * (1 + worst), "jdr": 0.5, "jcr": 0.0,
        "seesaw_rate": 0.0, "conflict_rate": None, "hijack_index": 2.0, "hijack_share": {"ocr": 0.9, "pickscore": 0.1},
        "held_out": {"exact_word": {"base": 0.5, "tuned": 0.75}, "attributes": {"base": 1.0, "tuned": 1.0}},
    }  # fmt: skip


def test_differences_are_paired_by_seed(tradeoffs):
    # apex is better by .1 and .3; across seeds both vary far more than that
    rows = [row("apex", 0, 0.1), row("apex", 1, -2.7), row("mgda", 0, 0.0), row("mgda", 1, -3.0)]
    apex, mgda = tradeoffs.summarize(rows)
    assert mgda["apex_minus/worst_gain"] == pytest.approx((0.2, 0.1))
    assert mgda["worst_gain"] == pytest.approx((-1.5, 1.5))
    assert mgda["held_out/exact_word"] == pytest.approx((0.25, 0))
    assert "apex_minus/worst_gain" not in apex
    assert "| mgda | 2 | -1.50 ± 1.50 |" in tradeoffs.markdown([apex, mgda])


def test_plan_names_methods_that_exist(tradeoffs):
    from _tradeoff_run import method_settings

    for part in ("tradeoffs", "ablation"):
        for condition, method, _ in tradeoffs.plan(part, [1]):
            objectives = tradeoffs.CONDITIONS[condition].get("objectives", tradeoffs.OBJECTIVES)
            trained, settings = method_settings(method, objectives)
            assert set(trained) <= set(objectives) and settings
    natural = {method for condition, method, _ in tradeoffs.plan("tradeoffs", [1]) if condition == "natural"}
    assert natural >= {*RULES, "only_ocr", "only_pickscore", "only_deqa", "only_aesthetic"}


def test_smoke(tradeoffs, tmp_path, monkeypatch):
    command = ["tradeoffs.py", "--smoke", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    tradeoffs.main()
    results = json.loads((tmp_path / "tradeoffs.json").read_text())
    assert {line["method"] for line in results["rows"]} == {"apex", "mgda", "only_deqa"}
    assert all(set(line["gains"]) == {"ocr", "pickscore", "deqa", "aesthetic"} for line in results["rows"])
    assert (tmp_path / "tradeoffs.png").stat().st_size > 10_000
    before = (tmp_path / "tradeoffs.md").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--redraw"])
    tradeoffs.main()
    assert (tmp_path / "tradeoffs.md").read_text() == before
