"""Run a function in a child that may be killed: forked from a server that has done the imports."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = 600.0  # seconds; a child takes 2 to 6, but the machine may be busy


@dataclass
class Child:
    """A process under way."""

    process: Any
    pipe: Connection
    log: Path

    def finish(self, limit: float = LIMIT) -> "Ended":
        """Wait for it, and kill it where it takes longer than `limit` seconds."""
        started, result, error = time.monotonic(), None, None
        try:
            if self.pipe.poll(limit):
                result, error = self.pipe.recv()
            else:
                error = f"hung: killed after {limit:g} s"
                self.process.kill()
        except EOFError:  # killed before it could say anything
            pass
        self.process.join(max(limit - (time.monotonic() - started), 1.0))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return Ended(result, error, self.process.exitcode, self.log.read_text(errors="replace"))


@dataclass
class Ended:
    """What became of a child: its result or its traceback, its exit code, and what it printed."""

    result: Any
    error: str | None
    exit_code: int
    output: str

    def checked(self) -> Any:
        """The result of a child that must not have failed."""
        assert self.error is None and self.exit_code == 0, f"{self.exit_code}\n{self.error}\n{self.output[-3000:]}"
        return self.result


def start(function: Callable, log: Path, *arguments: Any) -> Child:
    """Start `function(*arguments)` in a child whose output goes to the file `log`."""
    context = _server()
    log.touch()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, str(log), function, arguments))
    process.start()
    there.close()
    return Child(process, here, log)


def call(function: Callable, log: Path, *arguments: Any) -> Ended:
    """As `start`, waiting for the end."""
    return start(function, log, *arguments).finish()


def _work(pipe: Connection, log: str, function: Callable, arguments: tuple) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    try:
        result, error = function(*arguments), None
    except BaseException:
        result, error = None, traceback.format_exc()
    pipe.send((result, error))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), *([before] if before else [])])
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context
