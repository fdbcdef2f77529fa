"""Pretrains everything that the tiny world ships, from rendered images alone.

From the root of a checkout: `python -m tools.tiny_world.pretrain --output DIR --seed 0`.
"""

import argparse
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tools.tiny_world.generator import encode_latents, fit_flow, fit_vae, reconstruct
from tools.tiny_world.judges import (
    build_clip,
    build_quality_model,
    build_quality_processor,
    fit_aesthetic,
    fit_clip,
    fit_heldout,
    fit_quality,
    label_ids,
    worse_scene,
)
from tools.tiny_world.shared import save_clip, save_pipeline, save_quality, save_tensors
from trl_apex.rewards.deqa import ANSWER, QUESTION
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.tiny.prompts import words
from trl_apex.tiny.render import Scene, beauty, quality, render_batch, sample_scenes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lengths:
    """How long each part is pretrained, in optimizer steps, and on how many images.

    The flow is trained for two cycles of the learning rate. The second, `respell`, decides how well the base model spells,
    so how much is left for a reward to improve: words become readable between 1,000 and 1,600 steps in all.
    """

    images: int = 24_000
    vae: int = 600
    flow: int = 1_000
    respell: int = 300
    clip: int = 500
    aesthetic: int = 400
    quality: int = 300
    heldout: int = 500


@dataclass(frozen=True)
class Pictures:
    """Scenes with their pixels: half as rendered, half after a pass through the autoencoder, as generated ones are."""

    scenes: list[Scene]
    pixels: UInt8[Tensor, "N 3 32 32"]

    @property
    def captions(self) -> list[str]:
        """One caption per picture."""
        return [scene.prompt for scene in self.scenes]

    @property
    def qualities(self) -> Float[Tensor, "N"]:
        """Quality from 1 to 5, of shape `[N]`."""
        return torch.tensor([quality(scene) for scene in self.scenes])

    @property
    def beauties(self) -> Float[Tensor, "N"]:
        """Beauty from 1 to 10, of shape `[N]`."""
        return torch.tensor([beauty(scene) for scene in self.scenes])


def pretrain(output: Path, seed: int = 0, lengths: Lengths = Lengths()) -> None:
    """Trains and saves all parts, one after the other.

    Args:
        output (`pathlib.Path`): Folder for the weights; existing files are replaced.
        seed (`int`, *optional*, defaults to 0): Seed of the data, the weights and the batches.
        lengths (`Lengths`, *optional*): How long.
    """
    output.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(words("train"), lengths.images, seed)
    pixels = render_batch(scenes)
    pipeline = build_pipeline(seed)
    fit_vae(pipeline.vae, pixels, steps=lengths.vae, seed=seed)
    latents = encode_latents(pipeline.vae, pixels)
    captions = [scene.prompt for scene in scenes]
    fit_flow(pipeline, latents, captions, steps=lengths.flow, seed=seed)
    fit_flow(pipeline, latents, captions, steps=lengths.respell, seed=seed + 1)

    rng = np.random.default_rng(seed + 1)
    worse = [worse_scene(scene, rng) for scene in scenes]
    better_pictures = Pictures(scenes, half_reconstructed(pipeline.vae, pixels))
    worse_pictures = Pictures(worse, half_reconstructed(pipeline.vae, render_batch(worse)))
    save_pipeline(pipeline, output / "pipeline")
    fit_rewards(output, better_pictures, worse_pictures, seed, lengths)

    labels = label_ids([s.word for s in scenes], [s.colour for s in scenes], [s.shape for s in scenes])
    heldout = fit_heldout(better_pictures.pixels, labels, steps=lengths.heldout, seed=seed)
    save_tensors(heldout, output / "heldout.safetensors")


def fit_rewards(output: Path, better: Pictures, worse: Pictures, seed: int, lengths: Lengths) -> None:
    """Trains and saves the three reward networks on pairs of a better and a worse picture.

    Args:
        output (`pathlib.Path`): Folder for the weights.
        better (`Pictures`): The pictures that win under their captions.
        worse (`Pictures`): For each, one that loses.
        seed (`int`): Seed of the weights and the batches.
        lengths (`Lengths`): How long.
    """
    clip = build_clip(seed)
    pair_beauties = torch.stack([better.beauties, worse.beauties], dim=1)
    fit_clip(
        clip,
        better.pixels,
        worse.pixels,
        better.captions,
        worse.captions,
        pair_beauties,
        steps=lengths.clip,
        seed=seed,
    )
    both = torch.cat([better.pixels, worse.pixels])
    beauties, qualities = (torch.cat([getattr(better, n), getattr(worse, n)]) for n in ("beauties", "qualities"))
    head = fit_aesthetic(clip, both, beauties, steps=lengths.aesthetic, seed=seed)
    processor = build_quality_processor(QUESTION, ANSWER)
    model = build_quality_model(clip, processor, seed)
    fit_quality(model, processor, QUESTION, ANSWER, both, qualities, steps=lengths.quality, seed=seed)
    save_clip(clip, output / "clip")
    save_tensors(head, output / "aesthetic.safetensors")
    save_quality(model, processor, output / "deqa")


def half_reconstructed(vae: torch.nn.Module, pixels: UInt8[Tensor, "N 3 32 32"]) -> UInt8[Tensor, "N 3 32 32"]:
    """Replaces every second image by its reconstruction."""
    mixed = pixels.clone()
    mixed[1::2] = reconstruct(vae, pixels[1::2])
    return mixed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--respell", type=int, default=Lengths.respell, help="length of the second flow cycle")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; results can differ with another number")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    pretrain(arguments.output, arguments.seed, replace(Lengths(), respell=arguments.respell))
    logger.info("done in %.0f s", time.perf_counter() - start)


if __name__ == "__main__":
    main()
