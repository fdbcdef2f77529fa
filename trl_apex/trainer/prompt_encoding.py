"""Prompts are encoded before training starts; then the text encoders may go."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import failing_together, num_ranks, this_rank, wait_for_all
from ..policy.base import DiffusionPolicy
from ..prompts import PromptEmbeddings
from ..prompts.embeddings import LARGE
from ..prompts.fingerprint import encoder_fingerprint
from ..types import Embeddings


class PromptConditions:
    """What the denoiser is told: the embeddings of prompts, and of the negative prompt beside them, on the device.

    Args:
        policy ([`DiffusionPolicy`]): whose encoders and device.
        args ([`DiffusionGRPOConfig`]): where embeddings are kept, and which negative prompt.
    """

    def __init__(self, policy: DiffusionPolicy, args: Any):
        self._policy, self._args = policy, args
        self._prompts = open_embeddings(policy, args.max_sequence_length, args.prompt_cache_dir, args.output_dir)
        self._negative: Embeddings | None = None

    def prepare(self, datasets: list[Any], own_pipeline: bool) -> None:
        """Encode the prompts of `datasets` and let the encoders go, as far as the configuration says so."""
        args = self._args
        if args.precompute_prompts:
            precompute(self._prompts, datasets)
        unload = own_pipeline and args.precompute_prompts
        if unload if args.unload_text_encoders is None else args.unload_text_encoders:
            self.negative(guidance_scale=2.0)  # any that needs it: evaluation may have another than training
            unload_encoders(self._policy, own_pipeline)
            self._prompts.close(
                "The text encoders were unloaded once the prompts of `train_dataset` and `eval_dataset` were encoded."
            )

    def __call__(self, prompts: list[str]) -> Embeddings:
        """Embeddings `[B, ...]` of `prompts`, in order."""
        return self._prompts(prompts, self._args.device)

    def distinct(self, prompts: list[str]) -> tuple[Embeddings, Tensor]:
        """Embeddings `[P, ...]` of the P distinct `prompts`, and which of them belongs to each prompt, `[B]`."""
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([place[prompt] for prompt in prompts], device=self._args.device)
        return self(list(place)), index

    def negative(self, guidance_scale: float) -> Embeddings | None:
        """Embeddings `[1, ...]` of the negative prompt; None where guidance has no second branch."""
        if guidance_scale == 1.0 or not self._policy.batched_guidance:
            return None
        if self._negative is None:
            encoded = self._policy.encode_negative(self._args.negative_prompt, self._args.max_sequence_length)
            self._negative = {name: value.to(self._args.device) for name, value in encoded.items()}
        return self._negative


def open_embeddings(
    policy: DiffusionPolicy, max_sequence_length: int, cache_dir: str | None, output_dir: str
) -> PromptEmbeddings:
    """The embeddings of a policy's encoders, kept in `cache_dir` if there is one, else in memory or, where they would take
    more than 2 GB on a node, in `output_dir/prompt_embeddings`."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))
    return PromptEmbeddings(
        lambda prompts: policy.encode(prompts, max_sequence_length),
        cache_dir=cache_dir,
        fingerprint=lambda: encoder_fingerprint(policy.pipeline, policy.encoder_names, max_sequence_length),
        overflow_dir=Path(output_dir) / "prompt_embeddings",
        budget=LARGE / processes,
    )


def precompute(embeddings: PromptEmbeddings, datasets: list[Any]) -> None:
    """Encode every distinct prompt of some datasets; where they are kept on disk, each rank encodes its share.

    Args:
        embeddings ([`PromptEmbeddings`]): filled here.
        datasets (`list`): of `datasets.Dataset`, dicts of them, or None.
    """
    parts = [part for one in datasets for part in (one.values() if isinstance(one, dict) else [one])]
    prompts = sorted({prompt for part in parts if part is not None for prompt in part["prompt"]})
    with failing_together("the prompt embeddings"):
        if not embeddings.on_disk:  # the first batch tells how large all will be
            embeddings.precompute(prompts[: embeddings.batch_size], total=len(prompts))
    with failing_together("the prompt embeddings"):
        if embeddings.on_disk:
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
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
