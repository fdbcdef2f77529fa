"""A causal language model and a vision-language model that fit in a test, made without a download."""

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

WORDS = ["<pad>", "<eos>", "<unk>", "<image>", "user", ":", "say", "see", *"abcdefgh"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }


def tiny_causal_lm() -> Qwen2ForCausalLM:
    set_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**_sizes(), tie_word_embeddings=False))


def tiny_vlm():
    """A LLaVA with 8 x 8 images in patches of 4, and its processor."""
    from transformers import LlavaProcessor

    set_seed(0)
    vision = CLIPVisionConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_sizes()),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    size = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor
