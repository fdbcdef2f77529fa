"""The training loop that every tiny model goes through, and how the results are written in bfloat16."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_apex.tiny.pipeline import build_tokenizer
from trl_apex.tiny.render import SIZE

logger = logging.getLogger(__name__)


def descend(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss_of_step: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    max_norm: float | None = 1.0,
    warm_up: int = 100,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Minimizes a loss with AdamW and the schedule of [`warm_then_decay`].

    Args:
        name (`str`): For the log.
        parameters (`Iterable[torch.nn.Parameter]`): Changed in place.
        loss_of_step (`Callable`): Draws a batch and returns its loss.
        steps (`int`): Optimizer steps.
        learning_rate (`float`): The highest of the schedule.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): AdamW's.
        weight_decay (`float`, *optional*, defaults to 0.01): AdamW's.
        max_norm (`float`, *optional*, defaults to 1.0): Gradients are clipped to this norm; `None` for no clipping.
        warm_up (`int`, *optional*, defaults to 100): Steps of the rising learning rate.
        after_step (`Callable`, *optional*): Called with the number of the step when its update is done.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    schedule = warm_then_decay(optimizer, steps, warm_up=warm_up)
    for step in range(steps):
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        schedule.step()
        if after_step:
            after_step(step)
        if step % 50 == 0 or step == steps - 1:
            logger.info("%s %d/%d loss %.4f", name, step, steps, loss.item())


def warm_then_decay(
    optimizer: torch.optim.Optimizer, steps: int, *, warm_up: int = 100, decay_share: float = 0.35
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises for `warm_up` steps, stays, and falls linearly to zero over the last `decay_share`.

    `factor(t) = min(1, (t + 1) / warm_up, (steps - t) / (decay_share * steps))`

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> warm_then_decay(optimizer, 1000).get_last_lr()
        [0.01]
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warm_up, (steps - t) / (decay_share * steps))
    )


def clip_image_processor() -> Any:
    """CLIP's image processor on PIL, for images of 32 x 32 pixels; larger ones are reduced to that."""
    import transformers

    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Saves the pipeline as a diffusers folder in bfloat16 (the pipeline itself is left in bfloat16)."""
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipeline, name).to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    _use_lasting_names(folder)


def save_clip(model: Any, folder: Path) -> None:
    """Saves the CLIP model with its tokenizer and image processor."""
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    clip_image_processor().save_pretrained(folder)
    _use_lasting_names(folder)


def save_quality(model: Any, processor: Any, folder: Path) -> None:
    """Saves the vision-language model with its processor."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    _use_lasting_names(folder)


def save_tensors(module: torch.nn.Module, path: Path) -> None:
    """Saves the weights of a module as one safetensors file in bfloat16."""
    from safetensors.torch import save_file

    save_file({key: value.to(torch.bfloat16).contiguous() for key, value in module.state_dict().items()}, path)


def _use_lasting_names(folder: Path) -> None:
    """Replaces class names that only transformers 5 knows by their older names, which every release knows."""
    lasting = {"TokenizersBackend": "PreTrainedTokenizerFast", "CLIPImageProcessorPil": "CLIPImageProcessor"}
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        fixed = text
        for name, older in lasting.items():
            fixed = fixed.replace(f'"{name}"', f'"{older}"')
        if fixed != text:
            path.write_text(fixed, encoding="utf-8")
