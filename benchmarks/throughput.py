"""How fast an iteration is, against a plain loop in the field's order of work, and what each speed-up buys alone.

    python benchmarks/throughput.py [--smoke] [--models tiny mid] [--rounds N] [--out benchmarks/results]

`ratio` is the plain loop's processor time over the setting's, medians over rounds in which all settings take turns, on one
thread; `ratio_se` is its standard error. Wall times are given beside it, for a machine that other work shares.
`forwards` and `backwards` count rows through the transformer, both branches of the guidance, as they happened; the trainer's
are one forward more, of the detector that compares velocities.

Settings without "all" are the plain loop with one part exchanged; those with "all" are `APEXTrainer`. Before anything is
timed, trainer and plain loop compute the same iteration, and their latents and gradients are compared.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, machine, ratio, table, write
from _loops import ExchangedLoop, Parts, Work
from _speed import SMOKE, WORK, Model, PassCounter, TrainerRun, prompts, quiet, serial_rewards, timed

from trl_apex.tiny.world import tiny_rewards

BASE, SAME = "plain_loop", "all_same_mathematics"
PHASES = ("encode", "rollout", "reward", "update")
LAST = range(-3, -1)  # the last two steps that can be stochastic; the very last is noise-free
WINDOW: dict[str, Any] = {"sde_window_size": 2, "share_initial_noise": True}
LAST_WINDOW = {**WINDOW, "sde_window_range": LAST}
COMPILED = {"compile_denoiser": True}
# What is changed in the plain loop (`Parts`), or the options of the trainer; and the words for it. The trainer takes one
# timestep a forward: more of them are for GPUs that one batch leaves idle.
PARTS: dict[str, tuple[Parts, str]] = {
    BASE: (Parts(), "Flow-GRPO's order of work"),
    "separate_guidance": (Parts(separate_guidance=True), "the branches of the guidance in two forwards (slower)"),
    "rewards_after_sampling": (Parts(rewards_last=True), "rewards only when all is sampled (slower in wall time)"),
    "prompt_cache": (Parts(cache_prompts=True), "prompts encoded before training"),
    "group_deduplication": (Parts(encode_distinct=True), "a group's prompt encoded once an iteration"),
    "timestep_batching": (Parts(timesteps_at_once=3), "three timesteps a forward of the update"),
    "window": (Parts(window=LAST), "two stochastic, trained steps, the last possible; the others deterministic"),
    "window_shared_prefix": (
        Parts(window=LAST, shared_prefix=True),
        "the same, one start a group, steps before the window once",
    ),
    "compile": (Parts(compiled=True), "compiled blocks, warm-up apart"),
}
TRAINER: dict[str, tuple[dict[str, Any], str]] = {
    SAME: ({}, "APEXTrainer at identical mathematics"),
    "all_same_mathematics_compiled": (COMPILED, "the same, compiled blocks, warm-up apart"),
    "all_with_early_window": (WINDOW, "APEXTrainer, two steps in the first half, one start a group"),
    "all_with_window": (LAST_WINDOW, "APEXTrainer, the last two steps, one start a group"),
    "all_with_window_compiled": ({**LAST_WINDOW, **COMPILED}, "the same, compiled blocks, warm-up apart"),
    "all_with_window_unguided": (
        {**LAST_WINDOW, "guidance_scale": 1.0},
        "APEXTrainer, the last two steps, one start a group, no guidance",
    ),
}
SETTINGS = {**PARTS, **TRAINER}
# On the mid-size model, where an iteration takes long.
FEWER = [BASE, "timestep_batching", "window_shared_prefix", *TRAINER]


def same_mathematics(loop: ExchangedLoop, run: TrainerRun) -> dict[str, float]:
    """Largest differences between the first iteration of the plain loop and that of the trainer, same seed."""
    rollout = run.trainer._iteration_rollout
    assert rollout is not None
    scale = max(float(g.abs().max()) for g in loop.gradients)
    pairs = zip(run.gradients, loop.gradients, strict=True)
    found = {
        "latents": float((rollout["latents"] - loop.latents).abs().max()),
        "old_log_prob": float((rollout["old"] - loop.log_probs).abs().max()),
        "advantages": float((rollout["advantages"] - loop.advantages).abs().max()),
        "gradient_of_largest": max(float((a - b).abs().max()) for a, b in pairs) / scale,
    }
    wrong = {name: value for name, value in found.items() if not value < 1e-4}
    if wrong:
        raise RuntimeError(
            f"Trainer and plain loop must agree to 1e-4. Found {wrong}. The ratios would compare two things."
        )
    return found


def placed(window: range, work: Work) -> range:
    """A window counted from the end, among this many steps."""
    return range(max(work.steps + window.start, 0), work.steps + window.stop)


def started(name: str, model: Model, work: Work, texts: list[str]) -> ExchangedLoop | TrainerRun:
    """The plain loop or the trainer of one setting."""
    changes = SETTINGS[name][0]
    if isinstance(changes, Parts):
        parts = replace(changes, window=changes.window and placed(changes.window, work))
        return ExchangedLoop(model.fresh(), serial_rewards(), texts, work, parts, seed=0)
    options = dict(changes)
    if "sde_window_range" in options:
        window = placed(options["sde_window_range"], work)
        options["sde_window_range"] = [window.start, window.stop]
    return TrainerRun(model.fresh(), tiny_rewards(), texts, work, seed=0, **options)


class Race:
    """All settings on one model, in turns; the plain loop and the trainer at the same mathematics are among them."""

    def __init__(self, model: Model, work: Work, settings: list[str], rounds: int):
        self.model, self.work, self.settings = model, work, settings
        self.runs: dict[str, ExchangedLoop | TrainerRun] = {}
        self.counters: dict[str, PassCounter] = {}
        self.warm: dict[str, float] = {}
        self.turns: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
        texts = prompts(work.groups * (rounds + 1))
        for name in settings:
            run = self.runs[name] = started(name, model, work, texts)
            self.counters[name] = PassCounter(run.network)
            self.warm[name] = self._turn(name, 0)["cpu"]
            print(f"  {model.name} {name}: first iteration {self.warm[name]:.1f} s", flush=True)
        self.agreement = same_mathematics(self.runs[BASE], self.runs[SAME])
        for seed, run in enumerate(self.runs.values(), start=1):
            run.seed = (
                seed  # noise of its own from here on: no image is seen twice, so that no reward answers from memory
            )

    def round(self, turn: int) -> None:
        first = turn % len(self.settings)
        for name in self.settings[first:] + self.settings[:first]:
            self.turns[name].append(self._turn(name, turn))
        print(f"  {self.model.name} round {turn}", flush=True)

    def close(self) -> None:
        for run in self.runs.values():
            run.close()

    def _turn(self, name: str, turn: int) -> dict[str, Any]:
        run = self.runs[name]
        cpu, wall = timed(lambda: run.iteration(turn))
        return {"cpu": cpu, "wall": wall, **self.counters[name].take(), "phases": dict(run.phases.seconds)}

    def rows(self) -> list[dict[str, Any]]:
        """One row a setting."""
        found = []
        for name in self.settings:
            own, base = self.turns[name], self.turns[BASE]
            cpu, wall = (
                ratio([turn[kind] for turn in base], [turn[kind] for turn in own]) for kind in ("cpu", "wall")
            )
            seconds, wall_seconds = (statistics.median(turn[kind] for turn in own) for kind in ("cpu", "wall"))
            found.append({
                "setting": name,
                "meaning": SETTINGS[name][1],
                "model": self.model.name,
                "ratio": cpu[0],
                "ratio_se": cpu[1],
                "wall_ratio": wall[0],
                "wall_ratio_se": wall[1],
                "cpu_seconds": seconds,
                "images_per_cpu_second": self.work.samples / seconds,
                "images_per_second": self.work.samples / wall_seconds,
                "forwards": statistics.mean(turn["forwards"] for turn in own),
                "backwards": statistics.mean(turn["backwards"] for turn in own),
                "warm_up_cpu_seconds": self.warm[name] - seconds,
                "rounds": len(own),
            })  # fmt: skip
        return found

    def phases(self) -> list[dict[str, Any]]:
        """Images per processor second of prompt encoding, rollout, rewards and update apart."""
        found = []
        for name in (one for one in (BASE, SAME, "all_with_window") if one in self.settings):
            for phase in self.turns[name][0]["phases"]:
                seconds = statistics.median(turn["phases"][phase] for turn in self.turns[name])
                found.append({
                    "setting": name,
                    "model": self.model.name,
                    "phase": phase,
                    "cpu_seconds": seconds,
                    "images_per_cpu_second": self.work.samples / seconds,
                })  # fmt: skip
        return found


def half_precision(model: Model, work: Work) -> dict[str, Any]:
    """One forward and backward of one batch with the frozen base in bfloat16, against float32; not a whole iteration."""
    seconds, rows = {}, 2
    for half in (False, True):
        small = replace(work, groups=1, group=2, batch=rows, steps=2, guidance=1.0)
        loop = ExchangedLoop(model.fresh_copy(), [], prompts(1), small, Parts(half_precision=half), seed=0)
        text = loop.encode(prompts(1) * rows)
        x, step = torch.randn(rows, *loop.shape), torch.zeros(rows, dtype=torch.long)

        def once(loop=loop, x=x, step=step, text=text) -> None:
            loop.velocity(x, step, text).square().mean().backward()

        seconds[half] = timed(once)[0]
    return {
        "setting": "half_precision_base",
        "meaning": "frozen base in bfloat16, adapter in float32: forward and backward of one batch",
        "model": model.name,
        "ratio": seconds[False] / seconds[True],
        "ratio_se": None,
        "forwards": 2 * rows,
        "backwards": 2 * rows,
        "rounds": 1,
    }


def markdown(rows: list[dict[str, Any]], parts: list[dict[str, Any]], checks: dict[str, Any]) -> str:
    """A table per model, and the phases."""
    text = ""
    for name, found in checks.items():
        text += f"\n{name}: trainer and plain loop differ by at most "
        text += ", ".join(f"{value:.0e} ({what.replace('_', ' ')})" for what, value in found.items()) + "\n\n"
        head = ["setting", "times as fast (processor)", "(wall)", "rows forward", "rows backward", "what"]
        lines = []
        for row in (row for row in rows if row["model"] == name):
            processor = f"{row['ratio']:.2f}" + ("" if row["ratio_se"] is None else f" ± {row['ratio_se']:.2f}")
            wall = "" if row.get("wall_ratio_se") is None else f"{row['wall_ratio']:.2f} ± {row['wall_ratio_se']:.2f}"
            counts = f"{row['forwards']:.0f}", f"{row['backwards']:.0f}"
            lines.append([row["setting"], processor, wall, *counts, row["meaning"]])
        text += table(head, lines) + "\n"
    lines = []
    for name, model in dict.fromkeys((part["setting"], part["model"]) for part in parts):
        own = {p["phase"]: p["images_per_cpu_second"] for p in parts if (p["setting"], p["model"]) == (name, model)}
        lines.append([name, model, *(f"{own[phase]:.2f}" if phase in own else "" for phase in PHASES)])
    return f"{text}\nImages per processor second of each part\n\n{table(['setting', 'model', *PHASES], lines)}\n"


def write_known(out: Path, name: str, settings: dict, race: Race, more: Sequence[dict] = ()) -> str:
    """Write what is known so far, beside what is there of other models; the table."""
    path = out / "throughput.json"
    result: dict[str, Any] = {"settings": {}, "same_mathematics": {}, "rows": [], "phases": []}
    if path.is_file():
        result = json.loads(path.read_text())
    for part in ("rows", "phases"):
        result[part] = [row for row in result[part] if row["model"] != name]
    result["settings"][name], result["same_mathematics"][name] = settings, race.agreement
    result["rows"] += [*race.rows(), *more]
    result["phases"] += race.phases()
    made = markdown(result["rows"], result["phases"], result["same_mathematics"])
    write(path, result, made)
    return made


def main() -> None:
    given = arguments(
        __doc__,
        "few settings, one round, two images",
        models={"nargs": "+", "choices": ["tiny", "mid"], "default": ["tiny", "mid"]},
        rounds={"type": int, "nargs": 2, "default": [3, 2], "help": "on the tiny and the mid-size model"},
        groups={"type": int, "help": "prompts an iteration, instead of the model's own number"},
        settings={"nargs": "+", "help": "only these, besides the two that are always there"},
        compile={"action": "store_true", "help": "compiled blocks too, which take minutes to compile"},
    ).parse_args()
    quiet()
    models = ["tiny"] if given.smoke else given.models
    for name in models:
        model, work = Model(name), SMOKE if given.smoke else WORK[name]
        rounds = 1 if given.smoke else dict(zip(("tiny", "mid"), given.rounds, strict=True))[name]
        chosen = [*PARTS, *TRAINER] if name == "tiny" else FEWER
        chosen = [one for one in chosen if "compile" not in one or given.compile]
        work = replace(work, groups=given.groups or work.groups)
        if given.settings:
            chosen = [one for one in chosen if one in (BASE, SAME, *given.settings)]
        if given.smoke:
            chosen = [BASE, "window_shared_prefix", SAME, "all_with_window"]
        settings = {
            "machine": machine(),
            "threads": 1,
            "dtype": "float32",
            "seeds": "0 to compare, then one a setting",
        }
        settings |= {"work": vars(work), "parameters_M": model.sizes()}
        race = Race(model, work, chosen, rounds)
        for turn in range(1, rounds + 1):
            race.round(turn)
            made = write_known(given.out, name, {**settings, "rounds": turn}, race)
        race.close()
        if name == "tiny" and not given.smoke:
            made = write_known(given.out, name, {**settings, "rounds": rounds}, race, [half_precision(model, work)])
    print(made)


if __name__ == "__main__":
    main()
