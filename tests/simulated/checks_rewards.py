"""Every reward with a network, called by the scorer's threads, on the second device of the simulated accelerator."""

import pytest
import torch
from rewards_tiny_models import save_clip, save_llava, save_tokenizer
from safetensors.torch import save_file
from test_clip_rewards import OpenCLIP
from test_image_reward import checkpoint
from transformers import CLIPConfig

from trl_apex.rewards import (
    AestheticReward,
    CLIPScoreReward,
    DeQAReward,
    HPSv2Reward,
    ImageReward,
    JPEGCompressibilityReward,
    OCRReward,
    PickScoreReward,
    RewardScorer,
)
from trl_apex.rewards.clip import AestheticHead

PROMPTS = ["a red circle", "a blue square", 'a green square with "CAT"']


@pytest.fixture
def second_device():
    """What a process of rank 1 does first."""
    torch.accelerator.set_device_index(1)
    yield torch.device("sim:1")
    torch.accelerator.set_device_index(0)


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    """Each reward's class and arguments, with a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("models")
    clip, llava = (str(save(folder / save.__name__)) for save in (save_clip, save_llava))
    save_file(AestheticHead(width=16, hidden=(8, 8, 8, 8, 1)).state_dict(), folder / "head.safetensors")
    blip = folder / "blip"
    torch.save(checkpoint(len(save_tokenizer(blip, ["red", "circle"], length=35))), folder / "ImageReward.pt")
    hps = save_clip(folder / "hps", projection=12)
    config = CLIPConfig.from_pretrained(hps)
    torch.save({"state_dict": OpenCLIP(config.text_config.vocab_size).state_dict()}, folder / "hps.pt")
    return {
        "pickscore": (PickScoreReward, {"model": clip, "processor": None}),
        "clip_score": (CLIPScoreReward, {"model": clip}),
        "aesthetic": (AestheticReward, {"clip": clip, "head": str(folder / "head.safetensors")}),
        "hpsv2": (HPSv2Reward, {"weights": str(folder / "hps.pt"), "clip": str(hps)}),
        "image_reward": (ImageReward, {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(blip)}),
        "deqa": (DeQAReward, {"model": llava}),
    }


@pytest.mark.parametrize("name", ["pickscore", "clip_score", "aesthetic", "hpsv2", "image_reward", "deqa"])
@pytest.mark.parametrize("given", ["pictures", "images"])
def test_a_reward_of_rank_1_stays_on_its_device_in_the_scoring_thread(makers, second_device, name, given):
    cls, arguments = makers[name]
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    arguments = arguments | {"dtype": torch.float32}
    expected = cls(**arguments, device="cpu")(prompts=PROMPTS, images=images)
    reward = cls(**arguments)
    assert reward.device == torch.device("sim")
    if given == "images":
        images = images.to(second_device)
        reward.load()  # in the main thread, as the trainers do
    with RewardScorer([reward]) as scorer:
        scored = scorer.submit(prompts=PROMPTS, completions=images, images=images).result()
    assert reward.device == second_device
    assert scored.failures == {reward.__name__: 0}
    assert scored.rewards.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_functions_of_users_find_the_device_of_their_process_in_every_thread(second_device):
    def plain(images, **kwargs):
        return (images * torch.ones(3, 3, 20, 20).to("sim")).mean((1, 2, 3)).tolist()

    async def coroutine(images, **kwargs):
        return (images * torch.ones(3, 3, 20, 20, device="sim")).mean((1, 2, 3)).tolist()

    images = torch.rand(3, 3, 20, 20).to(second_device)
    with RewardScorer([plain, coroutine]) as scorer:
        scored = scorer.submit(prompts=PROMPTS, completions=images, images=images).result()
    assert scored.failures == {"plain": 0, "coroutine": 0}
    assert scored.rewards.isfinite().all()


def test_rewards_without_a_network_take_images_from_the_device(second_device):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with RewardScorer([JPEGCompressibilityReward(), OCRReward()]) as scorer:
        scored = scorer.submit(prompts=PROMPTS, completions=[], images=images.to(second_device)).result()
        on_cpu = scorer.submit(prompts=PROMPTS, completions=[], images=images).result()
    assert not any(scored.failures.values())
    torch.testing.assert_close(scored.rewards, on_cpu.rewards, equal_nan=True)
