"""What a vision-language model would answer about an image: a level of quality, or yes."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_apex.rewards.base import Images, Reward, RewardLoadError, to_pil

LEVELS = ("excellent", "good", "fair", "poor", "bad")
QUESTION = "How would you rate the quality of this image?"
PLACE = "{prompt}"
YES_OR_NO = 'Does this image show "{prompt}"? Answer yes or no.'
PUBLISHED = "zhiyuanyou/DeQA-Score-Mix3"
ANSWER = "The quality of the image is"


class DeQAReward(Reward):
    """Image quality on five levels, 1 (bad) to 5 (excellent), as DeQA-Score reads it from a vision-language model.

    The model is asked `question` about the image and given the start of the answer, `answer`; the reward is
    [`level_score`] of the logits of the five level words as the next token. The prompt plays no part.

    The published weights, `zhiyuanyou/DeQA-Score-Mix3` (mPLUG-Owl2, 7B), are for [`PublishedDeQAReward`].

    Args:
        model (`str`): Hub id or local folder of a model that `AutoModelForImageTextToText` loads.
        answer (`str`, *optional*): The start of the answer, which a level word continues.
        template (`str`, *optional*): The whole text, with the fields `{image}`, `{question}` and `{answer}`. Defaults
            to the processor's chat template, else `"USER: {image}\\n{question}\\nASSISTANT: {answer}"`.
        levels (`tuple[str, ...]`, *optional*): The level words, best first; each must be one token.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code that comes with the model.
        options: See [`Reward`].

    Reference:
        You et al., DeQA-Score, arXiv 2501.11561. Flow-GRPO trains on the value divided by 5.
    """

    default_name = "deqa"
    range = "1 (bad) to 5 (excellent), larger is better"
    weights_licence = "that of the model passed"
    accelerator_dtype = torch.bfloat16

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        answer: str = ANSWER,
        template: str | None = None,
        levels: tuple[str, ...] = LEVELS,
        trust_remote_code: bool = False,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.model, self.question, self.answer, self.template = model, question, answer, template
        self.levels, self.trust_remote_code = tuple(levels), trust_remote_code

    def _load(self) -> tuple[Any, Any, str, Tensor]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)
        text = build_text(processor, self.question, self.answer, self.template).rstrip(" ")
        level_ids = level_token_ids(processor.tokenizer, text, self.levels)
        # Images may take unlike numbers of tokens; padding on the left keeps the answer's start at the end of each row.
        processor.tokenizer.padding_side = "left"
        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        model.to(self.device).eval().requires_grad_(False)
        return model, processor, text, torch.tensor(level_ids, device=self.device)

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        _, _, text, level_ids = loaded
        return level_score(self._logits(loaded, images, [text] * len(prompts))[:, level_ids]).tolist()

    def _logits(self, loaded: Any, images: Images, texts: list[str]) -> Float[Tensor, "B V"]:
        """The logits of the token after each text."""
        model, processor, _, _ = loaded
        inputs = processor(images=to_pil(images), text=texts, return_tensors="pt", padding=True).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1  # the other positions' logits would fill the memory for nothing
        return model(**inputs).logits[:, -1]


class VLMYesReward(DeQAReward):
    """How sure a vision-language model is that the image shows what the prompt says.

    `r = log p("Yes" | image, question)`, over all tokens. Where the column `questions` holds a question or a list of them, `r` is
    the mean over these: one question for each thing in the prompt says more than one about all of it.

    Args:
        model (`str`): Hub id or local folder of a model that `AutoModelForImageTextToText` loads.
        question (`str`, *optional*): The question, with the field `{prompt}`.
        options: `template` and `trust_remote_code` of [`DeQAReward`], and those of [`Reward`].

    Reference:
        Lin et al., VQAScore, arXiv 2404.01291, which is `exp(r)`.
    """

    default_name = "vlm_yes"
    range = "below 0, larger is better"
    column = "questions"

    def __init__(self, model: str, question: str = YES_OR_NO, **options: Any) -> None:
        super().__init__(model, PLACE, "", levels=("Yes",), **options)
        self.asked = question

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        _, _, text, yes = loaded
        pictures, rewards = to_pil(images), []
        for i, own in enumerate(columns.get(self.column) or [None] * len(prompts)):
            questions = [own] if isinstance(own, str) else own or [self.asked.replace("{prompt}", prompts[i])]
            texts = [text.replace(PLACE, question) for question in questions]
            logits = self._logits(loaded, [pictures[i]] * len(texts), texts)
            rewards.append(logits.float().log_softmax(-1)[:, yes].mean().item())
        return rewards


class PublishedDeQAReward(Reward):
    """DeQA-Score by its authors' own model and code: the `score` method that comes with the weights, 1 to 5.

    It needs `transformers` 4.36.1, in the environment that `trl-apex serve-rewards --env deqa` makes. In half precision on a GPU.

    `trust_remote_code=True` runs that code: read it first, and pin its commit with `revision`. `options` are those of [`Reward`].
    """

    default_name = "deqa"
    range = "1 (bad) to 5 (excellent), larger is better"
    weights_licence = "Apache-2.0 by their authors' metadata, on a LLaMA-2 base with Meta's community licence"
    accelerator_dtype = torch.float16

    def __init__(
        self, model: str = PUBLISHED, trust_remote_code: bool = False, revision: str = "main", **options: Any
    ) -> None:
        super().__init__(**options)
        self.model, self.trust_remote_code, self.revision = model, trust_remote_code, revision

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            attn_implementation="eager",
            torch_dtype=self.dtype,
        )
        return model.to(self.device).eval()

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        return loaded.score(to_pil(images)).flatten().tolist()


def level_score(level_logits: Float[Tensor, "B L"]) -> Float[Tensor, "B"]:
    """The expected level under the model's next-token distribution over the level words.

    `r = sum_l w_l softmax(y)_l`, `y = level_logits`, `w = (5, 4, 3, 2, 1)`.

    Example:
        >>> level_score(torch.zeros(1, 5)).item()
        3.0
    """
    weights = torch.arange(level_logits.shape[-1], 0, -1, dtype=torch.float32, device=level_logits.device)
    return (level_logits.float().softmax(-1) * weights).sum(-1)


def build_text(processor: Any, question: str, answer: str, template: str | None = None) -> str:
    """The text that the model continues with a level word; the arguments are those of [`DeQAReward`]."""
    if template is None and getattr(processor, "chat_template", None):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        head = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        tokenizer = processor.tokenizer
        if tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            head = head.removeprefix(tokenizer.bos_token)  # the tokenizer puts it there itself
        return head + ("" if head[-1:].isspace() else " ") + answer
    image = getattr(processor, "image_token", None) or "<image>"
    template = template or "USER: {image}\n{question}\nASSISTANT: {answer}"
    return template.format(image=image, question=question, answer=answer)


def level_token_ids(tokenizer: Any, text: str, levels: tuple[str, ...]) -> list[int]:
    """The token that each level word adds after `text`, which the model continues; a word must be one token of its own."""

    def encode(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False)["input_ids"])

    before = encode(text)
    ids: list[int] = []
    for word in levels:
        after = encode(f"{text}{'' if text[-1:].isspace() else ' '}{word}")
        added = after[len(before) :]
        if after[: len(before)] != before or len(added) != 1 or added[0] == tokenizer.unk_token_id or added[0] in ids:
            raise RewardLoadError(
                f"Each level word must be one known token of its own after the answer's start. Found {word!r} as "
                f"{tokenizer.convert_ids_to_tokens(added)}. Pass other `levels`, or a model that knows them."
            )
        ids.append(added[0])
    return ids
