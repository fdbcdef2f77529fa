"""What went wrong on the way to the Hub, in words that help."""

from pathlib import Path
from typing import Any

from ..redact import redacted


class PushError(RuntimeError):
    """An upload failed. The run is on disk as before, and the message says how to try again.

    Args:
        message (`str`): what happened, and what to do.
        user (`bool`): whether the cause is the user's to mend (token, name, permission) rather than the network's.
    """

    def __init__(self, message: str, user: bool = False) -> None:
        super().__init__(message)
        self.user = user

    @property
    def exit_code(self) -> int:
        """Of a command that fails with it."""
        return 2 if self.user else 1


def is_network_failure(error: BaseException) -> bool:
    """Whether trying again may help: a broken connection, a timeout, or a server that is ill or busy.

    Example:
        >>> is_network_failure(TimeoutError()), is_network_failure(ValueError())
        (True, False)
    """
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    network = type(error).__module__.startswith(("httpx", "httpcore", "requests.", "urllib3"))  # httpx2 as well
    return network or isinstance(error, ConnectionError | TimeoutError)


def explained(error: BaseException, repo_id: str, run_dir: str | Path | None, endpoint: str) -> PushError:
    """The failure as a [`PushError`].

    Args:
        error (`BaseException`): of huggingface_hub or the network below it.
        repo_id (`str`): where the upload went.
        run_dir (`str` or `Path`, *optional*): what was uploaded; None if there is nothing to upload yet.
        endpoint (`str`): address of the hub.
    """
    kind, status = type(error).__name__, _status(error)
    user = True
    if kind == "OfflineModeIsEnabled":
        what = "offline mode is on. Unset HF_HUB_OFFLINE"
    elif kind == "LocalTokenNotFoundError" or (
        status == 401 and "nvalid" not in str(error) and not _sent_token(error)
    ):
        what = f"{endpoint} wants a token and there is none. Run `hf auth login`, or set HF_TOKEN"
    elif status == 401 and not repo_id_is_missing(error):
        what = f"{endpoint} does not accept the token. Make a new one with write access, and run `hf auth login`"
    elif status == 403:
        what = f"the token may not write to {repo_id}. Use one with write access to it, or another --repo-id"
    elif status in (401, 404):
        what = f"there is no repository {repo_id} at {endpoint}, or the token does not see it. Check name and token"
    elif kind == "HFValidationError":
        what = f"{repo_id!r} is no name of a repository. Use `user/name`"
    elif is_network_failure(error):
        what, user = f"the connection to {endpoint} failed ({kind}). Check it, or wait", False
    else:
        what, user = f"{kind}: {str(redacted(str(error))).partition(chr(10))[0].rstrip('.')}", False
    again = f" Nothing is lost: the run is in {run_dir}. To try again: trl-apex push {run_dir} --repo-id {repo_id}"
    return PushError(f"Could not upload to {repo_id}: {what}.{again if run_dir else ''}", user)


def repo_id_is_missing(error: BaseException) -> bool:
    """Whether a 401 hides a missing repository: the hub does not tell strangers which private ones exist."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    return headers.get("X-Error-Code") == "RepoNotFound"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _sent_token(error: Any) -> bool:
    request = getattr(getattr(error, "response", None), "request", None)
    return "authorization" in {name.lower() for name in getattr(request, "headers", {})}
