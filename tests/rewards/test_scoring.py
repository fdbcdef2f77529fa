"""The scorer: side by side, in order, never stuck, and a failure costs only its own rewards."""

import asyncio
import threading
import time
import urllib.error
from concurrent.futures import CancelledError
from email.message import Message

import pytest
import requests
import torch
from PIL import Image

from trl_apex.rewards import (
    RewardFailureRateError,
    RewardFailureWarning,
    RewardList,
    RewardLoadError,
    RewardScorer,
    TransientRewardError,
)


def score(scorer, size=2, **keywords):
    return scorer.submit(prompts=["x"] * size, completions=[None] * size, **keywords).result(timeout=20)


def constant(value, name="constant"):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    reward.__name__ = name
    return reward


def of_kind(kind, func):
    """The function itself, or one like it that is async."""

    async def awaited(**keywords):
        return func(**keywords)

    return func if kind == "blocking" else awaited


def test_columns_follow_the_order_of_the_functions():
    async def second(completions, **kwargs):
        return [2.0, None]

    with RewardScorer([constant(1), second, constant(float("nan"), "third")]) as scorer:
        scored = score(scorer)
    assert scored.rewards.dtype == torch.float32
    assert scored.rewards.nan_to_num(-1).tolist() == [[1, 2, -1], [1, -1, -1]]
    assert scored.failures == {"constant": 0, "second": 0, "third": 0}


def test_functions_run_side_by_side():
    meet = threading.Barrier(2, timeout=10)

    def blocking(completions, **kwargs):
        meet.wait()
        return [1.0] * len(completions)

    async def other(completions, **kwargs):
        await asyncio.to_thread(meet.wait)
        return [1.0] * len(completions)

    with RewardScorer([blocking, other]) as scorer:  # each waits for the other: one after the other would hang
        assert score(scorer).rewards.sum() == 4


