"""The losses against each other on the tiny world: what the same images and the same processor time buy.

    python benchmarks/losses.py --part scan        # learning rates, on the development seeds 0 and 100
    python benchmarks/losses.py                    # five other seeds with the chosen rates: time to quality
    python benchmarks/losses.py --smoke --out runs/smoke
    python benchmarks/losses.py --redraw           # the tables again, from the results

Every finished run is kept under `runs/`, so that the command can be stopped and started again. The plan is in
docs/benchmarks.md, "The losses against each other".
"""

import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from _bench import arguments, machine, mean_and_error, table, write
from _tradeoff_run import MEASURED, OBJECTIVES, production_rewards, table_of

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.demo import HELD_OUT, held_out_monitors, quiet
from trl_apex.evaluation import compare
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline

GOAL = 0.25  # base standard deviations
PROMPTS = 96
DEVELOPMENT, FRESH = (0, 100), (1, 2, 3, 4, 5)

# Every run: 40 iterations of 8 prompts x 4 images, two updates each, all weights trained.
BUDGET: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 32,
    "generation_batch_size": 32,
    "rollout_batch_size": 32,
    "num_generations": 4,
    "num_inference_steps": 6,
    "guidance_scale": 1.0,
    "max_sequence_length": 12,
    "max_steps": 80,
    "gradient_checkpointing": False,
    "logging_steps": 2,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 20,
    "eval_num_inference_steps": 6,
    "per_device_eval_batch_size": PROMPTS,
    "disable_tqdm": True,
}
APEX = {"aggregation_options": {"need_coef": 4.0, "warmup_iterations": 1, "ramp_iterations": 1}}
SDE = {"loss_type": "grpo", "epsilon": 1e-3, "noise_level": 0.7}
FINAL = {"timesteps_per_image": 4, "timestep_batch_size": 4, "num_iterations": 2, **APEX}
METHODS: dict[str, dict[str, Any]] = {
    # Flow-GRPO's loop: every step stochastic and trained, rewards summed and normalized.
    "plain": {
        **SDE,
        "timestep_batch_size": 5,
        "num_iterations": 2,
        "multi_objective_aggregation": "sum_then_normalize",
    },
    "grpo": {
        **SDE,
        "timestep_batch_size": 2,
        "num_iterations": 2,
        "sde_window_size": 2,
        "sde_window_range": [0, 4],
        **APEX,
    },
    "awm": {"loss_type": "awm", **FINAL},
    "nft": {"loss_type": "nft", **FINAL},
    "fpo": {"loss_type": "fpo", **FINAL},
}
SCANNED = {name: (1e-4, 3e-4) if name in ("plain", "grpo") else (1e-4, 2e-4) for name in METHODS}
CHOSEN = dict.fromkeys(METHODS, 1e-4)  # by the scan

Row = dict[str, Any]


class Course(transformers.TrainerCallback):
    """What training had cost at each evaluation; the evaluations themselves do not count."""

    def __init__(self, trainer: APEXTrainer) -> None:
        self.trainer, self.points = trainer, []
        self.rows = 0  # a row with a gradient counts as three: its backward pass costs two
        self._start = self._before = time.process_time()
        self._rows_before = 0
        trainer.policy.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.rows += len(inputs["hidden_states"]) * (3 if torch.is_grad_enabled() else 1)

    def on_step_end(self, args, state, control, **kwargs):
        self._before, self._rows_before = time.process_time(), self.rows

    def on_evaluate(self, args, state, control, **kwargs):
        images = state.global_step // 2 * args.generation_batch_size
        spent = {"images": images, "cpu_seconds": self._before - self._start, "rows": self._rows_before}
        self.points.append({**spent, "rewards": table_of(self.trainer)})
        self._start += time.process_time() - self._before
        self.rows = self._rows_before


