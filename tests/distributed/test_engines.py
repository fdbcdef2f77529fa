"""Every engine trains what DDP trains, and what it saves is whole."""

import numpy as np
import pytest
from compare import assert_same_training, curve, largest_difference, movement
from diffusers import SD3Transformer2DModel
from engines import environment
from faults import constant, train_with_a_bad_gradient
from processes import RankFailed, attempt, run
from safetensors.numpy import load_file
from training import red, tiny_pipeline, train

SHARDED = ("zero3", "zero3_offload", "fsdp2")
OTHERS = ("zero1", "zero2", *SHARDED)
STAGE = {"zero3_offload": "zero3"}


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.distributed if e == "zero3_offload" else ()) for e in OTHERS]
)
def test_an_engine_trains_an_adapter_as_ddp_does(engine, ddp, tmp_path):
    runs = run(train, 2, environment(engine), output_dir=str(tmp_path))
    assert [r["world"] for r in runs] == [2, 2]
    assert runs[0]["engine"] == STAGE.get(engine, engine)
    assert curve(runs[0], "ratio/max_deviation")[0] == 0.0
    assert_same_training(runs[0], ddp[0], tolerance=1e-5)
    assert runs[0]["aggregator"] == runs[1]["aggregator"]
    assert largest_difference(runs[0]["weights"], runs[1]["weights"]) == 0.0


@pytest.fixture(scope="module")
def ddp_four_steps(tmp_path_factory):
    return {
        lora: run(
            train, 2, environment("ddp"), output_dir=str(tmp_path_factory.mktemp("four")), lora=lora, max_steps=4
        )[0]
        for lora in (True, False)
    }


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("engine", ("ddp", *OTHERS))
def test_saving_and_resuming(engine, lora, ddp_four_steps, tmp_path):
    """Four steps at a stretch, and two steps twice: the same weights, in a form that a plain pipeline loads."""
    folder, saved = str(tmp_path / "run"), str(tmp_path / "saved")
    options = {"lora": lora, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(train, 2, environment(engine), output_dir=folder, save=saved, **options)[0]
    assert whole["engine"] == STAGE.get(engine, engine)
    assert_same_training(whole, ddp_four_steps[lora], tolerance=2e-5)
    assert not any(file.startswith(".partial") for file in whole["files"])
    _assert_a_plain_pipeline_loads(saved, whole["weights"], lora)

    resumed = run(train, 2, environment(engine), output_dir=folder, resume=f"{folder}/checkpoint-2", **options)[0]
    assert resumed["resumed_from"] == f"{folder}/checkpoint-2" and resumed["step"] == 4
    assert largest_difference(resumed["weights"], whole["weights"]) < 1e-7
    assert resumed["iterations"] == whole["iterations"][2:]
    assert resumed["aggregator"] == whole["aggregator"]


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


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("ddp", "zero2", "zero3", "fsdp2"))
def test_a_toy_reward_rises(engine, tmp_path):
    """The trained tiny pipeline learns redder images; three iterations see every prompt once."""
    options = {"rewards": [red], "trained": True, "max_steps": 9, "learning_rate": 4e-3}
    options |= {"generation_batch_size": 16, "per_device_train_batch_size": 8, "num_generations": 8}
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    reward = curve(result, "rewards/red/mean")
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.02


