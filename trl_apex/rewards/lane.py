"""A thread that runs one reward function, one call at a time, and that a stuck call cannot block for ever."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import torch


class Lane:
    """One blocking function's thread, used from one event loop.

    Calls run in the order they came. A call that overruns its time is given up, but a thread cannot be stopped: until
    it returns, later calls wait as long as their own timeout and then fail as well, since running a network in two
    threads at once would give wrong numbers. The thread is a daemon, so it never keeps the process alive. Its current
    device is that of the thread that made the lane: otherwise "cuda" would be the first GPU for every process.

    Args:
        name (`str`): Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._order = asyncio.Lock()
        self._overrun: asyncio.Future | None = None
        self._thread: threading.Thread | None = None
        self._target = on_this_device(self._work)

    @asynccontextmanager
    async def turn(self, timeout: float | int | None) -> AsyncIterator[None]:
        """Wait until the calls before this one are done.

        Args:
            timeout (`float`, *optional*): Seconds to wait for an earlier call that has overrun its time.

        Raises:
            TimeoutError: If that one is still running.
        """
        async with self._order:
            if self._overrun is not None:
                try:
                    await asyncio.wait_for(asyncio.shield(self._overrun), timeout)
                except TimeoutError:
                    raise TimeoutError(f"an earlier call is still running after another {timeout:g} s") from None
                except Exception:  # how the given-up call ended matters to nobody
                    pass
                self._overrun = None
            yield

    async def run(self, func: Callable, keywords: dict[str, Any], timeout: float | int | None) -> Any:
        """Call the function in the lane's thread.

        Args:
            func (`Callable`): The function.
            keywords (`dict[str, Any]`): Its keywords.
            timeout (`float`, *optional*): Seconds it may take.

        Raises:
            TimeoutError: If it takes longer.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._target, name=f"reward-{self.name}", daemon=True)
            self._thread.start()
        done: Future = Future()
        self._calls.put((done, func, keywords))
        waiting = asyncio.wrap_future(done)
        try:
            return await asyncio.wait_for(asyncio.shield(waiting), timeout)
        except TimeoutError:
            if waiting.done() and not waiting.cancelled():  # the function itself raised a TimeoutError
                return waiting.result()
            waiting.add_done_callback(lambda future: future.cancelled() or future.exception())
            self._overrun = waiting
            raise

    def close(self) -> None:
        """Let the thread end after its present call."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            done, func, keywords = call
            try:
                result = func(**keywords)
            except BaseException as error:  # handed to the waiting side, whatever it is
                _settle(done, error=error)
            else:
                _settle(done, result=result)
            del call, func, keywords


def on_this_device(target: Callable[[], Any]) -> Callable[[], Any]:
    """`target` for another thread, to run there with this thread's current device; a new thread's own is the first.

    Example:

    ```python
    >>> from trl_apex.rewards.lane import on_this_device
    >>> thread = threading.Thread(target=on_this_device(lambda: None))

    ```
    """
    if not torch.accelerator.is_available():
        return target
    index = torch.accelerator.current_device_index()

    def run() -> Any:
        torch.accelerator.set_device_index(index)
        return target()

    return run


def _settle(done: Future, result: Any = None, error: BaseException | None = None) -> None:
    """Set a future that the waiting side may have cancelled."""
    if not done.set_running_or_notify_cancel():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)
