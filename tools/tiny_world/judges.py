"""Pretrain what judges the pictures: CLIP and its aesthetic head, the model of quality, the held-out classifiers."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tools.tiny_world.shared import clip_image_processor, descend
from trl_apex.rewards.clip import AestheticHead
from trl_apex.rewards.deqa import ANSWER, LEVELS, QUESTION, build_text, level_token_ids
from trl_apex.tiny.heldout import HeldoutClassifier
from trl_apex.tiny.pipeline import MAX_LENGTH, build_tokenizer, build_word_tokenizer, token_ids
from trl_apex.tiny.prompts import COLOURS, LETTERS, SHAPES
from trl_apex.tiny.render import SIZE, Scene, as_float

PATCH = 4
EMBEDDING = 48
_PROBE_GAIN = 10.0  # the entries of a unit vector are small, scores are not


def worse_scene(scene: Scene, rng: np.random.Generator) -> Scene:
    """The losing half of a preference pair: the caption fits it less well (two in three), or it looks worse (one in three).

    Example:
        >>> scene = Scene("CAT", "red", "circle")
        >>> worse_scene(scene, np.random.default_rng(0)) == scene
        False
    """
    kind = rng.choice(
        ["letters", "colour", "shape", "blur", "noise", "fade"], p=[0.42, 0.125, 0.125, 0.11, 0.11, 0.11]
    )
    if kind == "letters":
        return replace(scene, word=_misspelled(scene.word, rng))
    if kind == "colour":
        return replace(scene, colour=str(rng.choice([c for c in COLOURS if c != scene.colour])))
    if kind == "shape":
        return replace(scene, shape=str(rng.choice([s for s in SHAPES if s != scene.shape])))
    if kind == "blur":
        return replace(scene, blur=scene.blur + float(rng.uniform(0.4, 1.1)))
    if kind == "noise":
        return replace(scene, noise=scene.noise + float(rng.uniform(0.04, 0.12)))
    faded = float(rng.uniform(0.35, 0.75))
    return replace(scene, text_opacity=faded * scene.text_opacity, shape_opacity=faded * scene.shape_opacity)


def _misspelled(word: str, rng: np.random.Generator) -> str:
    letters = list(word)
    for place in rng.choice(3, size=rng.integers(1, 4), replace=False):
        letters[place] = str(rng.choice([letter for letter in LETTERS if letter != word[place]]))
    return "".join(letters)


def build_clip(seed: int) -> Any:
    """Build the `CLIPModel` that plays PickScore's part, for images of 32 x 32 pixels, with random weights of `seed`."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        hidden_size=48,
        intermediate_size=96,
        projection_dim=EMBEDDING,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        **token_ids(build_tokenizer()),
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        projection_dim=EMBEDDING,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING))


