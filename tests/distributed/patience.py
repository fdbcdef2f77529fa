"""Tell processes that are slow from processes that hang, on a machine that may be busy with other things.

Wall time cannot tell: the same test takes ten times as long where ten programs share a processor. Processor time can.
Ranks that wait for each other use none, and a rank that spins uses more than any test needs.
"""

import contextlib
import time
from collections.abc import Sequence

import psutil

IDLE = 120.0
"""Seconds in which all processes of a run together compute next to nothing, after which they hang."""
BUSY = 300.0
"""Seconds of processor time that one process of a test may use; it takes 1 to 20."""


def processor_seconds(pid: int) -> float:
    """What a process and its children have computed so far; 0 for one that is gone."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
    return total


class Patience:
    """Watches the processes of one run.

    Args:
        pids (`Sequence[int]`): of the processes.
        idle, busy (`float`): seconds, see `IDLE` and `BUSY`.
    """

    def __init__(self, pids: Sequence[int], idle: float = IDLE, busy: float = BUSY):
        self.pids, self.idle, self.busy = pids, idle, busy
        self._seen, self._since = 0.0, time.monotonic()

    def verdict(self) -> str | None:
        """Why the run hangs; None where it is still at work. To be asked every second or so."""
        used = [processor_seconds(pid) for pid in self.pids]
        if max(used, default=0.0) > self.busy:
            return f"hung: a process has computed for more than {self.busy:g} s"
        if abs(sum(used) - self._seen) > 0.01 * self.idle:  # threads that look after connections wake up now and then
            self._seen, self._since = sum(used), time.monotonic()
        elif time.monotonic() - self._since > self.idle:
            return f"hung: no process has computed anything for {self.idle:g} s"
        return None
