"""The flow-matching losses in the trainer: AWM, DiffusionNFT and the ratio of flow-matching losses."""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, build
from toy_rewards import PROMPTS, contrast, redness
from transformers import TrainerCallback

from trl_apex import APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.diffusion.losses import training_sigmas
from trl_apex.diffusion.rollout import INITIAL_NOISE, ROW_LEVEL, ROW_NOISE, keyed_generator, keyed_noise

LOSSES = ("awm", "nft", "fpo")


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize("loss_type, passes", [("awm", 2), ("nft", 2), ("fpo", 2), ("awm", 1), ("nft", 1)])
def test_two_updates_equal_a_straight_line_computation(pipeline, lora, make_args, loss_type, passes):
    """Two passes over one rollout, or two iterations, between which the slow copy follows."""
    base, solver = copy.deepcopy(pipeline.transformer), "heun" if loss_type == "awm" else "euler"
    own = {"nft": {"nft_beta": 0.7}, "awm": {"awm_trust_region": 0.6}}.get(loss_type, {})
    args = make_args(
        DiffusionGRPOConfig, loss_type=loss_type, guidance_scale=None, num_inference_steps=4, timesteps_per_image=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, num_iterations=passes, max_steps=2, optim="sgd",
        learning_rate=0.5, max_grad_norm=0.0, weight_decay=0.0, shuffle_dataset=False, beta=0.3,
        activation_checkpointing=False, rollout_solver=solver, anchor_decay=None if loss_type == "fpo" else [0, 0.4, 0.9],
        **own,
    )  # fmt: skip
    seen = Gradients()
    trainer = DiffusionGRPOTrainer(
        pipeline,
        [contrast, redness],
        args,
        Dataset.from_dict({"prompt": PROMPTS[:2]}),
        peft_config=lora,
        callbacks=[seen],
    )
    model, runs = copy.deepcopy(trainer.model), []
    slow = copy.deepcopy(model)
    original = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: runs.append(original(inputs)) or runs[-1]
    trainer.train()

    prompts = [p for p in PROMPTS[:2] for _ in range(4)]
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )

    def velocity(network, x, t):
        return network(
            x, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=1000 * t, return_dict=False
        )[0]

    # A rollout of four steps, then two noise levels an image with fresh noise
    grid = trainer.sampler.schedule.sigmas

    def rollout(iteration):
        x0 = keyed_noise([(args.seed, INITIAL_NOISE, iteration, i) for i in range(8)], (16, 8, 8))
        network = slow if loss_type == "nft" else model
        with torch.no_grad():
            for now, after in zip(grid[:-1], grid[1:], strict=True):
                v = velocity(network, x0, now.expand(8))
                if solver == "heun" and after > 0:
                    v = (v + velocity(network, x0 + (after - now) * v, after.expand(8))) / 2
                x0 = x0 + (after - now) * v
        torch.testing.assert_close(runs[iteration]["clean"], x0, atol=1e-5, rtol=1e-4)
        keys = [keyed_generator(args.seed, ROW_LEVEL, iteration, i) for i in range(8)]
        t = torch.cat([training_sigmas("grid", grid, (1, 2), key) for key in keys])
        noise = keyed_noise([(args.seed, ROW_NOISE, iteration, i) for i in range(8)], (2, 16, 8, 8))
        return runs[iteration]["clean"], runs[iteration]["advantages"], t, noise

    def rows(network, old, x0, advantage, t, noise):
        losses, before = [], []
        for level in range(2):
            s = t[:, level].view(-1, 1, 1, 1)
            x, u = (1 - s) * x0 + s * noise[:, level], noise[:, level] - x0
            v = velocity(network, x, t[:, level])
            error = (v - u).square().mean((1, 2, 3))
            with torch.no_grad():
                anchor, wanted = velocity(slow, x, t[:, level]), velocity(base, x, t[:, level])
            if loss_type == "nft":
                mine, his, beta = v, anchor, 0.7
                r = advantage.clamp(-5, 5) / 10 + 0.5
                ends = [x - s * w - x0 for w in (beta * mine + (1 - beta) * his, (1 + beta) * his - beta * mine)]
                plus, minus = ((e**2).mean((1, 2, 3)) / e.detach().abs().mean((1, 2, 3)).clamp(min=1e-5) for e in ends)
                own = 5 * (r * plus + (1 - r) * minus) / beta
            else:
                if loss_type == "awm":
                    likelihood = -4 * t[:, level] * ((error + 1e-10) ** 0.25 - 1e-10**0.25)
                    a, low, high = advantage.clamp(-5, 5) / 5, 0.0, 2.0
                else:
                    likelihood, a, low, high = -10 * error, advantage, 0.99, 1.01
                ratio = (likelihood - (likelihood.detach() if old is None else old[level])).exp()
                own = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
                before.append(likelihood.detach())
            if loss_type == "awm":
                own = own + 0.6 * (v - anchor).square().mean((1, 2, 3))
            losses.append(own + 0.3 * (v - wanted).square().mean((1, 2, 3)))
        return torch.stack(losses).mean(), before

    parameters, copied = ([p for p in network.parameters() if p.requires_grad] for network in (model, slow))
    for update in range(2):
        if update % passes == 0:
            run, old = rollout(update // passes), None
            assert run[1].abs().max() > 0.5
        loss, before = rows(model, old, *run)
        old = before if old is None else old
        gradient = torch.autograd.grad(loss, parameters)
        flat = torch.cat([g.flatten() for g in gradient])
        assert logged(trainer, "loss")[update] == pytest.approx(
            loss.item(), abs=6e-5
        )  # transformers 4 logs four digits
        assert (seen.steps[update] - flat).norm() < 1e-4 * flat.norm() and flat.norm() > 1e-4
        with torch.no_grad():
            for p, g, s in zip(parameters, gradient, copied, strict=True):
                p -= 0.5 * g
                if (update + 1) % passes == 0:
                    d = min(0.4 * (update + 1), 0.9)
                    s.copy_(d * s + (1 - d) * p)
    if loss_type != "fpo":
        for s, found in zip(copied, trainer._anchor.copy, strict=True):
            torch.testing.assert_close(found, s, atol=1e-5, rtol=1e-4)
    assert logged(trainer, "kl")[1] > 0


@pytest.mark.parametrize(
    "model, adapter, loss_type",
    [
        *itertools.product(["tiny"], [True, False], LOSSES),
        ("flux2-klein", True, "nft"),
        ("qwen-image", True, "awm"),
        ("z-image", True, "fpo"),
    ],
)
def test_the_trained_rewards_policy_moves_and_a_resume_goes_on_exactly(
    pipeline, dataset, lora, make_args, tmp_path, model, adapter, loss_type
):
    def trainer(steps, name):
        pipe = copy.deepcopy(pipeline) if model == "tiny" else build(model)
        args = make_args(
            loss_type=loss_type, guidance_scale=None, timesteps_per_image=2, gradient_accumulation_steps=1, max_steps=steps,
            save_strategy="steps", save_steps=2, output_dir=str(tmp_path / name), beta=0.1, ema_decay=0.5,
            activation_checkpointing=False, learning_rate=1e-3, height=32, width=32,
            anchor_decay=None if loss_type == "fpo" else [0, 0.1, 0.5], offload_reference=loss_type == "awm",
        )  # fmt: skip
        return APEXTrainer(pipe, [contrast, redness], args, dataset, peft_config=lora if adapter else None)

    through = trainer(4, "through")
    start = weights(through)
    through.train()
    assert max((a - b).abs().max() for a, b in zip(start, weights(through), strict=True)) > 1e-4
    trainer(2, "parts").train()
    resumed = trainer(4, "parts")
    resumed.train(resume_from_checkpoint=True)
    pairs = [(weights(through), weights(resumed))]
    if loss_type != "fpo":
        pairs += [(through._anchor.copy, resumed._anchor.copy)]
        assert not all(torch.equal(a, b) for a, b in zip(weights(through), through._anchor.copy, strict=True))
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("loss_type", ["awm", "fpo"])
def test_accumulation_and_checkpointing_change_nothing(pipeline, dataset, lora, make_args, loss_type):
    found = []
    for overrides in (
        {"per_device_train_batch_size": 8, "timestep_batch_size": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "activation_checkpointing": True},
    ):
        args = make_args(loss_type=loss_type, guidance_scale=None, timesteps_per_image=2, max_steps=2, **overrides)
        trainer = APEXTrainer(copy.deepcopy(pipeline), [contrast, redness], args, dataset, peft_config=lora)
        trainer.train()
        found.append(weights(trainer))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_probe_measures_the_objectives_gradients(pipeline, dataset, lora, make_args, loss_type):
    args = make_args(
        loss_type=loss_type, guidance_scale=None, timesteps_per_image=2, timestep_batch_size=2, gradient_probe=True,
        probe_every=1, max_steps=2, beta=0.1, activation_checkpointing=False,
    )  # fmt: skip
    trainer = APEXTrainer(pipeline, [contrast, redness], args, dataset, peft_config=lora)
    trainer.train()
    harmony = logged(trainer, "gradient_harmony")
    assert len(harmony) == 2 and all(-1 <= value <= 1 for value in harmony)


def test_a_better_image_becomes_more_likely(pipeline, dataset, lora, make_args):
    """Along the negative gradient, the flow-matching loss of images above the mean falls against that of the others."""
    for loss_type in LOSSES:
        args = make_args(
            DiffusionGRPOConfig, loss_type=loss_type, guidance_scale=None, timesteps_per_image=3, timestep_batch_size=3,
            max_steps=1, optim="sgd", learning_rate=0.05, max_grad_norm=0.0, weight_decay=0.0, activation_checkpointing=False,
        )  # fmt: skip
        trainer = DiffusionGRPOTrainer(copy.deepcopy(pipeline), [contrast], args, dataset, peft_config=lora)
        model, run = copy.deepcopy(trainer.model), {}
        original = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs, f=original, r=run: r.update(f(inputs)) or r
        trainer.train()

        def errors(network, t=trainer, r=run):
            rows = t._rows(r, torch.cartesian_prod(torch.arange(8), torch.arange(3)))
            with torch.no_grad():
                return (t._predict(network, rows) - rows["target"]).square().mean((1, 2, 3)).view(8, 3).mean(1)

        change = errors(trainer.model) - errors(model)
        assert (change * run["advantages"]).sum() < 0, loss_type


def test_guidance_and_models_that_predict_noise_are_refused(dataset, make_args):
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 with loss_type='awm'"):
        make_args(loss_type="awm", guidance_scale=4.5)
    with pytest.raises(ValueError, match="`loss_type` must be one of grpo, awm, nft, fpo. Found 'dapo'"):
        make_args(loss_type="dapo")
    with pytest.raises(ValueError, match="need loss_type='grpo'"):
        make_args(loss_type="fpo", sde_window_size=2)
    with pytest.raises(ValueError, match="`share_initial_noise` needs loss_type='grpo'"):
        make_args(loss_type="nft", share_initial_noise=True)
    with pytest.raises(ValueError, match="not one that predicts noise. Found .StableDiffusionPipeline"):
        args = make_args(loss_type="fpo", guidance_scale=None, max_sequence_length=77)
        APEXTrainer(FAMILIES["sd1.5"](), [redness], args, dataset)


@pytest.mark.parametrize(
    "family, overrides, message",
    [
        ("sd1.5", {"rollout_solver": "heun"}, "`rollout_solver` must be 'euler'.*Found 'heun'"),
        ("sd1.5", {"ratio_guard": "grpo_guard"}, "needs transition='flow_sde'.*Found 'ddim'"),
        ("sd3", {"ratio_guard": "grpo_guard", "transition": "cps"}, "Found 'cps'. Use ratio_guard='kl_mask'"),
    ],
)
def test_solvers_and_guards_that_do_not_fit_the_model_are_refused(dataset, make_args, family, overrides, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGRPOTrainer(FAMILIES[family](), [redness], make_args(DiffusionGRPOConfig, **overrides), dataset)
