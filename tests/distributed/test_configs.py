"""The shipped configurations, as accelerate's own launcher reads them."""

import json
import os
import sys
from pathlib import Path

import pytest
from compare import assert_same_training, curve
from diffusers import SD3Transformer2DModel
from engines import CONFIGS, ENGINES, STAGE, environment, parse
from processes import launch, run
from training import train

from trl_apex.trainers.manifest import last_valid

HERE = Path(__file__).parent
EXAMPLES = CONFIGS.parent
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_every_promised_configuration_is_there():
    assert set(NAMES) == {
        "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2",
        "two_node_ddp", "two_node_zero2", "two_node_fsdp2",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_a_configuration(name):
    args, env = parse(name)
    assert args.mixed_precision == "bf16" and env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert args.num_processes == {"single": 1}.get(name, 16 if name.startswith("two_node") else 8)
    assert args.num_machines == (2 if name.startswith("two_node") else 1)
    assert args.use_deepspeed == ("zero" in name) == (env.get("ACCELERATE_USE_DEEPSPEED") == "true")
    assert args.use_fsdp == ("fsdp" in name) == (env.get("ACCELERATE_USE_FSDP") == "true")
    if "zero" in name:
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name.split("zero")[1][0]
        assert env["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
        device = "cpu" if "offload" in name else "none"
        assert env["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == device
        assert env["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == device
        if "zero3" in name:  # save_model would write nothing
            assert env["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    if "fsdp" in name:
        assert env["FSDP_VERSION"] == "2" and env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in env, "the blocks that the model itself names"


@pytest.mark.distributed
def test_the_configuration_for_one_process_trains(tmp_path, ddp):
    result = run(train, 1, environment("single", 1), output_dir=str(tmp_path))[0]
    assert result["world"] == 1
    assert_same_training(result, ddp[0], tolerance=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["two_node_ddp", "two_node_zero2", "two_node_fsdp2", "zero1", "zero3", "zero3_offload"]
)
def test_two_nodes_train_with_a_process_on_each(name, tmp_path, ddp):
    """As the ranks see it: each is the first of its node. Where no template is shipped, with the one-node file."""
    env = environment(name) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    result = run(train, 2, env, output_dir=str(tmp_path))[0]
    engine = name.removeprefix("two_node_")
    assert result["world"] == 2 and result["engine"] == STAGE.get(engine, engine)
    assert_same_training(result, ddp[0], tolerance=1e-5)


def _launch(name: str, script: Path, *arguments: str):
    """`accelerate launch`, as a user types it, with what makes an engine start on a CPU."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ENGINE": name}
    if name == "ddp":
        env["ACCELERATE_USE_CPU"] = "true"
    if name == "fsdp2":
        env["ACCELERATE_TORCH_DEVICE"] = "cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    return launch([*command, "--num_processes", "2", "--main_process_port", "0", str(script), *arguments], env)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_accelerate_launch_trains(name, tmp_path):
    done = _launch(name, HERE / "launched.py", str(tmp_path), "never")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "rank0.json").read_text())
    assert (result["world"], result["engine"], result["step"]) == (2, name, 2)
    assert curve(result, "ratio/max_deviation")[0] < 1e-6


@pytest.mark.distributed
def test_accelerate_launch_ends_when_a_rank_is_killed(tmp_path):
    done = _launch("ddp", HERE / "launched.py", str(tmp_path), "die")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "exitcode:-9" in done.stderr.replace(" ", "")
    assert last_valid(tmp_path).name == "checkpoint-1"


@pytest.mark.distributed
@pytest.mark.parametrize("name", ENGINES)
def test_the_documented_command_trains_all_weights(name, tmp_path):
    """`accelerate launch --config_file {name}.yaml examples/train_sd35_full.py`, at toy size, through each shipped file."""
    config = ["--config", str(EXAMPLES / "configs" / "sd35_full_tiny.yaml"), "--per_device_train_batch_size", "4"]
    cpu = [
        "--use_cpu",
        str(name == "ddp").lower(),
        "--ddp_backend",
        "gloo",
        "--bf16",
        "false",
        "--disable_tqdm",
        "true",
    ]
    script = [HERE / "launched.py", str(EXAMPLES / "train_sd35_full.py")]
    done = _launch(name, *script, *config, *cpu, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2 and first["step"] == second["step"] == 2
    assert first["engine"] == second["engine"] == STAGE.get(name, name)
    assert curve(first, "ratio/max_deviation")[0] < 1e-6  # rollout and update use batches of different sizes
    weights = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(bool(value.isfinite().all()) for value in weights.values())
