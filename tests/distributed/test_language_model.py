"""The language model's trainer on two processes: one state, and each rank's own slice of the advantages."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from engines import environment, on_cpu
from processes import run
from tiny_language_models import tiny_causal_lm, tiny_tokenizer

from trl_apex import APEXGRPOConfig, APEXGRPOTrainer


def train_language_model(rank: int, output_dir: str, resume: str | None = None) -> dict[str, Any]:
    """Two groups of four completions over two processes: each rank holds one group."""

    def loud(completions, **kwargs):
        return [10.0 * text.split().count("a") for text in completions]

    def quiet(completions, **kwargs):
        return [0.01 * text.split().count("b") for text in completions]

    on_cpu()
    args = APEXGRPOConfig(
        output_dir=output_dir, bf16=False, ddp_backend="gloo", per_device_train_batch_size=4, generation_batch_size=8,
        num_generations=4, max_completion_length=8, learning_rate=3e-3, max_steps=3, save_steps=2, disable_tqdm=True,
        report_to="none", gradient_checkpointing=False, warmup_iterations=1, ramp_iterations=1,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["say c", "say d", "say e", "say f"] * 4})
    trainer = APEXGRPOTrainer(tiny_causal_lm(), [loud, quiet], args, data, processing_class=tiny_tokenizer())
    gathered: list[tuple[torch.Tensor, torch.Tensor]] = []
    used: list[torch.Tensor] = []

    class Recording(type(trainer.aggregator)):  # type: ignore[misc]
        def __call__(self, rewards, group_ids, **kwargs):
            result = super().__call__(rewards, group_ids, **kwargs)
            gathered.append((rewards.clone(), result[0].clone()))
            return result

    trainer.aggregator.__class__ = Recording
    generate = trainer._generate_and_score_completions

    def recording(inputs):
        output = generate(inputs)
        used.append(output["advantages"].clone())
        return output

    trainer._generate_and_score_completions = recording
    trainer.train(resume_from_checkpoint=resume)
    return {
        "world": PartialState().num_processes,
        "rewards": [rewards.tolist() for rewards, _ in gathered],
        "advantages": [advantages.tolist() for _, advantages in gathered],
        "used": [values.tolist() for values in used],
        "state": trainer.aggregator.state_dict(),
    }


def test_each_rank_trains_on_its_slice_and_both_hold_one_state(tmp_path):
    first, second = run(train_language_model, 2, environment("ddp"), output_dir=str(tmp_path))
    assert first["world"] == second["world"] == 2
    assert first["state"] == second["state"] and first["rewards"] == second["rewards"]
    for step, advantages in enumerate(first["advantages"]):
        assert len(advantages) == 8
        assert first["used"][step] == pytest.approx(advantages[:4])
        assert second["used"][step] == pytest.approx(advantages[4:])
    saved = json.loads((tmp_path / "checkpoint-2/aggregator_state.json").read_text())
    assert saved["iteration"] == 2


@pytest.mark.distributed
def test_two_processes_resume_where_they_were(tmp_path):
    whole = run(train_language_model, 2, environment("ddp"), output_dir=str(tmp_path))
    options = {"output_dir": str(tmp_path), "resume": str(tmp_path / "checkpoint-2")}
    resumed = run(train_language_model, 2, environment("ddp"), **options)
    for before, after in zip(whole, resumed, strict=True):
        assert after["state"]["iteration"] == 3
        np.testing.assert_allclose(after["rewards"], before["rewards"][2:], atol=1e-6)
        assert after["state"]["priorities"] == pytest.approx(before["state"]["priorities"], abs=1e-6)
