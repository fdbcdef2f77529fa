import json
import shutil

import pytest

from trl_apex.trainers.checkpoint import check_engine
from trl_apex.trainers.manifest import (
    MANIFEST,
    PARTIAL,
    checkpoints,
    clear_partial,
    defects,
    finalize,
    last_valid,
    rotate,
    to_resume_from,
)


def save(run, step, content=b"weights" * 100, **facts):
    partial = run / PARTIAL / f"checkpoint-{step}"
    (partial / "state").mkdir(parents=True)
    (partial / "weights").write_bytes(content)
    (partial / "state" / "rank0").write_bytes(b"state")
    finalize(partial, run / f"checkpoint-{step}", **facts)
    return run / f"checkpoint-{step}"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda c: (c / "weights").write_bytes(b"weights" * 50), "weights has 350 of 700 bytes"),
        (lambda c: (c / "weights").write_bytes(b"WEIGHTS" * 100), "weights has another hash"),
        (lambda c: (c / "state" / "rank0").unlink(), "state/rank0 is missing"),
        (lambda c: (c / MANIFEST).unlink(), "manifest.json is missing or unreadable"),
        (lambda c: (c / MANIFEST).write_text('{"files": {"wei'), "manifest.json is missing or unreadable"),
        (lambda c: (c / MANIFEST).write_text('{"files": []}'), "manifest.json is missing or unreadable"),
    ],
    ids=["cut", "changed", "missing", "no-manifest", "cut-manifest", "odd-manifest"],
)
def test_a_harmed_checkpoint_is_passed_over(tmp_path, caplog, harm, told):
    first, second = save(tmp_path, 9), save(tmp_path, 10)
    assert last_valid(tmp_path) == second
    harm(second)
    assert defects(second) == [told]
    assert to_resume_from(True, tmp_path) == first
    assert f"{second} is not valid and is passed over: {told}" in caplog.text
    with pytest.raises(ValueError, match="must be valid") as error:
        to_resume_from(second, tmp_path)
    assert told in str(error.value) and f"Resume from {first}" in str(error.value)


def test_files_added_later_are_no_defect(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint / "README.md").write_text("card")
    assert defects(checkpoint) == []


def test_the_latest_step_counts_not_the_alphabet(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="Found none. Start anew"):
        to_resume_from(True, tmp_path / "absent")
    with pytest.raises(ValueError, match="There is no valid one; start anew"):
        to_resume_from(tmp_path / "checkpoint-1", tmp_path)


def test_a_broken_checkpoint_is_replaced_by_a_new_one(tmp_path):
    (save(tmp_path, 3) / "weights").write_bytes(b"")
    checkpoint = save(tmp_path, 3, b"new")
    assert defects(checkpoint) == [] and (checkpoint / "weights").read_bytes() == b"new"
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    rotate(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 5
    rotate(tmp_path, 3, keep=tmp_path / "checkpoint-1")
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-4", "checkpoint-1"]
    rotate(tmp_path, 1)
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-5"]


def test_rotation_spares_the_last_that_can_be_resumed_from(tmp_path):
    checkpoint = save(tmp_path, 1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / name).write_text("state")
    finalize(checkpoint.rename(tmp_path / "staged"), checkpoint, engine="ddp")
    for step in (2, 3):
        save(tmp_path, step, engine="ddp")  # weights alone
    rotate(tmp_path, 1)
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert last_valid(tmp_path) == checkpoint


def test_engines_and_numbers_of_processes(tmp_path):
    checkpoint = save(tmp_path, 1, engine="zero3", world_size=8)
    check_engine(checkpoint, "zero3", 8)
    with pytest.raises(ValueError, match="zero3 on 8. Found zero3 on 4"):
        check_engine(checkpoint, "zero3", 4)
    with pytest.raises(ValueError, match="zero3 on 8. Found ddp on 8"):
        check_engine(checkpoint, "ddp", 8)
    check_engine(save(tmp_path, 2, engine="ddp", world_size=8), "ddp", 1)


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared(tmp_path):
    whole = save(tmp_path, 1)
    shutil.copytree(whole, tmp_path / PARTIAL / "checkpoint-2")
    assert last_valid(tmp_path) == whole
    clear_partial(tmp_path)
    assert not (tmp_path / PARTIAL).exists()


def test_the_manifest_lists_every_file(tmp_path):
    listed = json.loads((save(tmp_path, 1, world_size=2) / MANIFEST).read_text())
    assert set(listed["files"]) == {"weights", "state/rank0"} and listed["world_size"] == 2
