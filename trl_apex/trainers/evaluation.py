"""Evaluation: images of a dataset's rows, deterministic, with every reward; during training and for `trl-apex evaluate`."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..diffusion.rollout import evaluation_noise
from ..distributed import failing_together, gather_list
from ..prompts.datasets import check_dataset, undecoded
from ..rewards.base import to_pil
from .inputs import check_calls, check_images, reward_names
from .logs import PICTURES, weighted_sum

logger = logging.getLogger(__name__)


def evaluate(trainer: Any, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
    """[`DiffusionGRPOTrainer.evaluate`]."""
    dataset = trainer.eval_dataset if eval_dataset is None else eval_dataset
    if isinstance(dataset, str):
        known = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
        if dataset not in known:
            raise ValueError(
                "`eval_dataset` must be a dataset, or the name of one that the trainer was given. Found "
                f"{dataset!r}; the trainer has {known or 'no named ones'}. Pass a `datasets.Dataset`."
            )
        metric_key_prefix, dataset = f"{metric_key_prefix}_{dataset}", trainer.eval_dataset[dataset]
    if isinstance(dataset, dict):
        metrics = {}
        for name, part in dataset.items():
            metrics.update(trainer.evaluate(part, metric_key_prefix=f"{metric_key_prefix}_{name}"))
        return metrics
    if dataset is None:
        raise ValueError(
            "Evaluation needs a dataset. Found none. Pass `eval_dataset` to the trainer or to `evaluate`."
        )
    check_dataset(dataset, "eval_dataset")
    check_images(trainer.policy, "eval_dataset", dataset)
    started = time.perf_counter()
    funcs = [*trainer.reward_funcs, *trainer.monitor_funcs]
    names = reward_names(funcs)
    check_calls(funcs, names, dataset)
    records, failed = _records(trainer, dataset, funcs, names)
    rewards = torch.tensor([list(record["rewards"].values()) for record in records], dtype=torch.float64)
    found: dict[str, float | None] = {}
    for name, part in reward_means(rewards, names).items():
        found |= {f"rewards/{name}/mean": part["mean"], f"rewards/{name}/se": part["se"]}
        if part["mean"] is None and name not in trainer._unscored:
            trainer._unscored.add(name)
            logger.warning("The reward %r scored none of the %d images of an evaluation.", name, len(records))
    trained, weights = rewards[:, : len(trainer.reward_funcs)], trainer.reward_weights.cpu()
    totals = weighted_sum(trained, weights)
    totals = totals[totals.isfinite()]
    lost = _lost(trainer.state.log_history, metric_key_prefix, found, failed)
    if not lost.intersection(name for name, weight in zip(names, weights.tolist(), strict=False) if weight):
        found["reward"] = weighted_sum(trained.nanmean(0, keepdim=True), weights).item()
        found["reward_std"] = totals.std().item() if len(totals) > 1 else None
    found["runtime"] = time.perf_counter() - started
    metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items() if v is not None and math.isfinite(v)}
    trainer.eval_records = records
    if trainer.monitor_funcs:
        trainer._watch.see(metric_key_prefix, names, records, trainer.state.global_step)
    Trainer.log(trainer, dict(metrics))
    if trainer.log_completions:
        shown = [record for record in records if record["image"] is not None]
        trainer._send_samples(f"images/{metric_key_prefix}", shown)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def _records(trainer: Any, dataset: Any, funcs: list, names: list[str]) -> tuple[list[dict[str, Any]], set[str]]:
    """The records of all rows of `dataset`, of which each rank draws its share, and the names of rewards that failed."""
    args, world, rank = trainer.args, trainer.accelerator.num_processes, trainer.accelerator.process_index
    sizes = trainer._eval_sizes(dataset)
    samplers = {size: trainer._sampler_of(args.eval_num_inference_steps, size) for size in set(sizes)}
    guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale

    def draw(rows: list[dict[str, Any]], numbers: list[int]) -> Tensor:
        size = sizes[numbers[0]]
        initial = evaluation_noise(args.seed, numbers, trainer.policy.latent_shape(*size))
        with trainer._failing_together_unless_sharded("the images of an evaluation"):
            embeddings = trainer._conditions(trainer._conditions.keys(rows, [size] * len(rows)))
            return trainer._sample(embeddings, initial, samplers[size], guidance).images

    scorer = trainer._open_scorer(funcs, names)
    with trainer._ema.applied(), trainer._rollout_weights(), closing(scorer):
        own = draw_and_score(
            dataset, batches_of_one_size(sizes, args.per_device_eval_batch_size, rank, world), draw,
            partial(trainer._submit, scorer), names, pictures=PICTURES if trainer.accelerator.is_main_process else 0,
        )  # fmt: skip
    own_images = {record["row"]: record["image"] for record in own}  # pictures are not gathered
    by_row = {record["row"]: record for record in gather_list([{**record, "image": None} for record in own])}
    failed = set(gather_list(sorted(scorer.failed)))
    if args.offload_rewards:
        scorer.offload()
    return [by_row[i] | {"image": own_images.get(i)} for i in range(len(dataset))], failed


def rewards_at_start(trainer: Any, count: int) -> Tensor:
    """Rewards `[P, K]` of the model as it is, of one image for each of the run's first `count` prompts, made as in training."""
    args = trainer.args
    dataset = trainer.train_dataset.select(trainer._prompts.first(count))
    sizes = [trainer._size_of(row) for row in undecoded(dataset)]
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    batches = batches_of_one_size(sizes, args.rollout_batch_size or args.per_device_train_batch_size, rank, world)

    rows_of = [[dataset[i] for i in numbers] for numbers in batches]

    def draw(rows: list[dict[str, Any]], numbers: list[int]) -> Tensor:
        trainer._use_size(size := sizes[numbers[0]])
        embeddings = trainer._conditions(trainer._conditions.keys(rows, [size] * len(rows)))
        return trainer._rollout(embeddings, [i * trainer.num_generations for i in numbers]).images

    with trainer._rollout_weights(), trainer._failing_together_unless_sharded("the images before training"):
        drawn = [draw(rows, numbers) for rows, numbers in zip(rows_of, batches, strict=True)]
    own: dict[int, list[float]] = {}
    with failing_together("the rewards before training"):  # after all images, which sharded ranks make together
        for numbers, rows, images in zip(batches, rows_of, drawn, strict=True):
            scored = trainer._submit(trainer._scorer, rows, images).result()
            own.update(zip(numbers, scored.rewards.tolist(), strict=True))
    by_row = dict(gather_list(list(own.items())))
    if args.offload_rewards:
        trainer._scorer.offload()
    return torch.tensor([by_row[row] for row in range(len(dataset))], dtype=torch.float64)


