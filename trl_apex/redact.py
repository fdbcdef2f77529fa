"""Hides secrets in what is printed, stored or published."""

import os
import re
from typing import Any
from urllib.parse import quote

HIDDEN = "(hidden)"
_NAMES = r"(?:token|secret|password|passwd|passphrase|api[_-]?key|(?:access|private|secret)[_-]?key|credentials?|authorization)"
_SECRET_KEY = re.compile(rf"(^|[_-])(tokens|{_NAMES})$", re.I)
_IN_TEXT = {  # pattern -> what is shown in its place
    re.compile(r"(\bBearer\s+)[^\s'\"]+", re.I): rf"\1{HIDDEN}",
    re.compile(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})\b"): HIDDEN,
    re.compile(rf"(--[\w-]*{_NAMES}[= ])('[^']*'|\"[^\"]*\"|\S+)", re.I): rf"\1{HIDDEN}",
    re.compile(rf"(\b(?:\w*[_-])?{_NAMES}['\"]?\s*[:=]\s*b?)(['\"])(?!\2).*?\2", re.I): rf"\1\2{HIDDEN}\2",
    re.compile(
        rf"(\b(?:[\w-]*[_-]{_NAMES}|api[_-]key|authorization):\s*)(?:Basic\s+)?(?!Bearer)[^\s'\"]+", re.I
    ): rf"\1{HIDDEN}",
    re.compile(rf"([?&;](?:[\w.-]*[_.-])?(?:{_NAMES}|key|sig|signature|auth)=)[^&;#\s'\"]+", re.I): rf"\1{HIDDEN}",
    re.compile(rf"(\b(?:\w*_)?{_NAMES}=)[^&;#\s'\",)]+", re.I): rf"\1{HIDDEN}",
    re.compile(r"(\w+://)[^/\s]+@"): rf"\1{HIDDEN}@",
}
_IN_USE: set[str] = set()


def secret_from(variable: str) -> str | None:
    """The key or token in an environment variable, which [`redacted`] hides from then on; None if there is none.

    Example:
        >>> os.environ["MY_KEY"] = "a-key-from-a-file\\n"
        >>> secret_from("MY_KEY")
        'a-key-from-a-file'
        >>> redacted("the server refuses a-key-from-a-file")
        'the server refuses (hidden)'
    """
    return checked_secret(os.environ.get(variable), f"the environment variable {variable}") or None


def checked_secret(secret: str | None, where: str) -> str:
    """A key or token without white space around it; ValueError, which says `where` it is, if no HTTP header can carry it."""
    secret = (secret or "").strip()
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ValueError(
            f"The secret in {where} must be printable ASCII without spaces. Found other characters among its "
            f"{len(secret)}. Set it again."
        )
    if len(secret) >= 8:
        _IN_USE.add(secret)
    return secret


def redacted(value: Any) -> Any:
    """A copy of a JSON value without secrets: entries named like one, and strings that look like one.

    Example:
        >>> redacted({"hub_token": "abc", "note": "logged in with hf_abcdefghijkl", "max_steps": 5})
        {'hub_token': '(hidden)', 'note': 'logged in with (hidden)', 'max_steps': 5}
        >>> redacted("trl-apex train --hub_token abc --max_steps 5")
        'trl-apex train --hub_token (hidden) --max_steps 5'
        >>> redacted("http://user:password@example.org/")
        'http://(hidden)@example.org/'
        >>> redacted("Illegal header value b'Bearer abc'")
        "Illegal header value b'Bearer (hidden)'"
    """
    return _hidden(value, known_secrets())


def known_secrets() -> list[str]:
    """The secrets in use and in environment variables with such names, each also as a URL spells it."""
    named = {value.strip() for name, value in os.environ.items() if _SECRET_KEY.search(name)}
    found = _IN_USE | {secret for secret in named if len(secret) >= 8 and not os.path.exists(secret)}
    return sorted(found | {quote(secret, safe="") for secret in found}, key=len, reverse=True)


def _hidden(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if item and isinstance(item, str) and _SECRET_KEY.search(str(key)) else _hidden(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hidden(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        for pattern, shown in _IN_TEXT.items():
            value = pattern.sub(shown, value)
    return value


def describe(error: BaseException) -> str:
    """An error in one line, without secrets: `KeyError: 'target'`."""
    try:
        text = redacted(" ".join(str(error).split()))
    except Exception:  # a `__str__` that fails itself
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
