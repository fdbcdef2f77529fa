"""What an engine saves is whole, resumes to the same weights, and is what a plain pipeline loads."""

import numpy as np
import pytest
from compare import assert_same_state, assert_same_training, largest_difference, movement
from diffusers import SD3Transformer2DModel
from engines import ENGINES, OTHERS, STAGE, environment
from processes import RankFailed, attempt, run
from safetensors.numpy import load_file
from tiny_runs import tiny_pipeline
from training import train

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_saving_and_resuming(engine, lora, reference, tmp_path):
    """Four steps at a stretch, and two steps twice: the same weights, in a form that a plain pipeline loads."""
    folder, saved = str(tmp_path / "run"), str(tmp_path / "saved")
    options = {"lora": lora, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(train, 2, environment(engine), output_dir=folder, save=saved, **options)[0]
    assert whole["engine"] == STAGE.get(engine, engine)
    assert_same_training(whole, reference(lora=lora, max_steps=4)[0], tolerance=2e-5)
    assert not any(file.startswith(".partial") for file in whole["files"])
    _assert_a_plain_pipeline_loads(saved, whole["weights"], lora)

    resumed = run(train, 2, environment(engine), output_dir=folder, resume=f"{folder}/checkpoint-2", **options)[0]
    assert resumed["resumed_from"] == f"{folder}/checkpoint-2" and resumed["step"] == 4
    assert largest_difference(resumed["weights"], whole["weights"]) < 1e-7
    for mine, theirs in zip(resumed["iterations"], whole["iterations"][2:], strict=True):
        np.testing.assert_allclose(mine["rewards"], theirs["rewards"], atol=1e-6)
        assert mine["priorities"] == pytest.approx(theirs["priorities"], abs=1e-6)
    assert_same_state(resumed["aggregator"], whole["aggregator"])


def _assert_a_plain_pipeline_loads(folder, weights, lora):
    pipeline = tiny_pipeline()
    if lora:
        pipeline.load_lora_weights(folder)
        (config,) = pipeline.transformer.peft_config.values()
        assert (config.r, config.lora_alpha) == (4, 8)
        loaded = {n: p.detach().numpy() for n, p in pipeline.transformer.named_parameters() if "lora_" in n}
    else:
        transformer = SD3Transformer2DModel.from_pretrained(f"{folder}/transformer")
        loaded = {n: p.detach().numpy() for n, p in transformer.named_parameters()}
    trained = {n.removeprefix("base_model.model.").replace("default_0", "default"): w for n, w in weights.items()}
    loaded = {n.replace("default_0", "default"): w for n, w in loaded.items()}
    assert largest_difference(loaded, trained) == 0.0
    assert len(loaded) > 20


def test_fsdp_with_a_sharded_state_dict_saves_whole_weights_too(tmp_path):
    env = environment("fsdp2") | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    result = run(train, 2, env, output_dir=str(tmp_path), save=str(tmp_path / "saved"))[0]
    assert result["engine"] == "fsdp2"
    _assert_a_plain_pipeline_loads(str(tmp_path / "saved"), result["weights"], lora=True)


def test_fsdp1_is_refused_where_weights_are_averaged(tmp_path):
    on_cpus = dict.fromkeys(["FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"], "false")
    env = environment("fsdp2") | {"FSDP_VERSION": "1"} | on_cpus
    for outcome in attempt(train, 2, env, output_dir=str(tmp_path), ema_decay=0.9):
        assert "need FSDP2, which keeps each weight by its name. Found FSDP1. Set `fsdp_version: 2`" in outcome.error


@pytest.mark.parametrize("engine", OTHERS)
def test_the_moving_average_and_the_slow_copy_are_saved_whole_and_resumed(engine, reference, tmp_path):
    options = {"ema_decay": 0.5, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"loss_type": "nft", "timesteps_per_image": 3, "anchor_decay": [0, 0.3, 0.9]}

    def averages(run_folder, name="ema"):
        return load_file(f"{run_folder}/checkpoint-3/{name}.safetensors")

    def plain(weights):
        return {name.replace(".default", "").rpartition("transformer_blocks")[2]: w for name, w in weights.items()}

    folder, saved = str(tmp_path), str(tmp_path / "saved")
    whole = run(train, 2, environment(engine), output_dir=folder, save=saved, **options)[0]
    first, anchor, ddp = averages(folder), averages(folder, "anchor"), reference(**options)[0]
    for place in (saved, f"{folder}/checkpoint-3"):  # what diffusers loads is the average
        adapter = load_file(f"{place}/pytorch_lora_weights.safetensors")
        average = {name: value for name, value in first.items() if name != "optimization_step"}
        assert largest_difference(plain(adapter), plain(average)) == 0.0
    assert movement(plain(load_file(f"{folder}/checkpoint-3/adapter_model.safetensors")), plain(adapter)) > 1e-4
    assert_same_training(whole, ddp, tolerance=2e-5)
    assert largest_difference(first, averages(ddp["output_dir"])) < 2e-5
    assert largest_difference(anchor, averages(ddp["output_dir"], "anchor")) < 2e-5
    run(train, 2, environment(engine), output_dir=folder, resume=f"{folder}/checkpoint-1", **options)
    for copy, name in ((first, "ema"), (anchor, "anchor")):
        assert largest_difference(averages(folder, name), copy) < 1e-7
        del copy["optimization_step"]
        assert movement(copy, whole["weights"]) > 1e-4  # not the weights


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine.startswith("zero")])
def test_another_number_of_processes_is_refused_by_zero(engine, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    run(train, 2, environment(engine), max_steps=1, **options)
    with pytest.raises(RankFailed, match="also on as many processes: zero. on 2. Found zero. on 1"):
        run(train, 1, environment(engine, 1), max_steps=2, resume=True, **options)


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ddp_and_fsdp_resume_on_another_number_of_processes(engine, lora, saved_by, resumed_by, reference, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "lora": lora}
    run(train, saved_by, environment(engine, saved_by), max_steps=2, **options)
    result = run(train, resumed_by, environment(engine, resumed_by), max_steps=4, resume=True, **options)[0]
    assert result["engine"] == engine and result["step"] == 4 and result["world"] == resumed_by
    assert largest_difference(result["weights"], reference(lora=lora, max_steps=4)[0]["weights"]) < 1e-5


def test_another_engine_is_refused(tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    run(train, 2, environment("ddp"), max_steps=1, **options)
    outcomes = attempt(train, 2, environment("zero2"), max_steps=2, resume=True, **options)
    assert all("ddp on 2. Found zero2 on 2" in outcome.error for outcome in outcomes)
