"""The tiny Stable Diffusion 3 pipeline before training: real classes, small enough for a CPU."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from trl_apex.tiny.prompts import COLOURS, LETTERS, SHAPES

LATENT_SIZE, LATENT_CHANNELS = 8, 16
MAX_LENGTH = 12  # tokens of a padded prompt: begin, nine of the prompt, end, and one to spare
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PROMPT_VOCABULARY = ("a", *COLOURS, *SHAPES, "with", '"', *LETTERS)


def build_pipeline(seed: int) -> Any:
    """Build the `StableDiffusion3Pipeline` with random weights of `seed`, in float32, for images of 32 x 32 pixels.

    Example:
        >>> build_pipeline(0).vae_scale_factor
        4
    """
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=24,
        joint_attention_dim=64,
        caption_projection_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tokenizer, tokenizer_3 = build_tokenizer(), build_tokenizer(begin=False)
    clip = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        **token_ids(tokenizer),
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=MAX_LENGTH,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer_3.pad_token_id,
        eos_token_id=tokenizer_3.eos_token_id,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(copy.deepcopy(clip)),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def token_ids(tokenizer: Any) -> dict[str, int]:
    """What the configuration of a network takes from its tokenizer."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def build_tokenizer(*, begin: bool = True) -> Any:
    """Build the tokenizer of prompts: lower-case words, single capitals and quotes; with `begin`, after `<bos>`, as CLIP's.

    Example:
        >>> build_tokenizer().tokenize('a red circle with "CAT"')
        ['a', 'red', 'circle', 'with', '"', 'C', 'A', 'T', '"']
    """
    template = "<bos> $A <eos>" if begin else "$A <eos>"
    return build_word_tokenizer(PROMPT_VOCABULARY, "[A-Z]|[^A-Za-z]", template, max_length=MAX_LENGTH)


def build_word_tokenizer(
    vocabulary: Sequence[str], isolated: str, template: str, *, max_length: int, extra_special: Sequence[str] = ()
) -> Any:
    """Build a tokenizer of whole words that can be saved and loaded, and pads on the right with id 0.

    What the regular expression `isolated` finds is a token of its own; `template` has the special tokens around a text.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL, *vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(isolated), behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, ids[name]) for name in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(extra_special),
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