def test_submit_returns_at_once_and_batches_keep_their_order():
    seen, inside = [], []

    def slow(images, batch, **kwargs):
        inside.append(1)
        assert len(inside) == 1, "two threads in one reward function"
        time.sleep(0.02)
        inside.pop()
        seen.append(batch[0])
        return images.mean(dim=(1, 2, 3)) + images.std(dim=(1, 2, 3))

    batches = [torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    batch = {"prompts": ["x"], "completions": [None]}
    with RewardScorer([slow]) as scorer:
        futures = [scorer.submit(**batch, images=batches[i], columns={"batch": [i]}) for i in range(6)]
        assert not futures[-1].done()
        overlapped = [future.result(timeout=10).rewards.item() for future in futures]
        assert seen == list(range(6))
        waited = [score(scorer, size=1, images=images, columns={"batch": [0]}).rewards.item() for images in batches]
    assert overlapped == waited


def test_submitting_from_several_threads():
    with RewardScorer([constant(1.0), constant(2.0, "other")]) as scorer:
        totals = []
        threads = [
            threading.Thread(target=lambda: totals.append(score(scorer).rewards.sum().item())) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
    assert totals == [6.0] * 8


def test_keywords_are_those_of_trl():
    seen = {}

    def reward(prompts, completions, completion_ids, target, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(kwargs, target=target, ids=completion_ids, state=trainer_state)
        log_metric("seen", 1.0)
        return [0.0] * len(prompts)

    def strict(prompts, completions, completion_ids, target, trainer_state, log_extra, log_metric):
        return [0.0] * len(prompts)

    logged = {}
    images = torch.rand(2, 3, 4, 4)
    with RewardScorer([reward, strict]) as scorer:
        keywords = {"trainer_state": "state", "log_extra": print, "log_metric": logged.__setitem__}
        scored = score(scorer, images=images, columns={"target": ["a", "b"]}, **keywords)
    assert torch.equal(seen["images"], images) and seen["target"] == ["a", "b"] and seen["ids"] is None
    assert seen["state"] == "state" and logged == {"seen": 1.0}
    assert scored.failures == {"reward": 0, "strict": 0}  # `strict` takes no `images` and got none


def test_a_failure_costs_its_own_rewards_and_warns_once():
    def broken(completions, **kwargs):
        raise KeyError("target")

    with RewardScorer([broken, constant(1.0)]) as scorer:
        with pytest.warns(RewardFailureWarning, match="`broken` failed on 2 of 2 samples: KeyError: 'target'"):
            scored = score(scorer)
        again = score(scorer)  # a second warning would be an error
    for result in (scored, again):
        assert result.rewards[:, 0].isnan().all() and (result.rewards[:, 1] == 1).all()
        assert result.failures == {"broken": 2, "constant": 0}


@pytest.mark.filterwarnings("ignore::trl_apex.rewards.RewardFailureWarning")
@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_timeout(kind):
    release = threading.Event()

    def blocking(completions, **kwargs):
        release.wait(10)
        return [1.0] * len(completions)

    async def waiting(completions, **kwargs):
        await asyncio.sleep(10)

    slow = blocking if kind == "blocking" else waiting
    with RewardScorer([slow, constant(1.0)], ["slow", "constant"], timeout=[0.1, None]) as scorer:
        scored = score(scorer)
        assert scored.failures == {"slow": 2, "constant": 0} and scored.rewards[:, 0].isnan().all()
        assert scored.seconds["slow"] > 0.09
        if kind == "blocking":
            assert score(scorer).failures["slow"] == 2  # still stuck: given up after its own timeout
            release.set()
            while score(scorer).failures["slow"]:  # until the stuck call has returned
                pass
            assert score(scorer).rewards[:, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_passing_failures_are_tried_again(kind):
    busy = iter([True, True, False])

    def attempt(completions, **kwargs):
        if next(busy):
            raise TransientRewardError("busy", retry_after=0.01)
        return [1.0] * len(completions)

    with RewardScorer([of_kind(kind, attempt)], max_retries=2, backoff=0.01) as scorer:
        assert score(scorer).rewards.tolist() == [[1.0], [1.0]]


@pytest.mark.filterwarnings("ignore::trl_apex.rewards.RewardFailureWarning")
def test_retries_are_bounded_and_only_for_passing_failures():
    calls = {"refused": 0, "broken": 0}

    def refused(**kwargs):
        calls["refused"] += 1
        raise ConnectionRefusedError("nobody there")

    def broken(**kwargs):
        calls["broken"] += 1
        raise RuntimeError("out of memory")

    with RewardScorer([refused, broken], max_retries=2, backoff=0.01) as scorer:
        assert score(scorer).failures == {"refused": 2, "broken": 2}
    assert calls == {"refused": 3, "broken": 1}


@pytest.mark.parametrize(
    "error",
    [
        requests.exceptions.ConnectionError("refused"),
        requests.exceptions.ReadTimeout("no answer"),
        urllib.error.URLError(ConnectionRefusedError("refused")),
        TimeoutError("no answer"),
    ],
)
def test_connections_of_the_usual_libraries_are_tried_again(error):
    errors = iter([error])

    def served(completions, **kwargs):
        for once in errors:
            raise once
        return [1.0] * len(completions)

    with RewardScorer([served], max_retries=1, backoff=0.01) as scorer:
        assert score(scorer).failures == {"served": 0}


@pytest.mark.filterwarnings("ignore::trl_apex.rewards.RewardFailureWarning")
def test_a_refusal_of_the_other_side_is_not_tried_again():
    calls = []

    def refused(**kwargs):
        calls.append(1)
        raise urllib.error.HTTPError("http://x", 404, "not found", Message(), None)

    with RewardScorer([refused], backoff=0.01) as scorer:
        assert score(scorer).failures == {"refused": 2} and len(calls) == 1


class Unreadable:
    """Looks like a number or an array, and raises what neither does."""

    def __float__(self):
        raise ZeroDivisionError

    def tolist(self):
        raise KeyError("values")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "one number or None per sample, 2 here. Found 1"),
        ([1.0, 2.0, 3.0], "2 here. Found 3"),
        ([], "2 here. Found 0"),
        ("ok", "Found a str"),
        ({0: 1.0, 1: 2.0}, "Found a dict"),
        (1.0, "Found a float"),
        (None, "Found a NoneType"),
        (["1.0", "2.0"], "Found '1.0' of type str"),
        ([b"1", 2.0], "of type bytes"),
        ([1.0, 1j], "of type complex"),
        (list(torch.empty(2, device="meta")), "of type Tensor"),
        (torch.empty(2, device="meta"), "Found a Tensor that cannot be read"),
        ([[1.0], [2.0]], "Found \\[1.0\\] of type list"),
        ([Unreadable(), 1.0], "of type Unreadable. Convert it"),
        (Unreadable(), "Found a Unreadable that cannot be read: KeyError"),
        ((1.0 for _ in range(2)), "Found a generator"),
    ],
)
def test_a_bug_of_the_user_is_an_error(returned, message):
    with RewardScorer([lambda **kwargs: returned], ["mine"]) as scorer, pytest.raises(ValueError, match=message):
        score(scorer)


@pytest.mark.parametrize("returned", [torch.tensor([1.0, 2.0]), torch.tensor([1, 2]).numpy(), (True, 2)])
def test_any_numbers_will_do(returned):
    with RewardScorer([lambda **kwargs: returned], ["mine"]) as scorer:
        assert score(scorer).rewards.tolist() == [[1.0], [2.0]]


@pytest.mark.filterwarnings("ignore::trl_apex.rewards.RewardFailureWarning")
def test_errors_of_single_samples_and_infinities_count():
    def partly(**kwargs):
        return RewardList([1.0, None, float("inf"), None], errors=[None, "bad image", None, None])

    with RewardScorer([partly]) as scorer:
        scored = score(scorer, size=4)
    assert scored.failures == {"partly": 2}
    assert scored.rewards[:, 0].isfinite().tolist() == [True, False, False, False]


@pytest.mark.parametrize("error", [RewardLoadError("no weights"), ImportError("no package")])
def test_a_reward_that_cannot_work_stops_the_run(error):
    def unloadable(**kwargs):
        raise error

    with RewardScorer([unloadable]) as scorer, pytest.raises(type(error), match=str(error)):
        score(scorer)


def test_old_options_say_that_they_have_no_effect():
    with pytest.warns(FutureWarning, match="`max_failure_rate` and `failure_window` have no effect"):
        RewardScorer([constant(1.0)], max_failure_rate=0.25, failure_window=8).close()
    assert issubclass(RewardFailureRateError, RuntimeError)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("kind", ["blocking", "async"])
@pytest.mark.parametrize(
    "raised",
    [StopIteration, StopAsyncIteration, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
    + [Unprintable, BaseExceptionGroup("several", [SystemExit(1)]), TimeoutError],
)
def test_whatever_leaves_a_reward_is_a_failure_and_never_a_hang(raised, kind):
    def bad(completions, **kwargs):
        raise raised

    name = raised.__name__ if isinstance(raised, type) else type(raised).__name__
    with RewardScorer([of_kind(kind, bad), constant(1.0)], ["bad", "constant"]) as scorer:
        with pytest.warns(RewardFailureWarning, match=name):
            scored = score(scorer)
        again = score(scorer)
    for result in (scored, again):
        assert result.failures == {"bad": 2, "constant": 0}
        assert result.rewards[:, 0].isnan().all() and (result.rewards[:, 1] == 1).all()


@pytest.mark.parametrize("raised", [StopIteration, SystemExit, ValueError])
def test_a_check_that_raises_anything_is_a_load_error(raised):
    def check():
        raise raised("no")

    unchecked = constant(1.0, "unchecked")
    unchecked.check = check
    told = f"`unchecked` must pass its `check.*{raised.__name__}: no"
    with RewardScorer([unchecked]) as scorer, pytest.raises(RewardLoadError, match=told):
        scorer.check()


def test_a_scorer_whose_thread_ends_tells_whoever_waits():
    release = threading.Event()

    def waiting(**kwargs):
        release.wait(10)
        return [1.0]

    scorer = RewardScorer([waiting])
    future = scorer.submit(prompts=["x"], completions=[None])
    scorer._loop.call_soon_threadsafe(scorer._loop.stop)
    with pytest.raises(CancelledError):
        future.result(timeout=10)
    with pytest.raises(RuntimeError, match="must be open"):
        score(scorer)
    release.set()
    scorer.close()


def test_each_reward_has_its_own_copies():
    done = threading.Event()

    def careless(prompts, completions, images, target, notes, **kwargs):
        for picture in completions:
            picture.thumbnail((8, 8))
        images.sub_(0.5)
        prompts.pop()
        completions.clear()
        target[0].append("more")
        notes[0]["seen"] = True
        done.set()
        return [0.0, 0.0]

    def careful(prompts, completions, images, target, notes, **kwargs):
        done.wait(10)
        assert prompts == ["x", "x"] and target == [["OPEN"], ["SHUT"]] and notes == [{}, {}]
        return [images.mean().item(), float(completions[0].size[0])]

    async def careful_async(**keywords):
        return await asyncio.to_thread(careful, **keywords)

    pictures, images = [Image.new("RGB", (32, 32)) for _ in range(2)], torch.full((2, 3, 4, 4), 0.75)
    batch = {"columns": {"target": [["OPEN"], ["SHUT"]], "notes": [{}, {}]}, "images": images}
    with RewardScorer([careless, careful, careful_async]) as scorer:
        scored = scorer.submit(prompts=["x", "x"], completions=pictures, **batch).result(timeout=20)
    assert scored.rewards.tolist() == [[0.0, 0.75, 0.75], [0.0, 32.0, 32.0]]
    assert images.mean() == 0.75 and len(pictures) == 2 and batch["columns"]["notes"] == [{}, {}]


def test_closing():
    scorer = RewardScorer([constant(1.0)])
    scorer.close()
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        score(scorer)
    assert not any(thread.name == "reward-scorer" and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize(
    "options",
    [{"names": ["a"]}, {"names": ["a", "a"]}, {"timeout": 0.0}, {"timeout": [1.0]}, {"max_retries": -1}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="Found"):
        RewardScorer([constant(1.0), constant(2.0, "other")], **options)
