import pytest

from trl_apex.prompts import GroupSampler


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_groups_are_whole_and_the_same_for_any_number_of_processes(world_size):
    sampler = GroupSampler(10, groups=4, group_size=4, repeats=2, shuffle=True, seed=3)
    indices = list(sampler)
    assert len(indices) == len(sampler) == 2 * 16 * 2
    per_rank = 16 // world_size
    # What accelerate deals: batches of per_rank indices, in turn.
    batches = [indices[i : i + per_rank] for i in range(0, len(indices), per_rank)]
    for start in range(0, len(batches), world_size):
        iteration = [index for batch in batches[start : start + world_size] for index in batch]
        assert [iteration[i] for i in range(0, 16, 4) for _ in range(4)] == iteration
        assert len(set(iteration)) == 4
    first = indices[:32]
    assert first[:16] == first[16:]


def test_an_epoch_has_its_own_order_and_repeats_it_exactly():
    sampler = GroupSampler(30, 5, 2, 1, True, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert len(set(first)) == 30


def test_too_few_prompts_is_an_error_not_an_empty_run():
    with pytest.raises(ValueError, match="needs 8 prompts.*Found a dataset of 3"):
        GroupSampler(3, 8, 2, 1, True, 0)
