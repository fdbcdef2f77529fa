"""What in the logs a reader should not overlook."""

from .run import Run


def findings(run: Run) -> list[str]:
    """Sentences about trouble in a run: its own warnings first, then what the logged numbers show.

    Args:
        run ([`Run`]): the run.

    Returns:
        `list[str]`: empty if nothing stands out.
    """
    found = list(dict.fromkeys(run.warnings))
    for name in run.objectives:
        failures = sum(run.series(f"reward_failures/{name}")[1])
        if failures:
            found.append(f"The reward {name} failed for {failures:.0f} images; they count as missing, not as bad.")
        values = run.series(f"live_groups/{name}")[1]
        if values and sum(v == 0 for v in values) > len(values) / 2:
            found.append(
                f"The reward {name} scored the images of every group alike in most iterations: it taught little."
            )
    for key, text in (
        ("skipped_updates/nonfinite", "updates had non-finite gradients and were skipped"),
        ("skipped_updates/dead", "updates had only zero advantages and were skipped"),
    ):
        count = sum(run.series(key)[1])
        if count:
            found.append(f"{count:.0f} {text}.")
    return found
