"""Rewards that fail in every way: the run goes on without their scores, or stops with a checkpoint, and learns nothing false."""

import math
import time
import warnings

import pytest
import torch
from tiny_runs import contrast, equal_weights, history, redness, tiny_trainer, weights_of

from trl_apex import DiffusionGRPOTrainer
from trl_apex.rewards import RewardFailureRateError, RewardList
from trl_apex.trainers.manifest import checkpoints, defects, last_valid

CALL, ROWS = 3, (1, 2)  # the third iteration of four; a sample of either group


class Misbehaves:
    """Contrast, which in one call does something else.

    Args:
        harm: from the sound scores of that call to what is returned, or an error.
        call (`int`): which call, counted from 1.
    """

    __name__ = "contrast"

    def __init__(self, harm, call: int = CALL):
        self.harm, self.call, self.calls = harm, call, 0

    def __call__(self, images, **others):
        self.calls += 1
        scores = contrast(images)
        return self.harm(scores) if self.calls == self.call else scores


def some(value):
    """Two of the four samples get `value`."""
    return lambda scores: [value if i in ROWS else score for i, score in enumerate(scores)]


def raises(scores):
    raise OSError("the server is gone")


def hangs(scores):
    time.sleep(4.0)
    return scores


def run(folder, reward, cls=None, steps=4, resume=None, **overrides):
    options = {} if cls is None else {"cls": cls}
    trainer = tiny_trainer(folder, (redness, reward), **options, max_steps=steps, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer):
    return getattr(trainer, "aggregator", None) and trainer.aggregator.state_dict()


def assert_as_if_masked(first, second):
    assert equal_weights(weights_of(first), weights_of(second))
    assert state(first) == state(second)
    assert all(bool(p.isfinite().all()) for p in weights_of(first).values())


