"""A complete run directory for the tests of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def complete_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests that change it make their own."""
    from example_run import write_run

    return write_run(tmp_path_factory.mktemp("runs") / "demo", hub_token="hf_abcdefghijklmnop", learning_rate=3e-4)
