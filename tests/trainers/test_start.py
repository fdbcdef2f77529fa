"""The rewards before training, from which progress is measured."""

import pytest
import torch
from tiny_runs import PROMPTS, contrast, fingerprints, redness, tiny_trainer


class Recorder:
    """Contrast of images, which keeps each call's prompts and images."""

    __name__ = "recorded"

    def __init__(self):
        self.prompts, self.images = [], []

    def __call__(self, images, prompts, **others):
        self.prompts.append(prompts)
        self.images.append(images.clone())
        return contrast(images)


@pytest.mark.parametrize(
    "options", [{}, {"share_initial_noise": True}, {"loss_type": "nft", "timesteps_per_image": 2}]
)
def test_the_start_is_the_mean_over_images_of_the_first_prompts_made_as_in_training(tmp_path, options):
    recorded = Recorder()
    trainer = tiny_trainer(tmp_path, [redness, recorded], baseline_prompts=3, rollout_batch_size=4, **options)
    trainer.train()
    start, first = recorded.images[:2]
    assert len(start) == 3 and len(first) == 4
    assert recorded.prompts[0][:2] == recorded.prompts[1][::2]
    torch.testing.assert_close(start[:2], first[::2])  # the first image of each group of the first iteration
    found = trainer.aggregator._state.first_mean.tolist()
    assert found == pytest.approx([sum(redness(start)) / 3, sum(contrast(start)) / 3])


@pytest.mark.parametrize(
    "options", [{"baseline_prompts": 0}, {"multi_objective_aggregation": "sum_then_normalize"}, {"whole": True}]
)
def test_no_image_is_made_where_nothing_uses_the_start(tmp_path, options):
    recorded = Recorder()
    recorded.whole_groups = options.pop("whole", False)  # such a reward has no score for one image
    trainer = tiny_trainer(tmp_path, [redness, recorded], **{"baseline_prompts": 128, **options})
    trainer.train()
    assert len(recorded.images) == 4


def test_a_prompt_set_smaller_than_asked_for_counts_whole_and_a_resumed_run_measures_no_other_start(tmp_path):
    recorded, again = Recorder(), Recorder()
    whole = tiny_trainer(tmp_path, [redness, recorded], baseline_prompts=128, save_strategy="steps", save_steps=2)
    whole.train()
    assert sorted(recorded.prompts[0]) == sorted(PROMPTS)
    resumed = tiny_trainer(tmp_path, [redness, again], baseline_prompts=128)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(again.images) == 2 and fingerprints(resumed) == fingerprints(whole)


def test_images_of_several_sizes_are_each_made_in_their_own(tmp_path):
    recorded = Recorder()
    sizes = {"height": [16, 16, 24, 24], "width": [16, 16, 32, 32]}
    trainer = tiny_trainer(tmp_path, [redness, recorded], baseline_prompts=4, columns=sizes, max_steps=1)
    trainer.train()
    made = {
        prompt: tuple(images.shape[2:])
        for prompts, images in zip(recorded.prompts[:2], recorded.images, strict=False)
        for prompt in prompts
    }
    assert made == dict(zip(PROMPTS, [(16, 16), (16, 16), (24, 32), (24, 32)], strict=True))
