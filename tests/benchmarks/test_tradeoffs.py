"""The trade-off benchmark at its smallest, and its arithmetic on rows worked out by hand."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tradeoffs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tradeoffs

    return tradeoffs


def row(method: str, seed: int, worst: float, condition: str = "natural") -> dict:
    return {
        "condition": condition, "method": method, "rate": 1e-4, "seed": seed,
        "gains": {"ocr": worst, "deqa": 1.0}, "errors": {"ocr": 0.1, "deqa": 0.1}, "worst_gain": worst,
        "mean_gain": (worst + 1) / 2, "hypervolume": max(worst, 0.0), "specialist_share": None,
        "held_out": {"exact_word": 0.25, "attributes": 0.0}, "jdr": 0.5, "seesaw_rate": 0.0,
        "curve": [[0.0, 0.0], [worst, 1.0]], "cost": [[64, 9.0, 320]], "priorities": {"ocr": [0.5, 0.75]},
    }  # fmt: skip


KEPT = [
    "losses",
    "losses_scan",
    "losses_guards",
    "losses_step_size",
    "language",
    "language_scan",
    "mixing",
    "tradeoffs_development",
    "tradeoffs_redness",
]


@pytest.mark.parametrize("name", [*KEPT, "tradeoffs", "tradeoffs_scan", "ablation"])
def test_the_tables_follow_from_the_kept_runs(tradeoffs, name):
    import language
    import losses
    import mixing

    summaries = {
        "losses": losses.summary,
        "language": language.summary,
        "mixing": mixing.summary,
        "tradeoffs": lambda rows: tradeoffs.markdown(tradeoffs.summarize(rows)),
        "ablation": lambda rows: tradeoffs.markdown(tradeoffs.summarize(rows)),
    }
    path = BENCHMARKS / "results" / f"{name}.json"
    rows = json.loads(path.read_text())["rows"]
    assert summaries[name.partition("_")[0]](rows) == path.with_suffix(".md").read_text()


def test_differences_are_paired_by_seed(tradeoffs):
    # apex is better by .1 and .3; across seeds both vary far more than that
    rows = [row("apex", 0, 0.1), row("apex", 1, -2.7), row("mgda", 0, 0.0), row("mgda", 1, -3.0)]
    apex, mgda = tradeoffs.summarize(rows)
    assert mgda["minus/worst_gain"] == pytest.approx((0.2, 0.1))
    assert mgda["worst_gain"] == pytest.approx((-1.5, 1.5))
    assert mgda["held_out/exact_word"] == pytest.approx((0.25, 0))
    assert mgda["lifted"] == pytest.approx((0.5, 0.0)) and apex["lifted"] == pytest.approx((0.5, 0.0))
    assert "minus/worst_gain" not in apex
    assert "| mgda | 0.0001 | 2 | -1.50 ± 1.50 |" in tradeoffs.markdown([apex, mgda])


def test_a_run_is_compared_with_the_mean_of_the_specialists(tradeoffs):
    rows = [row("apex", 0, 0.4), row("only_ocr", 0, 0.8), row("only_ocr", 1, 0.2), row("mgda", 2, 0.4, "mixed")]
    apex, _, _, mgda = tradeoffs.with_shares(rows)
    assert apex["specialist_share"] == {"ocr": 0.8} and mgda["specialist_share"] is None
    assert "curve" in apex and "curve" not in mgda


def test_what_a_goal_cost_lies_on_the_line_between_two_evaluations(tradeoffs):
    import losses

    found = row("apex", 0, 0.0) | {
        "curve": [[0, 0, 0, 0], [0.15, 1, 1, 1], [0.35, 1, 1, 1]],
        "cost": [[100, 10.0, 1], [300, 30.0, 3]],
    }
    assert losses.cost(found, ("ocr",), "cpu_seconds") == pytest.approx(20)
    assert losses.cost(found, ("pickscore",), "images") == pytest.approx(25)
    assert losses.cost(found | {"curve": [[0] * 4, [0.2] * 4, [0.2] * 4]}, ("ocr",), "images") is None


@pytest.mark.slow
def test_losses(tradeoffs, tmp_path, monkeypatch):
    import losses

    monkeypatch.setattr(sys, "argv", ["losses.py", "--smoke", "--out", str(tmp_path)])
    losses.main()
    rows = json.loads((tmp_path / "losses.json").read_text())["rows"]
    assert [found["method"] for found in rows] == ["plain", "fpo"]
    times = json.loads((tmp_path / "time_to_quality.json").read_text())["rows"]
    assert [set(found) for found in times] == [{"method", "seed", "cpu_seconds_ocr", "cpu_seconds_all"}] * 2
    plain, fpo = (found["cost"][-1] for found in rows)
    assert plain[0] == fpo[0] == 16 and plain[2] > 0


def test_plan_names_methods_that_exist(tradeoffs):
    from _tradeoff_run import method_settings

    for part in ("scan", "tradeoffs", "ablation"):
        for condition, method, _, _ in tradeoffs.plan(part):
            objectives = tradeoffs.CONDITIONS[condition].get("objectives", tradeoffs.OBJECTIVES)
            trained, settings = method_settings(method, objectives)
            assert set(trained) <= set(objectives) and settings
    natural = {method for condition, method, _, _ in tradeoffs.plan("tradeoffs") if condition == "natural"}
    needs = {"apex:quick", "apex:weak_need", "apex:mild_need"}
    assert natural >= {*tradeoffs.RULES, "only_ocr", "only_pickscore", "only_deqa", "only_aesthetic"} | needs
    assert len(natural) == len(tradeoffs.RULES) + 4 + 8 + len(needs)


def test_smoke(tradeoffs, tmp_path, monkeypatch):
    command = ["tradeoffs.py", "--smoke", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    tradeoffs.main()
    rows = json.loads((tmp_path / "tradeoffs.json").read_text())["rows"]
    assert [found["method"] for found in rows] == ["apex", "mgda", "only_deqa", "apex"]
    assert [list(found["gains"]) for found in rows[:3]] == [["ocr", "pickscore", "deqa", "aesthetic"]] * 3
    assert list(rows[3]["gains"]) == ["ocr", "pickscore", "deqa", "aesthetic", "right_colour"]
    assert all(found["held_out"]["exact_word"] is not None for found in rows)
    for picture in ("tradeoffs.png", "tradeoffs_objectives.png"):
        with Image.open(tmp_path / picture) as image:
            assert len(image.convert("RGB").getcolors(10**6)) > 1
    before = (tmp_path / "tradeoffs.md").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--redraw"])
    tradeoffs.main()
    assert (tmp_path / "tradeoffs.md").read_text() == before


def test_a_reward_of_your_own_is_a_fifth_objective(tradeoffs, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def darkness(images, **kwargs):\n    return (-images.mean((1, 2, 3))).tolist()\n"
    )
    monkeypatch.chdir(tmp_path)
    jobs = tradeoffs.plan("own_reward:darkness", [7])
    assert [job[1] for job in jobs] == ["apex", "sum_then_normalize", "normalize_then_sum"]
    small = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 8, "generation_batch_size": 8}
    (found,) = tradeoffs.execute(tradeoffs.named(jobs[:1], 4, **small, baseline_prompts=4), 1, tmp_path / "runs")
    assert list(found["gains"]) == ["ocr", "pickscore", "deqa", "aesthetic", "darkness"]
    assert found["errors"]["darkness"] > 0
    assert tradeoffs.summarize([found])[0]["gains/darkness"][0] == found["gains"]["darkness"]
