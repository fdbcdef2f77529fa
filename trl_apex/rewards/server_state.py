"""What the reward server knows of itself: which rewards are ready, and what it has done."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from trl_apex.rewards.batching import RequestBatcher
from trl_apex.rewards.calling import describe
from trl_apex.rewards.limits import Limits, MemoryBudget
from trl_apex.rewards.request_schema import Health, RewardState
from trl_apex.rewards.wire import PROTOCOL


class ServerState:
    """State of one server.

    Args:
        functions (`dict[str, Callable]`): Reward functions by name.
        limits ([`Limits`]): The bounds.
        budget ([`MemoryBudget`]): Memory that requests hold.
    """

    def __init__(self, functions: dict[str, Callable], limits: Limits, budget: MemoryBudget) -> None:
        self.functions, self.limits, self.budget = functions, limits, budget
        self.batchers: dict[str, RequestBatcher] = {}
        self.states = dict.fromkeys(functions, "loading")
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """Version of the package."""
        try:
            return version("trl_apex")
        except PackageNotFoundError:
            return "unknown"

    async def load(self) -> None:
        """Load all rewards; a failed one is told of in `health` and refuses requests."""

        async def load_one(name: str) -> None:
            try:
                await self.batchers[name].load()
                self.states[name] = "ready"
            except Exception as error:
                self.states[name] = f"failed: {describe(error)}"

        await asyncio.gather(*map(load_one, self.functions))

    def count(self, metric: str, reward: str, label: str = "", by: float | int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counts[metric, reward, label] += by  # type: ignore[assignment]

    def health(self) -> Health:
        """The server's health."""
        rewards = [
            RewardState(
                name=name,
                model=_model(func),
                state=self.states[name],
                range=getattr(func, "range", ""),
                weights_licence=getattr(func, "weights_licence", ""),
            )
            for name, func in self.functions.items()
        ]
        states = list(self.states.values())
        failed = any(state.startswith("failed") for state in states)
        status: Literal["ready", "loading", "failed"] = (
            "failed" if failed else "loading" if "loading" in states else "ready"
        )
        return Health(status=status, version=self.version, protocol=PROTOCOL, rewards=rewards)

    def metrics(self) -> str:
        """Counters and gauges in Prometheus' text form."""
        helps = {
            "requests_total": "Requests by reward and HTTP status.",
            "images_total": "Images scored.",
            "missing_total": "Images whose reward is missing because something broke.",
            "seconds_total": "Time spent scoring requests, waiting included.",
        }
        lines = []
        for metric, text in helps.items():
            lines += [f"# HELP trl_apex_reward_{metric} {text}", f"# TYPE trl_apex_reward_{metric} counter"]
            for (counted, reward, label), value in sorted(self.counts.items()):
                if counted == metric:
                    status = f',status="{label}"' if label else ""
                    lines.append(f'trl_apex_reward_{metric}{{reward="{_escape(reward)}"{status}}} {value:g}')
        lines += [
            "# HELP trl_apex_reward_waiting Images that wait or are scored.",
            "# TYPE trl_apex_reward_waiting gauge",
        ]
        lines += [f'trl_apex_reward_waiting{{reward="{_escape(n)}"}} {b.waiting}' for n, b in self.batchers.items()]
        lines += ["# HELP trl_apex_reward_ready Whether a reward can score.", "# TYPE trl_apex_reward_ready gauge"]
        lines += [f'trl_apex_reward_ready{{reward="{_escape(n)}"}} {s == "ready":d}' for n, s in self.states.items()]
        lines += ["# HELP trl_apex_reward_held_bytes Memory of requests.", "# TYPE trl_apex_reward_held_bytes gauge"]
        return "\n".join([*lines, f"trl_apex_reward_held_bytes {self.budget.used}", ""])


def _model(func: Callable) -> str:
    """Class of a reward with the model it uses, without local paths."""
    name = getattr(func, "__qualname__", type(func).__name__)
    sources = [str(getattr(func, key)) for key in ("model", "clip", "weights") if getattr(func, key, None)]
    return " ".join([name, *(source for source in sources if source.count("/") <= 1)])


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
