"""The tests' own machinery: what hangs is found and says where, what is merely slow is let be."""

import os
import time

import torch.distributed
from patience import Patience
from processes import attempt


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


def test_ranks_that_wait_for_each_other_are_found():
    outcomes = attempt(wait_for_a_rank_that_never_comes, 2, idle=3.0)
    assert [outcome.exit_code for outcome in outcomes] == [-9, -9]
    for outcome in outcomes:
        assert "no process has computed anything for 3 s" in outcome.error
    assert "in barrier" in outcomes[0].output and "in sleep_forever" in outcomes[1].output


def test_a_rank_that_computes_is_not_taken_for_one_that_hangs():
    (outcome,) = attempt(compute, 1, idle=1.0, seconds=4.0)
    assert not outcome.failed and outcome.result >= 4.0


def test_a_rank_that_computes_for_ever_is_found():
    patience = Patience([os.getpid()], busy=0.0)
    assert patience.verdict() == "hung: a process has computed for more than 0 s"
