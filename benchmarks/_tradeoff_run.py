"""One run of the trade-off benchmark: train the tiny world with one method, and measure what came of every objective."""

import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.aggregation import GRADIENT_RULES
from trl_apex.demo import HELD_OUT, demo_adapter, held_out_monitors, quiet
from trl_apex.evaluation import compare, seesaw_rate
from trl_apex.rewards import JPEGCompressibilityReward, OCRReward
from trl_apex.rewards.registry import load_reward
from trl_apex.tiny.prompts import COLOURS, RGB, SHAPES, tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards

OBJECTIVES = ("ocr", "pickscore", "deqa", "aesthetic")
JPEG, COLOUR = "jpeg_compressibility", "right_colour"
MEASURED = (*OBJECTIVES, JPEG, COLOUR, *HELD_OUT)

# By condition: `objectives`, `factors` on their rewards, `mixed` prompts, and other values for the configuration.
CONDITIONS: dict[str, dict[str, Any]] = {
    "natural": {},
    "conflict": {"objectives": (*OBJECTIVES, JPEG)},
    "field_units": {"factors": {"pickscore": 1 / 26, "deqa": 1 / 5}},  # as Flow-GRPO's users sum them
    "scaled": {"factors": {"aesthetic": 100.0}},
    "mixed": {"objectives": (*OBJECTIVES, COLOUR), "mixed": True, "prompt_mix": {"word": 1, "colour": 1}},
    "few_prompts": {"num_generations": 8},  # four prompts an iteration
    "long": {"max_steps": 384, "eval_steps": 96},  # three times the budget
}

# The budget of every run: 64 iterations of 8 prompts x 4 images, two updates each, all weights trained.
BUDGET: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 32,
    "generation_batch_size": 32,
    "rollout_batch_size": 32,
    "num_generations": 4,
    "num_inference_steps": 6,
    "guidance_scale": 1.0,
    "max_sequence_length": 12,
    "max_steps": 128,
    "gradient_checkpointing": False,
    "logging_steps": 2,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 32,
    "eval_num_inference_steps": 6,
    "per_device_eval_batch_size": 96,
    "disable_tqdm": True,
}
UPDATES = 2  # of an iteration
PROMPTS = 192  # of the test
DEVELOPMENT, FRESH = (0, 100), (1, 2, 3, 4, 5)  # seeds
WATCHED = ("clip_ratio/region_mean", "ratio/max_deviation", "movement", "rate_factor")  # means over a run
# Four noise levels an image, the images' final latents alone.
FINAL = {"timesteps_per_image": 4, "timestep_batch_size": 4, "num_iterations": UPDATES}
LOSS = {"loss_type": "nft", **FINAL}  # by the comparison of the losses
BASELINE = 128  # images before training, from whose mean rewards `apex` measures progress
# The settings that the plan chose on seed 0, with a quick schedule, for a short run; the package's defaults won in the end.
QUICK = {"need_coef": 4.0, "warmup_iterations": 1, "ramp_iterations": 1}
FULL = {"scale_blend": math.inf, "scale_reference": "initial"}  # scores in units of the first spread
PROBED = [r"attn\.to_out", r"attn\.to_add_out"]  # layers of the gradient probe
TARGETS = [0.75, 18.8, 3.4, 7.1]  # of OBJECTIVES, about one standard deviation above the base

