"""Prompts of several kinds in one run, each with its own reward."""

import pytest
from tiny_runs import PROMPTS, fingerprints, history, redness, tiny_trainer

KINDS = {"kind": ["word", "word", "plain", "plain"]}


def of_words(images, kind, **others):
    """Contrast of the images of one kind of prompts."""
    return [float(image.std()) if name == "word" else None for image, name in zip(images, kind, strict=True)]


def mixed(folder, **options):
    mix = {"prompt_mix": {"word": 0.5, "plain": 0.5}, **options}
    return tiny_trainer(folder, (redness, of_words), columns=KINDS, **mix)


def test_each_objective_has_its_prompts_in_every_iteration_and_a_resumed_run_goes_on_exactly(tmp_path):
    whole = mixed(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    assert (
        history(whole, "rewards/of_words/prompts") == [1] * 4 and history(whole, "rewards/redness/prompts") == [2] * 4
    )
    assert history(whole, "rewards/of_words/images") == [2] * 4 and history(whole, "rewards/redness/images") == [4] * 4
    resumed = mixed(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert fingerprints(resumed) == fingerprints(whole)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_mix_column": "sort"}, "needs the column 'sort'.*Found .'prompt', 'kind'"),
        ({"prompt_mix": {"word": 1, "plan": 1}}, "the kinds .'plain', 'word'"),
        ({"prompt_mix": {"word": "much", "plain": 1}}, "must be of type dict"),
        ({"prompt_mix": "{word: 1}"}, "must be JSON"),
    ],
)
def test_a_mix_that_the_dataset_does_not_have_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        mixed(tmp_path, **options)


def some_dead(folder, seen, **options):
    """A run in which the images of the last two prompts never differ."""

    def reward(images, prompts, **others):
        seen.append(sorted({PROMPTS.index(prompt) for prompt in prompts}))
        return [0.5 if PROMPTS.index(p) > 1 else float(image.std()) for image, p in zip(images, prompts, strict=True)]

    return tiny_trainer(folder, [reward], dead_prompt_rate=0.2, max_steps=12, **options)


def test_prompts_whose_images_do_not_differ_rest_and_a_resumed_run_goes_on_exactly(tmp_path):
    drawn, again = [], []
    whole = some_dead(tmp_path / "whole", drawn, save_strategy="steps", save_steps=5)
    whole.train()
    assert history(whole, "dead_prompts")[1:] == [0.5] * 11
    assert sorted(drawn[0] + drawn[1]) == [0, 1, 2, 3] and sum(set(prompts) <= {0, 1} for prompts in drawn[2:]) >= 6
    resumed = some_dead(tmp_path / "whole", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))  # inside an epoch
    assert again == drawn[5:] and fingerprints(resumed) == fingerprints(whole)
