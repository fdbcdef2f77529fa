"""docs/scaling.md says what benchmarks/scaling.py computes, and both agree with what `trl-apex plan` prints."""

import re
import sys
from pathlib import Path

import pytest

from trl_apex.cli import main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

PAGE = (ROOT / "docs" / "scaling.md").read_text()
STAGES = {"DDP": "no ZeRO", "ZeRO-1": "ZeRO-1", "ZeRO-2": "ZeRO-2", "ZeRO-3 / FSDP2": "ZeRO-3"}


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=pytest.mark.slow if t == "a sample" else ()) for t in scaling.TABLES]
)
def test_a_table_is_up_to_date(title):
    assert scaling.TABLES[title]() in PAGE


def test_every_table_of_numbers_is_checked():
    made = [table for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M) if table.split("\n")[1].startswith("| ---")]
    assert len(made) == len(scaling.TABLES)


@pytest.mark.slow
def test_the_sums_in_the_text_are_up_to_date():
    text = " ".join(PAGE.split())
    missing = [line for line in scaling.sums() if " ".join(line.split()) not in text]
    assert missing == []


@pytest.mark.slow
def test_the_plan_prints_the_same_states(capsys, tmp_path):
    """The columns "sum" of `trl-apex plan`, which leave out DDP's copies and buckets and the position buffer."""
    (tmp_path / "run.yaml").write_text(
        "model: sd3.5-medium\nheight: 64\nwidth: 64\nnum_generations: 8\ngeneration_batch_size: 64\n"
        f"per_device_train_batch_size: 8\ngradient_accumulation_steps: 9\noutput_dir: {tmp_path}\n"
    )
    main(["plan", "--config", str(tmp_path / "run.yaml"), "--gpus", "8", "--lora_r", str(scaling.LORA_RANK)])
    printed = capsys.readouterr().out
    buffer = 2 * scaling.shapes("SD3.5-M").buffer
    for label, lora in (("LoRA", True), ("full", False)):
        for engine, stage in STAGES.items():
            line = re.search(rf"^{label}, {stage} (.*)$", printed, re.M)[1].split()
            held = (scaling.held_bytes("SD3.5-M", lora, engine, 8) - buffer) / 1e9
            if engine == "DDP":
                trained = scaling.elements("SD3.5-M", lora).trained
                held -= (4 * trained if lora else 6 * trained + buffer) / 1e9
            assert float(line[3]) == pytest.approx(held, abs=0.006), (label, engine)
    denoiser = float(re.search(r"denoiser +([\d,.]+) M", printed)[1].replace(",", ""))
    assert f"| SD3.5-M | {denoiser:,.1f} M |" in PAGE


def test_one_gpu_needs_the_same_under_every_stage_of_zero():
    for name in scaling.MODELS:
        for lora in (True, False):
            held = [scaling.held_bytes(name, lora, engine, 1) for engine in list(scaling.ENGINES)[1:]]
            assert max(held) - min(held) < 1.0
            assert scaling.update_traffic(name, lora, "DDP", 1) == 0.0
