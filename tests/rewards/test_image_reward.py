"""ImageReward's own layout, against a BLIP written out by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_tiny_models import save_tokenizer
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, softmax
from transformers import AutoTokenizer

from trl_apex.rewards import ImageReward, RewardLoadError

WIDTH, TEXT_WIDTH, INNER, PATCH, SIDE = 128, 64, 96, 8, 16
PROMPTS = ["a red circle", "a blue square with green"]


def linear_weights(prefix, outputs, inputs):
    return {f"{prefix}.weight": torch.randn(outputs, inputs) / inputs**0.5, f"{prefix}.bias": torch.randn(outputs)}


def norm_weights(prefix, width):
    return {f"{prefix}.weight": 1 + 0.1 * torch.randn(width), f"{prefix}.bias": 0.1 * torch.randn(width)}


def checkpoint(words: int) -> dict[str, torch.Tensor]:
    """A random checkpoint with the authors' names, including parts that scoring does not use."""
    torch.manual_seed(0)
    seen, read = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{seen}.cls_token": torch.randn(1, 1, WIDTH),
        f"{seen}.pos_embed": torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        f"{seen}.patch_embed.proj.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 14,
        f"{seen}.patch_embed.proj.bias": torch.randn(WIDTH),
        f"{read}.embeddings.position_ids": torch.arange(40)[None],
        f"{read}.embeddings.word_embeddings.weight": torch.randn(words, TEXT_WIDTH),
        f"{read}.embeddings.position_embeddings.weight": torch.randn(40, TEXT_WIDTH),
        "blip.vision_proj.weight": torch.randn(4, WIDTH),
        "blip.temp": torch.tensor(0.07),
    }
    state |= norm_weights(f"{seen}.norm", WIDTH) | norm_weights(f"{read}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(2):
        block = f"{seen}.blocks.{i}"
        state |= norm_weights(f"{block}.norm1", WIDTH) | norm_weights(f"{block}.norm2", WIDTH)
        state |= linear_weights(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        state |= linear_weights(f"{block}.attn.proj", WIDTH, WIDTH)
        state |= linear_weights(f"{block}.mlp.fc1", INNER, WIDTH) | linear_weights(f"{block}.mlp.fc2", WIDTH, INNER)
        layer = f"{read}.encoder.layer.{i}"
        for kind, source in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            state |= linear_weights(f"{layer}.{kind}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            state |= linear_weights(f"{layer}.{kind}.self.key", TEXT_WIDTH, source)
            state |= linear_weights(f"{layer}.{kind}.self.value", TEXT_WIDTH, source)
            state |= linear_weights(f"{layer}.{kind}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            state |= norm_weights(f"{layer}.{kind}.output.LayerNorm", TEXT_WIDTH)
        state |= linear_weights(f"{layer}.intermediate.dense", INNER, TEXT_WIDTH)
        state |= linear_weights(f"{layer}.output.dense", TEXT_WIDTH, INNER)
        state |= norm_weights(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    sizes = [TEXT_WIDTH, 32, 16, 8, 4, 1]
    for i, layer in enumerate((0, 2, 4, 6, 7)):
        state |= linear_weights(f"mlp.layers.{layer}", sizes[i + 1], sizes[i])
    return state


def attend(query, key, value):
    """Attention with heads of 64, on `[length, width]`."""
    outputs = []
    for q, k, v in zip(query.split(64, -1), key.split(64, -1), value.split(64, -1), strict=True):
        outputs.append(softmax(q @ k.T / math.sqrt(64), -1) @ v)
    return torch.cat(outputs, -1)


def score_by_hand(state, pixels, ids):
    """The authors' forward pass for one image and one prompt without padding."""

    def dense(name, x):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    seen, read = "blip.visual_encoder", "blip.text_encoder"
    weight, bias = state[f"{seen}.patch_embed.proj.weight"], state[f"{seen}.patch_embed.proj.bias"]
    x = nn.functional.conv2d(pixels[None], weight, bias, stride=PATCH)[0].flatten(1).T
    x = torch.cat([state[f"{seen}.cls_token"][0], x]) + state[f"{seen}.pos_embed"][0]
    for i in range(2):
        block = f"{seen}.blocks.{i}"
        q, k, v = dense(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + dense(f"{block}.attn.proj", attend(q, k, v))
        x = x + dense(f"{block}.mlp.fc2", gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{seen}.norm", x, 1e-6)

    h = state[f"{read}.embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{read}.embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(f"{read}.embeddings.LayerNorm", h, 1e-12)
    for i in range(2):
        layer = f"{read}.encoder.layer.{i}"
        for kind, source in (("attention", h), ("crossattention", x)):
            source = h if kind == "attention" else x
            q = dense(f"{layer}.{kind}.self.query", h)
            k, v = dense(f"{layer}.{kind}.self.key", source), dense(f"{layer}.{kind}.self.value", source)
            out = dense(f"{layer}.{kind}.output.dense", attend(q, k, v))
            h = norm(f"{layer}.{kind}.output.LayerNorm", out + h, 1e-12)
        out = dense(f"{layer}.output.dense", gelu(dense(f"{layer}.intermediate.dense", h)))
        h = norm(f"{layer}.output.LayerNorm", out + h, 1e-12)
    y = h[0]
    for layer in (0, 2, 4, 6, 7):
        y = dense(f"mlp.layers.{layer}", y)
    return ((y - 0.16717362830052426) / 1.0333394966054072).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    tokenizer = save_tokenizer(folder, ["a", "red", "green", "blue", "circle", "square", "with"], length=35)
    torch.save(checkpoint(len(tokenizer)), folder / "ImageReward.pt")
    return folder


def test_score(folder):
    noise = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    rewards = ImageReward(str(folder / "ImageReward.pt"), str(folder))(
        prompts=PROMPTS, completions=[Image.fromarray(array) for array in noise]
    )
    state, tokenizer = torch.load(folder / "ImageReward.pt", weights_only=True), AutoTokenizer.from_pretrained(folder)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = []
    for prompt, array in zip(PROMPTS, noise, strict=True):
        pixels = ((torch.from_numpy(array) / 255 - mean) / std).permute(2, 0, 1)
        expected.append(score_by_hand(state, pixels, torch.tensor(tokenizer(prompt)["input_ids"])))
    assert abs(expected[0] - expected[1]) > 0.01
    assert rewards == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_wrong_file_is_refused(folder, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(RewardLoadError, match="must hold ImageReward's tensors"):
        ImageReward(str(tmp_path / "other.pt"), str(folder)).load()
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.query.bias"]
    torch.save(state, tmp_path / "partial.pt")
    with pytest.raises(RewardLoadError, match="1 missing"):
        ImageReward(str(tmp_path / "partial.pt"), str(folder)).load()
