"""Reward functions and the scorer that runs them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_apex.rewards.aesthetic import AestheticReward
    from trl_apex.rewards.clip_score import CLIPScoreReward
    from trl_apex.rewards.deqa import DeQAReward
    from trl_apex.rewards.from_ddpo import reward_from_ddpo
    from trl_apex.rewards.hpsv2 import HPSv2Reward
    from trl_apex.rewards.image_reward import ImageReward
    from trl_apex.rewards.jpeg import JPEGCompressibilityReward, JPEGIncompressibilityReward
    from trl_apex.rewards.ocr import OCRReward
    from trl_apex.rewards.pickscore import PickScoreReward
    from trl_apex.rewards.protocol import (
        Reward,
        RewardFunction,
        RewardList,
        RewardLoadError,
        TransientRewardError,
    )
    from trl_apex.rewards.scoring import RewardFailureRateError, RewardFailureWarning, RewardScorer, ScoredBatch
    from trl_apex.rewards.vlm_judge import VLMJudgeReward

_HOMES = {
    "AestheticReward": "aesthetic",
    "CLIPScoreReward": "clip_score",
    "DeQAReward": "deqa",
    "HPSv2Reward": "hpsv2",
    "ImageReward": "image_reward",
    "JPEGCompressibilityReward": "jpeg",
    "JPEGIncompressibilityReward": "jpeg",
    "OCRReward": "ocr",
    "PickScoreReward": "pickscore",
    "RemoteReward": "trl_apex.serving.client",
    "Reward": "protocol",
    "RewardFailureRateError": "scoring",
    "RewardFailureWarning": "scoring",
    "RewardFunction": "protocol",
    "RewardList": "protocol",
    "RewardLoadError": "protocol",
    "RewardScorer": "scoring",
    "ScoredBatch": "scoring",
    "TransientRewardError": "protocol",
    "VLMJudgeReward": "vlm_judge",
    "reward_from_ddpo": "from_ddpo",
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
