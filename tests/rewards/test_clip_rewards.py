"""PickScore, CLIPScore, aesthetic and HPSv2 against values worked out by hand on tiny CLIPs."""

import gc
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_tiny_models import save_clip
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel

from trl_apex.rewards import AestheticReward, CLIPScoreReward, HPSv2Reward, PickScoreReward, RewardLoadError
from trl_apex.rewards.clip import AestheticHead, _towers

PROMPTS = ["a red circle", "a blue square", "green", "a red circle with a blue square"]


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


@pytest.fixture(scope="module")
def tensor(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def prepare(image: Image.Image, side: int = 16) -> torch.Tensor:
    """CLIP's preprocessing by hand: shorter side to `side`, bicubic; centre crop; normalize."""
    scale = side / min(image.size)
    resized = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture(scope="module")
def by_hand(clip_folder, images):
    """Unit embeddings and temperature, one sample at a time and without any of the package's code."""
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    pictures, texts = [], []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=True):
            seen = model.vision_model(pixel_values=prepare(image)[None]).pooler_output
            pictures.append(model.visual_projection(seen)[0])
            tokens = tokenizer(prompt, return_tensors="pt")
            read = model.text_model(input_ids=tokens["input_ids"]).pooler_output
            texts.append(model.text_projection(read)[0])
    unit = [torch.nn.functional.normalize(torch.stack(rows), dim=-1) for rows in (pictures, texts)]
    return *unit, model.logit_scale.exp().item()


def close(rewards, expected):
    return rewards == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cls", [PickScoreReward, CLIPScoreReward])
def test_scaled_cosine(cls, clip_folder, images, tensor, by_hand):
    pictures, texts, scale = by_hand
    reward = cls(str(clip_folder), processor=None, batch_size=3)
    rewards = reward(prompts=PROMPTS, completions=images)
    assert scale > 10 and np.std(rewards) > 0.1
    assert close(rewards, (scale if cls is PickScoreReward else 100) * (pictures * texts).sum(-1))
    reward.unload()  # and with it the embeddings
    assert reward(prompts=PROMPTS, completions=[], images=tensor) == rewards, "tensors and pictures agree to the bit"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    torch.manual_seed(1)
    head = AestheticHead(width=16, hidden=(8, 8, 8, 8, 1))
    folder = tmp_path_factory.mktemp("head")
    save_file(head.state_dict(), folder / "head.safetensors")
    torch.save(head.state_dict(), folder / "head.pth")
    return head, folder


def test_aesthetic(clip_folder, images, by_hand, head):
    weights = head[0].state_dict()
    hidden = by_hand[0]
    for layer in (0, 2, 4, 6, 7):  # dropout sits between, activations nowhere
        hidden = hidden @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    for name in ("head.safetensors", "head.pth"):
        reward = AestheticReward(str(clip_folder), str(head[1] / name))
        assert close(reward(prompts=PROMPTS, completions=images), hidden[:, 0])


def test_published_head_has_the_shapes_of_the_definition():
    shapes = {key: tuple(value.shape) for key, value in AestheticHead().state_dict().items() if "weight" in key}
    sizes = [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    assert shapes == dict(zip([f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)], sizes, strict=True))
    assert [module.p for module in AestheticHead().layers if isinstance(module, nn.Dropout)] == [0.2, 0.2, 0.1]


def test_wrong_weights_are_refused(clip_folder, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled object, not tensors
    for file, message in (("a.safetensors", r"layers\.N\.weight"), ("module.pth", "[Ww]eights")):
        with pytest.raises(RewardLoadError, match=message):
            AestheticReward(str(clip_folder), str(tmp_path / file)).load()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RewardLoadError, match="safetensors"):
        PickScoreReward(str(tmp_path / "pickled"), processor=str(clip_folder)).load()
    with pytest.raises(RewardLoadError, match="`pickscore` must be able to load its weights"):
        PickScoreReward("nowhere/nothing", processor=None).load()


