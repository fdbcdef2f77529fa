"""Keeps secrets out of what is shown."""

import re
from typing import Any

_SECRET_KEY = re.compile(
    r"(^|_)(token|tokens|secret|password|passwd|api_key|apikey|access_key|private_key|credential|credentials|authorization)$",
    re.I,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})\b"
)
_SECRET_FLAG = re.compile(
    r"(--[\w-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]key|private[_-]key|credentials?)[= ])('[^']*'|\S+)",
    re.I,
)
_URL_USER = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")
HIDDEN = "(hidden)"


def redacted(value: Any) -> Any:
    """A copy of a JSON value without secrets: entries named like one, and strings that look like one.

    Args:
        value (`Any`): dictionaries, lists, strings and numbers.

    Example:
        >>> redacted({"hub_token": "abc", "note": "logged in with hf_abcdefghijkl", "max_steps": 5})
        {'hub_token': '(hidden)', 'note': 'logged in with (hidden)', 'max_steps': 5}
        >>> redacted("trl-apex train --hub_token abc --max_steps 5")
        'trl-apex train --hub_token (hidden) --max_steps 5'
        >>> redacted("http://user:password@example.org/")
        'http://(hidden)@example.org/'
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN if item and isinstance(item, str) and _SECRET_KEY.search(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, str):
        return _URL_USER.sub(rf"\1{HIDDEN}@", _SECRET_FLAG.sub(rf"\1{HIDDEN}", _SECRET_VALUE.sub(HIDDEN, value)))
    return value
