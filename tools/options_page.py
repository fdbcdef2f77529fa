"""Write docs/options.md, the page of all options, from the dataclasses: `python -m tools.options_page`."""

from pathlib import Path
from typing import Any

from trl_apex.aggregation.options import AGGREGATION_OPTIONS
from trl_apex.cli import option_groups
from trl_apex.trainers.config import APEXConfig, DiffusionGRPOConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# All options

Fields of `APEXConfig`, flags of `trl-apex train` and keys of its YAML file are the same options. In each table those that
most runs set come first. `python -m tools.options_page` writes this page. Fields of transformers and TRL that have no
meaning for a denoiser are refused, and are not listed.
"""
OURS = {**DiffusionGRPOConfig.__annotations__, **APEXConfig.__annotations__}
# What most runs set, in this order.
FIRST = (
    "model", "dataset", "rewards", "reward_weights", "output_dir", "max_steps", "learning_rate", "lora_r", "loss_type",
    "num_generations", "generation_batch_size", "per_device_train_batch_size", "updates_per_iteration", "height", "width",
    "num_inference_steps", "sde_window_size", "guidance_scale", "rollout_batch_size", "beta", "seed", "use_cpu",
    "eval_dataset", "eval_strategy", "eval_steps", "save_steps", "logging_steps", "report_to", "need_coef",
    "multi_objective_aggregation", "warmup_iterations",
)  # fmt: skip


def page() -> str:
    """The page, as Markdown."""
    text = HEAD
    for title, options in option_groups().items():
        inherited = title.startswith("From ")  # said in the documentation of its own library
        own = {n: o for n, o in options.items() if not inherited or n in OURS}
        text += f"\n## {title}\n\n{table(own)}" if own else f"\n## {title}\n"
        names = sorted([name for name in options if name not in own], key=rank)
        if names:
            text += "\nWith the meaning that they have there: " + ", ".join(f"`{name}`" for name in names) + ".\n"
    flat = next(options for title, options in option_groups().items() if "advantage" in title)
    rest = {name: option for name, option in AGGREGATION_OPTIONS.items() if name not in flat}
    return f"{text}\n## Keys of `aggregation_options`\n\n[The method](method.md) explains them.\n\n{table(rest)}"


def table(options: dict[str, tuple[Any, str]]) -> str:
    """A table with a row for each option."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for name in sorted(options, key=rank):
        default, text = options[name]
        shown = f"{default:.3g}" if isinstance(default, float) else getattr(default, "value", default)
        cells = text.replace("|", "\\|"), "" if shown in ("", [], {}) else f"`{shown}`"
        lines.append(f"| `{name}` | {cells[1]} | {cells[0]} |")
    return "\n".join(lines) + "\n"


def rank(name: str) -> int:
    """Where an option stands; those that are not among the first keep the order of their class."""
    return FIRST.index(name) if name in FIRST else len(FIRST)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
