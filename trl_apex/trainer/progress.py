"""A live line on the terminal: how far, the rewards and their priorities."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressCallback(TrainerCallback):
    """Shows a progress bar with the latest reward and priority of every objective.

    Args:
        names (`list[str]`): objectives, in order.
        console (`rich.console.Console`, *optional*): where to; the terminal by default.
    """

    def __init__(self, names: list[str], console: Console | None = None):
        self.names, self.console = names, console or Console()
        self._progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._progress is None or not logs:
            return
        parts = []
        for name in self.names:
            reward, priority = logs.get(f"rewards/{name}/mean"), logs.get(f"priority/{name}")
            if reward is not None:
                parts.append(f"{name} {reward:.3g}" + (f" ({priority:.0%})" if priority is not None else ""))
        if parts:
            self._progress.update(self._task, description=" ".join(parts))

    def on_train_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
