"""Evaluation during training: one image a prompt, deterministic, every reward and what is only watched."""

import logging
import math
import time
from contextlib import closing, nullcontext
from typing import Any

import torch
from transformers import Trainer

from ..diffusion.rollout import evaluation_noise
from ..diffusion.schedule import Sampler
from ..distributed import gather_list
from ..prompts.datasets import check_dataset
from ..rewards.base import to_pil
from .inputs import reward_names
from .logs import PICTURES, weighted_sum

logger = logging.getLogger(__name__)


def evaluate(trainer: Any, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
    """Sample one image per evaluation prompt, without noise on the way, and average every reward.

    Deterministic: `eval_num_inference_steps` ODE steps from noise keyed by the prompt's row, with the averaged
    weights where there are any. Each row counts once on any number of processes.

    Args:
        eval_dataset (`datasets.Dataset` or dict of them, or `str`, *optional*): instead of the trainer's own, or the
            name of one of these.
        ignore_keys: accepted for compatibility.
        metric_key_prefix (`str`): of the metrics' names.

    Returns:
        `dict`: `{prefix}_rewards/{name}/mean` and `/se` (standard error over prompts) of each reward and monitored
        function, `{prefix}_reward`, the weighted sum of means, and `{prefix}_reward_std`, the standard deviation of the
        weighted sum over prompts. A mean of which no prompt has a score is left out. `eval_records` keeps row, prompt
        and scores of every prompt, and on the main process the images of its first 64 (`"image"` is None elsewhere).

    Raises:
        ValueError: if there is no dataset, or one that the constructor would refuse.
    """
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
            metrics.update(trainer.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
        return metrics
    if dataset is None:
        raise ValueError(
            "Evaluation needs a dataset. Found none. Pass `eval_dataset` to the trainer or to `evaluate`."
        )
    check_dataset(dataset, "eval_dataset")
    started = time.perf_counter()
    funcs = [*trainer.reward_funcs, *trainer.monitor_funcs]
    names = reward_names(funcs)
    records = _records(trainer, dataset, funcs, names)
    metrics = {}
    rewards = torch.tensor([[r["rewards"][name] for name in names] for r in records], dtype=torch.float64)
    for name, column in zip(names, rewards.T, strict=True):
        values = column[column.isfinite()]
        if len(values):
            metrics[f"{metric_key_prefix}_rewards/{name}/mean"] = values.mean().item()
        elif name not in trainer._unscored:
            trainer._unscored.add(name)
            logger.warning("The reward %r scored none of the %d images of an evaluation.", name, len(records))
        if len(values) > 1:
            metrics[f"{metric_key_prefix}_rewards/{name}/se"] = values.std().item() / len(values) ** 0.5
    trained, weights = rewards[:, : len(trainer.reward_funcs)], trainer.reward_weights.cpu()
    total = weighted_sum(trained.nanmean(0, keepdim=True), weights).item()
    if math.isfinite(total):
        metrics[f"{metric_key_prefix}_reward"] = total
    totals = weighted_sum(trained, weights)
    totals = totals[totals.isfinite()]
    if len(totals) > 1:
        metrics[f"{metric_key_prefix}_reward_std"] = totals.std().item()
    metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
    trainer.eval_records = records
    if trainer.monitor_funcs:
        trainer._watch.see(metric_key_prefix, names, records, trainer.state.global_step)
    Trainer.log(trainer, dict(metrics))
    if trainer.log_completions:
        shown = [record for record in records if record["image"] is not None]
        trainer._send_samples(f"images/{metric_key_prefix}", shown)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def _records(trainer: Any, dataset, funcs: list, names: list[str]) -> list[dict[str, Any]]:
    """One record a row of `dataset`, in order: row, prompt, image or None, and rewards; on every rank."""
    args, world, rank = trainer.args, trainer.accelerator.num_processes, trainer.accelerator.process_index
    schedule = trainer.policy.schedule(args.eval_num_inference_steps, trainer.height, trainer.width)
    sampler = Sampler(schedule, trainer.transition, args.noise_level)
    guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
    share = -(-len(dataset) // world)  # every rank makes as many forwards; what is beyond the end is not counted
    mine = [min(rank + i * world, len(dataset) - 1) for i in range(share)]
    records: list[dict[str, Any]] = []
    pictures: list[Any] = []  # of this rank's first rows; kept on the main process
    scorer = trainer._open_scorer(funcs, names)
    averaged = trainer._ema.averaged() if trainer._ema is not None else nullcontext()
    with averaged, closing(scorer):
        for start in range(0, share, args.per_device_eval_batch_size):
            indices = mine[start : start + args.per_device_eval_batch_size]
            rows = [dataset[i] for i in indices]
            initial = evaluation_noise(args.seed, indices, trainer.latent_shape)
            empty = initial.new_zeros(len(rows), 0, *trainer.latent_shape)
            prompts = [row["prompt"] for row in rows]
            images = trainer._sample(trainer._conditions(prompts), initial, range(0), empty, sampler, guidance).images
            scored = trainer._submit(scorer, rows, images).result().rewards.tolist()
            if trainer.accelerator.is_main_process and len(pictures) < PICTURES:
                pictures.extend(to_pil(images[: PICTURES - len(pictures)]))
            for row, prompt, rewards in zip(indices, prompts, scored, strict=True):
                record = {"row": row, "prompt": prompt, "image": None}
                records.append({**record, "rewards": dict(zip(names, rewards, strict=True))})
    by_row = {record["row"]: record for record in gather_list(records)}
    for row, picture in zip(mine, pictures, strict=False):
        by_row[row]["image"] = picture
    return [by_row[i] for i in range(len(dataset))]


def predict(trainer: Any, test_dataset=None, ignore_keys=None, metric_key_prefix: str = "test"):
    """Not for this trainer: [`evaluate`] makes the images and scores them."""
    raise NotImplementedError(
        "An image model has no labels to predict. Call `evaluate(dataset)`: it returns the mean rewards, and "
        "`eval_records` holds each prompt's rewards and the first images."
    )
