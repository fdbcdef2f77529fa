"""A hub on loopback, and a run to put there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import Hub, running_hub
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, with things beside it that must not go up."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "checkpoint-4").mkdir()
    (run / "completions").mkdir()
    save_file({"a": torch.arange(6.0)}, run / "pytorch_lora_weights.safetensors")
    save_file({"a": torch.arange(6.0)}, run / "checkpoint-4" / "adapter_model.safetensors")
    (run / "training_args.bin").write_bytes(b"a pickle with hf_secretsecretsecret in it")
    (run / "completions" / "completions_00004.parquet").write_bytes(b"images")
    rows = {"ocr": {"base": 0.5, "tuned": 0.7, "se": 0.02, "gain": 0.8}}
    files = {
        "aggregator_state.json": {"objectives": ["ocr"], "iteration": 4},
        "summary.json": {"objectives": rows, "held_out": {"exact": {"base": 0.4, "tuned": 0.38, "se": 0.03}}},
        "config.json": {"model": "org/base", "hub_token": "hf_secretsecretsecret", "seed": 3, "run_name": None},
        "environment.json": {"command": "trl-apex train --x hf_secretsecretsecret", "versions": {"torch": "2.13.0"}},
        "trainer_state.json": {"global_step": 4, "log_history": [{"step": 4, "rewards/ocr/mean": 0.6}]},
        "samples/prompts.json": [{"prompt": 'a cat | with "A"', "base": {}, "tuned": {}}],
    }
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    for kind in ("base", "tuned"):
        Image.new("RGB", (16, 16), "red").save(run / "samples" / f"{kind}_000.png")
    return run
