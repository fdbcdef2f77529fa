"""Random models of the rewards' own classes, a few thousand weights each, saved as users' folders are."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEXT = "How would you rate the quality of this image ? The is USER : ASSISTANT"
LEVELS = ["excellent", "good", "fair", "poor", "bad"]
BODY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COLOURS = ["a", "red", "green", "blue", "circle", "square", "with"]


def save_tokenizer(folder: Path, words: list[str], length: int = 12, wrap: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `wrap` puts a start and an end token around each text, as CLIP does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "<image>", *words, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if wrap:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
        additional_special_tokens=["<image>"],
    )
    fast.save_pretrained(folder)
    return fast


def image_processor(side: int = 16):
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def save_clip(folder: Path, projection: int = 16, **body: str) -> Path:
    """A CLIP of two layers on 16 px images."""
    tokenizer = save_tokenizer(folder, COLOURS)
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=BODY | text | body, vision_config=BODY | vision | body, projection_dim=projection)
    model = CLIPModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # otherwise all texts are nearly the same
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def save_llava(folder: Path, levels: list[str] = LEVELS, chat_template: str | None = None, wrap: bool = False) -> Path:
    """A LLaVA of one layer on 16 px images."""
    tokenizer = save_tokenizer(folder, TEXT.split() + levels, length=64, wrap=wrap)
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **BODY),
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8} | BODY,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder
