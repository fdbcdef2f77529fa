"""The static rules against the advantages that the installed TRL computes, by driving its trainer."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_language_models import tiny_causal_lm, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_apex.aggregation import MultiObjectiveRewardAggregator

PROMPTS, GROUP = 3, 4
MISSING = None

# One row a sample, three groups of four: scales of OCR, PickScore and DeQA; with constants, gaps and a lost sample.
FULL = [
    [0.00, 21.51, 3.9], [0.25, 20.75, 4.1], [1.00, 22.02, 4.0], [0.50, 21.33, 2.2],
    [0.10, 19.80, 3.3], [0.10, 19.91, 3.1], [0.10, 20.42, 3.6], [0.10, 18.77, 3.0],
    [0.90, 22.90, 4.6], [0.80, 23.10, 4.5], [1.00, 22.35, 4.7], [0.70, 22.84, 4.4],
]  # fmt: skip
GAPS = [
    [0.00, 21.51, MISSING], [0.25, MISSING, 4.1], [1.00, 22.02, 4.0], [0.50, 21.33, 2.2],
    [MISSING, 19.80, 3.3], [MISSING, 19.91, 3.1], [MISSING, 20.42, MISSING], [MISSING, 18.77, MISSING],
    [MISSING, MISSING, MISSING], [0.80, 23.10, MISSING], [MISSING, 22.35, 4.7], [MISSING, 22.84, MISSING],
]  # fmt: skip


@pytest.fixture(scope="module")
def language_model():
    return tiny_causal_lm(), tiny_tokenizer()


def trl_advantages(language_model, folder, rewards, monkeypatch, **settings) -> torch.Tensor:
    """What `trl.GRPOTrainer` makes of these rewards, given row by row by its reward functions."""
    monkeypatch.setenv("CI", "1")  # TRL then sends nothing
    model, tokenizer = language_model

    def named(column: int):
        def reward(completions, **_columns):
            assert len(completions) == len(rewards)
            return [row[column] for row in rewards]

        reward.__name__ = f"reward_{column}"
        return reward

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[named(column) for column in range(3)],
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=2,
            report_to=[],
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in "abc"]),
        processing_class=tokenizer,
    )
    inputs = [{"prompt": prompt} for prompt in "abc" for _ in range(GROUP)]
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs)["advantages"]


@pytest.mark.filterwarnings("ignore:All reward functions returned None:UserWarning")
@pytest.mark.parametrize("rewards", [FULL, GAPS], ids=["full", "missing"])
@pytest.mark.parametrize(
    ("rule", "scale", "weights"),
    [
        ("sum_then_normalize", "group", None),
        ("sum_then_normalize", "batch", [1.0, 0.25, 2.0]),
        ("sum_then_normalize", "none", None),
        ("normalize_then_sum", "group", None),
        ("normalize_then_sum", "group", [1.0, 0.25, 2.0]),
    ],
)
def test_equals_trl(language_model, tmp_path, monkeypatch, rewards, rule, scale, weights):
    settings = {"multi_objective_aggregation": rule, "scale_rewards": scale, "reward_weights": weights}
    theirs = trl_advantages(language_model, tmp_path, rewards, monkeypatch, **settings)
    matrix = torch.tensor([[math.nan if value is None else value for value in row] for row in rewards])
    groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
    aggregator = MultiObjectiveRewardAggregator(["ocr", "pickscore", "deqa"], weights, rule, {"scale_rewards": scale})
    ours, _ = aggregator(matrix, groups)
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() <= 1e-6

    shuffled = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(0))
    moved, _ = aggregator(matrix[shuffled], groups[shuffled] * 10 - 7)
    # The order of summation differs, so TRL's float32 rounding (rewards of 20, spreads of 0.3) shows.
    assert (moved - theirs[shuffled]).abs().max() <= 2e-5
