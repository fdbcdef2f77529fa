"""The shipped tiny world: pipeline, rewards and held-out metrics, ready to use."""

from pathlib import Path
from typing import Any

import torch

from trl_apex.rewards.base import Reward

PARTS = {
    "pipeline": "pipeline",  # a diffusers folder
    "clip": "clip",  # a `CLIPModel` with its processor
    "aesthetic": "aesthetic.safetensors",  # the head on its image embedding
    "deqa": "deqa",  # a LLaVA model with its processor
    "heldout": "heldout.safetensors",  # the classifiers
}


def weights_path(name: str) -> Path:
    """The folder or safetensors file of one part of the shipped weights, a key of `PARTS`.

    Example:
        >>> weights_path("aesthetic").name
        'aesthetic.safetensors'
    """
    if name not in PARTS:
        raise ValueError(f"`name` must be one of {tuple(PARTS)}. Found {name!r}. Pass one of these.")
    return Path(__file__).parent / "weights" / PARTS[name]


def load_tiny_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """Load the pretrained `StableDiffusion3Pipeline` for images of 32 x 32 pixels, on the CPU; it is stored in bfloat16."""
    from diffusers import StableDiffusion3Pipeline

    from trl_apex.diffusion.families import dtype_argument
    from trl_apex.distributed import whole_models

    with whole_models():  # a script has made its arguments by now
        pipeline = StableDiffusion3Pipeline.from_pretrained(weights_path("pipeline"), **dtype_argument(dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_rewards() -> list[Reward]:
    """The four rewards of the tiny world: the classes for real models, on the tiny weights.

    Example:
        >>> [reward.__name__ for reward in tiny_rewards()]
        ['ocr', 'pickscore', 'deqa', 'aesthetic']
    """
    from trl_apex.rewards.clip import AestheticReward, PickScoreReward
    from trl_apex.rewards.deqa import DeQAReward
    from trl_apex.rewards.ocr import OCRReward

    clip = str(weights_path("clip"))
    return [
        OCRReward(confidence=True),
        PickScoreReward(model=clip, processor=clip, batch_size=64),
        DeQAReward(model=str(weights_path("deqa")), batch_size=64),
        AestheticReward(clip=clip, head=str(weights_path("aesthetic")), batch_size=64),
    ]
