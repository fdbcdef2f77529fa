import json
from collections import Counter

import pytest
import torch

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


def test_too_few_prompts_is_an_error_not_an_empty_run():
    with pytest.raises(ValueError, match="needs 8 prompts.*Found a dataset of 3"):
        GroupSampler(3, 8, 2, 1, True, 0)


KINDS = ["ocr"] * 30 + ["plain"] * 100 + ["rare"] * 10 + ["off"] * 5


def mixed(mix=None, **changes):
    options = {"groups": 8, "group_size": 2, "repeats": 1, "shuffle": True, "seed": 3, **changes}
    return GroupSampler(len(KINDS), kinds=KINDS, mix=mix or {"ocr": 8, "plain": 9, "rare": 3, "off": 0}, **options)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_iteration_holds_every_kind_and_the_epoch_keeps_the_shares(shuffle):
    sampler = mixed(shuffle=shuffle)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    seen = Counter()
    for start in range(0, len(indices), 16):
        prompts = indices[start : start + 16 : 2]
        assert prompts == indices[start + 1 : start + 16 : 2], "groups are whole"
        kinds = Counter(KINDS[i] for i in prompts)
        assert kinds["ocr"] in (3, 4) and kinds["plain"] in (3, 4) and kinds["rare"] in (1, 2) and not kinds["off"]
        seen.update(prompts)
    iterations = len(indices) // 16
    assert iterations == 27, "100 prompts at 3.6 an iteration"
    for kind, share in {"ocr": 3.2, "plain": 3.6, "rare": 1.2}.items():
        counts = [seen[i] for i in range(len(KINDS)) if KINDS[i] == kind]
        assert abs(sum(counts) - share * iterations) <= 1
        assert max(counts) - min(counts) <= 1, "a kind repeats as a whole"


