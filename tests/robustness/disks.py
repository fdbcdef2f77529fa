"""A run whose disk fails in the middle, in a child that may change its own limits."""

import logging
import resource
import subprocess
from pathlib import Path
from typing import Any

from tiny_runs import fingerprints, tiny_trainer
from transformers import TrainerCallback

from trl_apex.trainers.manifest import checkpoints, defects

FILLER = "filler"


class AfterTheFirstSave(TrainerCallback):
    """Does something to the disk once the first checkpoint is whole."""

    def __init__(self, harm) -> None:
        self.harm = harm

    def on_save(self, args, state, control, **others):
        if state.global_step == 2:
            self.harm(Path(args.output_dir))


def fill(run: Path) -> None:
    """Leave some kilobytes free."""
    with (run.parent / FILLER).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(file.tell() - 60_000, 0))


def limit_files(run: Path) -> None:
    """No file of this process may become longer than this, which those of a checkpoint are."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def remount_read_only(run: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(run.parent)], check=True)


def forbid_writing(run: Path) -> None:
    run.chmod(0o555)


HARMS = {"full": fill, "limited": limit_files, "read_only": remount_read_only, "forbidden": forbid_writing}


def train_until_the_disk_fails(run: str, harm: str) -> dict[str, Any]:
    """What the run says, and what is left."""
    logging.disable(logging.CRITICAL)
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(run, **options)
    trainer.add_callback(AfterTheFirstSave(HARMS[harm]))
    error = None
    try:
        trainer.train()
    except Exception as caught:
        error = caught
    found = checkpoints(run)
    return {
        "kind": type(error).__name__,
        "error": str(error),
        "whole": [c.name for c in found if not defects(c)],
        "broken": [c.name for c in found if defects(c)],
    }


def train_again(run: str, resume: bool) -> dict[str, str]:
    """To the end, on a disk that is sound."""
    trainer = tiny_trainer(run, max_steps=6, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=resume)
    return {key: value for key, value in fingerprints(trainer).items() if key != "logged"}
