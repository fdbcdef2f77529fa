"""Pretrain everything that the tiny world ships, from rendered images alone.

From the root of a checkout: `python -m tools.tiny_world.pretrain --output DIR --seed 0`.
"""

import argparse
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
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
from tools.tiny_world.shared import clip_image_processor, save, save_pipeline, save_tensors
from trl_apex.tiny.pipeline import build_pipeline, build_tokenizer
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
        return [scene.prompt for scene in self.scenes]


def pretrain(output: Path, seed: int = 0, lengths: Lengths = Lengths()) -> None:
    """Train and save all parts into a folder, one after the other; `seed` is that of data, weights and batches."""
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

    heldout = fit_heldout(better_pictures.pixels, label_ids(scenes), steps=lengths.heldout, seed=seed)
    save_tensors(heldout, output / "heldout.safetensors")


def fit_rewards(output: Path, better: Pictures, worse: Pictures, seed: int, lengths: Lengths) -> None:
    """Train and save the three reward networks on pairs of a picture that wins under its caption, and one that loses."""
    clip = build_clip(seed)
    beauties, qualities = (
        torch.tensor([[judge(scene) for scene in pictures.scenes] for pictures in (better, worse)])
        for judge in (beauty, quality)
    )
    fit_clip(
        clip,
        better.pixels,
        worse.pixels,
        better.captions,
        worse.captions,
        beauties.T.contiguous(),
        steps=lengths.clip,
        seed=seed,
    )
    both = torch.cat([better.pixels, worse.pixels])
    head = fit_aesthetic(clip, both, beauties.flatten(), steps=lengths.aesthetic, seed=seed)
    processor = build_quality_processor()
    model = build_quality_model(clip, processor, seed)
    fit_quality(model, processor, both, qualities.flatten(), steps=lengths.quality, seed=seed)
    save(output / "clip", clip, build_tokenizer(), clip_image_processor())
    save_tensors(head, output / "aesthetic.safetensors")
    save(output / "deqa", model, processor)


def half_reconstructed(vae: torch.nn.Module, pixels: UInt8[Tensor, "N 3 32 32"]) -> UInt8[Tensor, "N 3 32 32"]:
    """Replace every second image by its reconstruction."""
    mixed = pixels.clone()
    mixed[1::2] = reconstruct(vae, pixels[1::2])
    return mixed


def main() -> None:
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
