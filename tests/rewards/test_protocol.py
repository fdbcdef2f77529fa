"""The base class, the conversions between the two forms of images, and the embedding cache."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import redness, tiny_trainer

from trl_apex.rewards import RankReward, Reward, RewardFunction
from trl_apex.rewards.base import to_arrays, to_pil, to_uint8
from trl_apex.rewards.clip import EmbeddingCache


class Recording(Reward):
    def __init__(self, **options):
        super().__init__(**options)
        self.loads, self.calls = 0, []

    def _load(self):
        self.loads += 1
        return "weights"

    def _score(self, loaded, images, prompts, columns):
        assert loaded == "weights" and torch.is_inference_mode_enabled()
        self.calls.append((len(images), prompts, columns))
        return [float(len(prompt)) for prompt in prompts]


def test_batches_loading_and_unloading():
    reward = Recording(batch_size=2, name="mine", device="cpu")
    assert reward.loads == 0 and reward.__name__ == "mine" and isinstance(reward, RewardFunction)
    keywords = {"target": ["x", "y", "z"], "seed": 3, "odd": [1, 2]}
    assert reward(prompts=["a", "bb", "ccc"], images=torch.rand(3, 3, 4, 4), **keywords) == [1.0, 2.0, 3.0]
    assert reward.calls == [(2, ["a", "bb"], {"target": ["x", "y"]}), (1, ["ccc"], {"target": ["z"]})]
    reward(prompts=["a"], completions=[Image.new("RGB", (2, 2))])
    assert reward.loads == 1
    reward.unload()
    reward(prompts=["a"], completions=[Image.new("RGB", (2, 2))])
    assert reward.loads == 2


class Travelling(torch.nn.Linear):
    """A network that notes where it is sent."""

    def to(self, device):
        self.journey.append(torch.device(device).type)
        return self


class Networked(Reward):
    default_name = "networked"

    def _load(self):
        self.network = Travelling(1, 1)
        self.network.journey = []
        return self.network, "tokenizer"

    def _score(self, loaded, images, prompts, columns):
        loaded[0].journey.append("score")
        return images.mean((1, 2, 3)).tolist()


def test_an_offloaded_network_is_on_the_cpu_until_the_next_call():
    reward = Networked(device="meta")
    reward.offload()  # nothing is loaded yet
    for _ in range(2):
        reward(prompts=["a"], images=torch.rand(1, 3, 4, 4))
        reward(prompts=["a"], images=torch.rand(1, 3, 4, 4))
        RankReward(reward).offload()
    assert reward.network.journey == ["score", "score", "cpu", "meta", "score", "score", "cpu"]


def test_with_offload_rewards_networks_leave_after_each_rollout_and_evaluation(tmp_path):
    reward = Networked(device="meta")
    trainer = tiny_trainer(
        tmp_path, [reward, redness], offload_rewards=True, max_steps=2, rollout_batch_size=2, evaluate=True
    )
    trainer.train()
    rollout, evaluation = ["score", "score", "cpu"], ["meta", "score", "cpu"]
    assert reward.network.journey == [*rollout, "meta", *rollout, *evaluation]


def test_one_samples_trouble_stays_its_own():
    class Delicate(Recording):
        def _score(self, loaded, images, prompts, columns):
            to_pil(images)
            return [
                float(len(prompt)) + len(target) for prompt, target in zip(prompts, columns["target"], strict=True)
            ]

    good, odd = Image.new("RGB", (2, 2)), Image.new("F", (2, 2))
    reward, keywords = Delicate(device="cpu", batch_size=3), {"prompts": ["a", "", "ccc", "d"]}
    found = reward(**keywords, completions=[good, odd, good, good], target=["x", "x", None, "x"])
    assert found == [2.0, None, None, 2.0] and found.failures == 2
    assert "mode 'F'" in found.errors[1] and "TypeError" in found.errors[2]
    with pytest.raises(TypeError):  # nothing can be scored
        reward(**keywords, completions=[good] * 4, target=[None] * 4)


def test_one_batch_at_a_time():
    inside = []

    class Alone(Recording):
        def _score(self, loaded, images, prompts, columns):
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.01)
            inside.pop()
            return [0.0] * len(prompts)

    reward = Alone(device="cpu")
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(reward, prompts=["a"], images=torch.rand(1, 3, 2, 2)) for _ in range(4)]
    assert [call.result() for call in calls] == [[0.0]] * 4 and reward.loads == 1


def test_rounding_is_that_of_saving():
    images = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0, float("nan"), 254.6 / 255])
    assert to_uint8(images.repeat(3, 1).reshape(1, 3, 2, 4))[0, 0].flatten().tolist() == [0, 0, 0, 1, 255, 255, 0, 255]


def test_there_and_back():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    assert (to_arrays(tensor)[0] == array).all()
    assert (np.asarray(to_pil(tensor)[0]) == array).all()
    assert (to_arrays([Image.fromarray(array)])[0] == array).all()
    assert (to_uint8(tensor.half())[0].permute(1, 2, 0).numpy() == array).all()


def test_cache_keeps_the_last_ones_and_gives_the_right_rows():
    cache, computed = EmbeddingCache(size=3), []

    def get(keys):
        def embed(missing):
            computed.append([keys[i] for i in missing])
            return torch.tensor([[float(ord(keys[i]))] for i in missing])

        assert cache.get(list(keys), embed).flatten().tolist() == [float(ord(key)) for key in keys]

    get("abab")
    get("bc")
    get("ad")
    get("b")  # the oldest, so it has gone
    get("abcdefg")  # more than are kept
    assert computed == [["a", "b"], ["c"], ["d"], ["b"], ["c", "e", "f", "g"]]
