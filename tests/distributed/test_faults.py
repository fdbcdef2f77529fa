"""What breaks on one rank ends, or spares, the run on all of them."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
from engines import ENGINES, environment
from faults import (
    evaluate_out_of_memory,
    save_until_killed,
    stop_on_one_rank,
    train_until_killed,
    train_with_a_broken_reward,
    train_with_unequal_aggregators,
    train_with_uneven_logs,
)
from processes import attempt, run
from training import train

from trl_apex.trainers.manifest import PARTIAL, checkpoints, defects, last_valid

EVALUATION = {"eval_on_start": True, "eval_prompts": ["red"] * 6, "per_device_eval_batch_size": 1}


@pytest.mark.parametrize(
    ("engine", "options", "saved"),
    [
        ("ddp", {}, "checkpoint-1"),
        ("ddp", {"baseline_prompts": 4, "rollout_batch_size": 1}, None),
        pytest.param("zero3", EVALUATION, None, marks=pytest.mark.distributed),
    ],
    ids=["in the second iteration", "before training", "in an evaluation"],
)
def test_a_bug_in_a_reward_on_one_rank_ends_all_ranks(tmp_path, engine, options, saved):
    options = {"output_dir": str(tmp_path), "how": "wrong", **options}
    outcomes = attempt(train_with_a_broken_reward, 2, environment(engine), **options)
    assert "must return one number or None per sample" in outcomes[1].error
    assert "Rank 1 failed with ValueError: The reward `breaks` must return one number" in outcomes[0].error
    valid = last_valid(tmp_path)
    assert (valid and valid.name) == saved


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_rank_without_memory_in_an_evaluation_ends_all_ranks(tmp_path, engine):
    options = {"output_dir": str(tmp_path), "per_device_eval_batch_size": 1, "baseline_prompts": 0}
    outcomes = attempt(evaluate_out_of_memory, 2, environment(engine), **options)
    assert "OutOfMemoryError: out of memory" in outcomes[1].error
    assert "Every process must finish the images of an evaluation. Rank 1 failed with" in outcomes[0].error


@pytest.mark.distributed
def test_a_reward_that_fails_on_one_rank_costs_its_scores_alone(tmp_path):
    options = {"output_dir": str(tmp_path), "how": "raise", "max_reward_failure_rate": 0.6}
    runs = run(train_with_a_broken_reward, 2, environment("ddp"), **options)
    assert runs[0] == runs[1] == {"failures": [0.0, 4.0, 0.0, 0.0], "step": 4}


@pytest.mark.distributed
def test_too_many_failures_on_one_rank_stop_all_ranks_with_a_checkpoint(tmp_path):
    options = {"output_dir": str(tmp_path), "how": "raise", "max_reward_failure_rate": 0.4}
    outcomes = attempt(train_with_a_broken_reward, 2, environment("ddp"), **options)
    for outcome in outcomes:
        assert "reward 'breaks' failed for 4 of 8 images" in outcome.error
    assert last_valid(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"event": "on_step_begin", "step": 1}, 2),
        pytest.param({"event": "on_step_end", "step": 3}, 3, marks=pytest.mark.distributed),
        pytest.param({"event": "on_step_begin", "step": 1, "interrupted": True}, 2, marks=pytest.mark.distributed),
    ],
    ids=["in an iteration", "after the last", "with a signal on the other"],
)
def test_a_stop_that_one_rank_asks_for_is_of_all_ranks(options, at, tmp_path):
    asked, other = reversed(attempt(stop_on_one_rank, 2, environment("ddp"), output_dir=str(tmp_path), **options))
    stopped = f"Training was stopped at step {at}, with a checkpoint saved: "
    assert stopped + "seen enough" in asked.error
    assert stopped + ("interrupted" if "interrupted" in options else "another process asked for it") in other.error
    assert last_valid(tmp_path).name == f"checkpoint-{at}"


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_rank_ends_the_others(engine, tmp_path):
    outcomes = attempt(train_with_a_broken_reward, 2, environment(engine), output_dir=str(tmp_path), how="die")
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert "Found that another one is gone (at step 1, on rank 0" in outcomes[0].error
    assert f"resume from {tmp_path}/checkpoint-1, the last valid checkpoint" in outcomes[0].error
    options = {"output_dir": str(tmp_path), "how": "never", "resume": True, "max_steps": 2}
    assert run(train_with_a_broken_reward, 2, environment(engine), **options)[0]["step"] == 2


@pytest.mark.distributed
def test_a_reward_may_log_on_one_rank_only(tmp_path):
    assert run(train_with_uneven_logs, 2, environment("ddp"), output_dir=str(tmp_path)) == [[3.0, 3.0]] * 2


@pytest.mark.distributed
def test_unequal_aggregators_are_an_error_that_names_the_rank(tmp_path):
    outcomes = attempt(train_with_unequal_aggregators, 2, environment("ddp"), output_dir=str(tmp_path))
    for outcome in outcomes:
        assert "The state of the aggregator must be equal on all ranks. Found other values on rank 1" in outcome.error
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-1"]


@contextlib.contextmanager
def _killing(folder: Path, sign: str, seconds: float):
    """Kill what writes into `folder`, `seconds` after the file or folder `sign` is there."""
    over = threading.Event()

    def kill():
        while not (folder / sign).exists():
            if over.wait(0.005):
                return
        if not over.wait(seconds):
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("moments", [5, pytest.param(20, marks=pytest.mark.distributed)])
def test_a_save_that_is_killed_leaves_whole_checkpoints_only(moments, tmp_path):
    cut_short = 0
    for moment in range(moments):
        folder = tmp_path / str(moment)
        folder.mkdir()
        with _killing(folder, "checkpoint-1", 0.6 * ((moment * 0.618) % 1)):
            (outcome,) = attempt(save_until_killed, 1, output_dir=str(folder), seed=moment)
        assert outcome.exit_code == -signal.SIGKILL
        found = checkpoints(folder)
        assert found and all(defects(checkpoint) == [] for checkpoint in found)
        assert last_valid(folder) == found[0]
        cut_short += any((folder / PARTIAL).glob("checkpoint-*"))
    assert cut_short


@pytest.mark.distributed
@pytest.mark.parametrize("seconds", [0.1, 0.7, 1.5])
def test_a_killed_run_resumes_from_its_last_valid_checkpoint(seconds, tmp_path):
    with _killing(tmp_path, "checkpoint-2", seconds):
        attempt(train_until_killed, 1, environment("ddp", 1), output_dir=str(tmp_path))
    found = checkpoints(tmp_path)
    assert found and all(defects(checkpoint) == [] for checkpoint in found)
    weights = found[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # as a full disk would leave it
    step = int(found[1].name.split("-")[1])
    result = run(train, 1, environment("ddp", 1), output_dir=str(tmp_path), resume=True, max_steps=step + 1)[0]
    assert result["resumed_from"] == str(found[1]) and result["step"] == step + 1
