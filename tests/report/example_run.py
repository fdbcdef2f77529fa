"""A run directory as training and evaluation leave it, with made-up numbers."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LEVELS = {
    "ocr": (0.52, 0.14, 0.24),
    "pickscore": (21.4, 0.5, 0.6),
    "deqa": (3.4, 0.35, 0.4),
    "aesthetic": (5.1, -0.05, 0.3),
}
WORDS = ("CAT", "SUN", "HEX", "OAK", "TAN", "LUX")


def write_run(path: Path, steps: int = 60, seed: int = 0, samples: int = 6, **config: object) -> Path:
    """Write a complete run directory; `config` are entries of `config.json`."""
    (path / "samples").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = list(LEVELS)
    history = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-2.5 * step / steps)
        entry: dict[str, float] = {
            "step": 2 * step,
            "epoch": step / steps,
            "loss": float(rng.normal(0, 1e-3)),
            "grad_norm": float(abs(rng.normal(2e-4, 4e-5))),
            "learning_rate": 3e-4,
            "step_time": float(rng.normal(2.1, 0.1)),
            "ratio/max_deviation": float(abs(rng.normal(1e-4, 3e-5))),
            "clip_ratio/region_mean": float(rng.uniform(0.2, 0.5)),
        }
        push = np.exp(np.array([0.6 * np.sin(3 * done), 0.2, -0.1 * done, 0.8 * done]))
        for name, weight in zip(names, push / push.sum(), strict=True):
            start, gain, spread = LEVELS[name]
            entry[f"rewards/{name}/mean"] = float(start + gain * done + rng.normal(0, spread / 6))
            entry[f"rewards/{name}/std"] = spread
            entry[f"priority/{name}"] = float(weight)
            entry[f"potential/{name}"] = float(rng.uniform(0.4, 0.6))
            entry[f"conflict_penalty/{name}"] = float(rng.uniform(0.0, 0.1))
            entry[f"need/{name}"] = float(0.5 - 0.2 * done * gain)
            entry[f"hijack_share/{name}"] = float(weight + rng.normal(0, 0.02))
        entry["hijack_index"] = float(rng.uniform(1.1, 1.6))
        for (i, a), (j, b) in combinations(enumerate(names), 2):
            entry[f"conflict/{a}/{b}"] = float(0.4 * np.sin(i + 2 * j + done) + rng.normal(0, 0.02))
        history.append(entry)
    history.append({"step": 2 * steps, "train_runtime": 131.4})
    _write(path / "trainer_state.json", {"global_step": 2 * steps, "max_steps": 2 * steps, "log_history": history})
    objectives = {
        n: {"base": s, "tuned": s + g, "se": d / 12, "gain": g / d, "n": 96} for n, (s, g, d) in LEVELS.items()
    }
    held_out = {
        "exact_word": {"base": 0.41, "tuned": 0.47, "se": 0.04, "gain": 0.12, "gain_se": 0.08},
        "attributes": {"base": 0.88, "tuned": 0.87, "se": 0.02},
    }
    summary = {"objectives": objectives, "held_out": held_out, "seconds": {"train": 131.4}}
    _write(path / "summary.json", {**summary, "domination": {"all_at_least_as_good": 0.45}})
    batch = {"num_generations": 8, "generation_batch_size": 64}
    _write(
        path / "config.json", {"model": "tiny", **batch, "seed": seed, "multi_objective_aggregation": "apex", **config}
    )
    prompts = []
    for index in range(samples):
        word = WORDS[index % len(WORDS)]
        for kind, shift in (("base", 2), ("tuned", 0)):
            image = Image.new("RGB", (32, 32), (200, 190 - 10 * index, 160))
            draw = ImageDraw.Draw(image)
            draw.ellipse((4 + shift, 12, 26 + shift, 30), fill=(180, 40 + 20 * index, 60))
            draw.text((5, shift), word, fill=(20, 20, 20))
            image.save(path / "samples" / f"{kind}_{index}.png")
        base = {n: float(s + rng.normal(0, d)) for n, (s, _, d) in LEVELS.items()}
        tuned = {n: v + float(LEVELS[n][1]) for n, v in base.items()}
        prompts.append({"prompt": f'a red circle with " {" ".join(word)} "', "base": base, "tuned": tuned})
    _write(path / "samples" / "prompts.json", prompts)
    return path


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
