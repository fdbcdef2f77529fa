"""The evaluate run: a base model against its adapters, on the same prompts and noise."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.families import dtype_argument, load_policy
from ..diffusion.rollout import evaluation_noise, sample
from ..diffusion.schedule import Sampler
from ..prompts import PromptEmbeddings, load_prompts
from ..prompts.embeddings import encoding, unload_encoders
from ..report.figures import image_grid, save_samples
from ..rewards.base import KEYWORDS, OF_TRAINING, default_device
from ..rewards.registry import load_rewards
from ..rewards.scoring import RewardScorer
from ..tiny.world import load_tiny_pipeline
from ..trainers.adapters import adapted, check_adapter
from ..trainers.evaluation import batches_of_one_size, draw_and_score, reward_means
from ..trainers.inputs import as_list, check_calls, check_images, image_sizes, reward_names, submit
from .measures import compare, joint_hypervolume

logger = logging.getLogger(__name__)

BASE = "base"
Record = dict[str, Any]


def run_evaluation(
    model: Any,
    adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
    prompts: Any = None,
    rewards: Callable | Sequence[Callable] = (),
    output_dir: str | Path = "evaluation",
    *,
    monitors: Callable | Sequence[Callable] = (),
    split: str = "test",
    prompt_column: str = "prompt",
    max_prompts: int | None = None,
    images_per_prompt: int = 1,
    num_inference_steps: int = 40,
    guidance_scale: float = 4.5,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    grid_prompts: int = 24,
    report: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Draw images with the base and with each adapter, score them, and write the results.

    Deterministic sampling: image j of prompt i starts from the same noise for every model, the noise of the trainer's
    `evaluate` at the same seed. The prompt is the unit of all statistics: the rewards of its images are averaged first.

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`): the base; "tiny" for the one of the package.
        adapters (path, list of them or dict of name to path): run directories or hub ids with
            `pytorch_lora_weights.safetensors`, or with a fully trained denoiser in its own folder.
        prompts (`str`, `Path` or `datasets.Dataset`): as in [`load_prompts`], with `split`, `prompt_column` and
            `max_prompts`; every column reaches the rewards.
        rewards, monitors (callable or list): the objectives, and rewards that were not trained on, reported apart.
        images_per_prompt (`int`): each from its own noise.
        num_inference_steps, guidance_scale, negative_prompt: of the sampler; a scale of 1 is no guidance.
        height, width (`int`, *optional*): pixels; by default as the trainer, from the dataset's columns or the model.
        max_sequence_length (`int`): tokens of the longest text encoder, as in training.
        ema (`bool`): evaluate the averaged weights (`ema.safetensors`) that a run saved beside its adapter.
        dtype (`torch.dtype`, *optional*): of a model loaded by name; bfloat16 on a GPU, float32 on a CPU.
        device (*optional*): a GPU if there is one.
        grid_prompts (`int`): prompts in the picture files.
        report (`Callable`): gets one line after each model.

    Returns:
        `dict`: what `results.json` holds: `settings`, and what [`summarize_models`] returns.

    Note:
        Writes `results.json`, `results.md`, `grid.png` (a row a prompt, a column a model), `{name}_grid.png` for each model,
        and with one adapter also `summary.json` and `samples/`, which `trl-apex report` reads.
    """
    rewards, monitors = load_rewards(as_list(rewards)), load_rewards(as_list(monitors))
    model = str(model) if isinstance(model, Path) else model
    base_name = model if isinstance(model, str) else type(model).__name__
    names, named = reward_names([*rewards, *monitors], warn=True), _named(adapters)
    if not rewards:
        raise ValueError("`rewards` must hold at least one reward function. Found none. Pass e.g. `[OCRReward()]`.")
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            "`images_per_prompt` and `batch_size` must be at least 1. "
            f"Found {images_per_prompt} and {batch_size}. Use e.g. 1 and 8."
        )
    dataset = load_prompts(prompts, split, prompt_column, limit=max_prompts)
    outside_training = [keyword for keyword in KEYWORDS if keyword not in OF_TRAINING]
    check_calls([*rewards, *monitors], names, dataset, outside_training)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)

    device = torch.device(device or default_device())
    if model == "tiny":
        model = load_tiny_pipeline()
    if isinstance(model, str):
        dtype = dtype or (torch.bfloat16 if device.type != "cpu" else torch.float32)
        policy = load_policy(model, **dtype_argument(dtype))
    else:
        policy = load_policy(model)
    for source in named.values():
        check_adapter(policy, source, ema)
    policy.move_frozen(device)
    policy.denoiser.to(device)
    own_sizes = image_sizes(policy, dataset, "prompts", (height, width))
    sizes = [size for size in own_sizes for _ in range(images_per_prompt)]
    samplers = {
        size: Sampler(policy.schedule(num_inference_steps, *size), policy.transitions[0], 0.7) for size in set(sizes)
    }
    check_images(policy, "prompts", dataset)
    embeddings = PromptEmbeddings(
        **encoding(policy, max_sequence_length, negative_prompt, guided=guidance_scale != 1.0), device=device
    )
    keys = embeddings.keys(dataset, own_sizes)
    embeddings.precompute(keys)
    negative = embeddings.negative(guidance_scale)
    unload_encoders(policy, own_pipeline=False)
    rows = [row for row in dataset for _ in range(images_per_prompt)]
    pictures = grid_prompts * images_per_prompt  # the files show no more

    def draw(_: list[Record], numbers: list[int]) -> Tensor:
        size = sizes[numbers[0]]
        noise = evaluation_noise(seed, numbers, policy.latent_shape(*size))
        own = embeddings([keys[number // images_per_prompt] for number in numbers])
        return sample(policy, policy.denoiser, samplers[size], own, negative, guidance_scale, noise).images

    def evaluate(name: str) -> list[Record]:
        """Draw and score every row with the policy as it is now."""
        with closing(RewardScorer([*rewards, *monitors], names)) as scorer:
            found = draw_and_score(
                rows, batches_of_one_size(sizes, batch_size), draw, partial(submit, scorer), names, pictures
            )
        for record in found:
            record["key"] = str(keys[record["row"] // images_per_prompt])
        means = reward_means(_by_prompt(found, names), names)
        for unscored in [key for key, value in means.items() if not value["n"] and name == BASE]:
            logger.warning("The reward %r scored none of the %d images.", unscored, len(found))
        report(f"{name}: " + ", ".join(f"{k} {_plus_minus(v['mean'], v['se'])}" for k, v in means.items()))
        return found

    records = {BASE: evaluate(BASE)}
    for name, source in named.items():
        with adapted(policy, source, ema):
            records[name] = evaluate(name)

    height, width = sizes[0] if len(set(sizes)) == 1 else (None, None)
    settings = {
        "model": base_name,
        "adapters": {name: str(source) for name, source in named.items()},
        "prompts": len(dataset), "images_per_prompt": images_per_prompt, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "height": height, "width": width, "seed": seed, "ema": ema,
    }  # fmt: skip
    results = {"settings": settings, **summarize_models(records, names, len(rewards))}
    _write(output, results, records, pictures)
    return results


def summarize_models(records: dict[str, list[Record]], names: list[str], objectives: int) -> dict[str, Any]:
    """`models` (means, errors and numbers of prompts), `comparisons` with the base ([`compare`]), joint `hypervolume`.

    Args:
        records (`dict`): the base's first, under its name, then each adapter's; row by row alike.
        names (`list[str]`): rewards, the objectives first.
    """
    tables = {name: _by_prompt(rows, names) for name, rows in records.items()}
    base, *tuned = tables
    comparisons = {name: compare(names, tables[base], tables[name], objectives) for name in tuned}
    gains = [{k: row["gain"] for k, row in part["objectives"].items()} for part in comparisons.values()]
    return {
        "models": {name: reward_means(table, names) for name, table in tables.items()},
        "comparisons": comparisons,
        "hypervolume": joint_hypervolume(gains),
    }


def _by_prompt(records: list[Record], names: list[str]) -> Tensor:
    """Rewards `[P, K]`, averaged over the images of a prompt."""
    rows: dict[str, list[list[float]]] = {}
    for record in records:
        key = record["key"] if "key" in record else record["prompt"]  # one instruction may come with several images
        rows.setdefault(key, []).append([record["rewards"][name] for name in names])
    return torch.stack([torch.tensor(values, dtype=torch.float64).nanmean(0) for values in rows.values()])


def markdown_table(results: dict[str, Any]) -> str:
    """The results as Markdown: a row a reward, a column a model, gains in standard deviations of the base's rewards."""
    models, comparisons = results["models"], results["comparisons"]
    held_out = next(iter(comparisons.values()))["held_out"] if comparisons else {}
    heads = ["reward", *(f"{name} (± SE)" for name in models), *(f"gain of {name} (± SE)" for name in comparisons)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for reward in models[BASE]:
        cells = [f"{reward} (not trained on)" if reward in held_out else reward]
        cells += [_plus_minus(part[reward]["mean"], part[reward]["se"]) for part in models.values()]
        for part in comparisons.values():
            row = {**part["objectives"], **part["held_out"]}[reward]
            cells.append(_plus_minus(row["gain"], row["gain_se"], sign="+"))
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    for name, part in comparisons.items():
        volume = "-" if part["hypervolume"] is None else f"{part['hypervolume']:.3g}"
        better, worse = ("-" if share is None else f"{share:.1%}" for share in part["domination"].values())
        text += (
            f"\n\n{name}: every objective at least as good and one better on {better} of the prompts (JDR), the reverse on "
            f"{worse} (JCR); hypervolume of the gains above the base {volume}."
        )
    settings = results["settings"]
    size = "each of its own size" if settings["width"] is None else "{width} x {height} pixels".format(**settings)
    return text + (
        f"\n\n{{prompts}} prompts, {{images_per_prompt}} image(s) each, {size}, {{num_inference_steps}} steps, "
        "guidance {guidance_scale}, seed {seed}; the same noise for every model.\n"
    ).format(**settings)


def _write(output: Path, results: dict[str, Any], records: dict[str, list[Record]], pictures: int) -> None:
    (output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    (output / "results.md").write_text(markdown_table(results), encoding="utf-8")
    shown = {name: [record["image"] for record in rows[:pictures]] for name, rows in records.items()}
    side_by_side = [image for row in zip(*shown.values(), strict=True) for image in row]
    image_grid(side_by_side, len(shown)).save(output / "grid.png")
    for name, images in shown.items():
        image_grid(images, 8).save(output / f"{name}_grid.png")
    if len(records) == 2:
        base, tuned = records
        (output / "summary.json").write_text(json.dumps(results["comparisons"][tuned], indent=1, allow_nan=False))
        save_samples(output / "samples", records[base], records[tuned], pictures)


def _named(adapters: Any) -> dict[str, str | Path]:
    if isinstance(adapters, Mapping):
        named = {str(name): source for name, source in adapters.items()}
    else:
        sources = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        named = {Path(source).name or str(source): source for source in sources}
        if len(named) < len(sources):  # run directories with one name: tell them by where they lie
            named = {str(source).replace("/", "_"): source for source in sources}
        if len(named) < len(sources):
            raise ValueError(f"Adapters must differ. Found {[str(s) for s in sources]}. Name each once.")
    if BASE in named:
        raise ValueError(f"No adapter may be called {BASE!r}. Found {named}. Pass a dict with another name.")
    return named


def _plus_minus(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
