"""Reward functions and the scorer that runs them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_apex.rewards.registry import REWARDS

if TYPE_CHECKING:
    from trl_apex.rewards.base import (
        Reward,
        RewardFunction,
        RewardList,
        RewardLoadError,
        TransientRewardError,
        reward_from_ddpo,
    )
    from trl_apex.rewards.clip import AestheticReward, CLIPScoreReward, HPSv2Reward, PickScoreReward, SourceReward
    from trl_apex.rewards.deqa import DeQAReward, PublishedDeQAReward, VLMYesReward
    from trl_apex.rewards.geneval import GenEvalReward
    from trl_apex.rewards.groups import PairwiseReward, RankReward
    from trl_apex.rewards.image_reward import HPSv3Reward, ImageReward
    from trl_apex.rewards.ocr import OCRReward
    from trl_apex.rewards.scoring import RewardFailureRateError, RewardFailureWarning, RewardScorer, ScoredBatch
    from trl_apex.rewards.vision import (
        DINOSourceReward,
        JPEGCompressibilityReward,
        JPEGIncompressibilityReward,
        SafetyReward,
    )
    from trl_apex.rewards.vlm_judge import UnifiedReward, VLMJudgeReward

# Public name -> module that defines it. Loaded on first use: the import itself loads nothing heavy.
_BASE = "Reward RewardFunction RewardList RewardLoadError TransientRewardError reward_from_ddpo"
_SCORING = "RewardFailureRateError RewardFailureWarning RewardScorer ScoredBatch"
_HOMES = {
    **{name: module for module, _, name in (path.partition(":") for path in REWARDS.values())},
    **dict.fromkeys(_BASE.split(), "trl_apex.rewards.base"),
    **dict.fromkeys(_SCORING.split(), "trl_apex.rewards.scoring"),
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
