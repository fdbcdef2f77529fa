"""Start a few real processes for one test, and never leave one behind.

Processes are forked from a server that has done the imports, so that a test pays for its training alone. Processes that
hang say where, are killed, and the test fails with what each had printed.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import IDLE, Patience

HERE = Path(__file__).parent


class RankFailed(Exception):
    """A rank raised, died or hung."""


class Child:
    """`function(*arguments, **options)` in a process of its own, with the variables `env`; what it prints goes to `log`.

    [`finish`] fills in `result`, `error` (a traceback, or why it hangs), `exit_code` and `output`.
    """

    def __init__(
        self, function: Callable, log: Path, *arguments: Any, env: dict[str, str] | None = None, **options: Any
    ):
        self.log, self.output = log, ""
        self.result: Any = None
        self.error: str | None = None
        self.exit_code: int | None = None
        log.touch()
        self.pipe, there = _forkserver().Pipe(duplex=False)
        work = (there, str(log), env or {}, function, arguments, options)
        self.process = _forkserver().Process(target=_work, args=work)
        self.process.start()
        there.close()

    @property
    def failed(self) -> bool:
        return self.error is not None or self.exit_code != 0

    def report(self) -> str:
        return f"exit code {self.exit_code}\n{self.error or ''}\n{self.output[-3000:]}"

    def checked(self) -> Any:
        """The result of a process that must not have failed."""
        assert not self.failed, self.report()
        return self.result


def finish(children: Sequence[Child], idle: float = IDLE) -> None:
    """Wait until all have ended. Where none has computed anything for `idle` seconds, they say where, and are killed."""
    running = {child.pipe: child for child in children}
    patience, hung = Patience([child.process.pid for child in children], idle), None
    try:
        while running and hung is None:
            for pipe in wait(list(running), timeout=1.0):
                child = running.pop(pipe)
                with contextlib.suppress(EOFError):  # killed before it could say anything
                    child.result, child.error = pipe.recv()
            hung = patience.verdict()
        for child in running.values():
            child.error = hung
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGUSR1)
        if running:
            time.sleep(2.0)  # in which they say where
    finally:
        for child in children:
            if child.pipe not in running:
                child.process.join(60.0)
            child.process.kill()
            child.process.join()
            child.exit_code = child.process.exitcode
            child.output = child.log.read_text(errors="replace")


def call(function: Callable, log: Path, *arguments: Any) -> Child:
    """One process, at its end."""
    child = Child(function, log, *arguments)
    finish([child])
    return child


def run(function: Callable, world: int, env: dict[str, str] | None = None, **options: Any) -> list[Any]:
    """Run `function(rank, **options)` on `world` processes and return their results in rank order."""
    ranks = attempt(function, world, env, **options)
    if any(rank.failed for rank in ranks):
        raise RankFailed("\n".join(f"--- rank {number}: {rank.report()}" for number, rank in enumerate(ranks)))
    return [rank.result for rank in ranks]


def attempt(
    function: Callable, world: int, env: dict[str, str] | None = None, idle: float = IDLE, **options: Any
) -> list[Child]:
    """As `run`, but a failed rank is an outcome, not an error. `idle` is how long all ranks may wait, in seconds."""
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        rendezvous |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        ranks = []
        for rank in range(world):
            own = {**rendezvous, "LOCAL_RANK": str(rank), **(env or {}), "RANK": str(rank)}
            ranks.append(Child(function, Path(folder, f"rank{rank}.log"), rank, env=own, **options))
        finish(ranks, idle)
    return ranks


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of the loopback interface that a server may listen on, and that nobody else is given within the block."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: two may bind, one listens
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def launch(command: list[str], env: dict[str, str], cwd: str | None = None) -> subprocess.CompletedProcess:
    """`subprocess.run` of a command that starts processes of its own, all of which end with it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=err)
        patience, hung = Patience([process.pid]), None
        try:
            while process.poll() is None and hung is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                hung = patience.verdict()
        finally:
            with contextlib.suppress(psutil.Error):
                for one in (*psutil.Process(process.pid).children(recursive=True), process):
                    with contextlib.suppress(psutil.Error):
                        one.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read() + (hung or ""))


def _work(pipe, log: str, env: dict[str, str], function: Callable, arguments: tuple, options: dict[str, Any]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    faulthandler.register(signal.SIGUSR1, file=os.fdopen(os.dup(2), "w"))  # says where a process hangs
    import torch

    torch.set_num_threads(1)
    try:
        result, error = function(*arguments, **options), None
    except BaseException:
        result, error = None, traceback.format_exc()
    pipe.send((result, error))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)  # an engine's exit hooks may wait for ranks that are gone


@cache
def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    paths = [HERE, HERE.parent / "robustness", HERE.parents[1], *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")  # what is forked should have no threads
        first = context.Process(target=int)  # comes back once the imports are done: no test's time
        first.start()
        first.join()
    return context
