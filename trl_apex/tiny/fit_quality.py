"""Pretrains the tiny vision-language model that names a level of technical quality, as DeQA-Score does."""

import logging
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from trl_apex.rewards.deqa import LEVELS, build_text, level_token_ids
from trl_apex.tiny.fit_clip import PATCH, clip_pixels
from trl_apex.tiny.schedule import warm_then_decay
from trl_apex.tiny.tokenizer import build_chat_tokenizer

logger = logging.getLogger(__name__)


def build_quality_processor(question: str, answer: str) -> Any:
    """Builds the processor: CLIP's image processor at 32 pixels and a tokenizer that knows the words of the question."""
    from transformers import LlavaProcessor

    from trl_apex.tiny.saving import clip_image_processor

    return LlavaProcessor(
        image_processor=clip_image_processor(),
        tokenizer=build_chat_tokenizer(f"USER: {question} ASSISTANT: {answer}", LEVELS),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_quality_model(clip: Any, processor: Any, seed: int) -> Any:
    """Builds the model: the vision tower starts from CLIP's, projector and language model from random weights.

    Args:
        clip (`CLIPModel`): Its vision tower is copied.
        processor (`LlavaProcessor`): Decides the vocabulary.
        seed (`int`): Seed of the new weights.

    Returns:
        `LlavaForConditionalGeneration`: In float32, on the CPU.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config.to_dict(),
            text_config=text.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=(clip.config.vision_config.image_size // PATCH) ** 2,
        )
    )
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return model


def level_targets(qualities: Float[Tensor, "B"]) -> Float[Tensor, "B 5"]:
    """Soft labels over the five levels whose expected level is the quality.

    `y_l = max(0, 1 - |q - w_l|)`, `w = (5, 4, 3, 2, 1)`: the two nearest levels share the weight.

    Args:
        qualities (`torch.Tensor`): From 1 to 5, of shape `[B]`.

    Returns:
        `torch.Tensor`: Of shape `[B, 5]`, rows sum to 1, best level first.

    Example:
        >>> level_targets(torch.tensor([4.25])).tolist()
        [[0.25, 0.75, 0.0, 0.0, 0.0]]
    """
    levels = torch.arange(5, 0, -1, dtype=qualities.dtype)
    return (1 - (qualities[:, None] - levels).abs()).clamp(min=0)


def fit_quality(
    model: Any,
    processor: Any,
    question: str,
    answer: str,
    pixels: UInt8[Tensor, "N 3 32 32"],
    qualities: Float[Tensor, "N"],
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Trains the next token after the start of the answer to be the level of the image, in place.

    `loss = -sum_l y_l log p(level word l | image, question, start of the answer)`, `y` from [`level_targets`]

    Args:
        model (`LlavaForConditionalGeneration`): Changed in place.
        processor (`LlavaProcessor`): Its processor.
        question (`str`): The question about the image.
        answer (`str`): The start of the answer.
        pixels (`torch.Tensor`): Images of shape `[N, 3, 32, 32]`, uint8.
        qualities (`torch.Tensor`): Their quality, 1 to 5, of shape `[N]`.
        steps (`int`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 64): Images per step.
        seed (`int`, *optional*, defaults to 0): Seed of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    text = build_text(processor, question, answer)
    level_ids = torch.tensor(level_token_ids(processor.tokenizer, text, LEVELS))
    blank = pixels[0].permute(1, 2, 0).numpy()
    ids = processor(images=[blank], text=[text], return_tensors="pt").input_ids.expand(batch_size, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = warm_then_decay(optimizer, steps, warm_up=50)
    model.train()
    for step in range(steps):
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        logits = model(input_ids=ids, pixel_values=clip_pixels(pixels[index]), logits_to_keep=1).logits[:, -1]
        likely = logits.float().log_softmax(-1)[:, level_ids]
        loss = -(level_targets(qualities[index]) * likely).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("quality %d/%d loss %.3f", step, steps, loss.item())
    model.eval().requires_grad_(False)
