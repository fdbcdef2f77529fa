"""What tells one set of text encoders from another."""

import hashlib
import json
from typing import Any

import torch

SAMPLES = 16
VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "_attn_implementation_autoset")


def encoder_fingerprint(pipeline: Any, encoder_names: tuple[str, ...], max_sequence_length: int) -> str:
    """A hash of everything that decides what a prompt's embeddings are.

    Of each encoder: class, configuration, and of every parameter its name, shape, dtype and 16 evenly spaced values; of
    each tokenizer: class, longest text and vocabulary; and `max_sequence_length`. Where the encoders came from does not count.

    Args:
        pipeline (`diffusers.DiffusionPipeline`): with its encoders.
        encoder_names (`tuple[str, ...]`): the components that prompts need.
        max_sequence_length (`int`): tokens.

    Returns:
        `str`: 16 hexadecimal digits after the name of the pipeline's class.
    """
    digest = hashlib.sha256(f"{type(pipeline).__name__} {max_sequence_length}".encode())
    for name in encoder_names:
        encoder = getattr(pipeline, name, None)
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
        digest.update(f"{name} {type(encoder).__name__} {type(tokenizer).__name__}".encode())
        if encoder is not None:
            _add_encoder(digest, encoder)
        if tokenizer is not None:
            vocabulary = sorted(tokenizer.get_vocab().items())
            digest.update(json.dumps([tokenizer.model_max_length, vocabulary]).encode())
    return f"{type(pipeline).__name__}-{digest.hexdigest()[:16]}"


def _add_encoder(digest: Any, encoder: Any) -> None:
    config = {key: value for key, value in encoder.config.to_dict().items() if key not in VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(encoder.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        where = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), device=flat.device).long()
        digest.update(flat[where].float().cpu().numpy().tobytes())
