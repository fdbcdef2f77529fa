"""Start a few real processes for one test, and never leave one behind.

Processes are forked from a server that has done the imports, so that a test pays for its training alone. Ranks that
hang say where, are killed, and the test fails with what every rank had printed.
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
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
from patience import IDLE, Patience

PRELOAD = ["preload"]

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


def run(function: Callable, world: int, env: dict[str, str] | None = None, **kwargs: Any) -> list[Any]:
    """Run `function(rank, **kwargs)` on `world` processes and return their results in rank order."""
    outcomes = attempt(function, world, env, **kwargs)
    if any(outcome.failed for outcome in outcomes):
        report = "\n".join(
            f"--- rank {o.rank}: exit code {o.exit_code}\n{o.error or ''}\n{o.output[-3000:]}" for o in outcomes
        )
        raise RankFailed(report, outcomes)
    return [outcome.result for outcome in outcomes]


def attempt(
    function: Callable, world: int, env: dict[str, str] | None = None, idle: float = IDLE, **kwargs: Any
) -> list[Outcome]:
    """As `run`, but a failed rank is an outcome, not an error. `idle` is how long all ranks may wait, in seconds."""
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
            process = _forkserver().Process(target=_work, args=(there, str(logs[rank]), own, function, rank, kwargs))
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        open_pipes = dict(zip(pipes, outcomes, strict=True))
        patience, hung = Patience([process.pid for process in processes], idle), None
        try:
            while open_pipes and hung is None:
                for pipe in wait(list(open_pipes), timeout=1.0):
                    outcome = open_pipes.pop(pipe)
                    outcome.seconds = time.monotonic() - started
                    with contextlib.suppress(EOFError):  # killed before it could say anything
                        outcome.result, outcome.error = pipe.recv()
                hung = patience.verdict()
            for outcome in open_pipes.values():
                outcome.error = hung
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[outcome.rank].pid, signal.SIGUSR1)
            if open_pipes:
                time.sleep(2.0)  # in which they say where
        finally:
            for process, outcome in zip(processes, outcomes, strict=True):
                if outcome.seconds:
                    process.join(60.0)
                if process.is_alive():
                    process.kill()
                    process.join()
                outcome.exit_code = process.exitcode
                log = logs[outcome.rank]
                outcome.output = log.read_text(errors="replace") if log.exists() else ""
    return outcomes


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


def _work(pipe, log: str, env: dict[str, str], function: Callable, rank: int, kwargs: dict[str, Any]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    faulthandler.register(signal.SIGUSR1, file=os.fdopen(os.dup(2), "w"))  # says where a rank hangs
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
        before = dict(os.environ)
        os.environ["PYTHONPATH"] = os.pathsep.join([here, root, *filter(None, [before.get("PYTHONPATH")])])
        os.environ["OMP_NUM_THREADS"] = "1"  # what is forked should have no threads
        try:
            from multiprocessing.forkserver import ensure_running

            ensure_running()
            first = _context.Process(target=int)  # comes back once the imports are done: no test's time
            first.start()
            first.join()
        finally:
            for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]
    return _context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
