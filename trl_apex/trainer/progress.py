"""Two live lines on the terminal: how far, and the rewards with their priorities."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback


class ProgressCallback(TrainerCallback):
    """Shows a progress bar and the latest reward and priority of every objective.

    Args:
        names (`list[str]`): objectives, in order.
        console (`rich.console.Console`, *optional*): where to; the terminal by default.
    """

    def __init__(self, names: list[str], console: Console | None = None):
        self.names, self.console = names, console or Console()
        self._live: Live | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("updates, elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._text = Text("reward (priority): waiting for the first iteration", overflow="ellipsis", no_wrap=True)
        self._live = Live(Group(self._bar, self._text), console=self.console, refresh_per_second=4)
        self._live.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._live is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._live is None or not logs:
            return
        parts = []
        for name in self.names:
            reward, priority = logs.get(f"rewards/{name}/mean"), logs.get(f"priority/{name}")
            if reward is not None:
                parts.append(f"{name} {reward:.3g}" + (f" ({priority:.0%})" if priority is not None else ""))
        if parts:
            self._text.plain = "  ".join(parts)

    def on_train_end(self, args, state, control, **kwargs):
        if self._live is not None:
            self._live.stop()
            self._live = None