MASKED = {
    "nan": (some(math.nan), some(None)),
    "inf": (some(math.inf), some(None)),
    "minus_inf": (some(-math.inf), some(None)),
    "1e30": (some(1e30), some(None)),
    "too_large_for_float32": (some(1e39), some(None)),
    "too_large_for_a_float": (some(10**400), some(None)),
    "failed_samples": (lambda s: RewardList(some(None)(s), errors=some("broken")([None] * 4)), some(None)),
    "raises": (raises, lambda scores: [None] * len(scores)),
    "raises_stop_iteration": (lambda scores: [next(iter([]))], lambda scores: [None] * len(scores)),
    "all_1e30": (lambda scores: [1e30] * len(scores), lambda scores: [None] * len(scores)),
    "all_none": (lambda scores: [None] * len(scores), lambda scores: [math.nan] * len(scores)),
}
SAMPLE = ("1e30", "raises")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The run in which nothing breaks."""
    return run(tmp_path_factory.mktemp("sound"), contrast)


@pytest.fixture(scope="module")
def masked_by_hand(tmp_path_factory):
    """The run in which the samples were left out by hand, made once for each way of leaving out."""
    made = {}

    def get(mask, **options):
        scores = tuple(mask([0.0] * 4))
        key = (str(scores), str(sorted(options.items(), key=str)))
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("by_hand"), Misbehaves(mask), **options)
        return made[key]

    return get


@pytest.mark.parametrize("kind", [k if k in SAMPLE else pytest.param(k, marks=pytest.mark.slow) for k in MASKED])
def test_as_if_masked_by_hand(kind, tmp_path, masked_by_hand, sound):
    harm, mask = MASKED[kind]
    options = {"max_reward_failure_rate": 1.0}
    trainer = run(tmp_path, Misbehaves(harm), **options)
    assert_as_if_masked(trainer, masked_by_hand(mask, **options))
    assert not equal_weights(weights_of(trainer), weights_of(sound)), "the harm must have been there"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "inf", "too_large_for_float32", "raises"])
@pytest.mark.parametrize("rule", ["sum_then_normalize", "normalize_then_sum"])
def test_static_rules_too(kind, rule, tmp_path, masked_by_hand):
    harm, mask = MASKED[kind]
    options = {"cls": DiffusionGRPOTrainer, "multi_objective_aggregation": rule, "max_reward_failure_rate": 1.0}
    trainer = run(tmp_path, Misbehaves(harm), **options)
    assert_as_if_masked(trainer, masked_by_hand(mask, **options))


@pytest.mark.slow
def test_a_huge_value_in_the_very_first_batch(tmp_path):
    first = run(tmp_path / "a", Misbehaves(some(1e30), call=1))
    second = run(tmp_path / "b", Misbehaves(some(None), call=1))
    assert_as_if_masked(first, second)


def test_a_huge_value_is_warned_about_by_name(tmp_path):
    trainer = tiny_trainer(tmp_path, (redness, Misbehaves(some(1e30), call=1)), max_steps=1)
    with pytest.warns(UserWarning, match="objective 'contrast' returned a reward more than 1e[+]09 standard dev"):
        trainer.train()
    assert history(trainer, "missing/contrast") == [0.5]


@pytest.mark.slow
def test_a_reward_that_hangs_is_given_up(tmp_path):
    trainer = run(tmp_path / "a", Misbehaves(hangs), reward_timeout=3.0, max_reward_failure_rate=1.0)
    by_hand = run(tmp_path / "b", Misbehaves(lambda scores: [None] * 4))
    assert history(trainer, "reward_failures/contrast") == [0, 0, 4, 0]
    assert_as_if_masked(trainer, by_hand)


def test_a_bug_in_mid_run_stops_with_a_checkpoint_of_the_step(tmp_path, sound):
    unreadable = Misbehaves(lambda scores: torch.empty(4, device="meta"))
    trainer = tiny_trainer(tmp_path, (redness, unreadable), max_steps=4)
    with pytest.raises(ValueError, match="`contrast` must return numbers or None. Found a Tensor that cannot be read"):
        trainer.train()
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-2"] and not defects(last_valid(tmp_path))
    mended = run(tmp_path, contrast, resume=True)
    assert mended.resumed_from == str(tmp_path / "checkpoint-2")
    assert equal_weights(weights_of(mended), weights_of(sound))
    assert state(mended) == state(sound)


class Fails:
    """Contrast, failing on a share of the samples."""

    __name__ = "contrast"

    def __init__(self, every: int):
        self.every, self.seen = every, 0

    def __call__(self, images, **others):
        values, errors = contrast(images), [None] * len(images)
        for i in range(len(values)):
            self.seen += 1
            if self.seen % self.every == 0:
                values[i], errors[i] = None, "the picture is broken"
        return RewardList(values, errors)


@pytest.mark.slow
@pytest.mark.parametrize("every, failed", [(100, 1), (2, 50)])
def test_failures_up_to_the_limit_are_borne(every, failed, tmp_path, figure):
    trainer = run(tmp_path, Fails(every), steps=25)
    assert sum(history(trainer, "reward_failures/contrast")) == failed
    assert all(map(math.isfinite, [*trainer.aggregator.priorities.values(), *history(trainer, "loss")]))
    figure(f"failing_{100 // every}_percent", {"iterations": 25, "failed": failed, "of": 100, "went_on": True})


def test_a_reward_that_always_fails_stops_the_run_with_a_checkpoint(tmp_path, figure):
    trainer = tiny_trainer(tmp_path, (redness, Fails(1)), max_steps=25)
    told = pytest.warns(UserWarning, match="failed on 4 of 4 samples: the picture is broken")
    message = "'contrast' failed for 4 of 4 images, more than max_reward_failure_rate=0.5"
    with told, pytest.raises(RewardFailureRateError, match=message):
        trainer.train()
    assert last_valid(tmp_path).name == "checkpoint-1"
    figure("failing_100_percent", {"stopped_at_step": trainer.state.global_step, "checkpoint": "whole"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_is_read(tmp_path, sound):
    on_gpu = run(tmp_path, Misbehaves(lambda scores: torch.tensor(scores, device="cuda")))
    assert_as_if_masked(on_gpu, sound)


def test_a_reward_that_writes_into_the_trainer_state_changes_nothing(tmp_path):
    def meddles(images, trainer_state, **others):
        trainer_state.max_steps = 1
        trainer_state.log_history.clear()
        return contrast(images)

    trainer = run(tmp_path / "run", meddles, steps=3)
    assert trainer.state.global_step == 3 and len(history(trainer, "reward")) == 3


def test_a_reward_that_returns_pictures_is_told_so_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="must return numbers or None. Found .* of type list") as caught:
        run(tmp_path / "run", lambda images, **others: images)
    assert len(str(caught.value)) < 3000
