"""Every distinct prompt is encoded once."""

from collections.abc import Callable

import torch

from ..types import Embeddings


class PromptEmbeddings:
    """Prompt embeddings, computed on first need and kept on the CPU.

    Args:
        encode (`Callable[[list[str]], Embeddings]`): the policy's text encoders.
        batch_size (`int`): prompts encoded at a time.

    Example:
        ```python
        >>> cache = PromptEmbeddings(lambda prompts: {"x": torch.tensor([[float(len(p))] for p in prompts])})
        >>> cache(["a", "abc", "a"], "cpu")["x"].flatten().tolist()
        [1.0, 3.0, 1.0]

        ```
    """

    def __init__(self, encode: Callable[[list[str]], Embeddings], batch_size: int = 32):
        self._encode, self._batch_size = encode, batch_size
        self._rows: dict[str, Embeddings] = {}

    def precompute(self, prompts: list[str]) -> None:
        """Encode those of `prompts` that are not known yet."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        for start in range(0, len(missing), self._batch_size):
            chunk = missing[start : start + self._batch_size]
            encoded = {name: value.cpu() for name, value in self._encode(chunk).items()}
            for i, prompt in enumerate(chunk):
                self._rows[prompt] = {name: value[i].clone() for name, value in encoded.items()}

    def __call__(self, prompts: list[str], device: torch.device | str) -> Embeddings:
        """Embeddings of `prompts`, in order, on `device`."""
        self.precompute(prompts)
        rows = [self._rows[p] for p in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
