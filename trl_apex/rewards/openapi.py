"""Write the reward server's OpenAPI document: `python -m trl_apex.rewards.openapi FILE`."""

import json
import sys
from pathlib import Path
from typing import Any


def openapi_document() -> dict[str, Any]:
    """The document of a server with any rewards, without the version of the package.

    Returns:
        `dict[str, Any]`.

    Example:

    ```python
    >>> from trl_apex.rewards.openapi import openapi_document
    >>> sorted(openapi_document()["paths"])
    ['/health', '/metrics', '/v1/rewards', '/v1/rewards/{name}']

    ```
    """
    from trl_apex.rewards.server import build_app
    from trl_apex.rewards.wire import PROTOCOL

    document = build_app(["jpeg_compressibility"]).openapi()
    document["info"]["version"] = str(PROTOCOL)
    return document


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(openapi_document(), indent=2) + "\n")
