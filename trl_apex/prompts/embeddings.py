"""Prompt embeddings: encoded once, in memory or on disk, the same on every process."""

import contextlib
import gc
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..diffusion.families.base import DiffusionPolicy
from ..diffusion.nouns import Embeddings
from ..distributed import failing_together, num_ranks, this_rank, wait_for_all
from .datasets import edits_of, prompts_of

LARGE = 2e9
"""Bytes of embeddings in memory, over all processes of a node, above which they go to disk."""

# What a trainer does with them


def open_embeddings(policy: DiffusionPolicy, args: Any) -> "PromptEmbeddings":
    """The embeddings of a policy's encoders: in `args.prompt_cache_dir` if there is one, else in memory or, if they would
    take more than 2 GB on a node, in `output_dir/prompt_embeddings`."""
    guided = any(scale not in (None, 1.0) for scale in (args.guidance_scale, args.eval_guidance_scale))
    return PromptEmbeddings(
        **encoding(policy, args.max_sequence_length, args.negative_prompt, guided),
        cache_dir=args.prompt_cache_dir,
        overflow_dir=Path(args.output_dir) / "prompt_embeddings",
        budget=LARGE / int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks())),
        device=args.device,
    )


def encoding(policy: DiffusionPolicy, max_sequence_length: int, negative_prompt: str, guided: bool) -> dict[str, Any]:
    """What [`PromptEmbeddings`] needs of a policy. An edit holds its own negative prompt, which is encoded with its image."""
    names = (*policy.encoder_names, "vae") if policy.edits else policy.encoder_names
    found: dict[str, Any] = {
        "encode": lambda prompts: policy.encode(prompts, max_sequence_length),
        "fingerprint": lambda: encoder_fingerprint(policy.pipeline, names, max_sequence_length),
    }
    if policy.edits:
        own_negative = negative_prompt if policy.batched_guidance and guided else None
        return found | {"keys": partial(edits_of, negative=own_negative)}
    if policy.batched_guidance:
        found["encode_negative"] = lambda: policy.encode_negative(negative_prompt, max_sequence_length)
    return found


def prepare_embeddings(
    embeddings: "PromptEmbeddings", policy: DiffusionPolicy, args: Any, datasets: list[Any], own_pipeline: bool
) -> None:
    """Encode the prompts of `datasets` and unload the encoders, as the configuration says."""
    if args.precompute_prompts:
        precompute(embeddings, datasets)
    unload = own_pipeline and args.precompute_prompts
    if unload if args.unload_text_encoders is None else args.unload_text_encoders:
        embeddings.negative(guidance_scale=2.0)  # any above 1: evaluation may have another than training
        unload_encoders(policy, own_pipeline)
        embeddings.close(
            "The text encoders were unloaded once the prompts of `train_dataset` and `eval_dataset` were encoded."
        )


def precompute(embeddings: "PromptEmbeddings", datasets: list[Any]) -> None:
    """Encode every distinct prompt of pairs (dataset, size of each row's image); on disk, each rank encodes its share."""
    prompts = sorted({prompt for dataset, sizes in datasets for prompt in embeddings.keys(dataset, sizes)})
    with failing_together("the prompt embeddings"):
        if not embeddings.on_disk:  # the first batch tells how large all will be
            embeddings.precompute(prompts[: embeddings.batch_size], total=len(prompts))
    with failing_together("the prompt embeddings"):
        if embeddings.on_disk:
            embeddings.precompute(prompts[this_rank() :: num_ranks()])
    wait_for_all()
    with failing_together("the prompt embeddings"):
        embeddings.precompute(prompts)  # what is still missing, if the ranks do not share the disk


def unload_encoders(policy: DiffusionPolicy, own_pipeline: bool) -> None:
    """Free the memory of the text encoders; those of a pipeline that someone else may use are moved to the CPU."""
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


