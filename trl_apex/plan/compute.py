"""Passes through the denoiser in one iteration, on one GPU."""

from dataclasses import dataclass

from .settings import PlanSettings


@dataclass(frozen=True)
class Compute:
    """Numbers of calls, and of rows (images of one call) over all calls; a second branch of guidance doubles the rows.

    Args:
        rollout_calls, rollout_rows (`int`, `float`): without gradients; rows are a mean over windows where these differ.
        rows_saved_by_sharing (`float`): what `share_initial_noise` spares the rollout.
        update_calls, update_rows (`int`): forward passes with gradients.
        reference_calls, reference_rows (`int`): of the KL term, without gradients.
        backward_calls, backward_rows (`int`): backward passes.
        recomputed_rows (`int`): rows forwarded again by gradient checkpointing.
        updates (`int`): optimizer steps.
    """

    rollout_calls: int
    rollout_rows: float
    rows_saved_by_sharing: float
    update_calls: int
    update_rows: int
    reference_calls: int
    reference_rows: int
    backward_calls: int
    backward_rows: int
    recomputed_rows: int
    updates: int

    @property
    def forward_rows(self) -> float:
        """All forward passes of one image."""
        return self.rollout_rows + self.update_rows + self.reference_rows + self.recomputed_rows


def count_passes(settings: PlanSettings, batched_guidance: bool) -> Compute:
    """Count what one iteration of [`DiffusionGRPOTrainer`] calls.

    Args:
        settings ([`PlanSettings`]): the run.
        batched_guidance (`bool`): whether guidance takes a second branch in this family.

    Example:
        ```python
        >>> settings = PlanSettings(512, 512, samples=8, rollout_batch=8, steps=10, windows=(range(2, 5),), micro_batch=4)
        >>> passes = count_passes(settings, batched_guidance=True)
        >>> passes.rollout_calls, passes.rollout_rows, passes.update_calls, passes.update_rows, passes.updates
        (10, 80.0, 6, 24, 6)

        ```
    """
    branches = 2 if batched_guidance and settings.guidance != 1.0 else 1
    chunk, here = settings.rollout_batch, settings.samples_here
    sizes = [min(chunk, here - start) for start in range(0, here, chunk)]
    plain = here * settings.steps * branches
    saved = 0.0
    if settings.share_noise:
        for start, size in zip(range(0, here, chunk), sizes, strict=True):
            groups = len({sample // settings.group for sample in range(start, start + size)})
            before = sum(window.start for window in settings.windows) / len(settings.windows)
            saved += before * (size - groups) * branches
    rows = here * len(settings.windows[0]) * settings.passes
    calls = rows // settings.rows_per_forward
    update_rows = rows * branches
    return Compute(
        rollout_calls=len(sizes) * settings.steps,
        rollout_rows=plain - saved,
        rows_saved_by_sharing=saved,
        update_calls=calls,
        update_rows=update_rows,
        reference_calls=calls if settings.kl else 0,
        reference_rows=update_rows if settings.kl else 0,
        backward_calls=calls,
        backward_rows=update_rows,
        recomputed_rows=update_rows if settings.checkpointing else 0,
        updates=calls // settings.accumulation,
    )
