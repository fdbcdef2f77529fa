"""Evaluation during training: one image a prompt, deterministic, every reward and what is only watched."""

import time
from contextlib import closing, nullcontext
from typing import Any

import torch
from transformers import Trainer

from ..distributed import gather_list
from ..policy.sampler import Sampler
from ..rewards.images import to_pil
from ..rollout.noise import evaluation_noise
from .inputs import reward_names
from .monitor import RewardHackingWatch


class EvaluatingMixin(Trainer):
    """`evaluate()`, the images it made, and the watch over monitored rewards."""

    eval_records: list[dict[str, Any]] = []
    _watch: RewardHackingWatch
    control: Any

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample one image per evaluation prompt, without noise on the way, and average every reward.

        Deterministic: `eval_num_inference_steps` ODE steps from noise keyed by the prompt's row, with the averaged
        weights where there are any. Each row counts once on any number of processes.

        Args:
            eval_dataset (`datasets.Dataset` or dict of them, *optional*): instead of the trainer's own.
            ignore_keys: accepted for compatibility.
            metric_key_prefix (`str`): of the metrics' names.

        Returns:
            `dict`: `{prefix}_rewards/{name}/mean` and `/se` (standard error over prompts) of each reward and monitored
            function, and `{prefix}_reward`, the weighted sum of means. The images and their scores are kept in
            `eval_records` on the main process.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if dataset is None:
            raise ValueError(
                "Evaluation needs a dataset. Found none. Pass `eval_dataset` to the trainer or to `evaluate`."
            )
        started = time.perf_counter()
        funcs = [*self.reward_funcs, *self.monitor_funcs]
        names = reward_names(funcs)
        records = self._evaluation_records(dataset, funcs, names)
        metrics = {}
        for name in names:
            values = torch.tensor([r["rewards"][name] for r in records], dtype=torch.float64)
            values = values[values.isfinite()]
            if len(values):
                metrics[f"{metric_key_prefix}_rewards/{name}/mean"] = values.mean().item()
            if len(values) > 1:
                metrics[f"{metric_key_prefix}_rewards/{name}/se"] = values.std().item() / len(values) ** 0.5
        means = [metrics.get(f"{metric_key_prefix}_rewards/{name}/mean", 0.0) for name in self.reward_func_names]
        metrics[f"{metric_key_prefix}_reward"] = sum(
            w * m for w, m in zip(self.reward_weights.tolist(), means, strict=True)
        )
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.eval_records = records
        if self.monitor_funcs:
            self._watch.see(metric_key_prefix, names, records, self.state.global_step)
        Trainer.log(self, dict(metrics))
        if self.log_completions:
            self._send_samples(f"images/{metric_key_prefix}", records)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_records(self, dataset, funcs: list, names: list[str]) -> list[dict[str, Any]]:
        """One record a row of `dataset`, in order: row, prompt, image and rewards; on every rank."""
        args, world, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        schedule = self.policy.schedule(args.eval_num_inference_steps, self.height, self.width)
        sampler = Sampler(schedule, self.transition, args.noise_level)
        guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        share = -(-len(dataset) // world)  # every rank makes as many forwards; what is beyond the end is not counted
        mine = [min(rank + i * world, len(dataset) - 1) for i in range(share)]
        records = []
        scorer = self._open_scorer(funcs, names)
        averaged = self._ema.averaged() if self._ema is not None else nullcontext()
        with averaged, closing(scorer):
            for start in range(0, share, args.per_device_eval_batch_size):
                indices = mine[start : start + args.per_device_eval_batch_size]
                rows = [dataset[i] for i in indices]
                initial = evaluation_noise(args.seed, indices, self.latent_shape)
                empty = initial.new_zeros(len(rows), 0, *self.latent_shape)
                prompts = [row["prompt"] for row in rows]
                images = self._sample(self._conditions(prompts), initial, range(0), empty, sampler, guidance).images
                scored = self._submit(scorer, rows, images).result().rewards.tolist()
                for row, image, prompt, rewards in zip(indices, to_pil(images), prompts, scored, strict=True):
                    record = {"row": row, "prompt": prompt, "image": image}
                    records.append({**record, "rewards": dict(zip(names, rewards, strict=True))})
        by_row = {record["row"]: record for record in gather_list(records)}
        return [by_row[i] for i in range(len(dataset))]
