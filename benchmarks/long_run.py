"""A long training run of the tiny world: does memory stay flat, do files stay bounded, does the state stay right?

    python benchmarks/long_run.py [--iterations 2000] [--smoke] [--out benchmarks/results]

One process, one thread, two prompts x two images, two denoising steps, three cheap rewards of which one fails for an
image in a hundred; a checkpoint every 50 iterations and an evaluation every 100. All rewards are kept, and replayed
through a fresh aggregator at the end: its priorities and its state must be the run's own. Processor time is what
compares the first with the last iterations, since other programs share the machine.
"""

import json
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, slope, status_mb, write
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.aggregation import MultiObjectiveRewardAggregator
from trl_apex.demo import quiet
from trl_apex.rewards import JPEGCompressibilityReward
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline

LOGGED_EVERY = 10
BLOCK = 100  # iterations whose memory readings are averaged to one point of the fit
IN_GROUP, PROMPTS = 2, 2


def redness(images: Tensor, **others: Any) -> list[float]:
    """Mean of the red channel."""
    return images[:, 0].mean((1, 2)).tolist()


class SometimesMissing:
    """Contrast, without an answer for one image in a hundred."""

    __name__ = "contrast"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, **others: Any) -> list[float | None]:
        values: list[float | None] = images.std((1, 2, 3)).tolist()
        self.calls += 1
        if self.calls % 25 == 0:
            values[0] = None
        return values


