"""The shipped models, loaded once."""

from typing import Any

import pytest
import torch

from tools.tiny_world.measure import sample_images
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards


@pytest.fixture(scope="session")
def pipeline() -> Any:
    """The shipped pipeline in float32."""
    return load_tiny_pipeline()


@pytest.fixture(scope="session")
def rewards() -> dict[str, Any]:
    """The four rewards by name."""
    return {reward.__name__: reward for reward in tiny_rewards()}


@pytest.fixture(scope="session")
def rows() -> Any:
    """48 test prompts."""
    return tiny_prompts("test", 48, seed=0)


@pytest.fixture(scope="session")
def base_images(pipeline: Any, rows: Any) -> torch.Tensor:
    """One image of the base model per test prompt."""
    return sample_images(pipeline, rows["prompt"][:], seed=0)
