"""How beautiful an image is to the raters of the LAION aesthetic predictor."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_apex.rewards.image_tower import CLIPTower, shared_tower
from trl_apex.rewards.protocol import Images, Reward, RewardLoadError
from trl_apex.rewards.weights import find_weights, read_weights

HIDDEN = (1024, 128, 64, 16, 1)
DROPOUT = {0: 0.2, 1: 0.2, 2: 0.1}


class AestheticHead(nn.Module):
    """The predictor's head: five linear layers with dropout between them and no activations.

    `r = W_5 W_4 W_3 W_2 W_1 e` with biases; `e = embeddings`, of unit length.

    Args:
        width (`int`, *optional*, defaults to `768`): Size of the image embedding.
        hidden (`tuple[int, ...]`, *optional*): Outputs of the linear layers.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.aesthetic import AestheticHead
    >>> list(AestheticHead(width=8).state_dict())[::2]
    ['layers.0.weight', 'layers.2.weight', 'layers.4.weight', 'layers.6.weight', 'layers.7.weight']

    ```
    """

    def __init__(self, width: int = 768, hidden: tuple[int, ...] = HIDDEN) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise((width, *hidden))):
            layers.append(nn.Linear(inputs, outputs))
            if i in DROPOUT:
                layers.append(nn.Dropout(DROPOUT[i]))
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Score normalized image embeddings.

        Args:
            embeddings (`Tensor` of shape `[B, D]`): Of unit length.

        Returns:
            `Tensor` of shape `[B]`.
        """
        return self.layers(embeddings).squeeze(-1)


class AestheticReward(Reward):
    """LAION's aesthetic predictor: a linear head on the normalized CLIP-L image embedding.

    `r = head(e / ||e||)`

    Range: raw, about 1 to 10 (Stable Diffusion 3.5 medium: about 5.4), larger is better. Weights:
    `openai/clip-vit-large-patch14`, MIT; head `sac+logos+ava1-l14-linearMSE`, Apache-2.0.

    Args:
        clip (`str`, *optional*): Hub id or local folder of a `CLIPModel`.
        head (`str`, *optional*): The head's weights: a local `.safetensors` or `.pth` file, or a hub id, optionally
            with a file name after a colon (`"owner/repo:file.safetensors"`). Files other than safetensors are read
            with `weights_only=True`.
        processor (`str`, *optional*): Hub id or local folder of CLIP's processor. Defaults to `clip`.
        name (`str`, *optional*, defaults to `"aesthetic"`): Name of the objective.
        device (`str` or `torch.device`, *optional*): Defaults to the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Precision of CLIP, float32 by default; the head is always float32.
        batch_size (`int`, *optional*, defaults to `16`): Samples per forward pass.

    Reference:
        LAION's improved aesthetic predictor, on the SAC, Logos and AVA ratings.
    """

    default_name = "aesthetic"
    range = "raw, about 1 to 10, larger is better"
    weights_licence = "MIT (CLIP), Apache-2.0 (head)"

    def __init__(
        self,
        clip: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        processor: str | None = None,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(name=name, device=device, dtype=dtype, batch_size=batch_size)
        self.clip, self.head, self.processor = clip, head, processor

    def _load(self) -> tuple[CLIPTower, AestheticHead]:
        tower = shared_tower(self.clip, self.processor, self.device, self.dtype)
        return tower, load_head(find_weights(self.head, "head")).to(self.device)

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        tower, head = loaded
        return head(tower.encode_images(images)).tolist()


def load_head(path: Path) -> AestheticHead:
    """Read a head; the layer sizes come from the weights.

    Args:
        path (`Path`): A `.safetensors` file, or a PyTorch file, which is read with `weights_only=True`.

    Returns:
        [`AestheticHead`], in eval mode.

    Raises:
        RewardLoadError: If the file's keys are not those of the head.
    """
    state = read_weights(path)
    weights = [state[key] for key in sorted(state, key=_layer_number) if key.endswith(".weight")]
    if not weights:
        raise RewardLoadError(f"{path.name} must hold `layers.N.weight`. Found {sorted(state)}. Pass the head's file.")
    head = AestheticHead(weights[0].shape[1], tuple(weight.shape[0] for weight in weights))
    if set(head.state_dict()) != set(state):
        raise RewardLoadError(
            f"{path.name} must hold {sorted(head.state_dict())}. Found {sorted(state)}. Pass the head's file."
        )
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)


def _layer_number(key: str) -> int:
    parts = key.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1
