"""Images of several sizes in one run: columns `height` and `width` of the dataset."""

import pytest
import torch
from datasets import Dataset
from tiny_runs import PROMPTS, fingerprints, redness, tiny_trainer

from trl_apex.evaluation.run import run_evaluation
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.trainers.evaluation import batches_of_one_size

SIZES = {"height": [16, 16, 24, 24], "width": [16, 16, 32, 32]}


def recorder():
    """A reward that keeps the sizes of the images and what the columns say."""
    seen = []

    def size_seen(completions, images, height, width, **others):
        seen.append({(*image.shape[1:],) for image in images})
        assert all(c.size == (w, h) for c, h, w in zip(completions, height, width, strict=True))
        return images.mean((1, 2, 3)).tolist()

    return seen, size_seen


NFT = {"loss_type": "nft", "timesteps_per_image": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("loss", [{}, NFT], ids=["grpo", "nft"])
def test_each_iteration_and_each_evaluation_batch_has_one_size_and_a_resumed_run_goes_on_exactly(tmp_path, loss):
    seen, reward = recorder()
    options = {"columns": SIZES, "evaluate": True, "log_completions": True, "rollout_batch_size": 2, **loss}
    whole = tiny_trainer(tmp_path, (redness, reward), save_strategy="steps", save_steps=3, **options)
    whole.train()
    assert seen[:8] == [{(16, 16)}] * 2 + [{(24, 32)}] * 2 + [{(16, 16)}] * 2 + [{(24, 32)}] * 2
    assert [record["image"].size for record in whole.eval_records] == [(16, 16)] * 2 + [(32, 24)] * 2
    assert [record["prompt"] for record in whole.eval_records] == PROMPTS
    resumed = tiny_trainer(tmp_path, (redness, reward), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert fingerprints(resumed) == fingerprints(whole)
    assert whole.state.log_history[-1].items() >= {"step": 4}.items()


def test_an_option_counts_more_than_the_columns(tmp_path):
    trainer = tiny_trainer(tmp_path, columns=SIZES, evaluate=True, eval_height=32)
    trainer.evaluate()
    assert [record["image"].size for record in trainer.eval_records] == [(16, 32)] * 2 + [(32, 32)] * 2
    assert trainer._get_train_sampler().iterations == [1, 1]
    assert tiny_trainer(tmp_path, columns=SIZES, height=16, width=16)._get_train_sampler().iterations == [2]


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"height": [16, 16, 18, 16], "width": [16] * 4},
            "multiples of 4 pixels.*Found 18 x 16.*row 2 of `train_dataset`",
        ),
        ({"height": [16, None, 16, 16], "width": [16] * 4}, "whole numbers of pixels.*Found None, 16 in row 1"),
        ({"height": [16, 16.0, 16, 16], "width": [16] * 4}, "Found 16.0, 16 in row 0"),
        ({"height": [0, 16, 16, 16], "width": [16] * 4}, "Found 0, 16 in row 0"),
        ({"height": [64, 16, 16, 16], "width": [16] * 4}, "at most 32 pixels.*row 0"),
        ({"height": [16] * 4}, "must both be columns, or neither. Found `height` alone"),
        ({"height": [16, 16, 16, 24], "width": [16] * 4}, "needs 2 prompts.*Found 1 of the size .24, 16."),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused_before_anything_is_computed(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, columns=columns)


def test_the_sizes_of_an_evaluation_set_are_checked_too(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="Found 18 x 16.*row 1 of `eval_dataset`"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["a", "b"], "height": [16, 18], "width": [16, 16]}))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_makes_as_many_forwards_of_each_size(world):
    sizes = ["wide"] * 5 + ["tall"] * 2 + ["wide"] * 3
    ranks = [batches_of_one_size(sizes, 2, rank, world) for rank in range(world)]
    assert len({tuple((len(batch), sizes[batch[0]]) for batch in batches) for batches in ranks}) == 1
    assert all(len({sizes[row] for row in batch}) == 1 for batches in ranks for batch in batches)
    assert {row for batches in ranks for batch in batches for row in batch} == set(range(10))


def test_evaluate_draws_each_prompt_at_its_size(tmp_path):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "height": [16, 24, 16, 24], "width": [16, 32, 16, 32]})
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 12, "device": "cpu"}
    options |= {"report": lambda line: None}
    torch.manual_seed(0)
    results = run_evaluation(build_pipeline(0), (), dataset, [redness], tmp_path, **options)
    assert (results["settings"]["height"], results["settings"]["width"]) == (None, None)
    assert "each of its own size" in (tmp_path / "results.md").read_text() and (tmp_path / "base_grid.png").is_file()
    results = run_evaluation(build_pipeline(0), (), dataset, [redness], tmp_path, height=16, width=24, **options)
    assert "24 x 16 pixels" in (tmp_path / "results.md").read_text()
