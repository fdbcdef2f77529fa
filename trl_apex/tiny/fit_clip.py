"""Pretrains the tiny CLIP model, which plays PickScore's part and carries the aesthetic head."""

import logging
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from trl_apex.tiny.render import SIZE, as_float
from trl_apex.tiny.schedule import warm_then_decay
from trl_apex.tiny.tokenizer import MAX_LENGTH, build_tokenizer

logger = logging.getLogger(__name__)

PATCH = 4
EMBEDDING = 48
_PROBE_GAIN = 10.0  # the entries of a unit vector are small, scores are not
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own, which its image processor applies by default
_STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(seed: int) -> Any:
    """Builds the CLIP model with fresh random weights.

    Args:
        seed (`int`): Seed of the weights.

    Returns:
        `CLIPModel`: For images of 32 x 32 pixels and captions of up to 12 tokens.

    Example:
        >>> build_clip(0).config.projection_dim
        48
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        projection_dim=EMBEDDING,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
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
    """What CLIP's image processor gives for images of the model's own size: `(x - mean) / std` per channel."""
    mean, std = torch.tensor(_MEAN)[:, None, None], torch.tensor(_STD)[:, None, None]
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
    """Trains contrastively with hard negatives, in place.

    `loss = CE(image_i -> its caption among all captions) + CE(caption_i -> its better image among all images) + 0.1 MSE`

    The second term ranks the better of two images first for their caption, as PickScore's training does. The last
    regresses beauty linearly from the normalized embedding, so that the embedding keeps what an aesthetic head needs.

    Args:
        model (`CLIPModel`): Changed in place.
        better (`torch.Tensor`): Images of shape `[N, 3, 32, 32]`, uint8.
        worse (`torch.Tensor`): For each, an image that loses against it under the same caption.
        captions (`list[str]`): The captions of `better`.
        captions_of_worse (`list[str]`): The true captions of `worse`; some are equal to those of `better`.
        beauties (`torch.Tensor`): Beauty of both images, of shape `[N, 2]`.
        steps (`int`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 64): Pairs per step.
        seed (`int`, *optional*, defaults to 0): Seed of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    ids = torch.stack(
        [
            tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
            for texts in (captions, captions_of_worse)
        ],
        dim=1,
    )
    centre = beauties.mean()
    probe = nn.Linear(EMBEDDING, 1)
    parameters = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = warm_then_decay(optimizer, steps)
    model.train()
    for step in range(steps):
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
        target = torch.arange(batch_size)
        beauty = _PROBE_GAIN * probe(images).squeeze(-1) + centre
        pleasing = functional.mse_loss(beauty, beauties[index].T.reshape(-1))
        loss = functional.cross_entropy(to_text, target) + functional.cross_entropy(to_image, target)
        loss = loss + 0.1 * pleasing
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.0)
        if step % 50 == 0 or step == steps - 1:
            right = (to_text.argmax(-1) == target).float().mean().item()
            logger.info(
                "clip %d/%d loss %.3f retrieval %.2f beauty %.3f", step, steps, loss.item(), right, pleasing.item()
            )
    model.eval().requires_grad_(False)
