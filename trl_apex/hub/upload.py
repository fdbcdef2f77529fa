"""The upload of a run directory: only what a reader of the repository needs, and never a secret."""

import fnmatch
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .failure import explained, is_network_failure

# What goes up. Not among it: training_args.bin (a pickle of the arguments, the token among them), completions/ and logs.
UPLOADED = (
    *(
        "README.md",
        "report.html",
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    ),
    *("aggregator_state.json", "population_conflict.json", "trainer_state.json"),
    *("summary.json", "config.json", "environment.json", "figures/*.png", "samples/*.png", "samples/prompts.json"),
    *("transformer/*", "unet/*"),
)
PAUSES = (1.0, 4.0)
T = TypeVar("T")


def is_uploaded(path: str) -> bool:
    """Whether a file goes up, by its path in the run directory.

    Example:
        >>> is_uploaded("samples/base_0.png"), is_uploaded("training_args.bin"), is_uploaded("checkpoint-4/README.md")
        (True, False, False)
    """
    return any(fnmatch.fnmatch(path, pattern) for pattern in UPLOADED)


def files_to_upload(run_dir: str | Path) -> list[str]:
    """Paths inside a run directory that an upload takes along.

    Args:
        run_dir (`str` or `Path`): the run directory.

    Raises:
        FileNotFoundError: if it does not exist, or holds no weights.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"A run directory must exist. Found no directory {run_dir}. Pass the `output_dir` of a training run."
        )
    paths = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file())
    chosen = [path for path in paths if is_uploaded(path)]
    if not any(path.endswith(".safetensors") for path in chosen):
        raise FileNotFoundError(
            f"A run to upload must hold weights. Found no pytorch_lora_weights.safetensors and no transformer/ in {run_dir}. "
            "Pass the `output_dir` of a finished run; `trainer.save_model()` writes them."
        )
    return chosen


def push_run(
    run_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create: bool = True,
    commit_message: str = "Upload run",
    endpoint: str | None = None,
    pauses: tuple[float, ...] | None = None,
) -> str:
    """Upload a run in one commit: either all of it arrives, or nothing.

    Args:
        run_dir (`str` or `Path`): the run directory, with its model card.
        repo_id (`str`): `user/name`, or a name in your own space.
        token (`str`, *optional*): by default the one of `hf auth login` or HF_TOKEN.
        private (`bool`, *optional*): visibility of a repository that is created.
        revision (`str`, *optional*): branch to commit to.
        create (`bool`): create the repository if it is missing.
        commit_message (`str`): of the commit.
        endpoint (`str`, *optional*): address of the hub.
        pauses (`tuple[float, ...]`, *optional*): seconds before each further attempt after a network failure; 1 and 4.

    Returns:
        `str`: address of the repository.

    Raises:
        FileNotFoundError: if there is no such run, or it holds no weights.
        PushError: if the upload fails; the run directory is as before.
    """
    from huggingface_hub import HfApi

    run_dir = Path(run_dir)
    files = {path: run_dir / path for path in files_to_upload(run_dir)}
    api = HfApi(endpoint=endpoint, token=token)

    def upload() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id if create else repo_id
        return commit(api, name, files, commit_message, revision)

    return trying(upload, repo_id, run_dir, api.endpoint, pauses)


def commit(api: Any, repo_id: str, files: dict[str, Path], message: str, revision: str | None = None) -> str:
    """One commit of several files; returns the repository's address.

    Args:
        api (`huggingface_hub.HfApi`): with endpoint and token.
        repo_id (`str`): the repository.
        files (`dict[str, Path]`): where each lies, by its path in the repository.
        message (`str`): of the commit.
        revision (`str`, *optional*): branch.
    """
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).repo_url)


def trying(
    attempt: Callable[[], T],
    repo_id: str,
    run_dir: str | Path | None,
    endpoint: str,
    pauses: tuple[float, ...] | None = None,
) -> T:
    """Call something that talks to the Hub; after a network failure wait and call it again, and explain what stays.

    Args:
        attempt (`Callable`): safe to repeat.
        repo_id, run_dir, endpoint: for the explanation; see [`explained`].
        pauses (`tuple[float, ...]`, *optional*): seconds before each further attempt; 1 and 4.

    Raises:
        PushError: if the last attempt fails, or one fails for another reason than the network.
    """
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            return attempt()
        except Exception as error:
            if pause is None or not is_network_failure(error):
                raise explained(error, repo_id, run_dir, endpoint) from error
            time.sleep(pause)
    raise AssertionError("unreachable")
