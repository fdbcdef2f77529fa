"""The training loop that every tiny model goes through, and how the results are written in bfloat16."""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

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
    """Minimize a loss with AdamW, in place: the learning rate rises, stays, and falls to zero over the last 35 %.

    `factor(t) = min(1, (t + 1) / warm_up, (steps - t) / (0.35 steps))`

    Args:
        name (`str`): for the log.
        parameters (`Iterable[torch.nn.Parameter]`): changed in place.
        loss_of_step (`Callable`): draws a batch and returns its loss.
        max_norm (`float`, *optional*): gradients are clipped to this norm; None for no clipping.
        after_step (`Callable`, *optional*): called with the number of the step when its update is done.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warm_up, (steps - t) / (0.35 * steps))
    )
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


def clip_image_processor() -> Any:
    """CLIP's image processor on PIL, for images of 32 x 32 pixels; larger ones are reduced to that."""
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save the pipeline as a diffusers folder in bfloat16 (the pipeline itself is left in bfloat16)."""
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipeline, name).to(torch.bfloat16)
    save(folder, pipeline)


def save(folder: Path, *parts: Any) -> None:
    """Save models (in bfloat16), tokenizers and processors, with class names that every release of transformers knows."""
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
        part.save_pretrained(folder)
    lasting = {"TokenizersBackend": "PreTrainedTokenizerFast", "CLIPImageProcessorPil": "CLIPImageProcessor"}
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        fixed = re.sub('"(' + "|".join(lasting) + ')"', lambda found: f'"{lasting[found[1]]}"', text)
        if fixed != text:
            path.write_text(fixed, encoding="utf-8")


def save_tensors(module: torch.nn.Module, path: Path) -> None:
    """Save the weights of a module as one safetensors file in bfloat16."""
    save_file({key: value.to(torch.bfloat16).contiguous() for key, value in module.state_dict().items()}, path)
