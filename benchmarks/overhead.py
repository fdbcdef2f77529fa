"""What being multi-objective costs: the aggregation, the gradient probe, and all that is not a network.

    python benchmarks/overhead.py [--smoke] [--rounds 3] [--out benchmarks/results]

`iteration` splits the processor time of an `APEXTrainer` iteration with the apex rule: passes through the transformer,
VAE and rewards against everything else. `aggregation` puts every rule's time for 1,152 images and 4 objectives (that of
`aggregation_scale.py`) beside that iteration's time for as many images. `probe` is `probe_cost.py`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from _bench import arguments, machine, table, write
from _loops import Work
from _speed import SMOKE, WORK, Model, TrainerRun, prompts, quiet, timed
from aggregation_scale import TYPICAL, measure
from probe_cost import compare
from probe_cost import markdown as probe_table

from trl_apex.aggregation import RULES
from trl_apex.tiny.world import tiny_rewards

NETWORKS = ("transformer forward", "backward", "vae decode", "rewards")


class Shares:
    """Processor time inside chosen calls of the trainer's thread."""

    def __init__(self, run: TrainerRun):
        self.seconds: dict[str, float] = defaultdict(float)
        trainer = run.trainer
        for owner, name, what in (
            (trainer.policy.denoiser, "forward", "transformer forward"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.policy, "decode", "vae decode"),
            (trainer, "_compute_advantages", "aggregation"),
            (trainer.optimizer, "step", "optimizer"),
        ):
            setattr(owner, name, self._around(getattr(owner, name), what))

    def _around(self, call: Callable, what: str) -> Callable:
        def measured(*arguments: Any, **keywords: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments, **keywords)
            finally:
                self.seconds[what] += time.thread_time() - started

        return measured


def iteration(model: Model, work: Work, rounds: int) -> dict[str, Any]:
    """Seconds of one iteration by what they were spent on: medians over rounds."""
    texts = prompts(work.groups * (rounds + 1))
    run = TrainerRun(model.fresh(), tiny_rewards(), texts, work, seed=0, multi_objective_aggregation="apex")
    run.iteration()  # builds the optimizer, warms up
    shares = Shares(run)
    found = []
    for _ in range(rounds):
        shares.seconds.clear()
        whole = timed(run.iteration)[0]
        seconds = {**shares.seconds, "rewards": run.phases.seconds["reward"]}
        found.append({**seconds, "elsewhere": whole - sum(seconds.values()), "whole": whole})
    run.close()
    seconds = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
    networks = [sum(turn[name] for name in NETWORKS) / turn["whole"] for turn in found]
    return {
        "model": model.name,
        "images": work.samples,
        "seconds": seconds,
        "aggregation_share": statistics.median(turn["aggregation"] / turn["whole"] for turn in found),
        "not_a_network_share": 1 - statistics.median(networks),
        "rounds": rounds,
    }


def markdown(found: list[dict[str, Any]], rules: list[dict[str, Any]], probes: list[dict[str, Any]]) -> str:
    names = [*NETWORKS, "aggregation", "optimizer", "elsewhere"]
    shares = []
    for row in found:
        cells = [f"{100 * row['seconds'][name] / row['seconds']['whole']:.2f}" for name in names]
        shares.append([row["model"], *cells, f"{100 * row['not_a_network_share']:.2f}"])
    models = [row["model"] for row in found]
    lines = [[r["rule"], f"{r['ms']:.1f}", *(f"{100 * r['share'][name]:.4f}" for name in models)] for r in rules]
    return (
        f"Shares of an iteration's processor time, %\n\n{table(['model', *names, 'not a network'], shares)}\n\n"
        f"Aggregation of {TYPICAL[0]} x {TYPICAL[1]} rewards, % of an iteration of {TYPICAL[0]} images\n\n"
        f"{table(['rule', 'ms', *models], lines)}\n{probe_table(probes)}"
    )


def main() -> None:
    rounds_option = {"type": int, "default": 3}
    given = arguments(__doc__, "one round on two images", rounds=rounds_option).parse_args()
    quiet()
    rounds = 1 if given.smoke else given.rounds
    models = {"tiny": SMOKE} if given.smoke else WORK
    found = [iteration(Model(name), work, rounds) for name, work in models.items()]
    rules = []
    for rule in ["apex"] if given.smoke else RULES:
        timing = measure(rule, *TYPICAL)
        per_image = {row["model"]: row["seconds"]["whole"] / row["images"] for row in found}
        share = {name: timing["ms"] / 1e3 / (seconds * TYPICAL[0]) for name, seconds in per_image.items()}
        rules.append({**timing, "share": share})
    plan = {"tiny world": 1} if given.smoke else {"tiny world": 20, "100M": 4}
    probes = [compare(name, count) for name, count in plan.items()]
    made = markdown(found, rules, probes)
    print(made)
    work = {name: vars(work) for name, work in models.items()}
    settings = {"machine": machine(), "threads": 1, "seed": 0, "work": work}
    result = {"settings": settings, "iteration": found, "aggregation": rules, "probe": probes}
    write(given.out / "overhead.json", result, made)


if __name__ == "__main__":
    main()