class PromptEmbeddings:
    """Prompt embeddings, computed on first need and kept on the CPU or on disk.

    Args:
        encode (`Callable[[list[str]], Embeddings]`): the policy's text encoders.
        cache_dir (`str` or `Path`, *optional*): keep the embeddings in this folder instead of in memory, for this run and
            others. They are read row by row through the memory map, so that they take no memory of their own.
        fingerprint (`str` or `Callable`): names the encoders in `cache_dir`; see [`encoder_fingerprint`].
        overflow_dir (`str` or `Path`, *optional*): the folder to use if the embeddings would take more than `budget`.
        budget (`float`, *optional*): bytes in memory; `LARGE` by default.
        encode_negative (`Callable[[], Embeddings]`, *optional*): embeddings `[1, ...]` of the negative prompt.
        device (`torch.device` or `str`): where embeddings are returned.
        keys (`Callable`): what is encoded of rows of a dataset, given these and the sizes of their images: prompts or [`Edit`]s.

    Example:
        >>> cache = PromptEmbeddings(lambda prompts: {"x": torch.tensor([[float(len(p))] for p in prompts])})
        >>> cache(["a", "abc", "a"])["x"].flatten().tolist()
        [1.0, 3.0, 1.0]
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Embeddings],
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
        fingerprint: str | Callable[[], str] = "embeddings",
        overflow_dir: str | Path | None = None,
        budget: float | None = None,
        encode_negative: Callable[[], Embeddings] | None = None,
        device: torch.device | str = "cpu",
        keys: Callable[[Any, list[tuple[int, int]]], list[str]] = prompts_of,
    ):
        self._encode, self._encode_negative, self.keys = encode, encode_negative, keys
        self.batch_size, self.device = batch_size, device
        self._rows: dict[str, Embeddings] = {}
        self._negative: Embeddings | None = None
        self._fingerprint, self._overflow_dir, self._budget = fingerprint, overflow_dir, budget
        self._store = None if cache_dir is None else self._open(cache_dir)

    def __call__(self, prompts: list[str], device: torch.device | str | None = None) -> Embeddings:
        """Embeddings `[B, ...]` of `prompts`, in order."""
        embeddings, index = self.distinct(prompts, device)
        return {name: value[index] for name, value in embeddings.items()}

    def distinct(self, prompts: list[str], device: torch.device | str | None = None) -> tuple[Embeddings, Tensor]:
        """Embeddings `[P, ...]` of the P distinct `prompts`, and which of them belongs to each prompt, `[B]`."""
        device = self.device if device is None else device
        place: dict[str, int] = {}
        index = torch.tensor([place.setdefault(prompt, len(place)) for prompt in prompts], device=device)
        self.precompute(list(place))
        rows = [self._row(prompt) for prompt in place]
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}, index

    def negative(self, guidance_scale: float) -> Embeddings | None:
        """Embeddings `[1, ...]` of the negative prompt; None if guidance has no second branch."""
        if guidance_scale == 1.0 or self._encode_negative is None:
            return None
        if self._negative is None:
            self._negative = {name: value.to(self.device) for name, value in self._encode_negative().items()}
        return self._negative

    def precompute(self, prompts: list[str], total: int = 0) -> None:
        """Encode those of `prompts` that are not known yet; `total` says how many there will be, if more than these."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if self._store is not None:
            missing = self._store.find(missing)
        of_size: dict[Any, list[str]] = {}  # images of one size can be encoded together
        for prompt in missing:
            of_size.setdefault(getattr(prompt, "size", None), []).append(prompt)
        size = self.batch_size
        chunks = [own[start : start + size] for own in of_size.values() for start in range(0, len(own), size)]
        for number, chunk in enumerate(chunks):
            encoded = {name: value.cpu() for name, value in self._encode(chunk).items()}
            if self._store is None and number == 0:
                self._keep_within_budget(encoded, len(chunk), max(len(missing), total))
            if self._store is not None:
                self._store.add(chunk, encoded)
                continue
            for i, prompt in enumerate(chunk):
                self._rows[str(prompt)] = {name: value[i].clone() for name, value in encoded.items()}  # not an `Edit`

    def close(self, reason: str) -> None:
        """From now on, a prompt that is not known yet is an error, which starts with `reason`."""

        def refuse(prompts: list[str]) -> Embeddings:
            raise ValueError(f"{reason} Found another prompt: {prompts[0]!r}. Set `unload_text_encoders=False`.")

        self._encode = refuse

    @property
    def on_disk(self) -> bool:
        return self._store is not None

    def _open(self, folder: str | Path) -> "EmbeddingStore":
        fingerprint = self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()
        return EmbeddingStore(Path(folder).expanduser() / fingerprint)

    def _row(self, prompt: str) -> Embeddings:
        if prompt in self._rows:
            return self._rows[prompt]
        assert self._store is not None, "a prompt that was just encoded is in memory or on disk"
        row = self._store.row(prompt)
        if row is None:  # damaged since it was found
            self.precompute([prompt])
            row = self._store.row(prompt)
        assert row is not None, "a shard that was just written cannot be read"
        return row

    def _keep_within_budget(self, encoded: Embeddings, rows: int, total: int) -> None:
        size = sum(value.numel() * value.element_size() for value in encoded.values()) / rows * total
        if size <= (LARGE if self._budget is None else self._budget):
            return
        if self._overflow_dir is not None:
            self._store = self._open(self._overflow_dir)
            return
        warnings.warn(
            f"The embeddings of {total} prompts will take {size / 1e9:.0f} GB of memory in every process. Set "
            "`prompt_cache_dir` to keep them on disk.",
            stacklevel=4,
        )


