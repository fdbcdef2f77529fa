import pytest
import torch

from trl_apex.prompts.sampler import update_rows


@pytest.mark.parametrize("samples, window, updates", [(8, 3, 2), (8, 9, 4), (4, 1, 4), (6, 5, 1), (5, 2, 5)])
def test_every_row_is_trained_on_once(samples, window, updates):
    rows = update_rows(samples, window, updates, 0, (0, 1)).flatten(0, 1)
    assert sorted(map(tuple, rows.tolist())) == [(i, j) for i in range(samples) for j in range(window)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_update_sees_the_same_rows_on_any_number_of_processes(world_size):
    whole = update_rows(16, 3, 4, 0, (5, 2))
    share = 16 // world_size
    for update in range(4):
        parts = []
        for rank in range(world_size):
            rows = update_rows(share, 3, 4, rank * share, (5, 2))[update].clone()
            rows[:, 0] += rank * share
            parts.append(rows)
        assert sorted(torch.cat(parts).tolist()) == sorted(whole[update].tolist())


def test_passes_differ():
    assert not torch.equal(update_rows(16, 3, 4, 0, (0, 0)), update_rows(16, 3, 4, 0, (0, 1)))
