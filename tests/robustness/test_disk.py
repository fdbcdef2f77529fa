"""A disk that fills up or may not be written: what is said, and that no earlier checkpoint suffers."""

import contextlib
import os
import subprocess

import pytest
from disks import FILLER, train_again, train_until_the_disk_fails
from processes import call
from tiny_runs import tiny_trainer


@contextlib.contextmanager
def small_disk(folder, size="2M"):
    """A file system of its own, in memory; skips where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs rights: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def check(failed: dict, run, tmp_path, reason: str) -> None:
    """The message, and that the first checkpoint leads to the same end as an undisturbed run."""
    assert failed["kind"] == "SaveError", failed
    assert "checkpoint-4 must be written completely to" in failed["error"] and reason in failed["error"], failed[
        "error"
    ]
    assert f"resume from {run}/checkpoint-2, the last valid checkpoint, which is unchanged" in failed["error"]
    assert failed["whole"] == ["checkpoint-2"] and failed["broken"] == []


@pytest.mark.slow
def test_a_full_disk(tmp_path, figure):
    undisturbed = call(train_again, tmp_path / "log0", str(tmp_path / "sound"), False).checked()
    with small_disk(tmp_path / "disk") as disk:
        run = disk / "run"
        failed = call(train_until_the_disk_fails, tmp_path / "log1", str(run), "full").checked()
        check(failed, run, tmp_path, "MB free")
        (disk / FILLER).unlink()
        assert call(train_again, tmp_path / "log2", str(run), True).checked() == undisturbed
    figure("disk_full", {"error": failed["kind"], "whole_before": 1, "whole_after": 1, "resumed_bit_identical": True})


def test_a_file_that_cannot_grow(tmp_path):
    run = tmp_path / "run"
    failed = call(train_until_the_disk_fails, tmp_path / "log", str(run), "limited").checked()
    check(failed, run, tmp_path, "MB free")


@pytest.mark.slow
def test_an_output_directory_that_becomes_read_only(tmp_path, figure):
    undisturbed = call(train_again, tmp_path / "log0", str(tmp_path / "sound"), False).checked()
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:  # whom permissions do not bind
            run = stack.enter_context(small_disk(tmp_path / "disk")) / "run"
            failed = call(train_until_the_disk_fails, tmp_path / "log1", str(run), "read_only").checked()
            subprocess.run(["mount", "-o", "remount,rw", str(run.parent)], check=True)
        else:
            run = tmp_path / "run"
            failed = call(train_until_the_disk_fails, tmp_path / "log1", str(run), "forbidden").checked()
            run.chmod(0o755)
        check(failed, run, tmp_path, "Read-only file system" if os.geteuid() == 0 else "Permission denied")
        assert call(train_again, tmp_path / "log2", str(run), True).checked() == undisturbed
    figure("read_only", {"error": failed["kind"], "whole_before": 1, "whole_after": 1, "resumed_bit_identical": True})


def test_an_output_directory_that_cannot_be_written_is_refused_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to.*Not a directory"):
        tiny_trainer(tmp_path / "file" / "run", pipeline=object())


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs /proc")
def test_a_read_only_file_system_is_refused_before_any_compute():
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to. Found /proc/run"):
        tiny_trainer("/proc/run", pipeline=object())
