"""Prompts are encoded before training starts; then the text encoders may go."""

import gc
from typing import Any

import torch
from torch import nn

from ..distributed import failing_together, num_ranks, this_rank, wait_for_all
from ..policy.base import DiffusionPolicy
from ..prompts import PromptEmbeddings
from ..prompts.fingerprint import encoder_fingerprint


def open_embeddings(policy: DiffusionPolicy, max_sequence_length: int, cache_dir: str | None) -> PromptEmbeddings:
    """The embeddings of a policy's encoders, kept in `cache_dir` if there is one, else in memory."""
    fingerprint = ""
    if cache_dir is not None:
        fingerprint = encoder_fingerprint(policy.pipeline, policy.encoder_names, max_sequence_length)
    return PromptEmbeddings(
        lambda prompts: policy.encode(prompts, max_sequence_length), cache_dir=cache_dir, fingerprint=fingerprint
    )


def precompute(embeddings: PromptEmbeddings, datasets: list[Any], shared: bool) -> None:
    """Encode every distinct prompt of some datasets.

    Args:
        embeddings ([`PromptEmbeddings`]): filled here.
        datasets (`list`): of `datasets.Dataset`, dicts of them, or None.
        shared (`bool`): whether ranks find each other's embeddings on disk; then each encodes its share only.
    """
    parts = [part for one in datasets for part in (one.values() if isinstance(one, dict) else [one])]
    prompts = sorted({prompt for part in parts if part is not None for prompt in part["prompt"]})
    with failing_together("the prompt embeddings"):
        if shared:
            embeddings.precompute(prompts[this_rank() :: num_ranks()])
    wait_for_all()
    with failing_together("the prompt embeddings"):
        embeddings.precompute(prompts)  # where the disk is not shared by all ranks, what is still missing


def unload_encoders(policy: DiffusionPolicy, own_pipeline: bool) -> None:
    """Free the memory of the text encoders.

    Args:
        policy ([`DiffusionPolicy`]): of the pipeline.
        own_pipeline (`bool`): False for a pipeline that someone else may use again: its encoders are only moved to the CPU.
    """
    for name in policy.encoder_names:
        encoder = getattr(policy.pipeline, name, None)
        if not isinstance(encoder, nn.Module):
            continue
        if own_pipeline:
            policy.pipeline.register_modules(**{name: None})
        else:
            encoder.to("cpu")
        del encoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