class RecordingTrainer(APEXTrainer):
    """Keeps what the aggregator was given, in memory that is there from the start."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen = torch.zeros(self.args.max_steps, PROMPTS * IN_GROUP, len(self.reward_funcs))

    def _compute_advantages(self, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.seen[self.aggregator.iteration] = rewards
        return super()._compute_advantages(rewards, group_ids)


class Readings(TrainerCallback):
    """Memory, processor time, threads and open files after every iteration, and the files of the run."""

    KEYS = ("cpu", "wall", "rss_kb", "threads", "open_files")

    def __init__(self, output_dir: Path, iterations: int) -> None:
        self.output_dir = output_dir
        self.table = torch.zeros(iterations, len(self.KEYS), dtype=torch.float64)
        self.files: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **others: Any) -> None:
        row = [time.process_time(), time.perf_counter(), 1024 * status_mb("VmRSS")]
        row += [threading.active_count(), len(os.listdir("/proc/self/fd"))]
        self.table[state.global_step - 1] = torch.tensor(row, dtype=torch.float64)

    def on_save(self, args, state, control, **others: Any) -> None:
        sizes = [path.stat().st_size for path in self.output_dir.rglob("*") if path.is_file()]
        checkpoints = len(list(self.output_dir.glob("checkpoint-*")))
        self.files.append({"files": len(sizes), "checkpoints": checkpoints, "megabytes": sum(sizes) / 2**20})


def replay(trainer: RecordingTrainer) -> dict[str, Any]:
    """Aggregate the kept rewards anew, and compare with what the run logged and holds."""
    args = trainer.args
    fresh = MultiObjectiveRewardAggregator(
        trainer.reward_func_names, trainer.reward_weights.tolist(), "apex", options=args.apex_options()
    )
    groups = torch.arange(PROMPTS * IN_GROUP) // IN_GROUP
    recomputed = [fresh(rewards, groups)[1] for rewards in trainer.seen]
    largest, compared = 0.0, 0
    for entry in trainer.state.log_history:
        last = int(entry["step"])
        for name in trainer.reward_func_names:
            if (key := f"priority/{name}") in entry:
                window = [metrics[key] for metrics in recomputed[last - LOGGED_EVERY : last]]
                largest = max(largest, abs(entry[key] - sum(window) / len(window)))
                compared += 1
    return {
        "priorities_compared": compared,
        "largest_difference": largest,
        "state_equal": fresh.state_dict() == trainer.aggregator.state_dict(),
        "final_priorities": trainer.aggregator.priorities,
    }


def run(iterations: int, output_dir: Path) -> dict[str, Any]:
    """Train, and return every figure."""
    torch.set_num_threads(1)
    quiet()
    logging.getLogger("trl_apex").setLevel(logging.ERROR)
    config = APEXConfig(
        output_dir=str(output_dir), use_cpu=True, bf16=False, per_device_train_batch_size=PROMPTS * IN_GROUP,
        generation_batch_size=PROMPTS * IN_GROUP, num_generations=IN_GROUP, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=12, max_steps=iterations, learning_rate=1e-5, logging_steps=LOGGED_EVERY,
        save_strategy="steps", save_steps=50, save_total_limit=2, eval_strategy="steps", eval_steps=100,
        eval_num_inference_steps=2, per_device_eval_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    readings = Readings(output_dir, iterations)
    trainer = RecordingTrainer(
        load_tiny_pipeline(),
        [redness, SometimesMissing(), JPEGCompressibilityReward()],
        config,
        tiny_prompts("train", 64),
        eval_dataset=tiny_prompts("test", 4),
        peft_config=LoraConfig(r=4, lora_alpha=8),
        callbacks=[readings],
    )
    assert trainer.updates_per_iteration == 1
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {**figures(readings, iterations), **replay(trainer), "finite": finite(trainer)}


def finite(trainer: APEXTrainer) -> bool:
    """Whether every trained weight and every logged loss is a number."""
    weights = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return weights and bool(losses.isfinite().all())


def figures(readings: Readings, iterations: int) -> dict[str, Any]:
    """Slopes, bounds and ratios."""
    rows = [dict(zip(readings.KEYS, row, strict=True)) for row in readings.table.tolist()]
    assert all(row["wall"] for row in rows)
    edge = iterations // 10
    settled = [row["rss_kb"] for row in rows[edge:]]
    block = min(BLOCK, len(settled) // 6)

    def growth(part: list[float]) -> tuple[float, float | None]:
        means = [statistics.mean(part[i : i + block]) for i in range(0, len(part) - block + 1, block)]
        return slope([i * block for i in range(len(means))], means)

    rise, error = growth(settled)
    second_half, half_error = growth(settled[len(settled) // 2 :])

    def seconds(key: str, part: list[dict[str, float]]) -> list[float]:
        return [b[key] - a[key] for a, b in zip(part, part[1:], strict=False)]

    cpu, wall = seconds("cpu", rows), seconds("wall", rows)
    tenths = [sum(cpu[i * edge : (i + 1) * edge]) / sum(cpu[-edge:]) for i in range(len(cpu) // edge)]
    files = readings.files
    early, end = files[min(2, len(files) - 1)], files[-1]
    return {
        "iterations": iterations,
        "seconds_per_iteration": sum(wall) / len(wall),
        "rss_mb": {"after_warmup": settled[0] / 1024, "end": settled[-1] / 1024, "largest": max(settled) / 1024},
        "rss_slope_kb_per_iteration": {"slope": rise, "se": error, "from_iteration": edge, "block": block},
        "rss_slope_second_half": {"slope": second_half, "se": half_error},
        "threads": {"early": rows[edge]["threads"], "end": rows[-1]["threads"]},
        "open_files": {"early": rows[edge]["open_files"], "end": rows[-1]["open_files"]},
        "checkpoints": {"most": max(saved["checkpoints"] for saved in files), "save_total_limit": 2},
        "files": {"early": early["files"], "end": end["files"]},
        "megabytes": {"early": early["megabytes"], "end": end["megabytes"]},
        "throughput": {
            "iterations_compared": edge,
            "last_over_first_by_processor_time": sum(cpu[:edge]) / sum(cpu[-edge:]),
            "last_over_first_by_wall_time": sum(wall[:edge]) / sum(wall[-edge:]),
            "each_tenth_over_the_last_by_processor_time": tenths,
        },
    }


def main() -> None:
    iterations = {"type": int, "default": 2000}
    given = arguments(__doc__, "100 iterations, to see that it runs", iterations=iterations).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(100 if given.smoke else given.iterations, Path(folder))
    settings = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    write(given.out / "long_run.json", {"settings": settings, **result})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
