"""From a matrix of rewards to one advantage per sample."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import rules
from .checks import checked_batch, checked_options, checked_weights
from .conflict import cosines, score_correlation
from .diagnostics import (
    Aggregated,
    batch_metrics,
    complaints,
    hijack_shares,
    intended_shares,
    pair_metrics,
    streaks,
)
from .normalize import (
    GroupMoments,
    Groups,
    adaptive_normalize,
    batch_normalize,
    centre_in_group,
    group_moments,
    group_rows,
    pooled_variance,
    share_weights,
)
from .options import GRADIENT_RULES, RULES
from .outliers import implausible
from .schedule import observe_batch, presence, reprioritize
from .state import AggregatorState
from .surgery import gramian_weights


class MultiObjectiveRewardAggregator:
    r"""Turns several rewards per sample into one advantage per sample, by APEX or by a baseline rule.

    It needs no trainer and gathers nothing itself: give it the rewards of all ranks, on every rank, and all ranks hold
    the same state. The arithmetic runs in float64 on the CPU, so that it is the same on every device.

    Args:
        objectives (`list[str]`): a name for each column of the rewards.
        weights (`list[float]`, *optional*): the user's fixed weights; equal if not given. "apex" and "mgda" to
            "cagrad" use them divided by their sum; the rules that TRL has use them as they are, 1 by default, as TRL
            does. A weight of 0 means: watch, but do not train on it.
        rule (`str`): "apex", "sum_then_normalize", "normalize_then_sum", "weighted_advantages", "dvao", "mgda",
            "upgrad", "pcgrad" or "cagrad".
        **options: the fields of [`ApexOptions`].

    Raises:
        ValueError: for unknown rules and options, or weights that do not fit.

    Example:
        >>> aggregator = MultiObjectiveRewardAggregator(["ocr", "pickscore"])
        >>> rewards = torch.tensor([[0.0, 21.0], [1.0, 21.5], [0.5, 22.0], [0.5, 20.0]])
        >>> advantages, metrics = aggregator(rewards, torch.tensor([0, 0, 1, 1]))
        >>> [round(value, 2) for value in advantages.tolist()]
        [-1.18, 1.18, 0.79, -0.79]
        >>> aggregator.priorities
        {'ocr': 0.5, 'pickscore': 0.5}

    Note:
        Every equation of "apex" is reconstructed from the abstract of arXiv 2601.06574.
    """

    def __init__(
        self,
        objectives: list[str],
        weights: list[float] | None = None,
        rule: str = "apex",
        **options: Any,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"`rule` must be one of {', '.join(RULES)}. Found {rule!r}. Pass one of these.")
        if not objectives or len(set(objectives)) != len(objectives):
            raise ValueError(
                f"`objectives` must be distinct names, at least one. Found {objectives}. Rename the repeated rewards."
            )
        self.objectives = list(objectives)
        self.rule = rule
        self.options = checked_options(self.objectives, options)
        self._raw_weights = checked_weights(self.objectives, weights, rule)
        self._weights = self._raw_weights / self._raw_weights.abs().sum()
        self._state = AggregatorState.initial(self._weights, self.options.conflict_margin)
        self._scores: Tensor | None = None
        self._effective = self._weights
        self._measured: Tensor | None = None
        self._warned: set[str] = set()

    # What it knows

    @property
    def priorities(self) -> dict[str, float]:
        """The weight of each objective in the next batch, summing to one."""
        return dict(zip(self.objectives, self._current_weights().tolist(), strict=True))

    @property
    def effective_weights(self) -> dict[str, float]:
        """The mean weight of each objective over the rows of the last batch, the weights of the missing shared out."""
        return dict(zip(self.objectives, self._effective.tolist(), strict=True))

    @property
    def normalized(self) -> Float[Tensor, "B K"] | None:
        """What the last batch's advantages were summed from, per objective: what the gradient probe needs."""
        return self._scores

    @property
    def iteration(self) -> int:
        """Batches seen."""
        return self._state.iteration

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, lists and strings, exact through JSON."""
        return {"objectives": list(self.objectives), "rule": self.rule, **self._state.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: if it was saved for other objectives, another order of them, or another rule.
        """
        if list(state["objectives"]) != self.objectives:
            raise ValueError(
                f"The saved state must be for the objectives {self.objectives}, in that order. "
                f"Found {list(state['objectives'])}. Pass the rewards in the saved order, or start without the state."
            )
        if state["rule"] != self.rule:
            raise ValueError(
                f"The saved state must be for the rule {self.rule!r}. Found {state['rule']!r}. "
                "Resume with the saved rule, or start without the state."
            )
        missing = sorted(self._state.to_dict().keys() - state.keys())
        if missing:
            raise ValueError(
                f"The saved state must hold every field of {type(self._state).__name__}. Found none of "
                f"{', '.join(missing)}. It was cut, or saved by another version: start without the state."
            )
        self._state = self._state.loaded(state)

    # What happens

    def __call__(
        self,
        rewards: Tensor,
        group_ids: Tensor,
        mask: Tensor | None = None,
        update: bool = True,
    ) -> tuple[Float[Tensor, " B"], dict[str, float]]:
        """Aggregate one batch.

        Args:
            rewards (`Tensor` of shape `[B, K]`): of all ranks, larger is better; NaN or infinite = missing.
            group_ids (`Tensor` of shape `[B]`): rows with the same id were made from the same prompt.
            mask (`Tensor` of shape `[B, K]`, *optional*): false = missing.
            update (`bool`): whether to remember the batch; pass `False` for evaluation.

        Returns:
            `tuple` of the advantages, float32 of shape `[B]` on the rewards' device, and a flat dictionary of metrics.
            Where `metrics["all_dead"]` is 1, all advantages are 0 and the optimizer step is best skipped.

        Raises:
            ValueError: if the shapes do not fit.
        """
        values, valid = checked_batch(self.objectives, rewards, group_ids, mask)
        apex, absurd = self.rule == "apex", torch.zeros_like(valid)
        if apex:
            absurd = implausible(values.double(), valid, self._state, self.options.outlier_limit)
            valid = valid & ~absurd
            values = torch.where(valid, values, torch.nan)
        groups = group_rows(group_ids.cpu())
        moments = group_moments(values.double(), valid, groups, self.options.dead_tolerance)
        present = presence(moments, groups.sizes.double(), self.options.max_missing)
        state = observe_batch(self._state, moments, present.held, self.options)
        batch = self._apex(state, moments, groups, valid, state.priorities) if apex else self._baseline(values, groups)
        state = self._observe_correlation(state, batch.scores, valid & ~moments.dead[groups.index], present.held)
        shares = hijack_shares(batch.contributions)
        state = self._count_streaks(state, batch, shares, present.absent)
        state, terms = reprioritize(state, self._weights, self.options) if apex else (state, None)
        effective = share_weights(batch.weights.abs(), valid).mean(0)
        if update:
            self._state, self._effective = state, effective
            self._scores = batch.scores.to(rewards.device, torch.float32)
            for text in complaints(self.objectives, self.options, state, present.sparse, absurd.any(0)):
                if text not in self._warned:
                    self._warned.add(text)
                    warnings.warn(text, UserWarning, stacklevel=2)
        metrics = batch_metrics(self.objectives, self.options, state, batch, shares, effective, valid, terms)
        if self._measured is not None:
            metrics |= pair_metrics("gradient_conflict", self.objectives, self._measured)
        return batch.advantages.to(rewards.device, torch.float32), metrics

    def observe_conflict(
        self,
        matrix: Tensor,
        standard_error: Tensor | None = None,
        samples: int | None = None,
    ) -> None:
        r"""Take in a Gram matrix of the objectives' gradients, or its cosines.

        With `conflict_source` "gradient" or "population" it drives the conflict penalty; with "mgda", "upgrad",
        "pcgrad" and "cagrad" it gives the weights; otherwise it is only logged, as `gradient_conflict/{a}/{b}`.

        Args:
            matrix (`Tensor` of shape `[K, K]`): inner products or cosines; NaN = not known, held.
            standard_error (`Tensor` of shape `[K, K]`, *optional*): of the cosines. Twice this counts as noise.
            samples (`int`, *optional*): rows behind the matrix; \(2/\sqrt{n}\) counts as noise.

        Raises:
            ValueError: if the shape does not fit.
        """
        size = len(self.objectives)
        if tuple(matrix.shape) != (size, size):
            raise ValueError(
                f"`matrix` must have shape [{size}, {size}], one row per objective {self.objectives}. "
                f"Found {list(matrix.shape)}. Pass the Gram matrix of all objectives, in that order."
            )
        gramian = matrix.detach().to("cpu", torch.float64)
        measured = cosines(gramian) if bool((gramian.diagonal() > 0).any()) else torch.full_like(gramian, torch.nan)
        self._measured = measured
        options, state = self.options, self._state
        if self.rule in GRADIENT_RULES:
            if bool(gramian.isfinite().all()):
                weights = self._solve(gramian)
                self._state = replace(
                    state, gradient_weights=state.gradient_weights.update(weights, options.gradient_ema)
                )
        elif options.conflict_source != "advantage":
            decay = 0.0 if options.conflict_source == "population" else options.conflict_ema
            noise = torch.zeros_like(measured)
            if standard_error is not None:
                noise = 2 * standard_error.detach().to("cpu", torch.float64)
            elif samples is not None:
                noise = torch.full_like(measured, 2 / samples**0.5)
            margin = torch.nan_to_num(noise, nan=1.0).clamp(options.conflict_margin, 0.99)
            self._state = replace(
                state,
                conflict=state.conflict.update(measured, decay),
                margin=torch.where(measured.isnan(), state.margin, margin),
            )

    # The steps of one batch

    def _current_weights(self) -> Float[Tensor, " K"]:
        if self.rule == "apex":
            return self._state.priorities
        if self.rule in GRADIENT_RULES and self._gradient_known:
            return self._state.gradient_weights.value / self._state.gradient_weights.value.sum()
        return self._weights

    @property
    def _gradient_known(self) -> bool:
        return bool(self._state.gradient_weights.value.isfinite().all())

    def _solve(self, gramian: Float[Tensor, "K K"]) -> Float[Tensor, " K"]:
        options = self.options
        return gramian_weights(
            self.rule, gramian, self._weights, options.unit_gradients, options.cagrad_c, self._state.iteration
        )

    def _apex(
        self,
        state: AggregatorState,
        moments: GroupMoments,
        groups: Groups,
        valid: Bool[Tensor, "B K"],
        weights: Float[Tensor, " K"],
    ) -> Aggregated:
        options = self.options
        scores = moments.centred
        if options.normalize_objectives:
            scale = torch.where(state.scale.isnan(), pooled_variance(moments).sqrt().nan_to_num(nan=0.0), state.scale)
            scores = adaptive_normalize(moments, groups, scale, options.scale_blend, options.z_clip)
        shared = share_weights(weights, valid)
        present = shared.sum(1) > 0
        contributions = centre_in_group(shared * scores, present, groups)
        advantages = contributions.sum(1)
        if options.normalize_advantages:
            advantages = batch_normalize(advantages, present, weights, options.norm_floor)
        advantages = advantages.clamp(-options.advantage_clip, options.advantage_clip)
        return Aggregated(scores, contributions, advantages, weights)

    def _baseline(self, values: Float[Tensor, "B K"], groups: Groups) -> Aggregated:
        values = rules.wide_enough(values)
        options, raw = self.options, self._raw_weights.to(values.dtype)
        if self.rule == "sum_then_normalize":
            scores, advantages = rules.sum_then_normalize(
                values, raw, groups, options.scale_rewards, options.std_epsilon
            )
        elif self.rule == "weighted_advantages":
            scores, advantages = rules.weighted_advantages(
                values, raw, groups, options.scale_rewards, options.std_epsilon
            )
        elif self.rule == "dvao":
            scores, advantages = rules.dvao(values, raw, groups, options.std_epsilon)
        else:
            scores, advantages = rules.normalize_then_sum(values, raw, groups, options.std_epsilon)
        weights = self._weights
        if self.rule in GRADIENT_RULES:
            # Before a Gram matrix is measured, that of the scores stands in: a batch's gradients are as correlated as
            # its scores.
            wide = scores.double()
            weights = self._current_weights() if self._gradient_known else self._solve(wide.T @ wide)
            used = (weights * len(weights)).to(values.dtype)
            advantages = rules.normalize_then_sum(values, used, groups, options.std_epsilon)[1]
        contributions = scores.double() * weights
        return Aggregated(scores, contributions, advantages, weights)

    def _observe_correlation(
        self,
        state: AggregatorState,
        scores: Float[Tensor, "B K"],
        live: Bool[Tensor, "B K"],
        held: Bool[Tensor, " K"],
    ) -> AggregatorState:
        if self.rule == "apex" and self.options.conflict_source != "advantage":
            return state
        correlation, shared = score_correlation(scores.double(), live)
        known = correlation.isfinite() & ~(held[:, None] | held[None, :])
        margin = (2 / shared.clamp(min=1.0).sqrt()).clamp(self.options.conflict_margin, 0.99)
        return replace(
            state,
            conflict=state.conflict.update(torch.where(known, correlation, torch.nan), self.options.conflict_ema),
            margin=torch.where(known, margin, state.margin),
        )

    def _count_streaks(
        self, state: AggregatorState, batch: Aggregated, shares: Float[Tensor, " K"], absent: Bool[Tensor, " K"]
    ) -> AggregatorState:
        intended = intended_shares(batch.weights)
        owned = (shares > self.options.warn_share) & (intended <= self.options.warn_share)
        silent = torch.where(absent, state.silent, streaks(state.silent, state.dead_fraction == 1))
        return replace(state, owned=streaks(state.owned, owned), silent=silent)
