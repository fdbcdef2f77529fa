"""Multi-reward fine-tuning of text-to-image models with adaptive priorities, as a TRL trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use: `import trl_apex` itself imports nothing heavy.
_PUBLIC = {
    "APEXConfig": "trl_apex.trainers.config",
    "APEXGRPOConfig": "trl_apex.trainers.config",
    "APEXGRPOTrainer": "trl_apex.trainers.language",
    "APEXTrainer": "trl_apex.trainers.apex",
    "DiffusionGRPOConfig": "trl_apex.trainers.config",
    "DiffusionGRPOTrainer": "trl_apex.trainers.diffusion_grpo",
    "GradientProbe": "trl_apex.trainers.probe",
    "MultiObjectiveRewardAggregator": "trl_apex.aggregation",
    "OCRReward": "trl_apex.rewards",
    "PickScoreReward": "trl_apex.rewards",
    "DeQAReward": "trl_apex.rewards",
    "AestheticReward": "trl_apex.rewards",
}

__all__ = ["__version__", *_PUBLIC]

_moved.install()

if TYPE_CHECKING:
    from .aggregation import MultiObjectiveRewardAggregator
    from .rewards import AestheticReward, DeQAReward, OCRReward, PickScoreReward
    from .trainers.apex import APEXTrainer
    from .trainers.config import APEXConfig, APEXGRPOConfig, DiffusionGRPOConfig
    from .trainers.diffusion_grpo import DiffusionGRPOTrainer
    from .trainers.language import APEXGRPOTrainer
    from .trainers.probe import GradientProbe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
