"""APEX: the diffusion GRPO trainer with adaptive priorities."""

import logging
from functools import wraps
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..aggregation.aggregator import MultiObjectiveRewardAggregator
from ..aggregation.conflict import PopulationConflict
from ..diffusion.losses import NFT_CLIP, Surrogate, nft_share
from ..distributed import all_reduce_sum
from ..rewards.base import wants_whole_groups
from .config import APEXConfig
from .diffusion_grpo import DiffusionGRPOTrainer
from .evaluation import rewards_at_start
from .probe import GradientProbe

logger = logging.getLogger(__name__)


class APEXTrainer(DiffusionGRPOTrainer):
    """[`DiffusionGRPOTrainer`] that keeps several rewards in balance.

    Takes the same arguments; rewards are aggregated by a [`MultiObjectiveRewardAggregator`], whose state is saved with
    every checkpoint. Reconstructed from the abstract of APEX (arXiv 2601.06574).

    Example:
        ```python
        from trl_apex import AestheticReward, APEXConfig, APEXTrainer, OCRReward, PickScoreReward

        trainer = APEXTrainer(
            model="stabilityai/stable-diffusion-3.5-medium",
            reward_funcs=[OCRReward(), PickScoreReward(), AestheticReward()],
            args=APEXConfig(output_dir="run", num_generations=8, generation_batch_size=64),
            train_dataset=dataset,
            peft_config=LoraConfig(r=32, lora_alpha=64),
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "grpo", "apex", "diffusers", "text-to-image"]
    _name = "APEX"
    config_class = APEXConfig

    @wraps(DiffusionGRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        names, weights = self.reward_func_names, self.reward_weights.tolist()
        rule = self.args.multi_objective_aggregation
        self.aggregator = MultiObjectiveRewardAggregator(names, weights, rule, self.args.apex_options())
        warmup = self.aggregator.options.warmup_iterations if self.aggregator.rule == "apex" else 0
        if 0 < self.args.max_steps <= warmup * self.updates_per_iteration:
            logger.warning(
                f"`max_steps` should reach beyond the warm-up. Found {self.args.max_steps} updates, "
                f"{self.updates_per_iteration} an iteration, and warmup_iterations={warmup}: the weights stay equal to the "
                "end. Lower `updates_per_iteration` or `warmup_iterations`."
            )
        self.probe: GradientProbe | None = None
        self.population = PopulationConflict(len(names))
        if self.args.gradient_probe:
            every = 1 if self.aggregator.options.conflict_source == "population" else self.args.probe_every
            self.probe = GradientProbe(self.model, names, self.args.probe_layers, every)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        count = self.args.baseline_prompts if self.aggregator.rule == "apex" else 0
        compared = any(map(wants_whole_groups, self.reward_funcs))  # such a reward has no score for a single image
        if count and not compared and self.aggregator.iteration == 0:
            self.aggregator.observe_start(rewards_at_start(self, count))
        return super()._generate_and_score_completions(inputs)

    def _compute_advantages(self, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.aggregator.weights = self.reward_weights.tolist()  # a callback may have changed them
        advantages, metrics = self.aggregator(rewards, group_ids)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        return advantages, self.aggregator.normalized

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> Tensor:
        if self.probe is None or not self.probe.due(self.state.global_step):
            return super().training_step(model, inputs, num_items_in_batch)
        with self.probe.step():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._read_probe(self.probe)
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.probe is not None and self.probe.due(self.state.global_step):
            halves = inputs["samples"] // self.num_generations % 2
            if self.args.loss_type == "nft":
                inputs, halves = both_branches(inputs), halves.repeat(2)
            self.probe.rows(inputs.get("share", inputs["advantages"]), inputs["normalized"], halves)
        return super()._compute_loss(model, inputs)

    def _surrogate(self, prediction: Tensor, rows: dict[str, Any]) -> Surrogate:
        found = super()._surrogate(prediction, rows)
        return found._replace(loss=2 * rows["share"] * found.loss) if "share" in rows else found

    def _distances(self, model: nn.Module, prediction: Tensor, rows: dict[str, Any]) -> dict[str, Tensor]:
        penalized = self.beta > 0 or (self.args.loss_type == "awm" and "anchor" in rows)
        if not penalized or self.probe is None or not self.probe.due(self.state.global_step):
            return super()._distances(model, prediction, rows)
        rows = rows.get("once", rows)
        with self.probe.paused():  # a graph of its own, so that the probed one holds the advantages' gradient alone
            return super()._distances(model, self._predict(model, rows), rows)

    def _read_probe(self, probe: GradientProbe) -> None:
        result = probe.result(reduce=all_reduce_sum)
        if result is None:
            return
        self._metrics["train"]["gradient_harmony"].append(result.harmony)
        if self.aggregator.options.conflict_source == "population" and result.cross is not None:
            self.population.update(result.cross)
            cosine, error = self.population.estimate()
            self.aggregator.observe_conflict(cosine, standard_error=error)
        else:
            branches = 2 if self.args.loss_type == "nft" else 1
            self.aggregator.observe_conflict(result.gramian, samples=result.rows // branches)

    def _stateful(self) -> dict[str, Any]:
        return {**super()._stateful(), "aggregator": self.aggregator, "population": self.population}


def both_branches(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows twice, for a probed step of 'nft': with its good branch alone (r = 1), then with its bad one (r = 0).

    The loss is `r l(r = 1) + (1 - r) l(r = 0)`. Each branch is a row with the weight `share` (r or 1 - r), so the probe sees
    the gradient of each. Their sum is the gradient of the plain loss.
    """
    count = len(rows["advantages"])
    good, scores = nft_share(rows["advantages"]), nft_share(rows["normalized"])
    return recursively_apply(lambda tensor: torch.cat([tensor, tensor]), rows) | {
        "advantages": torch.tensor([NFT_CLIP, -NFT_CLIP], device=good.device).repeat_interleave(count),
        "share": torch.cat([good, 1 - good]),
        "normalized": torch.cat([scores, 1 - scores]),
        "once": rows,
    }
