"""Start a few real processes for one test, and never leave one behind.

Processes are forked from a server that has done the imports, so that a test pays for its training alone. A rank that
hangs is killed at the time limit, and the test fails with what every rank had printed.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = ["preload"]
TIME_LIMIT = 300.0  # seconds; a test takes 5 to 30, but the machine may be busy

_context: Any = None


class RankFailed(Exception):
    """A rank raised, died or hung. `outcomes` holds one entry a rank: a result, or the text of its failure."""

    def __init__(self, message: str, outcomes: list["Outcome"]):
        super().__init__(message)
        self.outcomes = outcomes


class Outcome:
    """What became of one rank."""

    def __init__(self, rank: int):
        self.rank = rank
        self.result: Any = None
        self.error: str | None = None
        self.exit_code: int | None = None
        self.seconds = 0.0
        self.output = ""

    @property
    def failed(self) -> bool:
        return self.error is not None or self.exit_code != 0


def run(
    function: Callable, world: int, env: dict[str, str] | None = None, limit: float = TIME_LIMIT, **kwargs: Any
) -> list[Any]:
    """Run `function(rank, **kwargs)` on `world` processes and return their results in rank order."""
    outcomes = attempt(function, world, env, limit, **kwargs)
    if any(outcome.failed for outcome in outcomes):
        report = "\n".join(
            f"--- rank {o.rank}: exit code {o.exit_code}\n{o.error or ''}\n{o.output[-3000:]}" for o in outcomes
        )
        raise RankFailed(report, outcomes)
    return [outcome.result for outcome in outcomes]


def attempt(
    function: Callable, world: int, env: dict[str, str] | None = None, limit: float = TIME_LIMIT, **kwargs: Any
) -> list[Outcome]:
    """As `run`, but a failed rank is an outcome, not an error."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    rendezvous |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    outcomes = [Outcome(rank) for rank in range(world)]
    _forkserver()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory, f"rank{rank}.log") for rank in range(world)]
        processes, pipes = [], []
        for rank in range(world):
            here, there = _forkserver().Pipe(duplex=False)
            own = {**rendezvous, "LOCAL_RANK": str(rank), **(env or {}), "RANK": str(rank)}
            process = _forkserver().Process(
                target=_work, args=(there, str(logs[rank]), own, limit, function, rank, kwargs)
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        open_pipes = dict(zip(pipes, outcomes, strict=True))
        try:
            while open_pipes and (left := limit - (time.monotonic() - started)) > 0:
                for pipe in wait(list(open_pipes), timeout=left):
                    outcome = open_pipes.pop(pipe)
                    outcome.seconds = time.monotonic() - started
                    with contextlib.suppress(EOFError):  # killed before it could say anything
                        outcome.result, outcome.error = pipe.recv()
            for outcome in open_pipes.values():
                outcome.error = f"hung: killed after {limit:g} s"
        finally:
            for process, outcome in zip(processes, outcomes, strict=True):
                process.join(0.0 if outcome.error and outcome.error.startswith("hung") else 10.0)
                if process.is_alive():
                    process.kill()
                    process.join()
                outcome.exit_code = process.exitcode
                log = logs[outcome.rank]
                outcome.output = log.read_text(errors="replace") if log.exists() else ""
    return outcomes


def _work(
    pipe, log: str, env: dict[str, str], limit: float, function: Callable, rank: int, kwargs: dict[str, Any]
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    faulthandler.dump_traceback_later(0.8 * limit, file=os.fdopen(os.dup(2), "w"))  # where a rank hangs
    import torch

    torch.set_num_threads(1)
    try:
        result, error = function(rank, **kwargs), None
    except BaseException:
        result, error = None, traceback.format_exc()
    pipe.send((result, error))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)  # an engine's exit hooks may wait for ranks that are gone


def _forkserver():
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
        here = str(Path(__file__).parent)
        root = str(Path(__file__).parents[2])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([here, root, *([before] if before else [])])
        try:
            from multiprocessing.forkserver import ensure_running

            ensure_running()
            first = _context.Process(target=int)  # comes back once the imports are done: no test's time
            first.start()
            first.join()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
    return _context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
