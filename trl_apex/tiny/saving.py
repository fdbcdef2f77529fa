"""Writes the tiny models in bfloat16, in folders that transformers and diffusers load."""

from pathlib import Path
from typing import Any

import torch

from trl_apex.tiny.render import SIZE
from trl_apex.tiny.tokenizer import build_tokenizer


def clip_image_processor() -> Any:
    """CLIP's image processor on PIL for images of 32 x 32 pixels; larger ones are reduced to that."""
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
    """Saves the weights of any module as one safetensors file in bfloat16."""
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
