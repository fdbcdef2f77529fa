"""Reward functions and the scorer that runs them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_apex.rewards.base import (
        Reward,
        RewardFunction,
        RewardList,
        RewardLoadError,
        TransientRewardError,
        reward_from_ddpo,
    )
    from trl_apex.rewards.clip import AestheticReward, CLIPScoreReward, HPSv2Reward, PickScoreReward
    from trl_apex.rewards.deqa import DeQAReward
    from trl_apex.rewards.image_reward import ImageReward
    from trl_apex.rewards.jpeg import JPEGCompressibilityReward, JPEGIncompressibilityReward
    from trl_apex.rewards.ocr import OCRReward
    from trl_apex.rewards.scoring import RewardFailureRateError, RewardFailureWarning, RewardScorer, ScoredBatch
    from trl_apex.rewards.vlm_judge import VLMJudgeReward

_HOMES = {
    "AestheticReward": "clip",
    "CLIPScoreReward": "clip",
    "DeQAReward": "deqa",
    "HPSv2Reward": "clip",
    "ImageReward": "image_reward",
    "JPEGCompressibilityReward": "jpeg",
    "JPEGIncompressibilityReward": "jpeg",
    "OCRReward": "ocr",
    "PickScoreReward": "clip",
    "RemoteReward": "trl_apex.serving.client",
    "Reward": "base",
    "RewardFailureRateError": "scoring",
    "RewardFailureWarning": "scoring",
    "RewardFunction": "base",
    "RewardList": "base",
    "RewardLoadError": "base",
    "RewardScorer": "scoring",
    "ScoredBatch": "scoring",
    "TransientRewardError": "base",
    "VLMJudgeReward": "vlm_judge",
    "reward_from_ddpo": "base",
}
__all__ = [
    "AestheticReward",
    "CLIPScoreReward",
    "DeQAReward",
    "HPSv2Reward",
    "ImageReward",
    "JPEGCompressibilityReward",
    "JPEGIncompressibilityReward",
    "OCRReward",
    "PickScoreReward",
    "RemoteReward",
    "Reward",
    "RewardFailureRateError",
    "RewardFailureWarning",
    "RewardFunction",
    "RewardList",
    "RewardLoadError",
    "RewardScorer",
    "ScoredBatch",
    "TransientRewardError",
    "VLMJudgeReward",
    "reward_from_ddpo",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = _HOMES[name]
        return getattr(import_module(home if "." in home else f"trl_apex.rewards.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
