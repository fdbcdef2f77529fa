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


def fails_in_the_second_save(run, harm: str, reason: str, tmp_path) -> None:
    failed = call(train_until_the_disk_fails, tmp_path / "log", str(run), harm).checked()
    assert failed["kind"] == "SaveError", failed
    assert "checkpoint-4 must be written completely to" in failed["error"] and reason in failed["error"], failed[
        "error"
    ]
    assert f"resume from {run}/checkpoint-2, the last valid checkpoint, which is unchanged" in failed["error"]
    assert failed["whole"] == ["checkpoint-2"] and failed["broken"] == []


def test_a_file_that_cannot_grow(tmp_path):
    fails_in_the_second_save(tmp_path / "run", "limited", "MB free", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "reason", "name"), [("full", "MB free", "disk_full"), ("read_only", "Read-only file system", "read_only")]
)
def test_a_disk_that_fails_leaves_a_checkpoint_that_leads_to_the_same_end(harm, reason, name, tmp_path, figure):
    undisturbed = call(train_again, tmp_path / "log0", str(tmp_path / "sound"), False).checked()
    with small_disk(tmp_path / "disk") as disk:
        fails_in_the_second_save(disk / "run", harm, reason, tmp_path)
        if harm == "full":
            (disk / FILLER).unlink()
        else:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert call(train_again, tmp_path / "log2", str(disk / "run"), True).checked() == undisturbed
    figure(name, {"error": "SaveError", "whole_before": 1, "whole_after": 1, "resumed_bit_identical": True})


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_an_output_directory_that_may_no_longer_be_written(tmp_path):
    fails_in_the_second_save(tmp_path / "run", "forbidden", "Permission denied", tmp_path)
    (tmp_path / "run").chmod(0o755)


def test_an_output_directory_that_cannot_be_written_is_refused_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to.*Not a directory"):
        tiny_trainer(tmp_path / "file" / "run", pipeline=object())


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs /proc")
def test_a_read_only_file_system_is_refused_before_any_compute():
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to. Found /proc/run"):
        tiny_trainer("/proc/run", pipeline=object())
