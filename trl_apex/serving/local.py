"""A reward server that the trainer starts itself on this machine, in a virtual environment of its own."""

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

ENVIRONMENTS = ("deqa",)  # that come with the package, as NAME.txt beside this file


class LocalServer:
    """`trl-apex serve-rewards COMMAND`, run by another Python on a free port of this machine.

    It is stopped when the object goes, when this process ends, and, by the server itself, when this process is killed.

    Args:
        command (`str` or `Sequence[str]`): Arguments of `trl-apex serve-rewards`.
        python (`str`, *optional*): The Python of the environment. Defaults to this process's.
        device (`str`, *optional*): See [`device_variables`].
        variables (`Mapping[str, str]`, *optional*): Further environment variables, such as the token.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        python: str | None = None,
        device: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        given = shlex.split(command) if isinstance(command, str) else list(command)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        program = [python or sys.executable, "-m", "trl_apex", "serve-rewards", *given]
        self.arguments = [*program, "--port", str(port), "--parent", str(os.getpid())]
        self.variables = device_variables(device) | dict(variables or {})
        self.restarts_left = 1
        self._lock = threading.Lock()
        self._start()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def restart(self) -> bool:
        """Start the server again if it has died, the first time; returns whether there is a server now."""
        with self._lock:
            if not self.running and self.restarts_left:
                self.restarts_left -= 1
                self._start()
            return self.running

    def _start(self) -> None:
        environment = os.environ | self.variables
        # What it prints goes to this process's stderr.
        self._process = subprocess.Popen(self.arguments, stdin=subprocess.DEVNULL, stdout=2, env=environment)
        self.stop = weakref.finalize(self, _stop, self._process, os.getpid())


def _stop(process: subprocess.Popen, owner: int) -> None:
    """End the server; a fork of the process that started it leaves it alone."""
    if os.getpid() == owner and process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def device_variables(device: str | None) -> dict[str, str]:
    """The environment variables that leave a server one accelerator of this machine, `"cuda:1"`, or none, `"cpu"`.

    None is the accelerator of this process, which shares it with the server.

    Example:
        >>> device_variables("cpu")
        {'CUDA_VISIBLE_DEVICES': ''}
    """
    if device is None and not torch.cuda.is_available():
        return {}
    chosen = torch.device(device or "cuda")
    if chosen.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[index] if index < len(visible) and visible[index] else str(index)}


def end_with(parent: int, end: Callable[[], None]) -> None:
    """Call `end()` once the process `parent` is no longer this one's parent, and leave 15 s later at the latest."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()
        time.sleep(15)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def make_environment(name: str, folder: str | Path | None = None) -> Path:
    """The Python of a virtual environment for rewards, which is made if it is missing or its requirements changed.

    Args:
        name (`str`): An environment that comes with the package (`"deqa"`), or a requirements file of your own.
        folder (`str`, *optional*): Where it goes. Defaults to `envs/NAME` in the current folder.

    Raises:
        ValueError: If there is no such file.
        RuntimeError: If the packages cannot be installed.
    """
    import fcntl

    requirements = Path(__file__).with_name(f"{name}.txt") if name in ENVIRONMENTS else Path(name)
    if not requirements.is_file():
        raise ValueError(
            f"An environment must be one of {', '.join(ENVIRONMENTS)}, or a requirements file. Found {name!r}. "
            "Check the path."
        )
    folder = Path(folder or Path("envs") / requirements.stem).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may ask for one environment at the same time
        if not installed.is_file() or installed.read_text() != requirements.read_text():
            print(f"Making the environment {folder} from {requirements.name}", flush=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
            for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
                if subprocess.run(command).returncode != 0:
                    raise RuntimeError(f"The environment must install. Found a failure of {shlex.join(command)}.")
            installed.write_text(requirements.read_text())
        # This very package, so that both sides of the connection are of one release.
        site = next(folder.glob("lib/python*/site-packages")) / "trl_apex"
        if site.is_symlink() and site.resolve() != Path(__file__).parents[1]:
            site.unlink()
        if not site.is_symlink():
            site.symlink_to(Path(__file__).parents[1])
    return python
