"""The GPU check at toy size on the CPU: the same code path, each part recorded, and a part that fails or hangs too."""

import json
import sys

import pytest
import torch

from tools import gpu_check

CPU = torch.device("cpu")


def records_of(part: str) -> list[dict]:
    found: list[dict] = []
    gpu_check.PARTS[part](gpu_check.SMOKE, CPU, found.append)
    return json.loads(json.dumps(found))


def test_the_real_size_is_that_of_stable_diffusion_3_5_medium():
    meta = torch.device("meta")
    with meta:
        model = gpu_check.random_transformer(gpu_check.MEDIUM, meta, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.24e9, rel=0.01)
    assert model.dtype == torch.bfloat16


def test_lora_is_measured_beside_the_plain_loop_and_a_failure_does_not_stop_the_rest(monkeypatch):
    settings = {"wrong": {"noise_level": -1.0}, "probe": {"gradient_probe": True, "probe_every": 1}}
    monkeypatch.setattr(gpu_check, "SETTINGS", settings)
    _, plain, wrong, probe = records_of("sd35")
    assert wrong["what"] == "wrong" and "noise_level" in wrong["error"]
    for record in (plain, probe):
        assert "error" not in record, record
        assert 0 < record["decode_s"] < record["rollout_s"] and record["update_s"] > 0
    assert probe["ratio_deviation_of_first_update"] < 1e-4
    assert probe["planned_update_gb"] > 0


def test_full_fine_tuning_takes_the_first_model_that_fits():
    (record,) = records_of("full")
    assert record["update_s"] > 0 and "error" not in record


@pytest.mark.parametrize(
    ("end", "said"), [("raise SystemExit(3)", "exit code 3"), ("time.sleep(60)", "longer than its")]
)
def test_a_part_that_crashes_or_hangs_keeps_what_it_measured(tmp_path, end, said):
    lines = tmp_path / "lines.jsonl"
    script = f'import time\nopen({str(lines)!r}, \'w\').write(\'{{"what": "first", "rollout_s": 2.5}}\\n\')\n{end}'
    records = gpu_check.run_part("sd35", [sys.executable, "-c", script], lines, limit=3)
    assert records[0] == {"part": "sd35", "what": "first", "rollout_s": 2.5}
    assert said in records[1]["error"]
    table = gpu_check.markdown({"device": "none", "torch": "2", "seconds": 1.0}, records)
    assert "| first | 2.5 |" in table and said in table


def test_the_tables_are_written(tmp_path):
    records = [{"part": "tests", "what": "pytest -m gpu", "tests": 40, "s": 12.5}]
    gpu_check.write_results(tmp_path / "gpu_check.json", gpu_check.describe_machine(CPU, 3.0), records)
    assert json.loads((tmp_path / "gpu_check.json").read_text())["records"] == records
    assert "| pytest -m gpu | 40 | 12.5 |" in (tmp_path / "gpu_check.md").read_text()


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 2
    assert "--smoke" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command_at_toy_size(tmp_path):
    assert gpu_check.main(["--smoke", "--out", str(tmp_path), "--parts", "tests", "demo"]) == 0
    records = json.loads((tmp_path / "gpu_check.json").read_text())["records"]
    assert {record["part"] for record in records} == {"tests", "demo"}
