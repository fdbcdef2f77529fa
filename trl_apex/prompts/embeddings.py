"""Every distinct prompt is encoded once."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..types import Embeddings
from .embedding_store import EmbeddingStore

LARGE = 2e9
"""Bytes of embeddings in memory, over all processes of a node, above which they go to disk."""


class PromptEmbeddings:
    """Prompt embeddings, computed on first need and kept on the CPU, or on disk.

    Args:
        encode (`Callable[[list[str]], Embeddings]`): the policy's text encoders.
        batch_size (`int`): prompts encoded at a time.
        cache_dir (`str` or `Path`, *optional*): keep the embeddings in this folder instead of in memory, for this run and
            others. They are read back row by row through the memory map, so that they take no memory of their own.
        fingerprint (`str` or `Callable`): names the encoders in `cache_dir`; see [`encoder_fingerprint`].
        overflow_dir (`str` or `Path`, *optional*): the folder to use where the embeddings would take more than `budget`.
        budget (`float`, *optional*): bytes in memory; `LARGE` by default.

    Example:
        ```python
        >>> cache = PromptEmbeddings(lambda prompts: {"x": torch.tensor([[float(len(p))] for p in prompts])})
        >>> cache(["a", "abc", "a"], "cpu")["x"].flatten().tolist()
        [1.0, 3.0, 1.0]

        ```
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Embeddings],
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
        fingerprint: str | Callable[[], str] = "embeddings",
        overflow_dir: str | Path | None = None,
        budget: float | None = None,
    ):
        self._encode, self.batch_size = encode, batch_size
        self._rows: dict[str, Embeddings] = {}
        self._fingerprint, self._overflow_dir, self._budget = fingerprint, overflow_dir, budget
        self._store = None if cache_dir is None else self._open(cache_dir)

    @property
    def on_disk(self) -> bool:
        return self._store is not None

    def _open(self, folder: str | Path) -> EmbeddingStore:
        fingerprint = self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()
        return EmbeddingStore(Path(folder).expanduser() / fingerprint)

    def precompute(self, prompts: list[str], total: int = 0) -> None:
        """Encode those of `prompts` that are not known yet.

        Args:
            prompts (`list[str]`): what to encode.
            total (`int`): prompts that there will be, if more than these.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if self._store is not None:
            missing = self._store.find(missing)
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            encoded = {name: value.cpu() for name, value in self._encode(chunk).items()}
            if self._store is None and start == 0:
                self._keep_within_budget(encoded, len(chunk), max(len(missing), total))
            if self._store is not None:
                self._store.add(chunk, encoded)
                continue
            for i, prompt in enumerate(chunk):
                self._rows[prompt] = {name: value[i].clone() for name, value in encoded.items()}

    def close(self, reason: str) -> None:
        """From now on, a prompt that is not known yet is an error.

        Args:
            reason (`str`): the error's text before the prompt that was found.
        """

        def refuse(prompts: list[str]) -> Embeddings:
            raise ValueError(f"{reason} Found another prompt: {prompts[0]!r}. Set `unload_text_encoders=False`.")

        self._encode = refuse

    def __call__(self, prompts: list[str], device: torch.device | str) -> Embeddings:
        """Embeddings of `prompts`, in order, on `device`; each distinct one travels once."""
        self.precompute(prompts)
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = [self._row(prompt) for prompt in place]
        index = torch.tensor([place[prompt] for prompt in prompts], device=device)
        return {name: torch.stack([row[name] for row in rows]).to(device)[index] for name in rows[0]}

    def _row(self, prompt: str) -> Embeddings:
        if prompt in self._rows:
            return self._rows[prompt]
        assert self._store is not None, "a prompt that was just encoded is in memory or on disk"
        row = self._store.row(prompt)
        if row is None:
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
            stacklevel=3,
        )
