"""The speed benchmarks at their smallest: they run, compare like with like, and count what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "benchmarks"


def image_is_drawn(path: Path) -> bool:
    """Whether a picture opens and holds more than one colour."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(10**6) or range(2)) > 1


@pytest.fixture
def smoke(monkeypatch, tmp_path):
    """Run a benchmark's smoke size in this process, and read what it wrote."""

    def run(name: str) -> dict:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [name, "--smoke", "--out", str(tmp_path)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert (tmp_path / f"{name}.md").read_text().count("|") > 10
        return json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)

    return run


def test_throughput(smoke):
    found = smoke("throughput")
    rows = {row["setting"]: row for row in found["rows"]}
    samples, steps, branches = 2, 4, 2
    rollout, update = samples * steps * branches, samples * (steps - 1) * branches
    watched = 1  # the trainer looks at one velocity an iteration, to see whether it learns
    # One step before the window, once for the group of two; three steps and a window of two for each image.
    window = (1 + samples * 3) * branches, samples * 2 * branches
    counted = {name: (row["forwards"], row["backwards"]) for name, row in rows.items()}
    assert counted == {
        "plain_loop": (rollout + update, update),
        "all_same_mathematics": (rollout + update + watched, update),
        "window_shared_prefix": (sum(window), window[1]),
        "all_with_window": (sum(window) + watched, window[1]),
    }
    assert max(found["same_mathematics"]["tiny"].values()) < 1e-4
    assert {part["phase"] for part in found["phases"]} == {"encode", "rollout", "reward", "update"}


@pytest.mark.slow
def test_throughput_refuses_to_compare_two_things(smoke, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent / "examples"))
    import plain_loop

    monkeypatch.setattr(plain_loop.PlainLoop, "log_prob", lambda self, x, mean, std: (x - mean).mean((1, 2, 3)))
    with pytest.raises(RuntimeError, match="must agree to 1e-4"):
        smoke("throughput")


@pytest.mark.slow
def test_overhead(smoke):
    found = smoke("overhead")
    seconds = found["iteration"][0]["seconds"]
    parts = sum(value for name, value in seconds.items() if name != "whole")
    assert parts == pytest.approx(seconds["whole"], rel=1e-4)
    assert 0 < seconds["aggregation"] < seconds["whole"]
    assert found["probe"][0]["steps"][1]["cosine_error"] < 1e-5


@pytest.mark.slow
def test_mixing(smoke):
    rows = smoke("mixing")["rows"]
    assert [row["arm"] for row in rows] == ["mixed", "word_then_colour", "colour_then_word"]
    assert all(row["worse kind"] == min(row["ocr"], row["colour"]) for row in rows)


@pytest.mark.slow
def test_growth(smoke, tmp_path):
    found = smoke("growth")
    assert [row["what"] for row in found["rows"]] == ["objectives", "group size"]
    assert all(point["cpu_seconds"] > 0 for row in found["rows"] for point in row["cost"])
    assert image_is_drawn(tmp_path / "growth.png")


def test_fit_finds_a_power_law(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from growth import fit

    slope, error = fit({size: [3.0 * size**1.5, 3.3 * size**1.5] for size in (1, 2, 4, 8)})
    assert slope == pytest.approx(1.5)
    assert 0 < error < 0.05
    assert fit({1: [1.0], 2: [4.0]}) == (pytest.approx(2.0), None)
