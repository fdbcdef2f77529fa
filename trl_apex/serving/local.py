"""A reward server that the trainer starts itself on this machine, in a virtual environment of its own."""

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ENVIRONMENTS = ("deqa",)  # that come with the package, as NAME.txt beside this file


class LocalServer:
    """`trl-apex serve-rewards COMMAND` on a free port, which ends with this process; arguments as of [`RemoteReward`]."""

    def __init__(self, command: str | Sequence[str], python: str | None = None, device: str | None = None) -> None:
        given = shlex.split(command) if isinstance(command, str) else list(command)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.restarts_left = f"http://127.0.0.1:{port}", 1
        program = [python or sys.executable, "-m", "trl_apex", "serve-rewards", *given]
        self.arguments = [*program, "--port", str(port), "--parent", str(os.getpid())]
        self.environment = os.environ | device_variables(device)
        self._lock = threading.Lock()
        self._start()

    def restart(self) -> bool:
        """Start the server again if it has died, the first time; returns whether there is a server now."""
        with self._lock:
            if self._process.poll() is not None and self.restarts_left:
                self.restarts_left -= 1
                self._start()
            return self._process.poll() is None

    def _start(self) -> None:
        # Ctrl-C in the terminal must not reach it: the trainer finishes its iteration. 2: this process's stderr.
        self._process = subprocess.Popen(self.arguments, stdout=2, env=self.environment, start_new_session=True)
        self.stop = weakref.finalize(self, _stop, self._process, os.getpid())


def _stop(process: subprocess.Popen, owner: int) -> None:
    """End the server; a fork of the process that started it leaves it alone."""
    if os.getpid() == owner:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()


def device_variables(device: str | None) -> dict[str, str]:
    """The variables that leave a server one accelerator, `"cuda:1"`, or none, `"cpu"`; by default this process's."""
    if device is None and not torch.cuda.is_available():
        return {}
    chosen = torch.device(device or "cuda")
    if chosen.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[index] if index < len(visible) and visible[index] else str(index)}


def end_with(parent: int, server: Any) -> None:
    """End the server once the process `parent` is no longer this one's parent, 15 s later at the latest."""
    while os.getppid() == parent:
        time.sleep(0.5)
    server.should_exit = True
    time.sleep(15)
    os._exit(1)


def make_environment(name: str) -> Path:
    """The Python of a virtual environment for rewards, which is made if it is missing or its requirements changed.

    It is `envs/NAME` in the current folder; `name` is one that comes with the package (`"deqa"`), or a requirements file.
    """
    import fcntl

    requirements = Path(__file__).with_name(f"{name}.txt") if name in ENVIRONMENTS else Path(name)
    if not requirements.is_file():
        raise ValueError(f"`--env` must be one of {', '.join(ENVIRONMENTS)}, or a requirements file. Found {name!r}.")
    folder = (Path("envs") / requirements.stem).absolute()
    folder.parent.mkdir(exist_ok=True)
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may ask for one environment at the same time
        if not installed.is_file() or installed.read_text() != requirements.read_text():
            print(f"Making the environment {folder} from {requirements.name}", flush=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
            for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
                subprocess.run(command, check=True)
            installed.write_text(requirements.read_text())
        # This very package, so that both sides of the connection are of one release.
        package, link = Path(__file__).parents[1], next(folder.glob("lib/python*/site-packages")) / "trl_apex"
        if link.resolve() != package:
            link.unlink(missing_ok=True)
            link.symlink_to(package)
    return python
