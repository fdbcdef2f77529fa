"""Measure what the tiny world ships, on test words that nothing was trained on: the figures of its model card.

From the root of a checkout: `python -m tools.tiny_world.measure --output figures.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tools.tiny_world.judges import worse_scene
from trl_apex.tiny.heldout import heldout_metrics
from trl_apex.tiny.pipeline import MAX_LENGTH
from trl_apex.tiny.prompts import tiny_prompts, words
from trl_apex.tiny.render import as_float, beauty, quality, render_batch, sample_scenes
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards

STEPS, GUIDANCE = 8, 1.0  # of every figure: deterministic Euler steps and guidance scale


@torch.no_grad()
def sample_images(
    pipeline: Any, prompts: list[str], seed: int, *, steps: int = STEPS, guidance: float = GUIDANCE
) -> Float[Tensor, "B 3 32 32"]:
    """Sample one image in [0, 1] per prompt, without noise after the start, which `seed` decides."""
    output: Any = pipeline(
        prompt=prompts,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=MAX_LENGTH,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return output.images.float()


def base_rewards(pipeline: Any, n_prompts: int, group: int, seed: int, **sampling: Any) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and mean within-prompt standard deviation of every reward and held-out metric, by name."""
    rows = tiny_prompts("test", n_prompts, seed)
    columns = {name: [value for value in rows[name] for _ in range(group)] for name in rows.column_names}
    images = sample_images(pipeline, columns["prompt"], seed, **sampling)
    scores: dict[str, Any] = {
        reward.__name__: reward(prompts=columns["prompt"], completions=images) for reward in tiny_rewards()
    }
    scores.update(heldout_metrics(images, columns))
    figures = {}
    for name, values in scores.items():
        table = np.asarray(values, dtype=np.float64).reshape(n_prompts, group)
        within = table.std(axis=1).mean()
        figures[name] = {"mean": table.mean(), "std": table.std(), "std_within_prompt": within}
    return figures


def rendered_figures(n: int, seed: int) -> dict[str, float]:
    """How well the reward networks and the held-out classifiers read `n` rendered images whose truth is known."""
    scenes = sample_scenes(words("test"), n, seed)
    rng = np.random.default_rng(seed)
    losers = [worse_scene(scene, rng) for scene in scenes]
    images, worse = as_float(render_batch(scenes)), as_float(render_batch(losers))
    prompts = [scene.prompt for scene in scenes]
    ocr, pickscore, deqa, aesthetic = tiny_rewards()
    won = np.asarray(pickscore(prompts=prompts, completions=images))
    lost = np.asarray(pickscore(prompts=prompts, completions=worse))
    other = np.asarray(pickscore(prompts=prompts[1:] + prompts[:1], completions=images))
    deqa_scores = deqa(prompts=prompts, completions=images)
    truth = [quality(scene) for scene in scenes]
    beauties = [beauty(scene) for scene in scenes]
    columns = {name: [getattr(scene, name) for scene in scenes] for name in ("word", "colour", "shape")}
    metrics = heldout_metrics(images, columns)
    return {
        "ocr_mean": float(np.asarray(ocr(prompts=prompts, completions=images), dtype=np.float64).mean()),
        "pickscore_prefers_better_image": float((won > lost).mean()),
        "pickscore_prefers_own_caption": float((won > other).mean()),
        "deqa_rank_correlation": rank_correlation(deqa_scores, truth),
        "deqa_mean_absolute_error": float(np.abs(np.asarray(deqa_scores) - truth).mean()),
        "aesthetic_rank_correlation": rank_correlation(aesthetic(prompts=prompts, completions=images), beauties),
        "heldout_exact_word": float(np.mean(metrics["exact_word"])),
        "heldout_attributes": float(np.mean(metrics["attributes"])),
    }


def rank_correlation(first: Any, second: Any) -> float:
    """Spearman's rank correlation of two sequences without ties of note.

    Example:
        >>> rank_correlation([1, 2, 3], [10, 20, 21])
        1.0
    """
    one, other = (np.argsort(np.argsort(np.asarray(values))).astype(np.float64) for values in (first, second))
    return round(float(np.corrcoef(one, other)[0, 1]), 12)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world.measure", description=__doc__)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="images per prompt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = load_tiny_pipeline()
    sampling = {"steps": STEPS, "guidance_scale": GUIDANCE, "prompts": arguments.prompts, "group": arguments.group}
    figures = {
        "sampling": sampling,
        "rendered": rendered_figures(1000, arguments.seed + 1),
        "base": base_rewards(pipeline, arguments.prompts, arguments.group, arguments.seed),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
