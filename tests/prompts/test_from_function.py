"""DDPO's two functions, as a dataset and a reward."""

import itertools

import pytest
import torch
from PIL import Image

from trl_apex.prompts import dataset_from_prompt_function
from trl_apex.rewards import reward_from_ddpo


def test_metadata_become_columns_that_reach_the_reward():
    numbers = itertools.count()
    dataset = dataset_from_prompt_function(lambda: ("a cat", {"number": next(numbers)}), 3)
    assert dataset["number"][:] == [0, 1, 2]
    seen = []

    def score(images, prompts, metadata):
        seen.append((images.shape, prompts, metadata))
        return torch.arange(len(prompts)), {"dropped": 1}

    reward = reward_from_ddpo(score)
    columns = {name: dataset[name][:] for name in dataset.column_names if name != "prompt"}
    values = reward(prompts=dataset["prompt"][:], completions=None, images=torch.rand(3, 3, 8, 8), **columns)
    assert values == [0.0, 1.0, 2.0] and reward.__name__ == "score"
    assert seen == [((3, 3, 8, 8), ("a cat",) * 3, ({"number": 0}, {"number": 1}, {"number": 2}))]


def test_metadata_that_are_no_dictionary_keep_their_own_column():
    dataset = dataset_from_prompt_function(lambda: ("a cat", 7), 2)
    assert dataset.column_names == ["prompt", "prompt_metadata"]
    reward = reward_from_ddpo(lambda images, prompts, metadata: (list(metadata), None), name="seven")
    assert reward(prompts=["a", "b"], images=torch.rand(2, 3, 4, 4), prompt_metadata=[7, 7]) == [7.0, 7.0]
    assert reward.__name__ == "seven"


def test_pictures_become_a_tensor_and_trainer_objects_are_no_columns():
    white = Image.new("RGB", (4, 6), "white")
    reward = reward_from_ddpo(lambda images, prompts, metadata: (images.amin((1, 2, 3)) + len(metadata[0]), None))
    assert reward(prompts=["a"], completions=[white], trainer_state=object(), completion_ids=None) == [1.0]


@pytest.mark.parametrize("drawn", ["a cat", ("a cat",), (1, {})])
def test_another_return_value_is_refused(drawn):
    with pytest.raises(ValueError, match="must return a pair"):
        dataset_from_prompt_function(lambda: drawn, 1)


def test_a_dataset_needs_a_size():
    with pytest.raises(ValueError, match="at least 1"):
        dataset_from_prompt_function(lambda: ("a", {}), 0)
