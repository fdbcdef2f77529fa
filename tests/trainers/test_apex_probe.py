"""The gradient probe inside a training run."""

import copy

import pytest
import torch
from adapter_trainers import build
from tiny_runs import history
from toy_rewards import contrast, redness

from trl_apex import APEXTrainer


def trained(pipeline, dataset, lora, args):
    trainer = APEXTrainer(copy.deepcopy(pipeline), [redness, contrast], args, dataset, peft_config=lora)
    trainer.train()
    return trainer


NFT = {"loss_type": "nft", "timesteps_per_image": 2, "anchor_decay": [0, 0.3, 0.9]}
AWM = {"loss_type": "awm", "timesteps_per_image": 2, "anchor_decay": [0, 0.3, 0.9]}


@pytest.mark.parametrize(
    "beta, checkpointing, loss",
    [(0.0, False, {}), (0.5, False, {}), (0.5, True, {}), (0.0, True, NFT), (0.5, False, NFT), (0.0, False, AWM)],
)
def test_probing_changes_no_weight(pipeline, dataset, lora, make_args, beta, checkpointing, loss):
    settings = {"beta": beta, "gradient_checkpointing": checkpointing, "probe_every": 1, "max_steps": 3, **loss}
    plain, probed = (
        trained(pipeline, dataset, lora, make_args(gradient_probe=probe, **settings)) for probe in (False, True)
    )
    for (name, expected), found in zip(plain.model.named_parameters(), probed.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert len(history(probed, "gradient_harmony")) == 3 and not history(plain, "gradient_harmony")


@pytest.mark.parametrize(
    "name, updates, options",
    [
        ("tiny", 1, {}),
        ("tiny", 4, {**NFT, "learning_rate": 1e-2}),
        *((name, 1, {"height": 16, "width": 16}) for name in ("flux2-klein", "qwen-image", "z-image")),
    ],
)
def test_cosine_of_the_run_equals_separate_backwards(name, pipeline, dataset, lora, make_args, updates, options):
    """Of the last update; under 'nft' the policy has left its slow copy by then."""
    trainer = APEXTrainer(
        pipeline if name == "tiny" else build(name), [redness, contrast],
        make_args(gradient_probe=True, probe_every=1, max_steps=updates, gradient_accumulation_steps=2, **options),
        dataset, peft_config=lora,
    )  # fmt: skip
    seen, batches, before = [], [], []
    observe, compute = trainer.aggregator.observe_conflict, trainer._compute_loss
    trainer.aggregator.observe_conflict = lambda matrix, **kw: (seen.append(matrix), observe(matrix, **kw))

    def keep(model, inputs):
        batches.append(dict(inputs))
        before.append(copy.deepcopy(trainer.model.state_dict()))
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    trainer.model.load_state_dict(before[-1])
    trainer.probe = None
    gradients = []
    for k in range(2):
        trainer.model.zero_grad()
        for inputs in batches[-2:]:
            advantages = inputs["normalized"][:, k].contiguous()
            trainer._step = 0
            compute(trainer.model, {**inputs, "advantages": advantages}).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).double()
        )
    expected = torch.stack(gradients) @ torch.stack(gradients).T

    def cosine(gramian):
        return gramian[0, 1] / (gramian[0, 0] * gramian[1, 1]).sqrt()

    assert len(seen) == updates
    assert abs(cosine(seen[-1]) - cosine(expected)) < 1e-4
    torch.testing.assert_close(seen[-1], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ["mgda", "upgrad"])
def test_gradient_rules_take_their_weights_from_the_probe(pipeline, dataset, lora, make_args, rule):
    args = make_args(multi_objective_aggregation=rule, probe_every=1, max_steps=4)
    trainer = trained(pipeline, dataset, lora, args)
    assert trainer.probe is not None
    weights = list(trainer.aggregator.priorities.values())
    assert sum(weights) == pytest.approx(1) and weights[0] != pytest.approx(0.5, abs=1e-6)


def test_population_estimate_is_saved_and_restored(pipeline, dataset, lora, make_args, tmp_path):
    options = {"conflict_source": "population"}
    config = {"aggregation_options": options, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = trained(pipeline, dataset, lora, make_args(**config))
    resumed = APEXTrainer(
        copy.deepcopy(pipeline), [redness, contrast],
        make_args(**{**config, "output_dir": str(tmp_path / "again")}), dataset, peft_config=lora,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.population.state_dict() == whole.population.state_dict()
    assert whole.population.state_dict()["weight"] > 4


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"aggregation_options": {"conflict_source": "gradient"}, "gradient_probe": False},
            "`gradient_probe` must not be False",
        ),
        ({"probe_every": 0}, "`probe_every` must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other(make_args, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_args(**overrides)
