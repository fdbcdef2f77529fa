import json
from collections.abc import Callable
from typing import Any

import pytest
from engines import environment
from processes import run
from training import train


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """Runs under DDP, one entry a rank: what other engines and numbers of processes are compared with. Each is made once."""
    made: dict[str, list[dict[str, Any]]] = {}

    def run_once(world: int = 2, **options: Any) -> list[dict[str, Any]]:
        key = json.dumps([world, options], sort_keys=True, default=lambda value: value.__name__)
        if key not in made:
            folder = str(tmp_path_factory.mktemp("ddp"))
            made[key] = run(train, world, environment("ddp", world), output_dir=folder, **options)
        return made[key]

    return run_once


@pytest.fixture(scope="session")
def ddp(reference):
    """Two processes of DDP with the defaults of these tests."""
    return reference()