def _lost(history: list[dict[str, Any]], prefix: str, found: dict[str, Any], failed: set[str]) -> set[str]:
    """Names of rewards without a score that failed, or had one before: a weighted sum without them misleads."""
    measured = {key for entry in history for key in entry}
    means = [key for key, value in found.items() if key.endswith("/mean") and value is None]
    names = {key: key.split("/", 1)[1].removesuffix("/mean") for key in means}
    return {name for key, name in names.items() if name in failed or f"{prefix}_{key}" in measured}


def reward_means(rewards: Tensor, names: list[str]) -> dict[str, dict[str, Any]]:
    """`mean`, `se` (its standard error) and `n` of each column of rewards `[P, K]`; None where too few are there."""
    result = {}
    for name, column in zip(names, rewards.T, strict=True):
        values = column[column.isfinite()]
        mean = values.mean().item() if len(values) else None
        se = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
        result[name] = {"mean": mean, "se": se, "n": len(values)}
    return result


def batches_of_one_size(sizes: Sequence[Any], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This rank's share of the rows of these sizes, in batches of one size; a row may come again, so that all ranks have as many.

    Example:
        >>> batches_of_one_size(["wide", "tall", "wide", "wide"], batch_size=2)
        [[0, 2], [3], [1]]
    """
    batches = []
    for size in dict.fromkeys(sizes):
        rows = [row for row, own in enumerate(sizes) if own == size]
        share = range(rank, rank + -(-len(rows) // world) * world, world)
        mine = [rows[min(place, len(rows) - 1)] for place in share]
        batches += [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return batches


def draw_and_score(
    dataset: Any,
    batches: Sequence[list[int]],
    draw: Callable[[list[dict[str, Any]], list[int]], Tensor],
    submit: Callable[[list[dict[str, Any]], Tensor, list], Any],
    names: list[str],
    pictures: int,
) -> list[dict[str, Any]]:
    """Draw and score some rows of a dataset: `row`, `prompt`, `image` (PIL, or None) and `rewards` by name, row by row.

    Args:
        batches: the numbers of rows to draw together, as many batches on every rank.
        draw: `(rows, their numbers) -> images [B, 3, H, W]`.
        submit: `(rows, images, PIL images) -> future of a ScoredBatch`.
        pictures: how many images to keep, those of the first rows.
    """
    shown = sorted(number for batch in batches for number in batch)[:pictures]
    records: list[dict[str, Any]] = []
    for numbers in batches:
        batch = [dataset[i] for i in numbers]
        images = draw(batch, numbers)
        drawn = to_pil(images)
        with failing_together("the rewards of an evaluation"):
            scored = submit(batch, images, drawn).result().rewards.tolist()
        for number, row, image, rewards in zip(numbers, batch, drawn, scored, strict=True):
            kept = image if number in shown else None
            values = dict(zip(names, rewards, strict=True))
            records.append({"row": number, "prompt": row["prompt"], "image": kept, "rewards": values})
    return sorted(records, key=lambda record: record["row"])