@pytest.mark.parametrize("sampler", [GroupSampler(30, 5, 2, 1, True, 0), mixed()], ids=["plain", "mixed"])
def test_an_epoch_has_its_own_order_and_repeats_it_exactly(sampler):
    first = list(sampler)
    assert len(set(first)) >= 30
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_an_iteration_has_one_size_and_each_size_its_share_of_an_epoch():
    sizes = [(64, 32 * (1 + i % 5 // 3)) for i in range(50)]  # 30 and 20 prompts
    sampler = GroupSampler(50, groups=4, group_size=2, repeats=3, shuffle=True, seed=3, sizes=sizes)
    indices = list(sampler)
    assert len(indices) == len(sampler) == (7 + 5) * 4 * 2 * 3
    iterations = [indices[start : start + 8] for start in range(0, len(indices), 24)]
    of = [{sizes[i] for i in iteration} for iteration in iterations]
    assert all(len(each) == 1 for each in of) and Counter(map(tuple, of)) == {((64, 32),): 7, ((64, 64),): 5}
    assert len({tuple(each) for each in of[:3]}) == 2, "the sizes take turns"
    assert len({i for iteration in iterations for i in iteration}) == 12 * 4, "no prompt twice an epoch"
    first = list(sampler)
    sampler.set_epoch(1)
    assert first == indices != list(sampler)


def test_a_mix_holds_within_every_size():
    sizes = ["wide" if i % 3 else "tall" for i in range(len(KINDS))]
    indices = list(mixed(sizes=sizes))
    for start in range(0, len(indices), 16):
        prompts = indices[start : start + 16]
        assert len({sizes[i] for i in prompts}) == 1
        kinds = Counter(KINDS[i] for i in prompts)
        assert kinds["ocr"] in (6, 8) and kinds["plain"] in (6, 8) and kinds["rare"] in (2, 4)
    with pytest.raises(ValueError, match="0 prompts of 'plain' of the size wide"):
        mixed(sizes=["wide" if kind == "ocr" else "tall" for kind in KINDS])


def test_too_few_prompts_of_a_size_are_refused():
    with pytest.raises(ValueError, match="needs 4 prompts.*all of one size. Found 3 of the size tall"):
        GroupSampler(10, 4, 2, 1, True, 0, sizes=["wide"] * 7 + ["tall"] * 3)


def test_kinds_take_turns_so_that_processes_share_them():
    prompts = list(mixed({"ocr": 1, "plain": 1, "rare": 0, "off": 0}, group_size=1))[:8]
    assert [KINDS[i] for i in prompts] == ["ocr", "plain"] * 4


@pytest.mark.parametrize(
    "mix, message",
    [
        ({"ocr": 1, "plain": 1}, "give each kind.*the kinds .'ocr', 'off', 'plain', 'rare'"),
        ({"ocr": 1, "plain": 1, "rare": 1, "of": 0}, "give each kind"),
        ({"ocr": 1, "plain": 1, "rare": -1, "off": 0}, "not negative"),
        ({"ocr": 0, "plain": 0, "rare": 0, "off": 0}, "one that is positive"),
        ({"ocr": 1, "plain": 1, "rare": float("nan"), "off": 0}, "one that is positive"),
        (
            {"ocr": 90, "plain": 5, "rare": 5, "off": 0},
            "at least one of the 8.*share of 0.4 for the 100 prompts of 'plain'",
        ),
        ({"ocr": 1, "plain": 1, "rare": 0, "off": 6}, "no prompt twice.*share of 6 for the 5 prompts of 'off'"),
    ],
)
def test_a_mix_that_does_not_fit_is_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        mixed(mix)


DEAD = {3, 4, 5, 6, 7, 8}


def epochs(sampler, numbers, dead=DEAD):
    """The prompts of some epochs, in which the prompts `dead` have dead groups and others have not."""
    drawn = []
    for epoch in numbers:
        sampler.set_epoch(epoch)
        prompts = list(sampler)[:: sampler.group_size]
        iterations = len(prompts) // sampler.groups
        for i in range(iterations):
            own = prompts[i * sampler.groups : (i + 1) * sampler.groups]
            flags = torch.tensor([prompt in dead for prompt in own])
            sampler.see(epoch * iterations + i, flags, torch.ones_like(flags))
        drawn.append(prompts)
    return drawn


def test_dead_prompts_are_drawn_less_often_until_their_images_differ():
    sampler = GroupSampler(12, 3, 2, 1, True, 0, dead_rate=0.25)
    plain = GroupSampler(12, 3, 2, 1, True, 0)
    first, *later = epochs(sampler, range(41))
    assert first == list(plain)[::2], "nothing is known in the first epoch"
    counts = Counter(prompt for drawn in later for prompt in drawn)
    alive = [counts[i] for i in range(12) if i not in DEAD]
    rates = [counts[i] / (sum(alive) / len(alive)) for i in DEAD]
    assert min(alive) > 50 and 0.2 < sum(rates) / len(rates) < 0.3 and max(rates) < 0.5
    assert [len(drawn) for drawn in later] == [12] * 40
    epochs(sampler, range(41, 60), dead=set())
    assert not sampler.dead and sorted(epochs(sampler, [60])[0]) == list(range(12))


def test_the_order_of_an_epoch_depends_on_what_was_dead_at_its_start_and_is_saved():
    sampler = GroupSampler(12, 3, 2, 1, True, 0, dead_rate=0.25)
    epochs(sampler, [0])
    sampler.set_epoch(1)
    drawn = list(sampler)
    sampler.see(4, torch.tensor([True, True, True]), torch.tensor([True, True, False]))
    assert sampler.dead == DEAD | set(drawn[:4])
    resumed = GroupSampler(12, 3, 2, 1, True, 0, dead_rate=0.25)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    resumed.set_epoch(1)
    assert list(resumed) == drawn == list(sampler) and resumed.dead == sampler.dead
    assert epochs(resumed, [2, 3]) == epochs(sampler, [2, 3])


def test_an_iteration_is_full_where_every_prompt_is_dead():
    sampler = GroupSampler(12, 5, 1, 1, True, 0, dead_rate=0.01)
    for drawn in epochs(sampler, range(4), dead=range(12)):
        assert len(drawn) == 10 and all(len(set(drawn[i : i + 5])) == 5 for i in (0, 5))


def test_dead_prompts_keep_the_mix():
    sampler = mixed({"ocr": 1, "plain": 1, "rare": 0, "off": 0}, dead_rate=0.1)
    for drawn in epochs(sampler, range(3), dead=range(25)):
        assert all(
            Counter(KINDS[i] for i in drawn[k : k + 8]) == {"ocr": 4, "plain": 4} for k in range(0, len(drawn), 8)
        )