def run(method: str, rate: float, seed: int, folder: Path, prompts: int = PROMPTS, **changes: Any) -> Row:
    """Train once; the gains over the base at each evaluation, and what they had cost.

    Args:
        method (`str`): a key of `METHODS`.
        rate (`float`): learning rate.
        seed (`int`): of prompts and all noise, evaluation's too.
        folder (`Path`): for the file of this run.
        prompts (`int`): test prompts, one image each.
        changes: other values for the configuration.
    """
    quiet()
    rewards, pipeline = production_rewards(), load_tiny_pipeline()
    pipeline.transformer.float()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = APEXTrainer(
            pipeline,
            [rewards[name] for name in OBJECTIVES],
            APEXConfig(output_dir=scratch, seed=seed, learning_rate=rate, **{**BUDGET, **METHODS[method], **changes}),
            tiny_prompts("train", 1024, seed),
            eval_dataset=tiny_prompts("test", prompts),
            monitor_funcs=[rewards[name] for name in MEASURED if name in rewards and name not in OBJECTIVES]
            + held_out_monitors(),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.evaluate()
        base = table_of(trainer)
        course = Course(trainer)
        trainer.add_callback(course)
        trainer.train()
    columns = [MEASURED.index(name) for name in (*OBJECTIVES, *HELD_OUT)]
    for point in course.points:
        tuned = point.pop("rewards")
        found = compare([*OBJECTIVES, *HELD_OUT], base[:, columns], tuned[:, columns], len(OBJECTIVES))
        point["gains"] = {name: row["gain"] for name, row in found["objectives"].items()}
        point["held_out"] = {name: row["tuned"] - row["base"] for name, row in found["held_out"].items()}
    row = {"method": method, "rate": rate, "seed": seed, "course": course.points}
    path = folder / f"{method}-{rate:g}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row


def cost(row: Row, names: tuple[str, ...], kind: str) -> float | None:
    """What it had cost until the worst of `names` was `GOAL` above the base, between evaluations by a line; None if never."""
    before, low = {"images": 0, "cpu_seconds": 0.0, "rows": 0}, 0.0
    for point in row["course"]:
        worst = min(point["gains"][name] for name in names)
        if worst >= GOAL:
            share = (GOAL - low) / (worst - low)
            return before[kind] + share * (point[kind] - before[kind])
        before, low = point, worst
    return None


def jobs_of(part: str, seeds: list[int] | None) -> list[tuple[str, float, int]]:
    """Seed by seed, so that a run that is stopped early holds whole seeds."""
    if part == "scan":
        return [(m, rate, seed) for seed in seeds or DEVELOPMENT for m in METHODS for rate in SCANNED[m]]
    return [(method, CHOSEN[method], seed) for seed in seeds or FRESH for method in METHODS]


def execute(jobs: list[tuple[str, float, int]], workers: int, folder: Path, **changes: Any) -> list[Row]:
    """Rows of all jobs in order; those that have a file are read from it."""
    found = {}
    for path in folder.glob("*.json"):
        row = json.loads(path.read_text())
        found[row["method"], row["rate"], row["seed"]] = row
    left = [job for job in jobs if job not in found]
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run, *job, folder, **changes): job for job in left}
        for done, future in enumerate(as_completed(futures), start=1):
            found[futures[future]] = row = future.result()
            last = row["course"][-1]
            gains = ", ".join(f"{name} {gain:+.2f}" for name, gain in last["gains"].items())
            print(f"[{done}/{len(left)}] {futures[future]}: {gains} ({last['cpu_seconds']:.0f} s)", flush=True)
    return [found[job] for job in jobs if job in found]


def cell(values: list[float | None], digits: int = 2, sign: str = "+") -> str:
    """Mean and standard error; of costs, how many of the runs reached the goal where not all did."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    mean, error = mean_and_error(known)
    text = f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def summary(rows: list[Row]) -> str:
    """A line a method and rate: gains at the end, and what the goal cost."""
    lines = []
    for key in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["rate"]) == key]
        last = [row["course"][-1] for row in mine]
        worst = [min(point["gains"].values()) for point in last]
        mean = [statistics.mean(point["gains"].values()) for point in last]
        lines.append(
            [key[0], f"{key[1]:g}", str(len(mine)), cell(worst), cell(mean)]
            + [cell([point["gains"][name] for point in last]) for name in OBJECTIVES]
            + [cell([point["held_out"][name] for point in last]) for name in HELD_OUT]
            + [cell([cost(row, names, "cpu_seconds") for row in mine], 0, "") for names in (("ocr",), OBJECTIVES)]
            + [cell([cost(row, OBJECTIVES, kind) for row in mine], 0, "") for kind in ("images", "rows")]
        )
    head = ["loss", "rate", "seeds", "worst", "mean", *OBJECTIVES, "exact word", "attributes"]
    head += ["CPU-s, OCR +.25", "CPU-s, all +.25", "images, all +.25", "rows, all +.25"]
    return table(head, lines, "---:") + "\n"


def main() -> None:
    given = arguments(
        __doc__,
        "two short runs, to see that it works",
        part={"choices": ("scan", "compare"), "default": "compare"},
        seeds={"type": int, "nargs": "*"},
        workers={
            "type": int,
            "default": 1,
            "help": "processes; times are of the processor, but two disturb each other",
        },
        redraw={"action": "store_true", "help": "only write the tables again"},
        runs={"type": Path, "default": Path("runs/losses"), "help": "where finished runs are kept"},
    ).parse_args()
    path = given.out / ("losses_scan.json" if given.part == "scan" else "losses.json")
    if given.redraw:
        found = json.loads(path.read_text())
    elif given.smoke:
        small = {"max_steps": 4, "eval_steps": 2, "prompts": 8}
        jobs = [("plain", 1e-4, 0), ("fpo", 1e-4, 0)]
        found = {"settings": small, "rows": execute(jobs, 1, given.out / "runs", **small)}
    else:
        rows = execute(jobs_of(given.part, given.seeds), given.workers, given.runs)
        found = {"machine": machine(), "budget": BUDGET, "methods": METHODS, "rows": rows}
    write(path, found, summary(found["rows"]), digits=4)
    if given.part == "compare":
        times = [
            {
                "method": row["method"],
                "seed": row["seed"],
                "cpu_seconds_ocr": cost(row, ("ocr",), "cpu_seconds"),
                "cpu_seconds_all": cost(row, OBJECTIVES, "cpu_seconds"),
            }
            for row in found["rows"]
        ]
        write(given.out / "time_to_quality.json", {"rows": times}, digits=4)


if __name__ == "__main__":
    main()
