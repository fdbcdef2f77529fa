"""One run of the trade-off benchmark: train the tiny world with one method, and measure what came of every objective."""

import json
import logging
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.demo import HELD_OUT, held_out_monitors, quiet
from trl_apex.evaluation import compare, hypervolume, seesaw_rate
from trl_apex.rewards import JPEGCompressibilityReward, OCRReward
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards

OBJECTIVES = ("ocr", "pickscore", "deqa", "aesthetic")
JPEG = "jpeg_compressibility"
MEASURED = (*OBJECTIVES, JPEG, *HELD_OUT)

CONDITIONS: dict[str, dict[str, Any]] = {
    "natural": {},
    "field_units": {"factors": {"pickscore": 1 / 26, "deqa": 1 / 5}},  # as Flow-GRPO's users sum them
    "scaled": {"factors": {"aesthetic": 100.0}},
    "conflict": {"objectives": (*OBJECTIVES, JPEG)},
    "kl": {"beta": 0.04},
    "long": {"max_steps": 90, "eval_steps": 30},  # three times the budget
}

# The budget of every run: 30 iterations of 8 prompts x 4 images, one update each, all weights trained. The images of a
# group share their initial noise, so that they differ by the two trained steps alone; that makes so small a budget enough.
BUDGET: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 32,
    "generation_batch_size": 32,
    "num_generations": 4,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "max_sequence_length": 12,
    "sde_window_size": 2,
    "sde_window_range": [0, 3],
    "share_initial_noise": True,
    "timestep_batch_size": 2,
    "learning_rate": 6e-5,
    "epsilon": 1e-3,
    "max_steps": 30,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "eval_num_inference_steps": 4,
    "per_device_eval_batch_size": 64,
    "disable_tqdm": True,
    "reward_overlap": False,
    "gradient_probe": True,
    "probe_every": 5,
    "probe_layers": [r"attn\.to_out", r"attn\.to_add_out"],
}
APEX = {"need_coef": 2.0, "warmup_iterations": 2, "ramp_iterations": 1, "priority_ema": 0.5}  # quick, for a short run
TARGETS = [0.75, 18.8, 3.4, 7.1]  # of OBJECTIVES, about one standard deviation above the base

ABLATIONS: dict[str, dict[str, Any]] = {
    "apex": {},
    "without_stage_1": {"normalize_objectives": False},
    "without_stage_2": {"normalize_advantages": False},
    "without_priorities": {"adaptive_priorities": False},
    "without_potential": {"potential_coef": 0.0},
    "without_conflict": {"conflict_coef": 0.0},
    "without_need": {"need_coef": 0.0},
    "conflict_gradient": {"conflict_source": "gradient"},
    "conflict_population": {"conflict_source": "population"},
    "need_target": {"need_mode": "target", "reward_targets": TARGETS},
    "need_coef_1": {"need_coef": 1.0},
}


@cache
def production_rewards() -> dict[str, Any]:
    """The production reward classes on the tiny networks, loaded once a process."""
    ocr = OCRReward(confidence=True, workers=1, engine_params={"Rec.rec_img_shape": [3, 48, 96]})
    return {reward.__name__: reward for reward in (ocr, *tiny_rewards()[1:], JPEGCompressibilityReward())}


def method_settings(method: str, objectives: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The objectives that a method trains on, of those of the condition, and its configuration.

    A method is a rule of the aggregator, `only_NAME`, `tuned_W1_W2_...` (weights of `sum_then_normalize`) or `apex:NAME`, a row
    of `ABLATIONS`.
    """
    if method.startswith("only_"):
        return (method.removeprefix("only_"),), {"multi_objective_aggregation": "sum_then_normalize"}
    if method.startswith("tuned_"):
        weights = [float(weight) for weight in method.split("_")[1:]]
        return objectives, {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": weights}
    if method.startswith("apex"):
        part = ABLATIONS[method.partition(":")[2] or "apex"]
        return objectives, {"aggregation_options": {**APEX, **part}}
    return objectives, {"multi_objective_aggregation": method}


def scaled(reward: Any, factor: float) -> Any:
    """The same reward in another unit."""
    if factor == 1:
        return reward

    def score(**inputs: Any) -> list[float | None]:
        return [None if value is None else factor * value for value in reward(**inputs)]

    score.__name__ = reward.__name__
    return score


def build_trainer(
    condition: str, method: str, seed: int, prompts: int, output_dir: str, **changes: Any
) -> APEXTrainer:
    """The trainer of one run, with every reward that is not trained on as a monitor."""
    quiet()
    options = dict(CONDITIONS[condition])
    objectives, own = method_settings(method, options.pop("objectives", OBJECTIVES))
    factors = options.pop("factors", {})
    config = APEXConfig(output_dir=output_dir, seed=seed, **{**BUDGET, **options, **own, **changes})
    rewards = production_rewards()
    held_out = {monitor.__name__: monitor for monitor in held_out_monitors()}
    trainer = APEXTrainer(
        load_tiny_pipeline(),
        [scaled(rewards[name], factors.get(name, 1.0)) for name in objectives],
        config,
        tiny_prompts("train", 512, seed),
        eval_dataset=tiny_prompts("test", prompts),
        monitor_funcs=[{**rewards, **held_out}[name] for name in MEASURED if name not in objectives],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def base_table(seed: int, prompts: int, folder: Path, **changes: Any) -> torch.Tensor:
    """Rewards `[P, M]` of the untrained model with this seed's evaluation noise; kept in a file, as all methods share it."""
    path = folder / f"base_{seed}_{prompts}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            trainer = build_trainer("natural", "apex", seed, prompts, scratch, **changes)
            trainer.evaluate()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table_of(trainer).tolist()))
    return torch.tensor(json.loads(path.read_text()), dtype=torch.float64)


