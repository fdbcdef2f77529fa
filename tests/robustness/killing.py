"""A run whose phase can be read from outside at any moment, so that it can be killed there, and its resume."""

import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_runs import contrast, fingerprints, redness, tiny_trainer

from trl_apex import APEXTrainer
from trl_apex.trainers.manifest import checkpoints

PHASES = ("start", "rollout", "reward", "update", "evaluation", "saving", "end")
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 3,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "ema_decay": 0.9,
    "lr_scheduler_type": "cosine",
}
REWARD_SECONDS = 0.03  # as a small network or a near server would take, so that a kill can fall there


class Marks:
    """The present phase and how often each was entered, in a file that outlives the process."""

    FORMAT = struct.Struct("<" + "I" * (1 + len(PHASES)))

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(self.FORMAT.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.FORMAT.size)
        self.entered: list[tuple[str, float]] = []

    def read(self) -> tuple[str, dict[str, int]]:
        """The phase and the counts."""
        now, *counts = self.FORMAT.unpack(self._memory[:])
        return PHASES[now], dict(zip(PHASES, counts, strict=True))

    def enter(self, phase: str) -> None:
        _, counts = self.read()
        counts[phase] += 1
        self.entered.append((phase, time.perf_counter()))
        self._memory[:] = self.FORMAT.pack(PHASES.index(phase), *counts.values())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter `phase`, and then the one before it again."""
        before, _ = self.read()
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def stays(self) -> list[tuple[str, int, float]]:
        """Every stay: its phase, the how manieth of that phase it was, and its seconds."""
        found, counts = [], dict.fromkeys(PHASES, 0)
        for (phase, begin), (_, end) in zip(self.entered, self.entered[1:], strict=False):
            counts[phase] += 1
            found.append((phase, counts[phase], end - begin))
        return found


class MarkedTrainer(APEXTrainer):
    """The trainer, telling in which phase it is. What is none of the others counts as the update."""

    marks: Marks

    def _generate_and_score_completions(self, inputs):
        self.marks.enter("rollout")
        result = super()._generate_and_score_completions(inputs)
        self.marks.enter("update")
        return result

    def evaluate(self, *arguments, **options):
        with self.marks.during("evaluation"):
            return super().evaluate(*arguments, **options)

    def _save_checkpoint(self, *arguments, **options):
        with self.marks.during("saving"):
            return super()._save_checkpoint(*arguments, **options)


def train_marked(folder: str, marks: str, resume: bool) -> dict[str, Any]:
    """Train to the end, from the last valid checkpoint or anew, and return the state and where it began."""

    def slow_redness(images, **others):
        with MarkedTrainer.marks.during("reward"):
            time.sleep(REWARD_SECONDS)
            return redness(images)

    slow_redness.__name__ = "redness"
    MarkedTrainer.marks = Marks(Path(marks))
    trainer = tiny_trainer(folder, (slow_redness, contrast), MarkedTrainer, evaluate=True, **SETTINGS)
    anew = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if not resume or "Start anew" not in str(error):
            raise
        anew = str(error)
        trainer.train()
    MarkedTrainer.marks.enter("end")
    return {
        "state": fingerprints(trainer),
        "resumed_from": trainer.resumed_from,
        "anew": anew,
        "stays": MarkedTrainer.marks.stays(),
        "checkpoints": [c.name for c in checkpoints(folder)],
    }