def test_towers_are_shared_and_embeddings_kept(clip_folder, images, head):
    gc.collect()  # towers of other tests, with their embeddings
    aesthetic = AestheticReward(str(clip_folder), str(head[1] / "head.safetensors"))
    clip_score = CLIPScoreReward(str(clip_folder))
    tower = clip_score.load()
    assert aesthetic.load()[0] is tower
    passes = []
    parts = tower.model.vision_model, tower.model.text_model
    hooks = [part.register_forward_hook(lambda part, *_: passes.append(part)) for part in parts]
    for _ in range(2):
        clip_score(prompts=PROMPTS, completions=images)
        aesthetic(prompts=PROMPTS, completions=images)
    for hook in hooks:
        hook.remove()
    assert set(passes) == set(parts) and len(passes) == 2, "four calls on the same images need one pass of each tower"
    del tower, parts, passes
    clip_score.unload()
    assert len(_towers) >= 1
    before = len(_towers)
    aesthetic.unload()
    gc.collect()
    assert len(_towers) == before - 1


def test_pickle_leaves_the_weights_behind(clip_folder, images):
    reward = PickScoreReward(str(clip_folder), processor=None, name="pick")
    expected = reward(prompts=PROMPTS, completions=images)
    pickled = pickle.dumps(reward)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy.__name__ == "pick" and copy(prompts=PROMPTS, completions=images) == expected


def test_half_precision_and_no_gradient(clip_folder, images, by_hand):
    reward = PickScoreReward(str(clip_folder), processor=None, dtype=torch.bfloat16)
    pictures, texts, scale = by_hand
    rewards = reward(prompts=PROMPTS, completions=images)
    assert rewards == pytest.approx((scale * (pictures * texts).sum(-1)).tolist(), abs=1.0)
    assert all(isinstance(value, float) for value in rewards)
    assert not any(parameter.requires_grad for parameter in reward.load().model.parameters())


def test_wrong_batches_are_refused(clip_folder, images):
    reward = PickScoreReward(str(clip_folder), processor=None)
    for completions, message in (
        (images, "one image per prompt. Found 4 images for 1 prompts"),
        (None, "Found no images"),
        (torch.rand(1, 4, 8, 8), r"must have shape \[B, 3, H, W\]"),
        (torch.ones(1, 3, 8, 8, dtype=torch.int64), "floats in"),
    ):
        with pytest.raises(ValueError, match=message):
            reward(prompts=["a"], completions=completions)


class OpenCLIPBlock(nn.Module):
    """One residual block in open_clip's layout, on torch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Stack(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([OpenCLIPBlock(width, heads) for _ in range(2)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenCLIPVision(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(width), nn.LayerNorm(width), Stack(width, 2)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    def __init__(self, words: int, width: int = 16, out: int = 12, length: int = 12) -> None:
        super().__init__()
        self.visual, self.transformer = OpenCLIPVision(width, out), Stack(width, 2)
        self.token_embedding, self.ln_final = nn.Embedding(words, width), nn.LayerNorm(width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def test_hpsv2_reads_the_open_clip_layout(tmp_path, images):
    save_clip(tmp_path, projection=12, hidden_act="gelu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(0)
    original = OpenCLIP(len(tokenizer)).eval()
    torch.save({"state_dict": original.state_dict()}, tmp_path / "weights.pt")

    square = [image.crop((0, 0, 20, 20)) for image in images]
    rewards = HPSv2Reward(str(tmp_path / "weights.pt"), clip=str(tmp_path))(prompts=PROMPTS, completions=square)
    expected = []
    with torch.no_grad():
        for image, prompt in zip(square, PROMPTS, strict=True):
            read = original.encode_text(tokenizer(prompt, return_tensors="pt")["input_ids"])
            seen = original.visual(prepare(image)[None])
            expected.append(torch.cosine_similarity(read, seen).item())
    assert np.std(expected) > 0.01
    assert rewards == pytest.approx(expected, abs=1e-5)

    del (state := original.state_dict())["visual.ln_post.bias"]
    torch.save(state, tmp_path / "partial.pt")
    with pytest.raises(RewardLoadError, match="1 missing"):
        HPSv2Reward(str(tmp_path / "partial.pt"), clip=str(tmp_path)).load()
