"""A run that is killed at any moment and resumed ends as if nothing had happened."""

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from killing import PHASES, Marks, train_marked
from processes import Child, call, finish

from trl_apex.trainers.manifest import PARTIAL, checkpoints, defects

PATIENCE = 240.0  # seconds to reach a moment
AT_ONCE = 4
TIMED = ("rollout", "reward", "update", "evaluation", "saving")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return call(train_marked, folder / "log", str(folder / "run"), str(folder / "marks"), False).checked()


def moments(stays: list, count: int, seed: int) -> list[tuple[str, int, float]]:
    """Random moments: a stay in each phase in turn, and a time inside it."""
    source = random.Random(seed)
    chosen = []
    for number in range(count):
        phase = TIMED[(seed + number) % len(TIMED)]
        _, which, seconds = source.choice([stay for stay in stays if stay[0] == phase])
        chosen.append((phase, which, seconds * source.random()))
    return chosen


def kill_in(phase: str, which: int, seconds: float, folder: Path) -> str:
    """Start the run, kill it `seconds` after its `which`-th entry into `phase`, and say in which phase it fell."""
    marks = Marks(folder / "marks")
    child = Child(train_marked, folder / "log", str(folder / "run"), str(folder / "marks"), False)
    limit = time.monotonic() + PATIENCE
    while marks.read()[1][phase] < which and child.process.is_alive():
        assert time.monotonic() < limit, f"never reached {phase} {which}\n{(folder / 'log').read_text()[-2000:]}"
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(child.process.pid, signal.SIGKILL)
    finish([child])
    if child.exit_code == -signal.SIGKILL:
        return marks.read()[0]
    child.checked()
    return "end"


def kill_and_resume(moment: tuple[str, int, float], folder: Path, undisturbed: dict) -> dict:
    """One kill and one resume; what they were."""
    folder.mkdir()
    fell = kill_in(*moment, folder)
    run = folder / "run"
    whole = [c for c in checkpoints(run) if not defects(c)]
    left = sorted(p.name for p in (run / PARTIAL).glob("*")) if (run / PARTIAL).is_dir() else []
    ended = call(train_marked, folder / "resumed.log", str(run), str(folder / "again"), True)
    result = ended.checked()
    assert result["state"] == undisturbed["state"], f"{moment} fell in {fell}, resumed from {result['resumed_from']}"
    assert result["checkpoints"] == undisturbed["checkpoints"]
    if whole:
        assert result["resumed_from"] == str(whole[0]), moment
        assert not left or f"what it left is deleted: {', '.join(left)}" in ended.output, ended.output[-2000:]
    else:
        assert "Start anew" in result["anew"] and result["resumed_from"] is None
    assert not (run / PARTIAL).exists()
    return {"aimed": moment[0], "fell": fell, "whole": len(whole), "left": bool(left)}


def summary(outcomes: list[dict]) -> dict:
    fell = Counter(outcome["fell"] for outcome in outcomes)
    return {
        "kills": len(outcomes),
        "fell_in": {phase: fell[phase] for phase in PHASES if fell[phase]},
        "resumed_from_a_checkpoint": sum(outcome["whole"] > 0 for outcome in outcomes),
        "before_the_first_checkpoint": sum(outcome["whole"] == 0 for outcome in outcomes),
        "in_the_middle_of_a_save": sum(outcome["left"] for outcome in outcomes),
        "ended_bit_identical": len(outcomes),
    }


def test_a_kill_in_a_save(undisturbed, tmp_path):
    assert kill_and_resume(("saving", 2, 0.01), tmp_path / "killed", undisturbed)["whole"]


@pytest.mark.slow
def test_thirty_kills(undisturbed, tmp_path, figure):
    chosen = moments(undisturbed["stays"], 30, seed=9)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        folders = [tmp_path / str(number) for number in range(len(chosen))]
        outcomes = list(pool.map(lambda moment, folder: kill_and_resume(moment, folder, undisturbed), chosen, folders))
    figure("kill_and_resume", summary(outcomes))
    fell = Counter(outcome["fell"] for outcome in outcomes)
    assert all(fell[phase] >= 2 for phase in TIMED), fell
