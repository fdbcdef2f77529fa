"""APEX in TRL's own trainer of language and vision-language models."""

import json
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..aggregation.aggregator import MultiObjectiveRewardAggregator
from ..distributed import local_slice
from ..rewards.scoring import numbered_names
from .checkpoint import AGGREGATOR_FILE, check_state, restore
from .config import STATIC_RULES, APEXGRPOConfig
from .inputs import upgraded

CITATION = """\
@article{chen2026apex,
    title        = {{APEX: Learning Adaptive Priorities for Multi-Objective Alignment in Vision-Language Generation}},
    author       = {Chen and others},
    year         = 2026,
    eprint       = {arXiv:2601.06574},
}"""


class APEXGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose rewards are kept in balance by a [`MultiObjectiveRewardAggregator`].

    Everything else is TRL's: models, tokenizers and processors, generation (vLLM included), tools, losses, logs. TRL
    gathers the scores of all rewards over ranks, and the aggregator's advantages take the place of its own.
    Reconstructed from the abstract of APEX (arXiv 2601.06574).

    Arguments are those of `trl.GRPOTrainer`. `args` is an [`APEXGRPOConfig`]; a plain `trl.GRPOConfig` is accepted and gets
    the aggregator's defaults.

    Example:
        ```python
        from trl_apex import APEXGRPOConfig, APEXGRPOTrainer

        trainer = APEXGRPOTrainer(
            model="Qwen/Qwen3-0.6B",
            reward_funcs=[correct, short],
            args=APEXGRPOConfig(output_dir="run", num_generations=8),
            train_dataset=dataset,
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "grpo", "apex"]
    _name = "APEX"
    _paper = {
        "title": "APEX: Learning Adaptive Priorities for Multi-Objective Alignment in Vision-Language Generation",
        "id": "2601.06574",
        "citation": CITATION,
    }
    args: APEXGRPOConfig
    reward_func_names: list[str]
    num_generations: int
    num_generations_eval: int
    _logs: dict[str, Any]

    @wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        if args is None:  # named as TRL does
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = APEXGRPOConfig(f"{name.split('/')[-1]}-APEX")
        args = upgraded(args, APEXGRPOConfig)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self.reward_func_names = numbered_names(self.reward_func_names, warn=True)
        rule = args.multi_objective_aggregation
        # TRL computes advantages of its own before ours replace them, and stops at a rule that it does not know.
        self.multi_objective_aggregation = rule if rule in STATIC_RULES else "sum_then_normalize"
        weights, options = self.reward_weights.tolist(), args.apex_options()
        self.aggregator = MultiObjectiveRewardAggregator(self.reward_func_names, weights, rule, options)
        self._gathered_rewards: Tensor | None = None

    # The seam: what two private methods of TRL return. The tests name the release that moves either.

    def _calculate_rewards(self, *args, **kwargs) -> Tensor:
        self._gathered_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rewards, self._gathered_rewards = self._gathered_rewards, None
        local = len(inputs)
        expected = local * self.accelerator.num_processes
        if rewards is None or "advantages" not in output or len(rewards) != expected:
            raise RuntimeError(
                f"trl {trl.__version__} no longer passes the rewards of {expected} completions through "
                "`_calculate_rewards` and their advantages out of `_generate_and_score_completions`. "
                "Install a release that trl_apex names in its requirements."
            )
        training = self.model.training
        group_size = self.num_generations if training else self.num_generations_eval
        groups = torch.arange(expected, device=rewards.device) // group_size
        self.aggregator.weights = self.reward_weights.tolist()  # a callback may have changed them
        advantages, metrics = self.aggregator(rewards, groups, update=training)
        for name, value in metrics.items():
            self._metrics["train" if training else "eval"][name].append(value)
        own = advantages[local_slice(local, self.accelerator.process_index)]
        output["advantages"] = own.to(output["advantages"])
        logged = self._logs["advantages"]  # of the table of completions: ours in place of TRL's
        for _ in range(min(expected, len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        return output

    # Checkpoints

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """TRL's own; ValueError, before anything is loaded, for a checkpoint whose states cannot be restored."""
        last = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(self.args.output_dir) if last else resume_from_checkpoint
        if checkpoint:
            check_state({"aggregator": self.aggregator}, checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / AGGREGATOR_FILE).write_text(json.dumps(self.aggregator.state_dict(), indent=1))
        super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        restore({"aggregator": self.aggregator}, checkpoint)
        # TRL restarts its count at 0, which shifts the moments at which it generates.
        progress = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        self._step = progress.global_step * self.args.gradient_accumulation_steps