class EmbeddingStore:
    """A folder of shards, each with the embeddings of some prompts and, in its header, these prompts.

    Any number of processes may read and write one folder at the same time: a shard gets its name only once it is complete,
    and never changes afterwards. A shard that cannot be read is renamed to `.bad` with a warning, and its prompts
    count as unknown: another process may still have it open, and the cause may be the disk.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = EmbeddingStore(Path(folder))
        ...     store.add(["a", "b"], {"x": torch.tensor([[1.0], [2.0]])})
        ...     store.find(["b", "c"]), store.row("b")["x"].tolist()
        (['c'], [2.0])
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._place: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}

    def find(self, prompts: list[str]) -> list[str]:
        """Those of `prompts` that no shard holds, after a look for new shards if need be."""
        if any(prompt not in self._place for prompt in prompts):
            for path in sorted(self.folder.glob("*.safetensors")):
                if path not in self._open:
                    self._read_shard(path)
        return [prompt for prompt in prompts if prompt not in self._place]

    def row(self, prompt: str) -> Embeddings | None:
        """The embeddings of one prompt, each without a batch axis; None if its shard was damaged meanwhile."""
        path, index = self._place[prompt]
        try:
            shard = self._open[path]
            return {name: shard.get_slice(name)[index] for name in shard.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has an exception of its own, the file system others
            self._drop(path, error)
            return None

    def add(self, prompts: list[str], embeddings: Embeddings) -> None:
        """Write one shard: `embeddings` of shape `[len(prompts), ...]` each."""
        text = json.dumps(prompts)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        unfinished = self.folder / f".{path.stem}.{uuid.uuid4().hex}.tmp"
        try:
            tensors = {name: value.detach().cpu().contiguous() for name, value in embeddings.items()}
            save_file(tensors, unfinished, metadata={"prompts": text})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._read_shard(path)

    def _read_shard(self, path: Path) -> None:
        try:
            shard = safe_open(path, framework="pt", device="cpu")
            prompts = json.loads(shard.metadata()["prompts"])
            sizes = {shard.get_slice(name).get_shape()[0] for name in shard.keys()}  # noqa: SIM118
            if sizes != {len(prompts)}:
                raise ValueError(f"it holds {sizes} rows for {len(prompts)} prompts")
        except FileNotFoundError:  # removed by another process
            return
        except Exception as error:
            self._drop(path, error)
            return
        self._open[path] = shard
        self._place.update({prompt: (path, index) for index, prompt in enumerate(prompts)})

    def _drop(self, path: Path, error: Exception) -> None:
        warnings.warn(
            f"A file of the prompt cache cannot be read and its embeddings are computed again: {path} ({error}). It is kept "
            "as *.bad.",
            stacklevel=4,
        )
        self._open.pop(path, None)
        self._place = {prompt: place for prompt, place in self._place.items() if place[0] != path}
        with contextlib.suppress(OSError):  # another process renamed it, or the folder is read-only
            os.replace(path, path.with_suffix(".bad"))


VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "_attn_implementation_autoset")


def encoder_fingerprint(pipeline: Any, encoder_names: tuple[str, ...], max_sequence_length: int) -> str:
    """A hash of everything that decides what a prompt's embeddings are, after the name of the pipeline's class.

    Of each encoder: class, configuration, and name, shape, dtype and 16 evenly spaced values of every parameter. Of
    each tokenizer: class, longest text, vocabulary and chat template. And `max_sequence_length`, in tokens. A source image
    has the VAE for an encoder, and of a language model's processor all settings count.
    """
    digest = hashlib.sha256(f"{type(pipeline).__name__} {max_sequence_length}".encode())
    if processor := getattr(pipeline, "processor", None):
        digest.update(processor.image_processor.to_json_string().encode())
    for name in encoder_names:
        encoder = getattr(pipeline, name, None)
        tokenizer = None if name == "vae" else getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
        digest.update(f"{name} {type(encoder).__name__} {type(tokenizer).__name__}".encode())
        if encoder is not None:
            config = dict(encoder.config) if name == "vae" else encoder.config.to_dict()
            config = {key: value for key, value in config.items() if key not in VOLATILE}
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for key, parameter in sorted(encoder.named_parameters()):
                digest.update(f"{key} {tuple(parameter.shape)} {parameter.dtype}".encode())
                flat = parameter.detach().reshape(-1)
                where = torch.linspace(0, len(flat) - 1, min(16, len(flat)), device=flat.device).long()
                digest.update(flat[where].float().cpu().numpy().tobytes())
        if tokenizer is not None:
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
            vocabulary = sorted(tokenizer.get_vocab().items())
            digest.update(json.dumps([tokenizer.model_max_length, vocabulary]).encode())
            digest.update(str(getattr(tokenizer, "chat_template", None) or "").encode())
    return f"{type(pipeline).__name__}-{digest.hexdigest()[:16]}"