PROBE = {
    "gradient_probe": True,
    "probe_every": 1,
    "conflict_source": "gradient",
    "probe_layers": [r"attn\.to_[qk]"],
    "max_steps": 3,
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Probed runs of one process and of two under DDP."""
    return {
        (world, lora): run(
            train,
            world,
            environment("ddp", world),
            output_dir=str(tmp_path_factory.mktemp("probe")),
            lora=lora,
            **PROBE,
        )[0]
        for world in (1, 2)
        for lora in (True, False)
    }


@pytest.mark.distributed
@pytest.mark.parametrize("engine", SHARDED)
def test_layerwise_rollout_equals_the_gathered_one(engine, ddp, tmp_path):
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), gather_for_rollout=False)[0]
    assert_same_training(result, ddp[0], tolerance=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("zero3", "fsdp2"))
def test_weights_are_gathered_once_a_rollout_or_in_each_forward(engine, tmp_path):
    """The all-gathers of the second rollout: as many for four steps as for eight, or twice as many for the layers."""
    counted = {}
    for gather in (True, False):
        for steps in (4, 8):
            options = {"gather_for_rollout": gather, "num_inference_steps": steps, "sde_window_size": 3}
            options |= {"sde_window_range": [0, 3], "lora": False, "count_gathers": True}
            result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
            counted[gather, steps] = result["gathers"][1]
    assert counted[True, 4] == counted[True, 8]
    layers = counted[False, 8] - counted[False, 4]  # of four more forwards
    assert layers >= 4 * 4  # four blocks
    assert counted[False, 8] > counted[True, 8] or engine == "zero3"
    print(engine, counted)


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("engine", ("zero1", "zero2", "zero3", "fsdp2"))
def test_the_gradient_probe_sees_the_same_conflict(engine, lora, probed, tmp_path):
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), lora=lora, **PROBE)[0]
    for other in (probed[2, lora], probed[1, lora]):
        assert_same_training(result, other, tolerance=2e-5)
        np.testing.assert_allclose(curve(result, "gradient_harmony"), curve(other, "gradient_harmony"), atol=1e-4)
        measured = [[entry["conflict/red/dark"] for entry in r["logs"][1:]] for r in (result, other)]
        np.testing.assert_allclose(*measured, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("zero2", "zero3", "fsdp2"))
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"beta": 0.01, "num_iterations": 2},
        {"guidance_scale": 3.0, "gradient_accumulation_steps": 1, "max_steps": 3},
        {"ema_decay": 0.5},
    ],
    ids=["checkpointing", "kl", "guidance-three-updates", "ema"],
)
def test_options_under_engines(engine, options, tmp_path):
    reference = run(train, 2, environment("ddp"), output_dir=str(tmp_path / "ddp"), **options)[0]
    result = run(train, 2, environment(engine), output_dir=str(tmp_path / engine), **options)[0]
    assert_same_training(result, reference, tolerance=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("zero2", "zero3", "fsdp2"))
def test_the_moving_average_is_saved_whole_and_resumed(engine, tmp_path):
    options = {"ema_decay": 0.5, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}

    def averages(folder):
        return load_file(folder / "checkpoint-3" / "ema.safetensors")

    run(train, 2, environment("ddp"), output_dir=str(tmp_path / "ddp"), **options)
    run(train, 2, environment(engine), output_dir=str(tmp_path / "run"), **options)
    first = averages(tmp_path / "run")
    assert largest_difference(first, averages(tmp_path / "ddp")) < 2e-5
    resume = str(tmp_path / "run" / "checkpoint-1")
    resumed = run(train, 2, environment(engine), output_dir=str(tmp_path / "run"), resume=resume, **options)[0]
    assert largest_difference(averages(tmp_path / "run"), first) < 1e-7
    del first["optimization_step"]
    assert movement(first, resumed["weights"]) > 1e-4  # an average, not the weights


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("zero2", "zero3", "fsdp2"))
def test_kl_to_a_frozen_copy_of_all_weights(engine, tmp_path):
    options = {"lora": False, "beta": 10.0, "max_steps": 3, "learning_rate": 1e-3}
    reference = run(train, 2, environment("ddp"), output_dir=str(tmp_path / "ddp"), **options)[0]
    result = run(train, 2, environment(engine), output_dir=str(tmp_path / engine), **options)[0]
    assert_same_training(result, reference, tolerance=1e-4)
    assert curve(result, "kl")[0] == 0.0 and curve(result, "kl")[2] > 0.0
    np.testing.assert_allclose(curve(result, "kl"), curve(reference, "kl"), rtol=1e-2, atol=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("zero2", "zero3"))
def test_another_number_of_processes_is_refused_by_zero(engine, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    run(train, 2, environment(engine), max_steps=1, **options)
    with pytest.raises(RankFailed, match="resumes on the number of processes that saved it, 2. Found 1"):
        run(train, 1, environment(engine, 1), max_steps=2, resume=True, **options)


@pytest.mark.distributed
@pytest.mark.parametrize(("saved_by", "resumed_by"), [(1, 2), (2, 1), (2, 4)])
def test_ddp_resumes_on_another_number_of_processes(saved_by, resumed_by, ddp_four_steps, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    run(train, saved_by, environment("ddp", saved_by), max_steps=2, **options)
    result = run(train, resumed_by, environment("ddp", resumed_by), max_steps=4, resume=True, **options)[0]
    assert result["step"] == 4 and result["world"] == resumed_by
    assert largest_difference(result["weights"], ddp_four_steps[True]["weights"]) < 1e-5


@pytest.mark.distributed
def test_fsdp_resumes_on_another_number_of_processes(ddp_four_steps, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    run(train, 2, environment("fsdp2"), max_steps=2, **options)
    result = run(train, 4, environment("fsdp2", 4), max_steps=4, resume=True, **options)[0]
    assert result["step"] == 4 and result["world"] == 4
    assert largest_difference(result["weights"], ddp_four_steps[True]["weights"]) < 1e-5


@pytest.mark.distributed
def test_another_engine_is_refused(tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    run(train, 2, environment("ddp"), max_steps=1, **options)
    outcomes = attempt(train, 2, environment("zero2"), max_steps=2, resume=True, **options)
    assert all("under the engine that saved it, ddp. Found zero2" in outcome.error for outcome in outcomes)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("ddp", "zero2", "zero3", "fsdp2"))
def test_updates_without_a_signal_leave_the_weights_alone(engine, tmp_path):
    first = run(train, 2, environment(engine), output_dir=str(tmp_path), max_steps=1, rewards=[constant])[0]
    second = run(train, 2, environment(engine), output_dir=str(tmp_path), max_steps=3, rewards=[constant])[0]
    assert movement(first["weights"], second["weights"]) == 0.0
    assert curve(second, "skipped_updates/dead") == [1.0, 1.0, 1.0]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ("ddp", "zero1", "zero2", "zero3", "fsdp2"))
def test_updates_that_are_not_finite_are_left_out(engine, tmp_path):
    runs = run(train_with_a_bad_gradient, 2, environment(engine), output_dir=str(tmp_path), bad_rank=1, bad_step=1)
    assert runs[0]["finite"] and runs[0]["skipped"] == [0.0, 1.0, 0.0]
    assert runs[0]["moved"][0] > 0 and runs[0]["moved"][1] == 0 and runs[0]["moved"][2] > 0
