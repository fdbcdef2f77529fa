"""One run on mixed prompts against the chain of stages that one would make by hand, on the tiny world.

    python benchmarks/mixing.py                               # about 45 minutes of one core
    python benchmarks/mixing.py --smoke --out runs/smoke     # two updates a run, to see that it works

Every finished run is kept under `runs/`, so that the command can be stopped and started again.

Half of the prompts ask for a word (OCR scores them), half for a colour alone (a colour reward scores them); PickScore scores
all. `mixed` trains on both kinds in every iteration. `word_then_colour` and `colour_then_word` train on one kind for half of
the iterations and then on the other, with the rewards of that kind. All arms start from the same weights and see as many
images of each kind. Measured on unseen words, and on the colours with other noise; the unit is one standard deviation of
the base over the prompts. Differences are paired by seed.

The plan, fixed before any run: seeds 1 to 5, 60 iterations, the settings of `tradeoffs.py`. The question is whether the first
stage of a chain is forgotten: the measure is the worse of the two kinds' own rewards. A difference counts if it is larger
than two standard errors.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from _bench import arguments, machine, mean_and_error, table, write
from _tradeoff_run import BUDGET, FRESH, LOSS, QUICK, execute, production_rewards, prompts_of, right_colour
from datasets import Dataset

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.demo import quiet
from trl_apex.tiny.prompts import COLOURS, SHAPES
from trl_apex.tiny.world import load_tiny_pipeline

KINDS = ("word", "colour")
RATE = 1e-4  # of `apex` with this loss, as in tradeoffs.py
ARMS: dict[str, tuple[tuple[str, ...], ...]] = {  # the kinds of prompts of each stage
    "mixed": (KINDS,),
    "word_then_colour": (("word",), ("colour",)),
    "colour_then_word": (("colour",), ("word",)),
}
MEASURES = {
    "ocr": "eval_word_rewards/ocr",
    "colour": "eval_colour_rewards/right_colour",
    "pickscore, words": "eval_word_rewards/pickscore",
    "pickscore, colours": "eval_colour_rewards/pickscore",
}


def stage(pipeline: Any, kinds: tuple[str, ...], seed: int, count: int, folder: str, **changes: Any) -> APEXTrainer:
    """A trainer on prompts of these kinds with their rewards; the rewards of other kinds are monitors."""
    own = {"word": production_rewards()["ocr"], "colour": right_colour}
    rows = [row for kind in kinds for row in prompts_of(kind, "train", 512, seed)]
    mix = {"prompt_mix": dict.fromkeys(kinds, 1)} if len(kinds) > 1 else {}
    config = APEXConfig(
        output_dir=folder,
        seed=seed,
        learning_rate=RATE,
        aggregation_options=QUICK,
        baseline_prompts=0,  # as when the kept results were made
        **{**BUDGET, **LOSS, "eval_strategy": "no", **mix, **changes},
    )
    return APEXTrainer(
        pipeline,
        [*(own[kind] for kind in kinds), production_rewards()["pickscore"]],
        config,
        Dataset.from_list(rows),
        eval_dataset={kind: Dataset.from_list(prompts_of(kind, "test", count, 0)) for kind in KINDS},
        monitor_funcs=[own[kind] for kind in KINDS if kind not in kinds],
    )


def run(arm: str, seed: int, iterations: int, count: int, **changes: Any) -> dict[str, Any]:
    """The gains of one arm, in standard deviations of the base."""
    quiet()
    logging.disable(logging.WARNING)
    pipeline, stages = load_tiny_pipeline(), ARMS[arm]
    base: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kinds in stages:
            trainer = stage(pipeline, kinds, seed, count, folder, max_steps=2 * iterations // len(stages), **changes)
            base = base or trainer.evaluate()
            trainer.train()
        tuned = trainer.evaluate()
    size = {"word": count, "colour": min(count, len(COLOURS) * len(SHAPES))}
    gains = {}
    for name, key in MEASURES.items():
        std = base[f"{key}/se"] * size[key.split("_")[1]] ** 0.5
        gains[name] = (tuned[f"{key}/mean"] - base[f"{key}/mean"]) / std
    gains["worse kind"] = min(gains["ocr"], gains["colour"])
    return {"arm": arm, "seed": seed, "gains": gains}


def summary(rows: list[dict[str, Any]]) -> str:
    """A line an arm: each gain, and by how much the mixed run is ahead, paired by seed."""
    lines = []
    for arm in ARMS:
        cells = [arm]
        for name in (*MEASURES, "worse kind"):
            values = {row["seed"]: row["gains"][name] for row in rows if row["arm"] == arm}
            mixed = {row["seed"]: row["gains"][name] for row in rows if row["arm"] == "mixed"}
            mean, error = mean_and_error(values.values())
            lead = mean_and_error(mixed[seed] - value for seed, value in values.items())
            ahead = "" if arm == "mixed" else f" ({lead[0]:+.2f} ± {lead[1]:.2f})"
            cells.append(f"{mean:+.2f} ± {error:.2f}{ahead}")
        lines.append(cells)
    return table(["arm (lead of mixed)", *MEASURES, "worse kind"], lines) + "\n"


def main() -> None:
    options = arguments(
        __doc__,
        "one seed, two updates a run",
        workers={"type": int, "default": 1, "help": "processes"},
        runs={"type": Path, "default": Path("runs/mixing"), "help": "where finished runs are kept"},
    ).parse_args()
    seeds, iterations, count = ([0], 2, 4) if options.smoke else (FRESH, 60, 64)
    changes = {"eval_num_inference_steps": 2} if options.smoke else {}
    folder = options.out / "runs" if options.smoke else options.runs
    jobs = {f"{arm}-{seed}": ((arm, seed, iterations, count), changes) for seed in seeds for arm in ARMS}
    rows = execute(jobs, options.workers, folder, run)
    found = {"settings": {**BUDGET, **QUICK, "iterations": iterations}, "machine": machine(), "rows": rows}
    write(Path(options.out) / "mixing.json", found, summary(rows))


if __name__ == "__main__":
    main()
