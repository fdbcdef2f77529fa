"""Ctrl-C in the middle of a run: finish the iteration, save, and say how to go on."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..cli import INTERRUPTED, CommandError
from ..distributed import any_rank


class Interrupted(CommandError):
    """The run was interrupted and can be resumed.

    Args:
        output_dir (`Path`): where the checkpoint is.
        command (`str`): what was typed.
    """

    def __init__(self, output_dir: Path, command: str) -> None:
        command = re.sub(r" --resume[_-]from[_-]checkpoint[= ]\S+", "", command)
        super().__init__(
            f"interrupted; a checkpoint is saved in {output_dir}. To go on: {command} --resume_from_checkpoint true",
            INTERRUPTED,
        )


class InterruptCallback(TrainerCallback):
    """Asks the trainer to stop at the end of the iteration after SIGINT or SIGTERM, on all processes together.

    A second signal stops at once, and the iteration is lost.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals for the length of a `with` block."""
        before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(
            "\nStopping at the end of this iteration, with a checkpoint. Press Ctrl-C again to stop at once.",
            file=sys.stderr,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Between two updates: agree with the other processes, then tell the trainer."""
        if self.trainer.save_and_stop is None and any_rank(self.requested, self.trainer.accelerator.device):
            self.requested = True
            self.trainer.request_stop("interrupted.")
