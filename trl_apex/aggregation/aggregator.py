"""From a matrix of rewards to one advantage per sample."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .conflict import cosines, score_correlation
from .metrics import Aggregated, batch_metrics, complaints, hijack_shares, next_report
from .normalize import (
    GroupMoments,
    Groups,
    Matrix,
    Rows,
    Valid,
    Vector,
    adaptive_normalize,
    batch_normalize,
    centre_in_group,
    group_moments,
    group_rows,
    implausible,
    pooled_variance,
    share_weights,
)
from .options import ApexOptions, checked_batch, checked_options, checked_weights, did_you_mean, option_table
from .priority import observe_batch, presence, reprioritize, reweighted
from .rules import GRADIENT_RULES, RULES, TABLE, gramian_weights, wide_enough
from .state import Average, PriorityState, ReportState, from_plain, to_plain


class MultiObjectiveRewardAggregator:
    r"""Turns several rewards per sample into one advantage per sample, by APEX or by another rule.

    It needs no trainer and gathers nothing: give it the rewards of all ranks, on every rank, and all ranks hold the same
    state. Statistics are float64 on the CPU, the same for every device; advantages come back on the rewards' device. Every
    equation of "apex" is reconstructed from the abstract of arXiv 2601.06574.

    Args:
        objectives (`list[str]`): a name for each column of the rewards.
        weights (`list[float]`, *optional*): the user's fixed weights, 1 each by default. "apex" and "mgda" to "cagrad"
            divide them by their sum; the other rules use them as they are, as TRL does. 0 watches without training.
        rule (`str`): "apex", "sum_then_normalize", "normalize_then_sum", "weighted_advantages", "dvao", "gd2po", "saw",
            "ctwa", "mgda", "upgrad", "pcgrad" or "cagrad".
        options ([`ApexOptions`] or `dict`, *optional*): everything else; listed below.

    Example:
        >>> aggregator = MultiObjectiveRewardAggregator(["ocr", "pickscore"], options={"warmup_iterations": 5})
        >>> rewards = torch.tensor([[0.0, 21.0], [1.0, 21.5], [0.5, 22.0], [0.5, 20.0]])
        >>> advantages, metrics = aggregator(rewards, torch.tensor([0, 0, 1, 1]))
        >>> [round(value, 2) for value in advantages.tolist()]
        [-1.18, 1.18, 0.79, -0.79]
        >>> aggregator.priorities
        {'ocr': 0.5, 'pickscore': 0.5}
    """

    def __init__(
        self,
        objectives: list[str],
        weights: list[float] | None = None,
        rule: str = "apex",
        options: ApexOptions | dict[str, Any] | None = None,
        **flat: Any,
    ) -> None:
        if rule not in RULES:
            raise ValueError(
                f"`rule` must be one of {', '.join(RULES)}. Found {rule!r}. {did_you_mean(rule, RULES)}Pass one of these."
            )
        named = isinstance(objectives, list | tuple) and all(isinstance(name, str) for name in objectives)
        if not named or not objectives or len(set(objectives)) != len(objectives):
            raise ValueError(
                f"`objectives` must be a list of distinct names, at least one. Found {objectives!r}. Name each reward once."
            )
        self.objectives = list(objectives)
        self.rule = rule
        self.options = checked_options(self.objectives, options, flat)
        self._raw_weights = checked_weights(self.objectives, weights, rule)
        self._state = PriorityState.initial(self._weights, self.options.conflict_margin)
        self._report = ReportState.initial(self._weights)
        self.normalized: Tensor | None = None  # each objective's scores in the last batch, for the gradient probe
        self._warned: set[str] = set()  # of this process: a resumed run warns again, in its own log

    @property
    def weights(self) -> list[float]:
        """The user's weights. Set between two batches, as annealing does, they count from the next batch on."""
        return self._raw_weights.tolist()

    @weights.setter
    def weights(self, weights: list[float]) -> None:
        self._raw_weights = checked_weights(self.objectives, weights, self.rule)

    @property
    def priorities(self) -> dict[str, float]:
        """The weight of each objective in the next batch, summing to one."""
        return self._named(self._current_weights(self._reweighted(self._state)))

    @property
    def effective_weights(self) -> dict[str, float]:
        """The mean weight of each objective over the rows of the last batch, the weights of the missing shared out."""
        return self._named(self._report.effective)

    @property
    def iteration(self) -> int:
        """Batches seen."""
        return self._state.iteration

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, lists and strings, exact through JSON."""
        names = {"objectives": list(self.objectives), "rule": self.rule}
        return {**names, **to_plain(self._state), **to_plain(self._report)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, of this version or of 0.1.0, but not its weights; a ValueError says if it does not fit."""
        for name, own in (("objectives", self.objectives), ("rule", self.rule)):
            if state.get(name) != own:
                raise ValueError(
                    f"The saved state must be for the {name} {own!r}. Found {state.get(name, 'none')!r}. "
                    f"Resume with the saved {name}{', in that order' * (name == 'objectives')}, or start without the state."
                )
        self._state, self._report = from_plain(self._state, state), from_plain(self._report, state)
        if not self.options.adaptive_priorities:  # the state may come from a run that had them
            self._state = replace(self._state, priorities=self._state.weights)

    def __call__(
        self, rewards: Tensor, group_ids: Tensor, mask: Tensor | None = None, update: bool = True
    ) -> tuple[Float[Tensor, " B"], dict[str, float]]:
        """Aggregate one batch. A ValueError says if the shapes do not fit.

        Args:
            rewards (`Tensor` of shape `[B, K]`): of all ranks, larger is better; NaN or infinite = missing.
            group_ids (`Tensor` of shape `[B]`): rows with the same id were made from the same prompt.
            mask (`Tensor` of shape `[B, K]`, *optional*): false = missing.
            update (`bool`): whether to remember the batch; pass `False` for evaluation.

        Returns:
            The advantages, float32 on the rewards' device, and a flat dictionary of metrics. If `metrics["all_dead"]` is 1,
            all advantages are 0 and the optimizer step is best skipped.
        """
        options, apex = self.options, self.rule == "apex"
        values, valid = checked_batch(self.objectives, rewards, group_ids, mask)
        state, absurd = self._reweighted(self._state), torch.zeros_like(valid)
        if apex:
            absurd = implausible(values.double(), valid, state.slow.value, state.widest, options.outlier_limit)
            valid = valid & ~absurd
            values = torch.where(valid, values, torch.nan)

        groups = group_rows(group_ids.cpu())
        moments = group_moments(values.double(), valid, groups, options.dead_tolerance)
        absent, sparse, live_groups = presence(moments, groups, options.max_missing)
        held = absent | sparse
        state = observe_batch(state, moments, held, options)
        batch = self._apex(state, moments, groups, valid) if apex else self._baseline(state, values, groups)
        scores = batch.scores.double()
        if not apex or options.conflict_source == "advantage":
            measured, shared = score_correlation(scores, valid & ~moments.dead[groups.index])
            measured = torch.where(held[:, None] | held, torch.nan, measured)
            noise = 2 / shared.clamp(min=1.0).sqrt()
            state = state.with_conflict(measured, noise, options.conflict_ema, options.conflict_margin)

        shares = hijack_shares(batch.contributions)
        effective = share_weights(batch.weights.abs(), valid).mean(0)
        report = next_report(self._report, shares, effective, batch.weights, state, absent, options.warn_share)
        columns = {
            "priority": batch.weights,
            "effective_weight": effective,
            "hijack_share": shares,
            "advantage_std": ((scores * scores).sum(0) / valid.sum(0).clamp(min=1)).sqrt(),
            "live_groups": live_groups,
            "missing": 1 - valid.double().mean(0),
        }
        if apex:
            state, terms = reprioritize(state, options)
            columns |= terms
        if update:
            self._state, self._report = state, report
            self.normalized = batch.scores.to(rewards.device, torch.float32)
            for text in complaints(self.objectives, self.rule, options, state, report, sparse, absurd.any(0)):
                if text not in self._warned:
                    self._warned.add(text)
                    warnings.warn(text, UserWarning, stacklevel=2)
        pairs = {"conflict": state.conflict.value, "gradient_conflict": report.measured}
        clip = options.advantage_clip if apex else math.inf
        metrics = batch_metrics(self.objectives, batch, columns, pairs, clip)
        return batch.advantages.to(rewards.device, torch.float32), metrics

    def observe_start(self, rewards: Tensor) -> None:
        """Take in rewards of the model before training; progress is then measured from their means.

        Without them it is measured from the mean rewards of the first batch, which are noisy where a batch has few
        prompts. Call it before the first batch. Only "apex" uses it.

        Args:
            rewards (`Tensor` of shape `[P, K]`): of all ranks, made as training makes them, of many prompts (one row each
                says most); NaN or infinite = missing. An objective without any keeps the start that it has.

        Raises:
            ValueError: if the shape does not fit, or a batch was seen already.
        """
        if rewards.ndim != 2 or rewards.shape[1] != len(self.objectives):
            raise ValueError(
                f"`rewards` must have shape [P, {len(self.objectives)}], a column per objective {self.objectives}. Found "
                f"{list(rewards.shape)}. Pass a row of rewards per image."
            )
        if self.iteration:
            raise ValueError(
                f"The start must be observed before the first batch. Found {self.iteration} batches seen. Call "
                "`observe_start` before training, not after a resume: a saved state holds the start."
            )
        values, state = rewards.detach().to("cpu", torch.float64), self._state
        absurd = implausible(values, values.isfinite(), state.slow.value, state.widest, self.options.outlier_limit)
        mean = torch.where(values.isfinite() & ~absurd, values, torch.nan).nanmean(0)
        self._state = replace(state, first_mean=torch.where(mean.isnan(), state.first_mean, mean))

    def observe_conflict(
        self, matrix: Tensor, standard_error: Tensor | None = None, samples: int | None = None
    ) -> None:
        r"""Take in a Gram matrix of the objectives' gradients, or its cosines.

        With the rule "apex" and `conflict_source` "gradient" or "population" it drives the conflict penalty; with "mgda",
        "upgrad", "pcgrad" and "cagrad" it gives the weights; otherwise it is only logged, as `gradient_conflict/{a}/{b}`.

        Args:
            matrix (`Tensor` of shape `[K, K]`): inner products or cosines; NaN = not known, held.
            standard_error (`Tensor` of shape `[K, K]`, *optional*): of the cosines. Twice this counts as noise.
            samples (`int`, *optional*): rows behind the matrix; \(2/\sqrt{n}\) counts as noise.
        """
        size = len(self.objectives)
        if tuple(matrix.shape) != (size, size):
            raise ValueError(
                f"`matrix` must have shape [{size}, {size}], one row per objective {self.objectives}. "
                f"Found {list(matrix.shape)}. Pass the Gram matrix of all objectives, in that order."
            )
        gramian = matrix.detach().to("cpu", torch.float64)
        measured, options, state = cosines(gramian), self.options, self._state
        self._report = replace(self._report, measured=measured)
        if self.rule in GRADIENT_RULES and bool(gramian.isfinite().all()):
            known = state.gradient_weights.update(self._solve(gramian), options.gradient_ema)
            self._state = replace(state, gradient_weights=known)
        elif self.rule == "apex" and options.conflict_source != "advantage":
            decay = 0.0 if options.conflict_source == "population" else options.conflict_ema
            noise = torch.full_like(measured, 2 / samples**0.5 if samples else 0.0)
            if standard_error is not None:
                noise = 2 * standard_error.detach().to("cpu", torch.float64)
            self._state = state.with_conflict(measured, noise, decay, options.conflict_margin)

    @property
    def _weights(self) -> Vector:
        return self._raw_weights / self._raw_weights.abs().sum()

    def _named(self, values: Vector) -> dict[str, float]:
        return dict(zip(self.objectives, values.tolist(), strict=True))

    def _reweighted(self, state: PriorityState) -> PriorityState:
        """The state with the user's current weights, which may have changed since the last batch."""
        old, new = state.weights, self._weights
        if torch.equal(old, new):
            return state
        if self.rule == "apex":
            priorities = reweighted(state.priorities, old, new, self.options.priority_floor)
            return replace(state, weights=new, priorities=priorities)
        unsolved = Average.empty(len(new))  # those from the gradients were solved with the old weights
        return replace(state, weights=new, priorities=new, gradient_weights=unsolved)

    def _current_weights(self, state: PriorityState) -> Vector:
        """Weights of the next batch, summing to one."""
        if self.rule == "apex":
            return state.priorities
        known = state.gradient_weights.value  # NaN for other rules, and before the first Gram matrix
        return known / known.sum() if bool(known.isfinite().all()) else self._weights

    def _solve(self, gramian: Matrix) -> Vector:
        """The weights that the rule gives to the objectives."""
        options = self.options
        return gramian_weights(
            self.rule, gramian, self._weights, options.unit_gradients, options.cagrad_c, self._state.iteration
        )

    def _apex(self, state: PriorityState, moments: GroupMoments, groups: Groups, valid: Valid) -> Aggregated:
        """Stage 1, the weighted sum, and stage 2."""
        options, weights, scores = self.options, state.priorities, moments.centred
        if options.normalize_objectives:
            known = state.scale
            if options.scale_reference == "initial":
                known = torch.where(state.first_scale.isnan(), known, state.first_scale)
            scale = torch.where(known.isnan(), pooled_variance(moments).sqrt().nan_to_num(nan=0.0), known)
            scores = adaptive_normalize(moments, groups, scale, options.scale_blend, options.z_clip)
        shared = share_weights(weights, valid)
        present = shared.sum(1) > 0
        contributions = centre_in_group(shared * scores, present, groups)
        advantages = contributions.sum(1)
        if options.normalize_advantages:
            advantages = batch_normalize(advantages, present, weights, options.norm_floor)
        advantages = advantages.clamp(-options.advantage_clip, options.advantage_clip)
        return Aggregated(scores, contributions, advantages, weights)

    def _baseline(self, state: PriorityState, values: Rows, groups: Groups) -> Aggregated:
        """Any other rule."""
        values, rule = wide_enough(values), TABLE[self.rule]
        extra = {name: getattr(self.options, name) for name in rule.options}
        scores, advantages = rule.function(values, self._raw_weights.to(values.dtype), groups, **extra)
        weights = self._current_weights(state)
        if rule.solver:
            if not bool(state.gradient_weights.value.isfinite().all()):
                # No Gram matrix yet: use the scores', since a batch's gradients are as correlated as its scores.
                weights = self._solve(scores.double().T @ scores.double())
            used = (weights * len(weights)).to(values.dtype)
            advantages = rule.function(values, used, groups, **extra)[1]
        return Aggregated(scores, scores.double() * weights, advantages, weights)


MultiObjectiveRewardAggregator.__doc__ = f"{MultiObjectiveRewardAggregator.__doc__}\n    Options:{option_table()}\n"
