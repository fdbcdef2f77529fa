"""What is said when the disk will not take a checkpoint."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .checkpoint import clear_partial, last_whole


class SaveError(RuntimeError):
    """A checkpoint could not be written. Those before it are as they were."""

    exit_code = 1


def check_writable(folder: str | Path) -> None:
    """Make the folder where it is missing, and see whether a file can be written there.

    Raises:
        ValueError: says what the system said.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be written to. Found {folder}: {error.strerror or error}. Pass another "
            "folder, or mend its permissions or the space on its disk."
        ) from error


@contextmanager
def saving(name: str, run: str | Path) -> Iterator[None]:
    """While a checkpoint is written.

    Args:
        name (`str`): of the checkpoint.
        run (`str` or `Path`): the output directory.

    Raises:
        SaveError: where the disk is what failed; other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        clear_partial(run)
        whole = last_whole(run)
        raise SaveError(
            f"{name} must be written whole to {run}. Found that it cannot: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]} ({_free(run)} MB free). Make room or mend the permissions, then "
            + (f"resume from {whole}, the last whole checkpoint, which is as it was." if whole else "start anew.")
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError | TimeoutError)
    # PyTorch's writer of zip files reports a failed write as a RuntimeError.
    return (
        isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    )


def _free(run: str | Path) -> str:
    try:
        return f"{shutil.disk_usage(run).free / 2**20:.0f}"
    except OSError:
        return "unknown"