# Changes of `QUICK`.
ABLATIONS: dict[str, dict[str, Any]] = {
    "quick": {},
    "without_start": {"baseline_prompts": 0},  # progress counts from the first batch
    "default_schedule": {"warmup_iterations": 10, "ramp_iterations": 10},  # the package's defaults
    "weak_need": {"warmup_iterations": 10, "ramp_iterations": 10, "need_coef": 1.0},  # the defaults but for the need
    "mild_need": {"warmup_iterations": 10, "ramp_iterations": 10, "need_coef": 2.0},
    "pooled_scale": {"scale_blend": math.inf},  # a group's own spread does not count
    "pooled_scale_unclipped": {"scale_blend": math.inf, "z_clip": math.inf},
    "full_scale_clipped": FULL,  # with the usual clip
    "full_scale": FULL | {"z_clip": 20.0},  # outliers count almost in full
    "full_scale_unclipped": FULL | {"z_clip": math.inf},
    "tight_clip": {"z_clip": 2.5, "advantage_clip": 2.5},  # half of what an outlier counts
    "without_stage_1": {"normalize_objectives": False},
    "without_stage_2": {"normalize_advantages": False},
    "without_priorities": {"adaptive_priorities": False},
    "without_potential": {"potential_coef": 0.0},
    "without_conflict": {"conflict_coef": 0.0},
    "without_need": {"need_coef": 0.0},
    "need_target": {"need_mode": "target", "reward_targets": TARGETS},
    "need_largest": {"need_scale": "largest"},
    "need_coef_2": {"need_coef": 2.0},
    "need_coef_1": {"need_coef": 1.0},
}
# What may keep a run with few prompts from breaking: other values for the configuration.
REMEDIES: dict[str, dict[str, Any]] = {
    "half_rate": {},  # see `CHOSEN` in tradeoffs.py
    "kl": {"beta": 0.04},
    "strong_kl": {"beta": 0.4},
    "average": {"ema_decay": 0.9},
    "steady": {"target_movement": 3.5e-4},
    "control": {"adam_epsilon": 1.01e-8},  # no remedy: another course from the first update on
}


@cache
def production_rewards() -> dict[str, Any]:
    """The production reward classes on the tiny networks, loaded once a process, and the colour of an image."""
    ocr = OCRReward(confidence=True, workers=1, engine_params={"Rec.rec_img_shape": [3, 48, 96]})
    rewards = (ocr, *tiny_rewards()[1:], JPEGCompressibilityReward(), right_colour)
    return {reward.__name__: reward for reward in rewards}


own_reward = cache(load_reward)  # loaded once a process, as those


def options_of(condition: str) -> dict[str, Any]:
    """What [`CONDITIONS`] says; any other condition is the name of a reward, which `natural` gets as a fifth objective."""
    if condition not in CONDITIONS:
        reward = own_reward(condition)
        return {"objectives": (*OBJECTIVES, reward.__name__), "added": reward}
    return dict(CONDITIONS[condition])


def right_colour(images, wanted=None, **kwargs):
    """Cosine of the mean colour, without its grey, with the `wanted` one; None where the prompt wants a word instead."""
    scores: list[float | None] = []
    for image, name in zip(images, wanted or [None] * len(images), strict=True):
        if name is None:
            scores.append(None)
            continue
        mean, goal = image.mean((1, 2)), torch.tensor(RGB[name], dtype=image.dtype)
        scores.append(float(torch.nn.functional.cosine_similarity(mean - mean.mean(), goal - goal.mean(), dim=0)))
    return scores


