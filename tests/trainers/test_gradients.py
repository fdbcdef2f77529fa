"""What only saves memory or time leaves the gradients as they are, and is seen to save: calls are counted."""

import copy

import pytest
import torch
from toy_rewards import contrast, redness
from transformers import TrainerCallback

from trl_apex import APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trained(pipeline, dataset, args, peft_config, callbacks=(), **kwargs):
    """One run from equal weights: the gradients of its updates, the rows of each forward, and the trainer."""
    gradients, forwards = Gradients(), []
    pipeline = copy.deepcopy(pipeline)
    pipeline.transformer.register_forward_hook(
        lambda module, inputs, output: forwards.append((len(output[0]), torch.is_grad_enabled()))
    )
    trainer = DiffusionGRPOTrainer(
        pipeline, [redness, contrast], args, dataset, peft_config=peft_config, callbacks=[gradients, *callbacks],
        **kwargs,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at the start, and with it every gradient of A
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    trainer.train()
    return gradients.steps, forwards, trainer


def assert_equal_gradients(found, expected, tolerance=1e-5):
    """To `tolerance` of the largest entry, update by update."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        largest = max(g.abs().max().item() for g in other.values())
        assert largest > 1e-5
        for name, gradient in other.items():
            assert (one[name] - gradient).abs().max().item() <= tolerance * largest, name


PLAIN = {"num_inference_steps": 4, "max_steps": 1, "guidance_scale": 2.0, "gradient_accumulation_steps": 3}


SAVING = {  # what saves memory or time, and how many forwards with a gradient it takes
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 12}, 12),
    "timesteps": ({"timestep_batch_size": 3, "gradient_accumulation_steps": 1}, 1),
    "both": ({"timestep_batch_size": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 2),
    "checkpointing": ({"gradient_checkpointing": True}, 3),
}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_same_gradients(pipeline, dataset, lora, make_args, full):
    peft_config = None if full else lora
    expected, calls, _ = trained(pipeline, dataset, make_args(DiffusionGRPOConfig, **PLAIN), peft_config)
    assert [rows for rows, grad in calls if grad] == [2 * 8] * 3  # both branches of the guidance in one forward
    for name, (change, forwards) in SAVING.items():
        args = make_args(DiffusionGRPOConfig, **{**PLAIN, **change})
        found, calls, trainer = trained(pipeline, dataset, args, peft_config)
        updating = [rows for rows, grad in calls if grad]
        assert len(updating) == forwards and sum(updating) == 2 * 8 * 3, name
        assert trainer.state.global_step == 1, name
        assert_equal_gradients(found, expected)


def test_a_shared_prefix_saves_forwards_and_changes_no_gradient(pipeline, dataset, lora, make_args, monkeypatch):
    settings = {
        **PLAIN, "num_inference_steps": 6, "sde_window_size": 2, "sde_window_range": [3, 5], "share_initial_noise": True,
        "guidance_scale": 1.0, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    found, shared, _ = trained(pipeline, dataset, make_args(DiffusionGRPOConfig, **settings), lora)
    # The same initial noise within a group, but every sample computes its own prefix.
    from trl_apex.trainers import diffusion_grpo as module

    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda *args, **options: sample(*args[:-1], None, **options))
    expected, alone, _ = trained(pipeline, dataset, make_args(DiffusionGRPOConfig, **settings), lora)
    probe = [1]  # the one row that watches whether updates reach the rollout
    assert [rows for rows, grad in alone if not grad] == probe + [8] * 6
    assert [rows for rows, grad in shared if not grad] == probe + [2, 2, 2, 8, 8, 8]  # 2 prompts x 4 images
    # The prefixes were sampled in batches of 2 and of 8, and on some processors products of those round differently.
    assert_equal_gradients(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_ratio_is_one_with_a_base_in_bf16_loaded_by_name(pipeline, dataset, lora, make_args, tmp_path, autocast):
    pipeline.save_pretrained(tmp_path / "pipeline")
    dtype = {} if autocast else {"model_init_kwargs": {"dtype": "bfloat16"}}
    args = make_args(bf16=autocast, max_steps=4, guidance_scale=2.0, **dtype)
    trainer = APEXTrainer(str(tmp_path / "pipeline"), [redness, contrast], args, dataset, peft_config=lora)
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    trainer.train()
    deviation = [entry["ratio/max_deviation"] for entry in trainer.state.log_history if "loss" in entry]
    assert deviation[0::2] == [0.0, 0.0] and min(deviation[1::2]) > 0


def test_non_finite_updates_in_a_row_stop_with_a_checkpoint(pipeline, dataset, lora, make_args, tmp_path):
    class Spoil(TrainerCallback):
        """What an overflow in half precision leaves behind, in updates 2, 4 and 5."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 in (2, 4, 5):
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")

    args = make_args(max_steps=20, max_nonfinite_updates=2)
    trainer = APEXTrainer(pipeline, [redness], args, dataset, peft_config=lora)
    trainer.callback_handler.callbacks.insert(0, Spoil())
    weights = []
    trainer.add_callback(Weights(weights))
    with pytest.raises(RuntimeError, match="with a checkpoint saved: 2 updates in a row had non-finite gradients"):
        trainer.train()
    assert trainer.state.global_step == 6  # the end of the iteration
    assert (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").is_file()
    skipped = [i + 1 for i in range(5) if torch.equal(weights[i], weights[i - 1]) and i]
    assert skipped == [2, 4, 5]
    logged = [e["step"] for e in trainer.state.log_history if e.get("skipped_updates/nonfinite")]
    assert logged == [2, 4, 5]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_overflows_of_a_loss_scale_that_is_still_falling_do_not_stop_a_run(pipeline, dataset, lora, make_args):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30, growth_interval=10**6)

    class Unscale(TrainerCallback):
        """What accelerate does before the gradient's norm where it scales the loss itself."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            scaler.unscale_(trainer.optimizer.optimizer)

    args = make_args(max_steps=6, max_nonfinite_updates=1, max_grad_norm=0.0)
    trainer = APEXTrainer(pipeline, [redness], args, dataset, peft_config=lora)
    trainer.accelerator.scaler = scaler
    trainer.callback_handler.callbacks.insert(0, Unscale())
    weights = []
    trainer.add_callback(Weights(weights))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    overflows = [entry["skipped_updates/overflow_rate"] for entry in logged]
    assert overflows[0] == 1.0 and overflows[-1] == 0.0
    assert all(entry["skipped_updates/nonfinite"] == 0 for entry in logged)
    changed = [not torch.equal(weights[i], weights[i - 1]) for i in range(1, 6)]
    assert changed == [not overflow for overflow in overflows[1:]]


class Weights(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))


def test_the_logged_size_of_gradients_is_theirs(pipeline, dataset, lora, make_args):
    args = make_args(DiffusionGRPOConfig, max_grad_norm=0.0, max_steps=2, ema_decay=0.9, gradient_accumulation_steps=2)
    seen = []
    steps, _, trainer = trained(pipeline, dataset, args, lora, callbacks=[Weights(seen)])
    for entry, gradients in zip([e for e in trainer.state.log_history if "loss" in e], steps, strict=True):
        every = torch.cat([g.flatten() for g in gradients.values()])
        assert entry["grad_rms"] == pytest.approx(every.square().mean().sqrt().item(), rel=1e-5)
    average = torch.cat([copy.flatten() for copy in trainer._ema.copy])
    first, last = seen  # the average moves once a step of the optimizer, whatever the accumulation
    torch.testing.assert_close(average, 0.9 * first + 0.1 * last, atol=1e-7, rtol=0)
    assert trainer.optimizer.optimizer.defaults["fused"] is True
