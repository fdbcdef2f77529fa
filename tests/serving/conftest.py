"""The tiny models, saved once."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "rewards"))
from rewards_tiny_models import save_clip, save_llava


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))
