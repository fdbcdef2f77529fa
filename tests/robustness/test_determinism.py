"""Same seed, same machine, same bits: in another process, and with any number of workers that load the prompts."""

from typing import Any

import pytest
from processes import call
from tiny_runs import fingerprints, tiny_trainer


def train(folder: str, options: dict[str, Any]) -> dict[str, str]:
    trainer = tiny_trainer(folder, evaluate=True, ema_decay=0.9, **options)
    trainer.train()
    trainer.evaluate()
    return fingerprints(trainer)


@pytest.mark.slow
def test_the_same_bits_in_two_processes_and_with_workers(tmp_path, figure):
    variants: dict[str, dict[str, Any]] = {
        "first": {},
        "again": {},
        "two_workers": {"dataloader_num_workers": 2},
        "persistent_workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    }
    runs = {
        name: call(train, tmp_path / f"{name}.log", str(tmp_path / name), options).checked()
        for name, options in variants.items()
    }
    # A loader draws a seed for its workers from PyTorch's generator in every pass, a persistent one in its first only.
    allowed = {"persistent_workers": {"torch_random"}}
    other = {name: {p for p in state if state[p] != runs["first"][p]} for name, state in runs.items()}
    assert all(parts <= allowed.get(name, set()) for name, parts in other.items()), other
    figure("determinism", {"parts": sorted(runs["first"]), "other": {name: sorted(p) for name, p in other.items()}})


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path):
    first, other = (
        call(train, tmp_path / f"{seed}.log", str(tmp_path / str(seed)), {"seed": seed}).checked() for seed in (3, 4)
    )
    assert first["weights"] != other["weights"] and first["aggregator"] != other["aggregator"]