def prompts_of(kind: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of the kind "word" (OCR has a target, no colour is wanted) or "colour" (the reverse, no word)."""
    if kind == "word":
        rows = tiny_prompts(split, count, seed)
        return [{**row, "kind": kind, "target": row["word"], "wanted": None} for row in rows]
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES][:count]
    own = {"kind": kind, "target": None, "word": None}
    return [{"prompt": f"a {c} {s}", "colour": c, "shape": s, "wanted": c, **own} for c, s in pairs]


def of_words(monitor: Any) -> Any:
    """The same monitor on the prompts that have a word; None elsewhere."""

    def score(images, word, **columns):
        at = [i for i, one in enumerate(word) if one is not None]
        there = {name: [values[i] for i in at] for name, values in columns.items() if isinstance(values, list)}
        shown = images[at] if isinstance(images, torch.Tensor) else [images[i] for i in at]
        found = monitor(images=shown, word=[word[i] for i in at], **there) if at else []
        scores: list[float | None] = [None] * len(word)
        for i, value in zip(at, found, strict=True):
            scores[i] = float(value)
        return scores

    score.__name__ = monitor.__name__
    return score


def method_settings(method: str, objectives: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The objectives that a method trains on, of those of the condition, and its configuration.

    A method is a rule of the aggregator with the package's defaults, `only_NAME`, `tuned_W1_W2_...` (weights of
    `sum_then_normalize`) or `apex:NAME`, a row of `ABLATIONS`; `METHOD:NAME` is any of them with one of `REMEDIES`.
    """
    rest, _, change = method.rpartition(":")
    if change in REMEDIES:
        trained, own = method_settings(rest, objectives)
        return trained, own | REMEDIES[change]
    if method.startswith("only_"):
        return (method.removeprefix("only_"),), {"multi_objective_aggregation": "sum_then_normalize"}
    if method.startswith("tuned_"):
        weights = [float(weight) for weight in method.split("_")[1:]]
        return objectives, {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": weights}
    if method == "apex":
        return objectives, {"baseline_prompts": BASELINE}
    if rest == "apex":
        part = dict(ABLATIONS[change])
        start = part.pop("baseline_prompts", BASELINE)
        return objectives, {"aggregation_options": {**QUICK, **part}, "baseline_prompts": start}
    probe = {"gradient_probe": True, "probe_layers": PROBED} if method in GRADIENT_RULES else {}
    return objectives, {"multi_objective_aggregation": method, **probe}


def scaled(reward: Any, factor: float) -> Any:
    """The same reward in another unit."""
    if factor == 1:
        return reward

    def score(**inputs: Any) -> list[float | None]:
        return [None if value is None else factor * value for value in reward(**inputs)]

    score.__name__ = reward.__name__
    return score


def build_trainer(
    condition: str,
    method: str,
    seed: int,
    prompts: int,
    output_dir: str,
    *,
    adapter: bool = False,
    **changes: Any,
) -> APEXTrainer:
    """The trainer of one run, with every reward that is not trained on as a monitor. `adapter`: the LoRA of the demo."""
    quiet()
    options = options_of(condition)
    objectives, own = method_settings(method, options.pop("objectives", OBJECTIVES))
    factors, mixed, added = options.pop("factors", {}), options.pop("mixed", False), options.pop("added", None)
    kinds = ("word", "colour") if mixed else ("word",)
    config = APEXConfig(output_dir=output_dir, seed=seed, **{**BUDGET, **LOSS, **options, **own, **changes})
    measured = production_rewards() | {monitor.__name__: of_words(monitor) for monitor in held_out_monitors()}
    if added is not None:
        measured[added.__name__] = added
    train, test = (
        Dataset.from_list([row for kind in kinds for row in prompts_of(kind, split, count // len(kinds), own_seed)])
        for split, count, own_seed in (("train", 1024, seed), ("test", prompts, 0))
    )
    pipeline = load_tiny_pipeline()
    pipeline.transformer.float()
    trainer = APEXTrainer(
        pipeline,
        [scaled(measured[name], factors.get(name, 1.0)) for name in objectives],
        config,
        train,
        eval_dataset=test,
        peft_config=demo_adapter() if adapter else None,
        monitor_funcs=[measured[name] for name in MEASURED if name not in objectives and (name != COLOUR or mixed)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def table_of(trainer: APEXTrainer, names: list[str], factors: dict[str, float]) -> torch.Tensor:
    """Rewards `[P, M]` of the trainer's last evaluation, in their natural units; NaN where there is none."""
    found = [record["rewards"] for record in trainer.eval_records]
    rows = [[math.nan if row.get(name) is None else row[name] for name in names] for row in found]
    units = torch.tensor([factors.get(name, 1.0) for name in names], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64) / units


class Cost(transformers.TrainerCallback):
    """What training had cost at each evaluation: images, processor time and denoiser rows; evaluations do not count."""

    def __init__(self, trainer: APEXTrainer) -> None:
        self.points: list[tuple[int, float, int]] = []
        self._images = trainer.args.generation_batch_size
        self._rows = 0  # a row with a gradient counts as three: its backward pass costs two
        self._seconds, self._since = 0.0, time.process_time()
        trainer.policy.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self._rows += len(inputs["hidden_states"]) * (3 if torch.is_grad_enabled() else 1)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._spent = state.global_step // UPDATES * self._images, round(self._seconds, 1), self._rows

    def on_evaluate(self, args, state, control, **kwargs):
        self.points.append(self._spent)
        self._since, self._rows = time.process_time(), self._spent[2]


def run(condition: str, method: str, rate: float, seed: int, prompts: int, **changes: Any) -> dict[str, Any]:
    """Train once with a method (see [`method_settings`]) and measure it on so many test prompts, one image each.

    The seed is that of prompts, weights and all noise, evaluation's too; all methods share it, so differences are paired.
    `changes` are other values for the configuration. Of `curve`, each point is the gains at an evaluation, and of `cost` what
    [`Cost`] says.
    """
    logging.disable(logging.WARNING)
    options = options_of(condition)
    factors, judged = options.get("factors", {}), options.get("objectives", OBJECTIVES)
    names = [*judged, *(name for name in MEASURED if name not in judged)]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(condition, method, seed, prompts, scratch, learning_rate=rate, **changes)
        trainer.evaluate()
        base = table_of(trainer, names, factors)
        cost = Cost(trainer)
        trainer.add_callback(cost)
        trainer.train()
        tuned = table_of(trainer, names, factors)
    result = compare(names, base, tuned, len(judged))
    gains = {name: row["gain"] for name, row in result["objectives"].items()}
    differences = {name: (row["base"], row["tuned"]) for name, row in result["held_out"].items()}
    return {
        "condition": condition,
        "method": method,
        "rate": rate,
        "seed": seed,
        "gains": gains,
        "errors": {name: row["gain_se"] for name, row in result["objectives"].items()},
        "worst_gain": min(gains.values()),
        "mean_gain": statistics.mean(gains.values()),
        "hypervolume": result["hypervolume"],
        "specialist_share": None,
        "held_out": {name: tuned - base for name, (base, tuned) in differences.items() if base is not None},
        "jdr": result["domination"]["all_at_least_as_good"],
        "cost": cost.points,
        **dynamics(trainer.state.log_history, list(judged), base, factors),
    }


def dynamics(
    history: list[dict[str, Any]], objectives: list[str], base: torch.Tensor, factors: dict[str, float]
) -> dict[str, Any]:
    """What the logs of a run say of its course; the first columns of `base` are the objectives."""
    evaluations = [entry for entry in history if f"eval_rewards/{objectives[0]}/mean" in entry]
    columns = [column[column.isfinite()] for column in base.T[: len(objectives)]]
    units = torch.stack([column.std() for column in columns])
    points = {"mean": [[column.mean().item() for column in columns]]}
    points["se"] = [[(column.std() / len(column) ** 0.5).item() for column in columns]]
    for kind, rows in points.items():
        keys = {name: f"eval_rewards/{name}/{kind}" for name in objectives}
        rows += [[entry[key] / factors.get(name, 1.0) for name, key in keys.items()] for entry in evaluations]
    means, errors = (torch.tensor(rows, dtype=torch.float64) for rows in points.values())
    curve = (means - means[0]) / units
    priorities = {name: [e[f"priority/{name}"] for e in history if f"priority/{name}" in e] for name in objectives}
    logs = {name: [entry[name] for entry in history if name in entry] for name in WATCHED}
    return {
        "seesaw_rate": seesaw_rate(means, errors),
        "logs": {name: statistics.mean(values) for name, values in logs.items() if values},
        "curve": [[round(value, 3) for value in point] for point in curve.tolist()],
        "priorities": {name: [round(value, 3) for value in values] for name, values in priorities.items() if values},
    }


def execute(
    jobs: dict[str, tuple[tuple, dict[str, Any]]],
    workers: int,
    folder: Path,
    function: Callable[..., dict[str, Any]] = run,
) -> list[dict[str, Any]]:
    """Rows of all jobs in order: by name, positional and named arguments of `function`. Rows that have a file are read from it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in jobs}
    left = [name for name, path in paths.items() if not path.exists()]
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(function, *jobs[name][0], **jobs[name][1]): name for name in left}
        for done, future in enumerate(as_completed(futures), start=1):
            row, name = future.result(), futures[future]
            paths[name].write_text(json.dumps(row))
            gains = ", ".join(f"{objective} {gain:+.2f}" for objective, gain in row["gains"].items())
            print(f"[{done}/{len(left)}] {name}: {gains}", flush=True)
    return [json.loads(path.read_text()) for path in paths.values()]
