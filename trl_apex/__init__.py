"""Multi-reward fine-tuning of text-to-image models with adaptive priorities, as a TRL trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use: `import trl_apex` itself imports nothing heavy.
_PUBLIC = {
    "APEXConfig": "trl_apex.trainer.apex_config",
    "APEXGRPOConfig": "trl_apex.trainer.apex_grpo_config",
    "APEXGRPOTrainer": "trl_apex.trainer.apex_grpo_trainer",
    "APEXTrainer": "trl_apex.trainer.apex_trainer",
    "DiffusionGRPOConfig": "trl_apex.trainer.diffusion_grpo_config",
    "DiffusionGRPOTrainer": "trl_apex.trainer.diffusion_grpo_trainer",
    "GradientProbe": "trl_apex.trainer.gradient_probe",
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
    from .trainer.apex_config import APEXConfig
    from .trainer.apex_grpo_config import APEXGRPOConfig
    from .trainer.apex_grpo_trainer import APEXGRPOTrainer
    from .trainer.apex_trainer import APEXTrainer
    from .trainer.diffusion_grpo_config import DiffusionGRPOConfig
    from .trainer.diffusion_grpo_trainer import DiffusionGRPOTrainer
    from .trainer.gradient_probe import GradientProbe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
