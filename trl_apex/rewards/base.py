"""What a reward is: the base class, its images and its weights."""

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from trl_apex.redact import describe

Images = Sequence[Image.Image] | Tensor
METADATA_COLUMN = "prompt_metadata"
OF_TRAINING = ("trainer_state", "log_metric", "log_extra")
KEYWORDS = ("prompts", "completions", "completion_ids", *OF_TRAINING)
"""What every reward call of a trainer gets, beside dataset columns and, where it takes them, `images`."""

# Loading sets PyTorch's default dtype for a moment, for the whole process: one network at a time.
_LOADING = threading.RLock()
_OFFLOADED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # networks, which rewards may share


@runtime_checkable
class RewardFunction(Protocol):
    """Any callable, blocking or `async`, that takes TRL's keywords and returns one number or None per sample.

    The keywords are `prompts`, `completions`, `images`, `completion_ids` (None for images), every other column of
    the dataset as a list, `trainer_state`, `log_extra` and `log_metric`. Larger is better.
    """

    def __call__(self, *, prompts: list[str], completions: Any, **kwargs: Any) -> Any: ...


class Reward:
    """Base of this package's rewards: a name, loading at the first call, batches, pickling and unloading.

    A subclass implements `_load()`, which returns whatever it must hold in memory, and
    `_score(loaded, images, prompts, columns)`, which scores one batch. One instance scores one batch at a time. With
    `whole_groups = True` a batch is all images of one prompt's group.

    Args:
        name (`str`, *optional*): Name of the objective. Defaults to the class's own.
        device (`str` or `torch.device`, *optional*): Where the network runs; without an index, the current device of
            the thread that loads it. Defaults to the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Precision. Defaults to float32; for large language models on a GPU, to bfloat16.
        batch_size (`int`, *optional*, defaults to `16`): Samples per forward pass, at least 1.
    """

    default_name: ClassVar[str] = "reward"
    range: ClassVar[str] = ""
    weights_licence: ClassVar[str] = ""
    extra: ClassVar[str] = ""  # of this package, that it needs
    accelerator_dtype: ClassVar[torch.dtype] = torch.float32  # the default there
    whole_groups: ClassVar[bool] = False

    def __init__(
        self,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Found {batch_size}. Pass the samples per forward.")
        self.__name__ = name or self.default_name
        self.device = torch.device(device) if device is not None else default_device()
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else self.accelerator_dtype)
        self.batch_size = batch_size
        self._loaded: Any = None
        self._lock = threading.RLock()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Images | None = None,
        images: Float[Tensor, "B 3 H W"] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score a batch: one reward per image, None where the reward does not apply.

        Args:
            prompts (`Sequence[str]`): One prompt per image.
            completions (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]` in [0, 1]): The images.
            images (`Tensor` of shape `[B, 3, H, W]` in [0, 1], *optional*): The images, used instead of `completions`.
            columns: Every other keyword that TRL passes; a list holds one entry per image. Where `whole_groups` is set,
                images of equal `group_ids` in a row are a group, or of equal prompts if there is no such column.

        Raises:
            ValueError: If there is not one image per prompt. What a network raises for every image is raised too.
        """
        batch = one_per_prompt(self.__name__, prompts, completions, images)
        columns = {key: value for key, value in columns.items() if is_column(value, len(prompts))}
        parts = [slice(i, i + self.batch_size) for i in range(0, len(prompts), self.batch_size)]
        if self.whole_groups:
            parts = groups_of(columns.get("group_ids", prompts))
        rewards, broken = RewardList([]), None
        with self._lock, torch.inference_mode():
            loaded = self.load()
            while parts:
                part = parts.pop(0)
                own = {key: value[part] for key, value in columns.items()}
                texts = list(prompts[part])
                try:
                    scored = self._score(loaded, batch[part], texts, own)
                except (RewardLoadError, ImportError):
                    raise
                except Exception as error:
                    if len(texts) > 1 and not self.whole_groups:  # one by one: a broken image costs no other's reward
                        parts = [slice(i, i + 1) for i in range(part.start, part.start + len(texts))] + parts
                        continue
                    scored, broken = RewardList([None] * len(texts), [describe(error)] * len(texts)), error
                rewards += scored
                rewards.errors += getattr(scored, "errors", [None] * len(scored))
        if broken is not None and rewards.failures == len(rewards):
            raise broken
        return rewards

    def load(self) -> Any:
        """Load the weights now instead of at the first call; a RewardLoadError or ImportError says what is missing."""
        with self._lock:
            if self._loaded is None:
                try:
                    self.device = torch.empty(0, device=self.device).device  # "cuda" becomes this thread's "cuda:1"
                    with _LOADING:
                        self._loaded = self._load()
                except (ImportError, RewardLoadError):
                    raise
                except Exception as error:
                    raise RewardLoadError(
                        f"The reward `{self.__name__}` must be able to load its weights. "
                        f"Found {type(error).__name__}: {error}. Check the model id or path and the connection."
                    ) from error
            for network in _OFFLOADED.intersection(self._networks()):
                network.to(self.device)
                _OFFLOADED.discard(network)
            return self._loaded

    def check(self) -> None:
        """Load the weights before anything else runs: loading changes PyTorch's default dtype for a moment."""
        self.load()

    def unload(self) -> None:
        """Free the memory of the network; the next call loads it again."""
        with self._lock:
            self._loaded = None
            self._empty_cache()

    def offload(self) -> None:
        """Keep the network in the CPU's memory until the next call."""
        with self._lock:
            for network in self._networks():
                _OFFLOADED.add(network.to("cpu"))
            self._empty_cache()

    def _networks(self) -> list[torch.nn.Module]:
        parts = self._loaded if isinstance(self._loaded, tuple | list) else [self._loaded]
        parts = [part if isinstance(part, torch.nn.Module) else getattr(part, "model", None) for part in parts]
        return [part for part in parts if isinstance(part, torch.nn.Module)]

    def _empty_cache(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _load(self) -> Any:
        return True  # nothing to hold in memory

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list[float | None]:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings alone: weights and locks stay in the process that made them."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_loaded", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loaded=None, _lock=threading.RLock())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.__name__!r}, device={str(self.device)!r}, dtype={self.dtype})"


class RewardList(list):
    """Rewards of a batch, with the cause of each one that is missing because something broke.

    `rewards` holds one number per sample, None or NaN where it is missing, and `errors` one cause or None. A reward function may
    return a plain list, in which a missing reward is one that does not apply to the sample.

    Example:
        >>> rewards = RewardList([0.5, None], errors=[None, "the image is truncated"])
        >>> rewards, rewards.errors
        ([0.5, None], [None, 'the image is truncated'])
    """

    def __init__(self, rewards: Sequence[float | None], errors: Sequence[str | None] | None = None) -> None:
        super().__init__(rewards)
        self.errors: list[str | None] = list(errors) if errors is not None else [None] * len(rewards)

    @property
    def failures(self) -> int:
        """How many are missing because something broke."""
        return sum(error is not None for error in self.errors)


class RewardLoadError(ValueError):
    """A reward could not load its weights or is set up wrongly: the run cannot go on with it."""


class TransientRewardError(ConnectionError):
    """A failure that may pass, such as a busy server: the scorer tries again, after the seconds that the other side asked for."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def reward_from_ddpo(reward_function: Callable, name: str | None = None) -> Callable:
    """Adapt `reward_function(images, prompts, metadata) -> (rewards, reward_metadata)` of `trl.DDPOTrainer`.

    Args:
        reward_function (`Callable`): Takes a float tensor `[B, 3, H, W]` in [0, 1], a tuple of B prompts and a tuple of
            B metadata: dictionaries of the dataset's columns, or the column `prompt_metadata` if there is one.
        name (`str`, *optional*): Name of the objective. Defaults to the function's own.

    Example:
        >>> def brightness(images, prompts, metadata):
        ...     return images.mean((1, 2, 3)), {}
        >>> reward = reward_from_ddpo(brightness)
        >>> reward.__name__, reward(prompts=["grey"], completions=None, images=torch.full((1, 3, 8, 8), 0.5))
        ('brightness', [0.5])
    """

    def reward(
        prompts: Sequence[str], completions: Images | None = None, images: Tensor | None = None, **columns: Any
    ) -> list[float]:
        if images is None:
            images = torch.from_numpy(np.stack(to_arrays(completions or []))).permute(0, 3, 1, 2).float() / 255
        rows = {key: list(value) for key, value in columns.items() if is_column(value, len(prompts))}
        metadata: list[Any] = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        metadata = rows.get(METADATA_COLUMN, metadata or [{}] * len(prompts))
        values, _ = reward_function(images, tuple(prompts), tuple(metadata))
        return torch.as_tensor(values, dtype=torch.float64).flatten().tolist()

    reward.__name__ = str(name or getattr(reward_function, "__name__", type(reward_function).__name__))
    return reward


def one_per_prompt(name: str, prompts: Sequence[str], completions: Any, images: Images | None = None) -> Images:
    """The images of a call of the reward `name`, in `images` or else in `completions`; a ValueError unless there is one each."""
    batch = completions if images is None else images
    if batch is None or len(batch) != len(prompts):
        found = "no images" if batch is None else f"{len(batch)} images"
        raise ValueError(
            f"`{name}` needs one image per prompt. Found {found} for {len(prompts)} prompts. "
            "Pass `completions` or `images` of the same length as `prompts`."
        )
    return batch


def reward_columns(columns: Iterable[str]) -> list[str]:
    """The dataset columns that reward functions get as keywords; those named like other keywords they cannot get."""
    return [name for name in columns if name not in (*KEYWORDS, "images", "prompt", "completion", "self")]


def is_column(value: Any, size: int) -> bool:
    """Whether a keyword of a reward call holds one entry per sample."""
    return isinstance(value, list | tuple) and len(value) == size


def wants_whole_groups(func: Any) -> bool:
    """Whether a reward function must see all images of a prompt's group in one call, and their `group_ids`."""
    return getattr(func, "whole_groups", False) is True


def groups_of(ids: Sequence[Any]) -> list[slice]:
    """A slice for each run of equal values."""
    starts = [i for i, group in enumerate(ids) if i == 0 or group != ids[i - 1]]
    return [slice(*ends) for ends in pairwise([*starts, len(ids)])]


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def to_uint8(images: Tensor) -> UInt8[Tensor, "B 3 H W"]:
    """Quantize float images in [0, 1] to bytes, as saving them to a file would: `u = round(255 clip(x, 0, 1))`; bytes pass.

    Example:
        >>> to_uint8(torch.tensor([0.0, 0.5, 1.2]).reshape(1, 3, 1, 1)).flatten().tolist()
        [0, 128, 255]
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must have shape [B, 3, H, W]. Found {list(images.shape)}. Pass RGB images, channels first."
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floats in [0, 1] or uint8. Found {images.dtype}. Convert them first.")
    # NaN has no defined byte value; black is what a failed decode is saved as.
    return torch.nan_to_num(images.detach().float(), nan=0.0).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def to_arrays(images: Images) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The images as RGB byte arrays, channels last, the form that PIL and OpenCV share."""
    if isinstance(images, Tensor):
        return list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
    return [np.asarray(to_rgb(image)) for image in images]


def to_pil(images: Images) -> list[Image.Image]:
    """The images as RGB PIL images."""
    if isinstance(images, Tensor):
        return [Image.fromarray(array) for array in to_arrays(images)]
    return [to_rgb(image) for image in images]


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image in RGB; 16-bit gray is scaled to 8 bits, which `convert("RGB")` would clip.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 51400)).getpixel((0, 0))
        (200, 200, 200)
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image must be in a mode of 8 or 16 bits. Found mode {image.mode!r}, whose range is not defined. Scale "
            'it to 0 to 255 and convert it to "RGB".'
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def read_weights(source: str, keyword: str, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """The tensors of a weights file by name; a nested `"state_dict"` is unwrapped.

    Args:
        source (`str`): A local file, `"owner/repo:FILE"` on the hub, or `"owner/repo"` with one weights file in it.
        keyword (`str`): The argument that it came from.
        dtype (`torch.dtype`, *optional*, defaults to float32): Of floating-point tensors; None for that of the file.

    Raises:
        RewardLoadError: If the file is not named and not the only one, or holds something other than tensors.
    """
    path = Path(source)
    if not path.is_file():
        from huggingface_hub import HfApi, hf_hub_download

        repo, _, filename = str(source).partition(":")
        if not filename:
            names = [name for name in HfApi().list_repo_files(repo) if name.endswith((".safetensors", ".pth", ".pt"))]
            if len(names) != 1:
                raise RewardLoadError(
                    f"`{keyword}` must name one weights file. Found {len(names)} in {repo}: {names}. "
                    f'Pass "{repo}:FILE" with one of them.'
                )
            (filename,) = names
        path = Path(hf_hub_download(repo, filename))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardLoadError(f"{path.name} must hold tensors by name. Found other things. Pass a weights file.")
    return {
        key: value.to(dtype or value.dtype) if value.is_floating_point() else value for key, value in state.items()
    }


def renamed(key: str, patterns: Sequence[tuple[str, str]]) -> str:
    """The name of a tensor after each pattern is replaced in turn.

    Example:
        >>> renamed("ln_1.bias", [(r"ln_(\\d)", r"layer_norm\\1")])
        'layer_norm1.bias'
    """
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that was read from `source`; it must hold all tensors, as [`check_tensors`] says."""
    found = module.load_state_dict(state, strict=False)
    check_tensors(found.missing_keys, found.unexpected_keys, source, type(module).__name__)


def check_tensors(missing: Iterable[str], unexpected: Iterable[str], source: str, name: str) -> None:
    """Raise RewardLoadError where `source` lacks tensors of the network `name`, or has others, buffers of positions aside."""
    missing, unexpected = ([key for key in keys if not key.endswith("position_ids")] for keys in (missing, unexpected))
    if missing or unexpected:
        raise RewardLoadError(
            f"{source} must hold the tensors of {name}. Found {len(missing)} missing ({', '.join(missing[:3])}) and "
            f"{len(unexpected)} left over ({', '.join(unexpected[:3])}). Pass the file that belongs to this reward."
        )