def table_of(trainer: APEXTrainer, factors: dict[str, float] | None = None) -> torch.Tensor:
    """Rewards `[P, M]` of the trainer's last evaluation, in their natural units."""
    rows = [[record["rewards"][name] for name in MEASURED] for record in trainer.eval_records]
    units = torch.tensor([(factors or {}).get(name, 1.0) for name in MEASURED], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64) / units


def run(condition: str, method: str, seed: int, prompts: int, folder: Path, **changes: Any) -> dict[str, Any]:
    """Train once with a method (see [`method_settings`]) and measure it on so many test prompts, one image each.

    The seed is that of prompts, weights and all noise, evaluation's too; all methods share it, so differences are paired.
    `folder` keeps the base's evaluation; `changes` are other values for the configuration.
    """
    logging.disable(logging.WARNING)
    base = base_table(seed, prompts, folder, **changes)
    factors = CONDITIONS[condition].get("factors", {})
    judged = CONDITIONS[condition].get("objectives", OBJECTIVES)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(condition, method, seed, prompts, scratch, **changes)
        trainer.train()
        seconds = time.process_time() - started
        tuned = table_of(trainer, factors)
    order = [MEASURED.index(name) for name in (*judged, *(name for name in MEASURED if name not in judged))]
    names = [MEASURED[i] for i in order]
    result = compare(names, base[:, order], tuned[:, order], len(judged))
    gains = {name: row["gain"] for name, row in result["objectives"].items()}
    history = trainer.state.log_history
    return {
        "condition": condition,
        "method": method,
        "seed": seed,
        **{f"gain/{name}": gain for name, gain in gains.items()},
        "worst_gain": min(gains.values()),
        "mean_gain": statistics.mean(gains.values()),
        "hypervolume": result["hypervolume"],
        "hypervolume_below_base": hypervolume(torch.tensor([list(gains.values())]), -torch.ones(len(gains))),
        "jdr": result["domination"]["all_at_least_as_good"],
        "jcr": result["domination"]["all_at_most_as_good"],
        **{f"held_out/{name}": row["tuned"] - row["base"] for name, row in result["held_out"].items()},
        **dynamics(history, list(gains), base, factors),
        "cpu_seconds": round(seconds, 1),
    }


def dynamics(
    history: list[dict[str, Any]], objectives: list[str], base: torch.Tensor, factors: dict[str, float]
) -> dict[str, Any]:
    """What the logs of a run say of its course."""
    evaluations = [entry for entry in history if f"eval_rewards/{objectives[0]}/mean" in entry]
    columns = [MEASURED.index(name) for name in objectives]
    units = base[:, columns].std(0)
    start, start_se = base[:, columns].mean(0), units / len(base) ** 0.5
    means, errors = [start], [start_se]
    for entry in evaluations:
        for kind, values in (("mean", means), ("se", errors)):
            row = [entry[f"eval_rewards/{name}/{kind}"] / factors.get(name, 1.0) for name in objectives]
            values.append(torch.tensor(row, dtype=torch.float64))
    harmony = logged(history, "gradient_harmony")
    priorities = {name: logged(history, f"priority/{name}") for name in objectives}
    return {
        "seesaw_rate": seesaw_rate(torch.stack(means), torch.stack(errors)),
        "conflict_rate": sum(value < 0 for value in harmony) / len(harmony) if harmony else None,
        "hijack_index": mean_of(logged(history, "hijack_index")),
        **{f"hijack_share/{name}": mean_of(logged(history, f"hijack_share/{name}")) for name in objectives},
        "priorities": {name: [round(v, 3) for v in values] for name, values in priorities.items() if values},
        "curve": [[round(v, 3) for v in ((mean - start) / units).tolist()] for mean in means],
    }


def logged(history: list[dict[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry and entry[key] == entry[key]]


def mean_of(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None
