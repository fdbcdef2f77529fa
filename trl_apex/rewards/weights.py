"""Where a reward's single weights file comes from, and how it is read without running anything."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_apex.rewards.protocol import RewardLoadError


def find_weights(source: str, keyword: str) -> Path:
    """A local file as it is, or the file downloaded from the hub.

    Args:
        source (`str`): A local file, or `"owner/repo:FILE"`, or `"owner/repo"` with one weights file in it.
        keyword (`str`): The argument that `source` came from, for the error message.

    Returns:
        `Path`.

    Raises:
        RewardLoadError: If the repository does not hold exactly one weights file and none is named.
    """
    if Path(source).is_file():
        return Path(source)
    from huggingface_hub import HfApi, hf_hub_download

    repo, _, filename = str(source).partition(":")
    if not filename:
        names = [name for name in HfApi().list_repo_files(repo) if name.endswith((".safetensors", ".pth", ".pt"))]
        if len(names) != 1:
            raise RewardLoadError(
                f"`{keyword}` must name one weights file. Found {len(names)} in {repo}: {names}. "
                f'Pass "{repo}:FILE" with one of them.'
            )
        filename = names[0]
    return Path(hf_hub_download(repo, filename))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in float32.

    Args:
        path (`Path`): A `.safetensors` file, or a PyTorch file, which is read with `weights_only=True`; a nested
            `"state_dict"` is unwrapped.

    Returns:
        `dict[str, Tensor]`.

    Raises:
        RewardLoadError: If the file holds something other than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardLoadError(f"{path.name} must hold tensors by name. Found other things. Pass a weights file.")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict and refuse one with a missing tensor, which would leave random weights behind.

    Args:
        module (`torch.nn.Module`): What to fill.
        state (`dict[str, Tensor]`): Its tensors; others are not allowed, buffers of positions aside.
        source (`str`): Name of the file, for the error message.

    Raises:
        RewardLoadError: If tensors are missing or left over.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    if missing or unexpected:
        raise RewardLoadError(
            f"{source} must hold the tensors of {type(module).__name__}. Found {len(missing)} missing "
            f"({', '.join(missing[:3])}) and {len(unexpected)} left over ({', '.join(unexpected[:3])}). "
            "Pass the file that belongs to this reward."
        )
