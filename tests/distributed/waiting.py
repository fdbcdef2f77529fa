"""Ranks that hang, and one that is only slow."""

import time

import torch.distributed


def sleep_forever() -> None:
    time.sleep(1e6)


def wait_for_a_rank_that_never_comes(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    if rank == 0:
        torch.distributed.barrier()
    sleep_forever()


def compute(rank: int, seconds: float) -> float:
    """Compute for so many seconds of wall time."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        sum(range(10_000))
    return time.monotonic() - started
