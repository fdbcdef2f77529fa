"""One CLIP model for all rewards that look through it, with embeddings of seen prompts and images kept."""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_apex.rewards.images import to_arrays
from trl_apex.rewards.protocol import Images, RewardLoadError


class EmbeddingCache:
    """Embeddings of the items seen last, by a key of their content.

    Args:
        size (`int`): Embeddings kept; the least recently used ones go first.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.image_tower import EmbeddingCache
    >>> cache = EmbeddingCache(size=2)
    >>> cache.get(["a", "b", "a"], lambda missing: torch.tensor([[float(i)] for i in missing])).flatten().tolist()
    [0.0, 1.0, 0.0]
    >>> cache.misses
    2

    ```
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.misses = 0
        self._kept: OrderedDict[Any, Tensor] = OrderedDict()

    def get(self, keys: list, embed: Callable[[list[int]], Tensor]) -> Float[Tensor, "B D"]:
        """The embedding of each key; `embed` computes those of the positions in `keys` that are new."""
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._kept}
        fresh: dict[Any, Tensor] = {}
        if first:
            missing = sorted(first.values())
            self.misses += len(missing)
            # A clone per row, so that a kept row does not hold the whole batch in memory.
            fresh = {keys[i]: row.clone() for i, row in zip(missing, embed(missing), strict=True)}
        rows = [fresh[key] if key in fresh else self._kept[key] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            self._kept[key] = row
            self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return torch.stack(rows)


class CLIPTower:
    """A CLIP model with its processor; embeddings come out L2-normalized, in float32.

    Args:
        model (`CLIPModel`): The model, on its device.
        processor (`str`): Hub id or local folder of its processor.
        images_kept (`int`, *optional*, defaults to `1024`): Image embeddings kept.
        prompts_kept (`int`, *optional*, defaults to `65536`): Prompt embeddings kept.
    """

    def __init__(self, model: Any, processor: str, images_kept: int = 1024, prompts_kept: int = 65536) -> None:
        from transformers import AutoTokenizer

        self.model = model.eval().requires_grad_(False)
        self.device, self.dtype = model.device, model.dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(processor)
        self.image_processor: Any = clip_image_processor_class().from_pretrained(processor)
        self.image_embeddings = EmbeddingCache(images_kept)
        self.text_embeddings = EmbeddingCache(prompts_kept)
        self._lock = threading.RLock()

    @property
    def logit_scale(self) -> float:
        """The learned temperature, `exp` already taken."""
        return self.model.logit_scale.detach().float().exp().item()

    def encode_images(self, images: Images) -> Float[Tensor, "B D"]:
        """Normalized image embeddings.

        Args:
            images (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The batch.

        Returns:
            `Tensor` of shape `[B, D]`, float32, on the tower's device.
        """
        arrays = to_arrays(images)
        keys = [(array.shape, hashlib.blake2b(array.tobytes(), digest_size=16).digest()) for array in arrays]

        def embed(missing: list[int]) -> Tensor:
            inputs = self.image_processor(
                [arrays[i] for i in missing], return_tensors="pt", input_data_format="channels_last"
            )
            pixels = inputs["pixel_values"].to(self.device, self.dtype)
            return normalize(pooled(self.model.get_image_features(pixel_values=pixels)))

        with self._lock, torch.inference_mode():
            return self.image_embeddings.get(keys, embed)

    def encode_prompts(self, prompts: list[str]) -> Float[Tensor, "B D"]:
        """Normalized text embeddings; prompts beyond the model's length are cut.

        Args:
            prompts (`list[str]`): The prompts.

        Returns:
            `Tensor` of shape `[B, D]`, float32, on the tower's device.
        """

        def embed(missing: list[int]) -> Tensor:
            tokens = self.tokenizer(
                [prompts[i] for i in missing],
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            features = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            return normalize(pooled(features))

        with self._lock, torch.inference_mode():
            return self.text_embeddings.get(prompts, embed)


_towers: "weakref.WeakValueDictionary[tuple, CLIPTower]" = weakref.WeakValueDictionary()
_towers_lock = threading.Lock()


def shared_tower(
    model: str,
    processor: str | None,
    device: torch.device,
    dtype: torch.dtype,
    load: Callable[[str], Any] | None = None,
) -> CLIPTower:
    """The one tower of this process for a model, device and precision; it goes when its last user unloads.

    Args:
        model (`str`): Hub id or local folder of a `CLIPModel`, or what `load` takes.
        processor (`str`, *optional*): Hub id or local folder of its processor. Defaults to `model`.
        device (`torch.device`): Where it runs.
        dtype (`torch.dtype`): Precision of the network.
        load (`Callable[[str], CLIPModel]`, *optional*): Reads the model; by default from its folder.

    Returns:
        [`CLIPTower`].
    """
    key = (str(model), str(processor or model), str(device), dtype, load is None)
    with _towers_lock:
        tower = _towers.get(key)
        if tower is None:
            network = (load or load_clip)(str(model)).to(device, dtype)
            tower = CLIPTower(network, str(processor or model))
            _towers[key] = tower
        return tower


def load_clip(model: str) -> Any:
    """A `CLIPModel` from the hub or from a local folder, which must hold safetensors."""
    from transformers import CLIPModel

    folder = Path(model)
    if not folder.is_dir():
        return CLIPModel.from_pretrained(model)  # pickled weights of the hub are read with `weights_only`
    if not list(folder.glob("*.safetensors")):
        raise RewardLoadError(
            f"A local model folder must hold safetensors weights. Found none in {model}. "
            "Save the model again with `save_pretrained`."
        )
    return CLIPModel.from_pretrained(folder, use_safetensors=True)


def clip_image_processor_class() -> Any:
    """CLIP's image processor on PIL, which needs no torchvision and gives the same pixels everywhere."""
    import transformers

    # transformers before 5 has one class, which is the PIL one.
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def pooled(features: Any) -> Float[Tensor, "B D"]:
    """The projected embedding: transformers 5 wraps it in an output object, older releases return the tensor.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.image_tower import pooled
    >>> pooled(torch.ones(1, 2)).shape
    torch.Size([1, 2])

    ```
    """
    return features if isinstance(features, Tensor) else features.pooler_output


def normalize(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """`e / ||e||` in float32.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.image_tower import normalize
    >>> [round(x, 4) for x in normalize(torch.tensor([[3.0, 4.0]]))[0].tolist()]
    [0.6, 0.8]

    ```
    """
    embeddings = embeddings.float()
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
