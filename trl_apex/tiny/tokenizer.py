"""Word-level tokenizers with the special tokens of CLIP, T5 or a chat model, that survive saving and loading."""

import re
from collections.abc import Sequence
from typing import Any

from trl_apex.tiny.prompts import COLOURS, LETTERS, SHAPES

MAX_LENGTH = 12
"""Tokens of a padded prompt: begin, nine of the prompt, end, and one to spare."""

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PROMPT_VOCABULARY = ("a", *COLOURS, *SHAPES, "with", '"', *LETTERS)


def build_tokenizer(*, begin: bool = True) -> Any:
    """Builds the tokenizer of prompts: whole lower-case words and single capital letters.

    Quotes are tokens of their own, and so is each capital letter, so `"CAT"` is five tokens. Unknown words become `<unk>`.

    Args:
        begin (`bool`, *optional*, defaults to `True`): Whether a text starts with `<bos>`, as for CLIP; T5 has none.

    Returns:
        `PreTrainedTokenizerFast`: Ends a text with `<eos>` and pads on the right with id 0, to 12 tokens.

    Example:
        >>> build_tokenizer().tokenize('a red circle with "CAT"')
        ['a', 'red', 'circle', 'with', '"', 'C', 'A', 'T', '"']
    """
    template = "<bos> $A <eos>" if begin else "$A <eos>"
    return _word_level(PROMPT_VOCABULARY, "[A-Z]|[^A-Za-z]", template, max_length=MAX_LENGTH)


def build_chat_tokenizer(text: str, levels: Sequence[str]) -> Any:
    """Builds the tokenizer of the tiny vision-language model: the words of its one dialogue and of the answers.

    Args:
        text (`str`): What the model will be asked, and the start of its answer.
        levels (`Sequence[str]`): The words it may answer with.

    Returns:
        `PreTrainedTokenizerFast`: Knows `<image>` as a special token; unknown words become `<unk>`.

    Example:
        >>> build_chat_tokenizer("How good?", ["fine"]).tokenize("<image> How good? fine day")
        ['<image>', 'How', 'good', '?', 'fine', '<unk>']
    """
    words = list(dict.fromkeys([*re.findall(r"\w+|[^\w\s]", text), *levels]))
    return _word_level(words, r"[^\w\s]", "<bos> $A", max_length=256, extra_special=["<image>"])


def _word_level(
    vocabulary: Sequence[str], isolated: str, template: str, *, max_length: int, extra_special: Sequence[str] = ()
) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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
