"""The same reward, here and behind the server: the same numbers, and failures that say what is wrong."""

import asyncio
import datetime
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from loopback import TOKEN, running
from PIL import Image
from rewards_tiny_models import save_clip, save_llava

from trl_apex.rewards import (
    DeQAReward,
    JPEGCompressibilityReward,
    PickScoreReward,
    RankReward,
    RemoteReward,
    RewardLoadError,
    RewardScorer,
    TransientRewardError,
)
from trl_apex.rewards.base import to_uint8
from trl_apex.serving.server import make_server
from trl_apex.serving.wire import check_column
from trl_apex.trainers.inputs import _warn_of_hidden_columns, check_calls

PROMPTS = ["a red circle", "a blue square", "green", "with"] * 3


def brightness(prompts, completions, images=None, target=None, **kwargs):
    """Not rounded to bytes: a float image that lost a digit on the way would show."""
    if images is not None:
        return images.double().mean(dim=(1, 2, 3))
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in completions]


def by_column(completions, target, **kwargs):
    return [len(text) if text else None for text in target]


async def asynchronous(prompts, **kwargs):
    await asyncio.sleep(0)
    return [float(len(prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return {
        "pickscore": PickScoreReward(str(save_clip(tmp_path_factory.mktemp("clip"))), processor=None),
        "deqa": DeQAReward(str(save_llava(tmp_path_factory.mktemp("llava")))),
        "jpeg_compressibility": JPEGCompressibilityReward(),
        "brightness": brightness,
        "by_column": by_column,
        "asynchronous": asynchronous,
    }


@pytest.fixture(scope="module")
def url(local):
    with running(local) as url:
        RemoteReward(url, "deqa").check()
        yield url


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 20, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


@pytest.fixture(scope="module")
def tensor():
    return torch.rand(12, 3, 24, 20, generator=torch.Generator().manual_seed(0))


def broken_picture():
    """A PNG file that was cut."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:1000]))


def call(reward, **keywords):
    returned = reward(**keywords)
    if asyncio.iscoroutine(returned):
        returned = asyncio.run(returned)
    return returned.tolist() if hasattr(returned, "tolist") else list(returned)


@pytest.mark.parametrize("name", ["pickscore", "deqa", "jpeg_compressibility", "brightness", "asynchronous"])
def test_same_numbers_for_pictures_and_tensors(url, local, name, pictures, tensor):
    rounding, exact, plain = (RemoteReward(url, name, as_uint8=given, batch_size=12) for given in (True, False, None))
    keywords = {"prompts": PROMPTS, "completions": pictures}
    assert call(rounding, **keywords) == call(local[name], **keywords)
    keywords = {"prompts": PROMPTS, "completions": [], "images": tensor}
    assert call(exact, **keywords) == call(plain, **keywords) == call(local[name], **keywords)
    if name != "brightness":  # which reads more than 8 bits
        assert call(rounding, **keywords) == call(local[name], **keywords)


def test_a_reward_that_takes_floats_gets_them(url, local, tensor):
    rounded = call(RemoteReward(url, "brightness", as_uint8=True), prompts=PROMPTS, images=tensor)
    expected = call(local["brightness"], prompts=PROMPTS, completions=[], images=to_uint8(tensor).float() / 255)
    assert rounded == expected


def test_same_numbers_for_pictures_of_several_sizes_and_modes(url, local, pictures):
    mixed = [pictures[0], pictures[1].resize((30, 12)), pictures[2].convert("L"), pictures[3].convert("RGBA")]
    keywords = {"prompts": PROMPTS[:4], "completions": mixed}
    assert call(RemoteReward(url, "brightness"), **keywords) == [
        float(np.asarray(image.convert("RGB"), dtype=np.float64).mean()) for image in mixed
    ]
    assert call(RemoteReward(url, "pickscore"), **keywords) == call(local["pickscore"], **keywords)


def test_half_precision_in_several_parts(url, local, tensor):
    half = tensor.bfloat16()
    expected = call(local["brightness"], prompts=PROMPTS, completions=[], images=half)
    reward = RemoteReward(url, "brightness", as_uint8=False, batch_size=5)
    assert call(reward, prompts=PROMPTS, images=half) == expected


def test_large_images_are_sent_in_smaller_parts():
    parts = RemoteReward("http://127.0.0.1:1", "x")._parts
    assert [len(range(12)[p]) for p in parts(torch.empty(12, 3, 1024, 1024, dtype=torch.uint8))] == [8, 4]
    assert len(parts(torch.empty(12, 3, 2048, 2048, dtype=torch.uint8))) == 6
    assert len(parts([Image.new("L", (8, 8))] * 17)) == 3 and parts([]) == []
    exact = RemoteReward("http://127.0.0.1:1", "x", as_uint8=False)._parts
    assert len(exact(torch.empty(4, 3, 2048, 2048).expand(4, 3, 2048, 2048))) == 4


def test_a_prompt_or_picture_that_is_refused_costs_its_own_image(url, pictures):
    prompts, images = ["x"] * 3 + ["y" * 10_001] + ["x"] * 2, [*pictures[:4], broken_picture(), pictures[5]]
    rewards = asyncio.run(RemoteReward(url, "asynchronous", batch_size=3)(prompts=prompts, completions=images))
    assert rewards == [1.0, 1.0, 1.0, None, None, 1.0]
    assert "a prompt must have at most 10000 characters" in rewards.errors[3] and "truncated" in rewards.errors[4]


def test_columns_travel(url, pictures):
    keywords = {"target": ["cat", None, "", "tent"], "photo": [object()] * 4, "log_metric": print}
    keywords |= {"prompts": PROMPTS[:4], "completions": pictures[:4]}
    assert call(RemoteReward(url, "by_column", columns=["target"]), **keywords) == [3.0, None, None, 4.0]
    with pytest.raises(ValueError, match="column `photo` must hold JSON values.*object.*in row 0.*`columns`"):
        call(RemoteReward(url, "by_column"), **keywords)


def test_a_reward_gets_the_values_and_types_that_it_gets_in_the_trainer(pictures):
    text = "NFD e\u0301, \u05e9\u05dc\u05d5\u05dd, \U0001f600\u200d\U0001f525, ２０２４, \x00\n\u2028"
    values = [text, "", None, True, 0, -0.0, 1.0, 2**60, 0.1, 1e-300, [], ["a", None, [1]], {"1": {"b": [2.5]}}]
    seen = []

    def look(prompts, row, completions, **kwargs):
        seen.append((prompts, row, kwargs))
        return [0.0] * len(row)

    keywords = {"prompts": list(map(str, values)), "completions": pictures[:1] * len(values), "completion_ids": None}
    with running([look]) as url:
        for reward in (look, RemoteReward(url, "look", batch_size=64)):
            call(reward, **keywords, row=values)
    assert repr(seen[0]) == repr(seen[1])


@pytest.mark.parametrize("value", [float("nan"), (1, 2), {1: 2}, b"x", datetime.date(2024, 5, 1), pytest], ids=repr)
def test_a_column_that_cannot_travel_is_refused_before_training(value):
    with pytest.raises(ValueError, match="The column `row` must hold JSON values.*in row 1"):
        check_column("row", [1, value])


def test_the_trainer_names_a_column_that_a_remote_reward_cannot_get():
    data = Dataset.from_dict({"prompt": ["a"], "day": [datetime.date(2024, 5, 1)], "self": ["x"]})
    with pytest.raises(ValueError, match="The column `day` must hold JSON values"):
        check_calls([RemoteReward("http://127.0.0.1:1", "x")], ["x"], data)
    check_calls([RemoteReward("http://127.0.0.1:1", "x", columns=[])], ["x"], data)
    with pytest.warns(UserWarning, match="Found self in `train_dataset`"):
        _warn_of_hidden_columns(data, "train_dataset")


def test_a_reward_may_have_any_name(pictures):
    names = ["schön", "a/b", "50%", "what?", "#1", "a b", "\U0001f600", "\u05e9\u05dc\u05d5\u05dd", "e\u0301", "２"]
    with running(dict.fromkeys(names, asynchronous)) as url:
        for name in names:
            reward = RemoteReward(url, name)
            reward.check()
            assert call(reward, prompts=["abc"], completions=pictures[:1]) == [3.0]
    with pytest.raises(ValueError, match="must not need what only a trainer has. Found log_metric in `needy`"):
        make_server([needy])
    with pytest.raises(ValueError, match="`url` must be the server's address alone"):
        RemoteReward("http://127.0.0.1:1/?token=abc", "x")


def needy(prompts, log_metric, **kwargs):
    log_metric("seen", 1.0)


def test_in_the_scorer_beside_local_ones(url, local, tensor):
    with RewardScorer([RemoteReward(url, "pickscore"), local["brightness"]]) as scorer:
        futures = [
            scorer.submit(prompts=PROMPTS, completions=[None] * 12, images=tensor, columns={}) for _ in range(3)
        ]
        results = [future.result(timeout=30) for future in futures]
    expected = call(local["pickscore"], prompts=PROMPTS, images=tensor)
    for scored in results:
        assert scored.rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-4)  # three batches may be joined
        assert scored.failures == {"pickscore": 0, "brightness": 0}


def test_a_broken_reward_is_told_per_image(pictures):
    def broken(prompts, **kwargs):
        if "bad" in prompts:
            raise RuntimeError("cannot score 'bad'")
        return [1.0] * len(prompts)

    with running({"broken": broken}, batch_wait=0.2) as url, RewardScorer([RemoteReward(url, "broken")]) as scorer:
        good = scorer.submit(prompts=["good"], completions=pictures[:1])  # joined with the next in one call
        with pytest.warns(UserWarning, match="cannot score 'bad'"):
            bad = scorer.submit(prompts=["bad"], completions=pictures[:1]).result(timeout=20)
        assert bad.failures == {"broken": 1}
        assert good.result(timeout=20).rewards.item() == 1.0


def test_requests_of_several_clients_are_joined(pictures):
    sizes = []

    def counting(prompts, completions, **kwargs):
        sizes.append(len(prompts))
        return [float(prompt) for prompt in prompts]

    with running({"counting": counting}, batch_wait=0.3, max_batch=8) as url:

        async def several():
            rewards = [RemoteReward(url, "counting") for _ in range(6)]
            return await asyncio.gather(
                *(r(prompts=[f"{2 * i}", f"{2 * i + 1}"], completions=pictures[:2]) for i, r in enumerate(rewards))
            )

        answers = asyncio.run(several())
    assert [list(answer) for answer in answers] == [[2.0 * i, 2.0 * i + 1] for i in range(6)]
    assert sum(sizes) == 12 and len(sizes) <= 3 and max(sizes) <= 8


class Slow:
    """Loads for a while, or until it is released; fails to if told so."""

    def __init__(self, fail=False, seconds=0.2):
        self.__name__ = "slow"
        self.fail, self.seconds = fail, seconds
        self.unloaded = False
        self.release = threading.Event()

    def load(self):
        self.release.wait(self.seconds)
        if self.fail:
            raise RewardLoadError("no weights here")

    def unload(self):
        self.unloaded = True

    def __call__(self, prompts, **kwargs):
        return [0.5] * len(prompts)


def test_loading_is_waited_for_and_memory_freed(pictures):
    slow = Slow(seconds=20)
    with running([slow]) as url:
        with pytest.raises(RuntimeError, match="did not answer within 1 s: the reward is not ready: loading"):
            call(RemoteReward(url, "slow", timeout=1), prompts=["x"], completions=pictures[:1])
        slow.release.set()
        assert call(RemoteReward(url, "slow"), prompts=["x"], completions=pictures[:1]) == [0.5]
        RemoteReward(url, "slow").check()
    assert slow.unloaded


@pytest.fixture(scope="module")
def failing():
    with running([Slow(fail=True)], token=TOKEN) as url:
        yield url


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("away", TOKEN, "no server answers .*Start it"),
        ("fast", TOKEN, "the server has slow, not this one"),
        ("slow", TOKEN, "failed: RewardLoadError: no weights here"),
        ("slow", "another-token-of-some-length", "the server refuses the token. Set"),
        ("slow", "", "the server refuses the token"),
    ],
)
def test_check_says_what_is_wrong_in_one_line(failing, name, token, message, monkeypatch):
    monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", token)
    reward = RemoteReward("http://127.0.0.1:9" if name == "away" else failing, name)
    with pytest.raises(RewardLoadError, match=message) as caught, RewardScorer([reward]) as scorer:
        scorer.check()
    assert "\n" not in str(caught.value)


def test_check_tells_another_kind_of_server():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RewardLoadError, match="this is no reward server"):
            RemoteReward(f"http://127.0.0.1:{server.server_port}", "ocr").check()
        server.shutdown()


def test_a_server_that_is_away_is_a_passing_failure_and_a_refusal_is_none(url, pictures):
    away = RemoteReward("http://127.0.0.1:9", "x", max_retries=1, backoff=0.01)
    with pytest.raises(TransientRewardError, match="does not answer"):
        call(away, prompts=["x"], completions=pictures[:1])
    with pytest.raises(RuntimeError, match="404: there is no such reward"):
        call(RemoteReward(url, "nothing"), prompts=["x"], completions=pictures[:1])


def test_the_token_is_never_pickled(monkeypatch):
    monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", TOKEN)
    reward = RemoteReward("http://127.0.0.1:1", "ocr")
    assert TOKEN.encode() not in pickle.dumps(reward) and TOKEN not in repr(reward)
    assert pickle.loads(pickle.dumps(reward)).__name__ == "ocr"


def test_a_token_with_a_newline_is_sent_without_it(monkeypatch, pictures):
    with running([Slow()], token=TOKEN) as url:
        monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", f"{TOKEN}\n")
        RemoteReward(url, "slow").check()
        assert call(RemoteReward(url, "slow"), prompts=["x"], completions=pictures[:1]) == [0.5]


@pytest.mark.parametrize("token", ["tökentökentökentöken", "token token token token", "token\ntoken-token-token"])
def test_a_token_that_cannot_be_sent_is_refused_without_its_value(token, monkeypatch, pictures):
    monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", token)
    reward = RemoteReward("http://127.0.0.1:9", "slow")
    for attempt in (reward.check, lambda: call(reward, prompts=["x"], completions=pictures[:1])):
        with pytest.raises(ValueError, match="TRL_APEX_REWARD_TOKEN must be printable ASCII") as caught:
            attempt()
        assert token not in str(caught.value)


def test_a_token_over_plain_http_is_warned_about_once(monkeypatch):
    monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", TOKEN)
    reward = RemoteReward("http://reward-server.invalid:9", "slow", startup_timeout=0.1)
    with pytest.warns(UserWarning, match="goes to reward-server.invalid unencrypted") as caught:
        for _ in range(2):
            with pytest.raises(RewardLoadError, match="no server answers"):
                reward.check()
    assert len(caught) == 1 and TOKEN not in str(caught[0].message)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("127.0.0.1:8000", {}, "must start with http"),
        ("http://x", {"batch_size": 0}, "`batch_size`"),
        ("http://x", {"max_concurrency": 0}, "`max_concurrency`"),
    ],
)
def test_options(url, options, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(url, "ocr", **options)


def test_whole_groups_through_the_server(pictures):
    """Requests are groups, and the server joins none, however it is asked."""
    ids = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    ranked = RankReward(brightness, name="ranked")
    expected = ranked(["p"] * 12, pictures, group_ids=ids)
    with running([ranked], batch_wait=0.05) as url:
        with pytest.raises(RewardLoadError, match="compares the images of a group.*Pass whole_groups=True"):
            RemoteReward(url, "ranked").check()
        remote = RemoteReward(url, "ranked", batch_size=2, whole_groups=True)
        remote.check()
        with RewardScorer([remote]) as scorer:
            batch = {"prompts": ["p"] * 12, "completions": pictures}
            both = [scorer.submit(**batch, group_ids=ids) for _ in range(2)]
            for scored in both:
                assert scored.result(timeout=20).rewards.flatten().tolist() == pytest.approx(expected)
