"""Signs of reward hacking, and of nothing."""

import torch

from trl_apex.evaluation import hacking_signs

NAMES = ["a", "b", "faces", "words"]


def evaluation(rows=200, seed=0):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 100.0, 0.1, 1.0])


def moved(by, noise=0.5):
    generator = torch.Generator().manual_seed(1)
    first = evaluation()
    scale = torch.tensor([1.0, 100.0, 0.1, 1.0])
    return first, first + scale * (torch.tensor(by) + noise * torch.randn(first.shape, generator=generator))


def test_a_fall_beside_a_rise_is_named_with_its_figures():
    first, latest = moved([0.5, 0.3, -0.4, 0.2])
    (sign,) = hacking_signs(NAMES, first, latest, 2)
    difference = (latest - first)[:, 2]
    error = (difference.std() / 200**0.5).item()
    assert sign == (
        f"faces fell from {first[:, 2].mean():.4g} to {latest[:, 2].mean():.4g} "
        f"({difference.mean():.3g} ± {error:.3g})"
    )


def test_no_sign_without_both():
    assert not hacking_signs(NAMES, *moved([0.5, 0.3, 0.0, 0.2]), 2)  # nothing fell
    assert not hacking_signs(NAMES, *moved([-0.2, 0.0, -0.4, -0.4]), 2)  # nothing rose
    first, latest = moved([0.5, 0.3, -0.02, 0.2], noise=1.0)  # within its noise: SE 0.07
    assert not hacking_signs(NAMES, first, latest, 2)


def test_rewards_of_any_scale_count_alike():
    first, latest = moved([0.5, -0.1, -0.4, 0.0])
    assert hacking_signs(NAMES, first, latest, 2)  # in raw units b, a hundred times larger, would hide the rise of a
    factor = torch.tensor([1e-6, 1e6, 1.0, 1.0])
    assert hacking_signs(NAMES, first * factor, latest * factor, 2) == hacking_signs(NAMES, first, latest, 2)


def test_missing_values_and_constant_rewards():
    first, latest = moved([0.5, 0.3, -0.4, 0.2])
    first[::3, 0], latest[1::3, 2] = torch.nan, torch.nan
    first[:, 1] = latest[:, 1] = 7.0
    assert len(hacking_signs(NAMES, first, latest, 2)) == 1
    latest[:, 2] = torch.nan
    assert not hacking_signs(NAMES, first, latest, 2)
    assert not hacking_signs(NAMES, first[:1], latest[:1], 2)