def clip_pixels(pixels: UInt8[Tensor, "B 3 32 32"]) -> Float[Tensor, "B 3 32 32"]:
    """The output of CLIP's image processor for images of the model's own size: `(x - mean) / std` per channel."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (as_float(pixels) - mean) / std


def fit_clip(
    model: Any,
    better: UInt8[Tensor, "N 3 32 32"],
    worse: UInt8[Tensor, "N 3 32 32"],
    captions: list[str],
    captions_of_worse: list[str],
    beauties: Float[Tensor, "N 2"],
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Train contrastively with hard negatives, in place.

    `loss = CE(image_i -> its caption among all captions) + CE(caption_i -> its better image among all images) + 0.1 MSE`

    The second term ranks the better of two images first for their caption, as PickScore's training does. The last
    regresses beauty linearly from the normalized embedding, so that the embedding keeps what an aesthetic head needs.

    Args:
        better, worse (`torch.Tensor`): images and, for each, one that loses against it under the same caption.
        captions, captions_of_worse (`list[str]`): their own captions; some are equal.
        beauties (`torch.Tensor`): of both images.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    padded = {"padding": "max_length", "return_tensors": "pt"}
    ids = torch.stack([tokenizer(texts, **padded).input_ids for texts in (captions, captions_of_worse)], dim=1)
    centre = beauties.mean()
    probe = nn.Linear(EMBEDDING, 1)
    target = torch.arange(batch_size)

    def loss_of_step() -> Tensor:
        index = torch.randint(len(better), (batch_size,), generator=generator)
        tokens = ids[index].transpose(0, 1).reshape(2 * batch_size, MAX_LENGTH)
        pixels = clip_pixels(torch.cat([better[index], worse[index]]))
        output = model(input_ids=tokens, pixel_values=pixels)
        images, texts = output.image_embeds, output.text_embeds  # of unit length
        scale = model.logit_scale.exp()
        to_text = scale * images[:batch_size] @ texts.T
        same = (tokens[:batch_size, None] == tokens[None]).all(-1)
        same &= ~torch.eye(batch_size, 2 * batch_size, dtype=torch.bool)
        to_text = to_text.masked_fill(same, -torch.inf)
        to_image = scale * texts[:batch_size] @ images.T
        to_image = to_image.masked_fill(same & (torch.arange(2 * batch_size) < batch_size), -torch.inf)
        beauty = _PROBE_GAIN * probe(images).squeeze(-1) + centre
        loss = functional.cross_entropy(to_text, target) + functional.cross_entropy(to_image, target)
        return loss + 0.1 * functional.mse_loss(beauty, beauties[index].T.reshape(-1))

    def limit_scale(_: int) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.0)

    parameters = [*model.train().parameters(), *probe.parameters()]
    descend("clip", parameters, loss_of_step, steps=steps, learning_rate=2e-3, after_step=limit_scale)
    model.eval().requires_grad_(False)


@torch.no_grad()
def embed_images(clip: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> Float[Tensor, "N D"]:
    """Image embeddings of unit length, of shape `[N, D]`."""
    parts = [clip.get_image_features(pixel_values=clip_pixels(part)).pooler_output for part in pixels.split(512)]
    return functional.normalize(torch.cat(parts).float())


def fit_aesthetic(
    clip: Any,
    pixels: UInt8[Tensor, "N 3 32 32"],
    beauties: Float[Tensor, "N"],
    *,
    steps: int,
    batch_size: int = 512,
    seed: int = 0,
) -> AestheticHead:
    """Regress beauty from the frozen image embeddings with the production head: five linear layers, 1024 wide."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    embeddings = embed_images(clip, pixels)
    head = AestheticHead(embeddings.shape[1]).train()
    centre = beauties.mean()

    def loss_of_step() -> Tensor:
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        return functional.mse_loss(head(embeddings[index]), beauties[index] - centre)

    descend(
        "aesthetic",
        head.parameters(),
        loss_of_step,
        steps=steps,
        learning_rate=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        max_norm=None,
        warm_up=20,
    )
    with torch.no_grad():
        last: Any = head.layers[-1]
        last.bias += centre
    return head.eval().requires_grad_(False)


def build_chat_tokenizer(text: str, levels: Sequence[str]) -> Any:
    """Build the tokenizer of the vision-language model: the words of its one dialogue, of the answers, and `<image>`.

    Example:
        >>> build_chat_tokenizer("How good?", ["fine"]).tokenize("<image> How good? fine day")
        ['<image>', 'How', 'good', '?', 'fine', '<unk>']
    """
    words = list(dict.fromkeys([*re.findall(r"\w+|[^\w\s]", text), *levels]))
    return build_word_tokenizer(words, r"[^\w\s]", "<bos> $A", max_length=256, extra_special=["<image>"])


def build_quality_processor() -> Any:
    """Build the processor: CLIP's image processor at 32 pixels and a tokenizer that knows the words of the question."""
    return LlavaProcessor(
        image_processor=clip_image_processor(),
        tokenizer=build_chat_tokenizer(f"USER: {QUESTION} ASSISTANT: {ANSWER}", LEVELS),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_quality_model(clip: Any, processor: Any, seed: int) -> Any:
    """Build the `LlavaForConditionalGeneration` that names a level of quality, as DeQA-Score does.

    The vision tower is that of `clip`; projector and language model have random weights of `seed`.
    """
    torch.manual_seed(seed)
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        **token_ids(processor.tokenizer),
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config.to_dict(),
            text_config=text.to_dict(),
            image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=(clip.config.vision_config.image_size // PATCH) ** 2,
        )
    )
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return model


