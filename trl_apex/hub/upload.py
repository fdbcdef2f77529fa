"""The upload of a run directory: only what a reader of the repository needs, never a secret, and errors that help."""

import fnmatch
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..redact import redacted

# What goes up. Not among it: training_args.bin (a pickle of the arguments, the token among them), completions/ and logs.
UPLOADED = [
    *("README.md", "report.html", "pytorch_lora_weights.safetensors"),
    *("adapter_model.safetensors", "adapter_config.json", "transformer/*", "unet/*"),
    *("aggregator_state.json", "population_conflict.json", "trainer_state.json"),
    *("summary.json", "config.json", "environment.json", "figures/*.png", "samples/*.png", "samples/prompts.json"),
]
PAUSES = (1.0, 4.0)  # seconds before each further attempt
T = TypeVar("T")


class PushError(RuntimeError):
    """An upload failed. The run is on disk as before, and the message says how to try again.

    Args:
        message (`str`): what happened, and what to do.
        user (`bool`): whether the user can mend it (token, name, permission) or the network must recover.
    """

    def __init__(self, message: str, user: bool = False) -> None:
        super().__init__(message)
        self.user = user

    @property
    def exit_code(self) -> int:
        """Of a command that fails with it."""
        return 2 if self.user else 1


def is_uploaded(path: str) -> bool:
    """Whether a file goes up, by its path in the run directory.

    Example:
        >>> is_uploaded("samples/base_0.png"), is_uploaded("training_args.bin"), is_uploaded("checkpoint-4/README.md")
        (True, False, False)
    """
    return any(fnmatch.fnmatch(path, pattern) for pattern in UPLOADED)


def check_uploadable(run_dir: str | Path) -> None:
    """Refuse a directory that holds no weights to upload.

    Raises:
        FileNotFoundError: if it does not exist, or holds no weights.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"A run directory must exist. Found no directory {run_dir}. Pass the `output_dir` of a training run."
        )
    if not any(is_uploaded(path.relative_to(run_dir).as_posix()) for path in run_dir.rglob("*.safetensors")):
        raise FileNotFoundError(
            f"A run to upload must hold weights. Found no pytorch_lora_weights.safetensors and no transformer/ in {run_dir}. "
            "Pass the `output_dir` of a finished run; `trainer.save_model()` writes them."
        )


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
        token (`str`, *optional*): by default that of `hf auth login` or HF_TOKEN.
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

    check_uploadable(run_dir)
    api = HfApi(endpoint=endpoint, token=token)

    def upload() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id if create else repo_id
        done = api.upload_folder(
            repo_id=name,
            folder_path=run_dir,
            allow_patterns=UPLOADED,
            commit_message=commit_message,
            revision=revision,
        )
        return str(done.repo_url)

    return trying(upload, repo_id, run_dir, api.endpoint, pauses)


def trying(
    attempt: Callable[[], T],
    repo_id: str,
    run_dir: str | Path | None,
    endpoint: str,
    pauses: tuple[float, ...] | None = None,
) -> T:
    """Call something that talks to the Hub. After a network failure, wait and call it again.

    Args:
        attempt (`Callable`): safe to repeat.
        repo_id (`str`), run_dir (`str` or `Path`, *optional*), endpoint (`str`): named in the error.
        pauses (`tuple[float, ...]`, *optional*): seconds before each further attempt; 1 and 4.

    Raises:
        PushError: if the last attempt fails, or one fails for another reason than the network.
    """
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            return attempt()
        except Exception as error:
            if pause is None or not is_network_failure(error):
                cause, user = _cause(error, repo_id, endpoint)
                again = f" Nothing is lost: the run is in {run_dir}. To try again: trl-apex push {run_dir} --repo-id {repo_id}"
                text = f"Could not upload to {repo_id}: {cause}.{again if run_dir else ''}"
                raise PushError(text, user) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def is_network_failure(error: BaseException) -> bool:
    """Whether another attempt may help: the server is busy or broken, or gave no answer.

    Errors of the HTTP library have no answer of the server. They are told from errors of the code, which are Python's own
    exceptions, by that alone: the library has changed between versions of huggingface_hub.

    Example:
        >>> is_network_failure(TimeoutError()), is_network_failure(ValueError()), is_network_failure(KeyError("x"))
        (True, False, False)
    """
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = _answer(error, "status_code", None)
    if status is not None:
        return status >= 500 or status == 429
    if isinstance(error, ValueError | OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__ != "builtins"


def _answer(error: BaseException, name: str, otherwise: Any) -> Any:
    """An attribute of the server's answer behind an error."""
    return getattr(getattr(error, "response", None), name, otherwise)


def _cause(error: BaseException, repo_id: str, endpoint: str) -> tuple[str, bool]:
    """What went wrong and what to do, and whether the user can mend it."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    kind, status = type(error).__name__, _answer(error, "status_code", None)
    sent = {name.lower() for name in getattr(_answer(error, "request", None), "headers", {})}
    # The hub does not tell strangers which private repositories exist: then a 401 says that there is none.
    hidden = status == 401 and _answer(error, "headers", {}).get("X-Error-Code") == "RepoNotFound"
    no_token = status == 401 and "authorization" not in sent and "nvalid" not in str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on. Unset HF_HUB_OFFLINE", True
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no name of a repository. Use `user/name`", True
    if isinstance(error, LocalTokenNotFoundError) or no_token:
        return f"{endpoint} wants a token and there is none. Run `hf auth login`, or set HF_TOKEN", True
    if status == 401 and not hidden:
        text = f"{endpoint} does not accept the token. Make a new one with write access, and run `hf auth login`"
        return text, True
    if status == 403:
        text = f"the token may not write to {repo_id}. Use one with write access to it, or another --repo-id"
        return text, True
    if status in (401, 404):
        text = f"there is no repository {repo_id} at {endpoint}, or the token does not see it. Check name and token"
        return text, True
    if is_network_failure(error):
        return f"the connection to {endpoint} failed ({kind}). Check it, or wait", False
    return f"{kind}: {str(redacted(str(error))).partition(chr(10))[0].rstrip('.')}", False
