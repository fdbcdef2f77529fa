"""Images before and after, in the form that a report reads."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .grid import image_grid


def save_samples(folder: str | Path, base: Sequence[dict], tuned: Sequence[dict], count: int) -> None:
    """Write images for the same prompts and noise one by one, and as two grids beside the folder.

    Args:
        folder (`str` or `Path`): usually `samples` of a run directory; made if needed.
        base, tuned (sequences of `dict`): records with `prompt`, `image` (PIL) and `rewards`, in the same order.
        count (`int`): write the first so many.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompts: list[dict[str, Any]] = []
    for i, (before, after) in enumerate(zip(base[:count], tuned[:count], strict=True)):
        before["image"].save(folder / f"base_{i:03d}.png")
        after["image"].save(folder / f"tuned_{i:03d}.png")
        rewards = {"base": _finite(before["rewards"]), "tuned": _finite(after["rewards"])}
        prompts.append({"prompt": before["prompt"], **rewards})
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1))
    for name, records in (("base", base), ("tuned", tuned)):
        image_grid([record["image"] for record in records[:count]], 8).save(folder.parent / f"{name}_grid.png")


def _finite(rewards: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in rewards.items()}