def level_targets(qualities: Float[Tensor, "B"]) -> Float[Tensor, "B 5"]:
    """Soft labels over the five levels whose expected level is the quality.

    `y_l = max(0, 1 - |q - w_l|)`, `w = (5, 4, 3, 2, 1)`: the two nearest levels share the weight; the best level is first.

    Example:
        >>> level_targets(torch.tensor([4.25])).tolist()
        [[0.25, 0.75, 0.0, 0.0, 0.0]]
    """
    levels = torch.arange(5, 0, -1, dtype=qualities.dtype)
    return (1 - (qualities[:, None] - levels).abs()).clamp(min=0)


def fit_quality(
    model: Any,
    processor: Any,
    pixels: UInt8[Tensor, "N 3 32 32"],
    qualities: Float[Tensor, "N"],
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Train the next token after the start of the answer to be the level of the image, in place.

    `loss = -sum_l y_l log p(level word l | image, question, start of the answer)`, `y` from [`level_targets`]
    """
    generator = torch.Generator().manual_seed(seed)
    text = build_text(processor, QUESTION, ANSWER)
    level_ids = torch.tensor(level_token_ids(processor.tokenizer, text, LEVELS))
    blank = pixels[0].permute(1, 2, 0).numpy()
    ids = processor(images=[blank], text=[text], return_tensors="pt").input_ids.expand(batch_size, -1)

    def loss_of_step() -> Tensor:
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        logits = model(input_ids=ids, pixel_values=clip_pixels(pixels[index]), logits_to_keep=1).logits[:, -1]
        log_likelihood = logits.float().log_softmax(-1)[:, level_ids]
        return -(level_targets(qualities[index]) * log_likelihood).sum(-1).mean()

    descend("quality", model.train().parameters(), loss_of_step, steps=steps, learning_rate=1.5e-3, warm_up=50)
    model.eval().requires_grad_(False)


def label_ids(scenes: Sequence[Scene]) -> Int[Tensor, "N 5"]:
    """The classes of each image as integers: three letters, the colour, the shape."""
    return torch.tensor(
        [[*map(LETTERS.index, s.word), COLOURS.index(s.colour), SHAPES.index(s.shape)] for s in scenes]
    )


def augment(images: Float[Tensor, "B 3 32 32"], generator: torch.Generator) -> Float[Tensor, "B 3 32 32"]:
    """Shift the batch by up to one pixel and change contrast, brightness and noise of each image."""
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    shifted = functional.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, down : down + 32, right : right + 32]
    contrast, brightness, noise = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    changed = 0.5 + (0.7 + 0.4 * contrast) * (shifted - 0.5) + 0.1 * (brightness - 0.5)
    return (changed + 0.06 * noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def fit_heldout(
    pixels: UInt8[Tensor, "N 3 32 32"],
    labels: Int[Tensor, "N 5"],
    *,
    steps: int,
    batch_size: int = 96,
    seed: int = 0,
) -> HeldoutClassifier:
    """Train the classifiers with the sum of five cross-entropies; `labels` are those of [`label_ids`]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = HeldoutClassifier().train()

    def loss_of_step() -> Tensor:
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        letters, colour, shape = model(augment(as_float(pixels[index]), generator))
        classes = labels[index]
        loss = 3 * functional.cross_entropy(letters.flatten(0, 1), classes[:, :3].flatten())
        return loss + functional.cross_entropy(colour, classes[:, 3]) + functional.cross_entropy(shape, classes[:, 4])

    descend(
        "heldout",
        model.parameters(),
        loss_of_step,
        steps=steps,
        learning_rate=2e-3,
        betas=(0.9, 0.999),
        weight_decay=0.02,
        max_norm=None,
        warm_up=50,
    )
    return model.eval().requires_grad_(False)
