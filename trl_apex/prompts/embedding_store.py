"""Prompt embeddings on disk, in safetensors files that are mapped into memory and read row by row."""

import contextlib
import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..types import Embeddings


class EmbeddingStore:
    """A folder of shards, each with the embeddings of some prompts and, in its header, these prompts.

    Any number of processes may read and write one folder at the same time: a shard gets its name only once it is whole,
    and never changes afterwards. A shard that cannot be read is renamed to `.bad` with a warning, and its prompts
    count as unknown: another process may still have it open, and the cause may be the disk.

    Args:
        folder (`Path`): of one encoder fingerprint; made if needed.

    Example:
        ```python
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = EmbeddingStore(Path(folder))
        ...     store.add(["a", "b"], {"x": torch.tensor([[1.0], [2.0]])})
        ...     store.find(["b", "c"]), store.row("b")["x"].tolist()
        (['c'], [2.0])

        ```
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._place: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}

    def find(self, prompts: list[str]) -> list[str]:
        """Those of `prompts` that no shard holds, after a look for new shards if need be."""
        if any(prompt not in self._place for prompt in prompts):
            self._read_new_shards()
        return [prompt for prompt in prompts if prompt not in self._place]

    def row(self, prompt: str) -> Embeddings | None:
        """The embeddings of one prompt, each without a batch axis; None if its shard has been damaged meanwhile."""
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

    def _read_new_shards(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._open:
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
