"""APEX: the diffusion GRPO trainer with adaptive priorities."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ..aggregation.aggregator import MultiObjectiveRewardAggregator
from .apex_config import APEXConfig
from .diffusion_grpo_trainer import DiffusionGRPOTrainer

logger = logging.getLogger(__name__)

AGGREGATOR_FILE = "aggregator_state.json"


class APEXTrainer(DiffusionGRPOTrainer):
    """[`DiffusionGRPOTrainer`] that keeps several rewards in balance.

    Takes the same arguments; rewards are aggregated by a [`MultiObjectiveRewardAggregator`], whose state is saved with
    every checkpoint. Reconstructed from the abstract of APEX (arXiv 2601.06574).

    Example:
        ```python
        from trl_apex import APEXConfig, APEXTrainer, AestheticReward, DeQAReward, OCRReward, PickScoreReward

        trainer = APEXTrainer(
            model="stabilityai/stable-diffusion-3.5-medium",
            reward_funcs=[OCRReward(), PickScoreReward(), DeQAReward(), AestheticReward()],
            args=APEXConfig(output_dir="run", num_generations=24),
            train_dataset=dataset,
            peft_config=LoraConfig(r=32, lora_alpha=64),
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "grpo", "apex", "diffusers", "text-to-image"]
    _name = "APEX"
    config_class = APEXConfig

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self.aggregator = MultiObjectiveRewardAggregator(
            self.reward_func_names,
            weights=self.reward_weights.tolist(),
            rule=self.args.multi_objective_aggregation,
            **self.args.aggregator_options(),
        )

    def _compute_advantages(self, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        advantages, metrics = self.aggregator(rewards, group_ids)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        return advantages, self.aggregator.normalized

    def _extra_state(self) -> dict[str, Any]:
        return {AGGREGATOR_FILE: self.aggregator.state_dict()}

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / AGGREGATOR_FILE
        if not path.is_file():
            raise ValueError(
                f"A checkpoint of APEXTrainer must hold {AGGREGATOR_FILE}. Found none in {checkpoint}. It was saved by "
                "another trainer: load its adapter as the model and start anew instead of resuming."
            )
        self.aggregator.load_state_dict(json.loads(path.read_text()))
