"""The language model's trainer on two processes: one state, and each rank's own slice of the advantages."""

import json

import pytest
from engines import environment
from language import train_language_model
from processes import run


def test_each_rank_trains_on_its_slice_and_both_hold_one_state(tmp_path):
    first, second = run(train_language_model, 2, environment("ddp"), output_dir=str(tmp_path))
    assert first["world"] == second["world"] == 2
    assert first["state"] == second["state"] and first["rewards"] == second["rewards"]
    for step, advantages in enumerate(first["advantages"]):
        assert len(advantages) == 8
        assert first["used"][step] == pytest.approx(advantages[:4])
        assert second["used"][step] == pytest.approx(advantages[4:])
    saved = json.loads((tmp_path / "checkpoint-2/aggregator_state.json").read_text())
    assert saved["iteration"] == 2


@pytest.mark.distributed
def test_two_processes_resume_where_they_were(tmp_path):
    whole = run(train_language_model, 2, environment("ddp"), output_dir=str(tmp_path))
    resumed = run(
        train_language_model, 2, environment("ddp"), output_dir=str(tmp_path), resume=str(tmp_path / "checkpoint-2")
    )
    for before, after in zip(whole, resumed, strict=True):
        assert after["state"]["iteration"] == 3
        assert after["rewards"] == before["rewards"][2:]
        assert after["state"] == before["state"]
