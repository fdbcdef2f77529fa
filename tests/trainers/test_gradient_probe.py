"""The probe against K separate backwards, on a real SD3 transformer with LoRA."""

import copy
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_apex.trainers.probe import GradientProbe, weighted_gradients

OBJECTIVES = ["ocr", "pickscore", "deqa"]
ROWS = 6


def tiny_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


@pytest.fixture(scope="module")
def lora() -> nn.Module:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model = get_peft_model(tiny_transformer(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():  # LoRA's B starts at zero, where A has no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def batch(rows: int = ROWS, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(rows, 4, 8, 8, generator=g),
        "noise": torch.randn(rows, 4, 8, 8, generator=g),
        "timestep": torch.rand(rows, generator=g) * 1000,
        "text": torch.randn(rows, 5, 16, generator=g),
        "pooled": torch.randn(rows, 16, generator=g),
        "scores": torch.randn(rows, 3, generator=g),
    }


def log_prob(model: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(
        hidden_states=b["latents"],
        timestep=b["timestep"],
        encoder_hidden_states=b["text"],
        pooled_projections=b["pooled"],
        return_dict=False,
    )[0]
    return -((out - b["noise"]) ** 2).flatten(1).mean(1)


def surrogate(
    model: nn.Module, b: dict[str, torch.Tensor], advantages: torch.Tensor, drift: Any = 0.0
) -> torch.Tensor:
    now = log_prob(model, b)
    ratio = torch.exp(now - now.detach() + drift)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()


def separate_backwards(model, probe, loss_of) -> torch.Tensor:
    """Gram matrix by the textbook way: one backward per objective, over the same parameters, and the direction."""
    modules = dict(model.named_modules())
    parameters = [p for name in probe.layer_names for p in modules[name].parameters() if p.requires_grad]
    rows = []
    for k in [*range(3), None]:
        gradient = torch.autograd.grad(loss_of(k), parameters)
        rows.append(torch.cat([part.flatten() for part in gradient]).double())
    return torch.stack(rows) @ torch.stack(rows).T


def cosines(gramian: torch.Tensor) -> torch.Tensor:
    size = gramian.diagonal().sqrt()
    return gramian / torch.outer(size, size)


def advantages_of(scores: torch.Tensor) -> torch.Tensor:
    return scores @ torch.tensor([0.2, 0.5, 0.3])


def check(result, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    cos = cosines(expected)
    assert (result.cosine - cos[:3, :3]).abs().max() <= tolerance
    assert abs(result.harmony - float(cos[3, :3].min())) <= tolerance
    torch.testing.assert_close(
        result.gramian, expected[:3, :3], rtol=1e-3, atol=1e-3 * float(expected.diagonal().max())
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_equals_separate_backwards(lora, checkpointing):
    b = batch()
    advantages = advantages_of(b["scores"])
    transformer = lora.base_model.model
    transformer.enable_gradient_checkpointing() if checkpointing else transformer.disable_gradient_checkpointing()
    lora.train()
    probe = GradientProbe(lora, OBJECTIVES)
    assert len(probe.layer_names) >= 14
    expected = separate_backwards(
        lora, probe, lambda k: surrogate(lora, b, advantages if k is None else b["scores"][:, k])
    )
    lora.zero_grad()
    with probe.step():
        probe.rows(advantages, b["scores"])
        surrogate(lora, b, advantages).backward()
    transformer.disable_gradient_checkpointing()
    check(probe.result(), expected)


def test_leaves_the_training_gradient_alone(lora):
    b = batch()
    advantages = advantages_of(b["scores"])
    gradients = []
    for probed in (False, True):
        lora.zero_grad()
        probe = GradientProbe(lora, OBJECTIVES)
        if probed:
            with probe.step():
                probe.rows(advantages, b["scores"])
                surrogate(lora, b, advantages).backward()
        else:
            surrogate(lora, b, advantages).backward()
        gradients.append([p.grad.clone() for p in lora.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(module._forward_hooks for module in lora.modules() if isinstance(module, nn.Linear))


def test_micro_batches_accumulate(lora):
    parts = [batch(4, seed) for seed in (1, 2)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    advantages = advantages_of(whole["scores"])
    probe = GradientProbe(lora, OBJECTIVES)
    for part in parts:
        with probe.step():
            probe.rows(advantages_of(part["scores"]), part["scores"])
            (surrogate(lora, part, advantages_of(part["scores"])) / 2).backward()
    expected = separate_backwards(
        lora, probe, lambda k: surrogate(lora, whole, advantages if k is None else whole["scores"][:, k])
    )
    result = probe.result()
    check(result, expected)
    assert result.rows == 8
    assert probe.result() is None  # forgotten


def test_several_steps_of_a_sample_and_batched_guidance(lora):
    """Rows are (sample, step) pairs; with guidance in one forward the rows come twice."""
    b = batch()
    b["scores"] = b["scores"][[0, 0, 1, 1, 2, 2]]
    advantages = advantages_of(b["scores"])
    double = {key: torch.cat([b[key], b[key]]) for key in b}
    double["text"] = torch.cat([torch.zeros_like(b["text"]), b["text"]])

    def loss(k):
        out = lora(
            hidden_states=double["latents"],
            timestep=double["timestep"],
            encoder_hidden_states=double["text"],
            pooled_projections=double["pooled"],
            return_dict=False,
        )[0]
        without, with_prompt = out.chunk(2)
        guided = without + 3.0 * (with_prompt - without)
        now = -((guided - b["noise"]) ** 2).flatten(1).mean(1)
        return -(now * (advantages if k is None else b["scores"][:, k])).mean()

    probe = GradientProbe(lora, OBJECTIVES)
    expected = separate_backwards(lora, probe, loss)
    with probe.step():
        probe.rows(advantages, b["scores"])
        loss(None).backward()
    check(probe.result(), expected)


def test_clipped_and_tiny_rows_are_left_out(lora):
    b = batch()
    advantages = advantages_of(b["scores"]).abs() + 0.1
    advantages[0] = 0.0
    drift = torch.zeros(ROWS)
    drift[1] = 0.5  # the ratio is above the clip range, with a positive advantage
    probe = GradientProbe(lora, OBJECTIVES)
    with probe.step():
        probe.rows(advantages, b["scores"])
        surrogate(lora, b, advantages, drift).backward()
    result = probe.result()
    rest = {key: b[key][2:] for key in b}
    expected = separate_backwards(
        lora,
        probe,
        lambda k: surrogate(lora, rest, advantages[2:] if k is None else rest["scores"][:, k]) * (ROWS - 2) / ROWS,
    )
    check(result, expected)
    assert result.rows == ROWS - 1


def test_full_fine_tuning_of_chosen_layers():
    model = tiny_transformer()
    b = batch()
    advantages = advantages_of(b["scores"])
    probe = GradientProbe(model, OBJECTIVES, layers=[r"attn\.to_(q|out)", r"ff\.net\.2$"])
    assert 0 < len(probe.layer_names) < 12
    expected = separate_backwards(
        model, probe, lambda k: surrogate(model, b, advantages if k is None else b["scores"][:, k])
    )
    with probe.step():
        probe.rows(advantages, b["scores"])
        surrogate(model, b, advantages).backward()
    check(probe.result(), expected)


def test_under_autocast_the_cosines_stay_close(lora):
    b = batch()
    advantages = advantages_of(b["scores"])
    probe = GradientProbe(lora, OBJECTIVES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = separate_backwards(
            lora, probe, lambda k: surrogate(lora, b, advantages if k is None else b["scores"][:, k])
        )
        with probe.step():
            probe.rows(advantages, b["scores"])
            surrogate(lora, b, advantages).backward()
    assert (probe.result().cosine - cosines(expected)[:3, :3]).abs().max() < 0.02


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_kl_through_a_paused_forward_keeps_the_probe_exact(lora, checkpointing):
    """A KL term is not proportional to the advantage; through a forward of its own it leaves the probe alone."""
    b = batch()
    advantages = advantages_of(b["scores"])
    target = torch.zeros_like(b["latents"])

    def kl():
        return 0.5 * (-log_prob(lora, {**b, "noise": target})).mean()

    probe = GradientProbe(lora, OBJECTIVES)
    expected = separate_backwards(
        lora, probe, lambda k: surrogate(lora, b, advantages if k is None else b["scores"][:, k])
    )
    transformer = lora.base_model.model
    transformer.enable_gradient_checkpointing() if checkpointing else transformer.disable_gradient_checkpointing()
    lora.train()
    lora.zero_grad()
    with probe.step():
        probe.rows(advantages, b["scores"])
        loss = surrogate(lora, b, advantages)
        with probe.paused():
            loss = loss + kl()
        loss.backward()
    transformer.disable_gradient_checkpointing()
    check(probe.result(), expected)
    apart = [p.grad.clone() for p in lora.parameters() if p.grad is not None]
    lora.zero_grad()
    with probe.step():
        probe.rows(advantages, b["scores"])
        (surrogate(lora, b, advantages) + kl()).backward()
    together = [p.grad for p in lora.parameters() if p.grad is not None]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert (probe.result().cosine - cosines(expected)[:3, :3]).abs().max() > 1e-3  # why it must be separate


def test_reduce_sums_gradients_over_ranks_before_the_products(lora):
    parts = [batch(4, seed) for seed in (3, 4)]
    probes = [GradientProbe(lora, OBJECTIVES) for _ in parts]
    whole = GradientProbe(lora, OBJECTIVES)
    for part, probe in zip(parts, probes, strict=True):
        advantages = advantages_of(part["scores"])
        for listener in (probe, whole):
            with listener.step():
                listener.rows(advantages, part["scores"])
                surrogate(lora, part, advantages).backward()
    waiting = [[probe._sums[name].clone() for name in probe.layer_names] for probe in probes]

    def reduce_from(rank):
        queue = iter([*waiting[1 - rank], torch.tensor([4.0])])
        return lambda mine: mine + next(queue)

    expected = whole.result()
    for rank, probe in enumerate(probes):
        result = probe.result(reduce_from(rank))
        torch.testing.assert_close(result.gramian, expected.gramian, rtol=1e-4, atol=1e-7)
        assert result.rows == expected.rows == 8


def _rank(rank: int, store: str, model: nn.Module, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ddp = nn.parallel.DistributedDataParallel(model)
    probe = GradientProbe(model, OBJECTIVES)
    part = batch(4, seed=3 + rank)
    advantages = advantages_of(part["scores"])
    with probe.step():
        probe.rows(advantages, part["scores"])
        surrogate(ddp, part, advantages).backward()

    def total(values: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(values)
        return values

    result = probe.result(total)
    queue.put((rank, result.cosine.tolist(), result.rows, torch.distributed.get_world_size()))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_under_ddp_see_the_gradients_of_the_whole_batch(lora, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(rank, tmp_path / "store", lora, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    parts = [batch(4, seed) for seed in (3, 4)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    advantages = advantages_of(whole["scores"])
    expected = separate_backwards(
        lora,
        GradientProbe(lora, OBJECTIVES),
        lambda k: surrogate(lora, whole, advantages if k is None else whole["scores"][:, k]),
    )
    for _rank_number, cosine, rows, world in found:
        assert world == 2 and rows == 8
        assert (torch.tensor(cosine) - cosines(expected)[:3, :3]).abs().max() < 1e-4


def test_halves_give_the_products_between_prompts(lora):
    b = batch()
    advantages = advantages_of(b["scores"])
    halves = torch.tensor([0, 0, 0, 1, 1, 1])
    probe = GradientProbe(lora, OBJECTIVES)
    whole = GradientProbe(lora, OBJECTIVES)
    for listener, given in ((probe, halves), (whole, None)):
        with listener.step():
            listener.rows(advantages, b["scores"], given)
            surrogate(lora, b, advantages).backward()
    parameters = [p for p in lora.parameters() if p.requires_grad]
    sides = []
    for half in (0, 1):
        rows = [
            torch.cat(
                [
                    part.flatten()
                    for part in torch.autograd.grad(
                        surrogate(lora, b, torch.where(halves == half, b["scores"][:, k], 0.0)), parameters
                    )
                ]
            ).double()
            for k in range(3)
        ]
        sides.append(torch.stack(rows))
    result, plain = probe.result(), whole.result()
    expected = sides[0] @ sides[1].T
    torch.testing.assert_close(result.cross, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(result.gramian, plain.gramian, rtol=1e-3, atol=1e-6)
    assert abs(result.harmony - plain.harmony) < 1e-4


def test_one_objective_is_its_own_direction(lora):
    b = batch()
    probe = GradientProbe(lora, ["only"])
    with probe.step():
        probe.rows(b["scores"][:, 0], b["scores"][:, :1])
        surrogate(lora, b, b["scores"][:, 0]).backward()
    assert probe.result().harmony == pytest.approx(1.0, abs=1e-6)


def test_an_objective_without_scores_has_no_cosine(lora):
    b = batch()
    scores = b["scores"].clone()
    scores[:, 1] = 0.0
    probe = GradientProbe(lora, OBJECTIVES)
    with probe.step():
        probe.rows(advantages_of(scores), scores)
        surrogate(lora, b, advantages_of(scores)).backward()
    result = probe.result()
    assert result.cosine[1].isnan().all() and result.cosine[0, 2].isfinite()
    assert result.harmony == result.harmony


@pytest.mark.parametrize(("tokens", "wide", "narrow"), [(64, 4, 8), (1, 16, 32)], ids=["many tokens", "one token"])
def test_both_ways_of_summing_agree(tokens, wide, narrow):
    g = torch.Generator().manual_seed(0)
    a, d = torch.randn(5, tokens, narrow, generator=g), torch.randn(5, tokens, wide, generator=g)
    c = torch.randn(5, 4, generator=g)
    expected = torch.einsum("rto,rti,rm->moi", d, a, c).flatten(1)
    torch.testing.assert_close(weighted_gradients(a, d, c), expected, rtol=1e-4, atol=1e-4)
    bias = torch.einsum("rto,rm->mo", d, c)
    torch.testing.assert_close(weighted_gradients(a, d, c, bias=True)[:, wide * narrow :], bias, rtol=1e-4, atol=1e-4)


def test_schedule():
    probe = GradientProbe(nn.Linear(2, 2), ["a"], every=10)
    assert [update for update in range(25) if probe.due(update)] == [0, 10, 20]


def test_what_the_user_is_told(lora):
    frozen = copy.deepcopy(tiny_transformer()).requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable linear layer"):
        GradientProbe(frozen, OBJECTIVES)
    probe = GradientProbe(lora, OBJECTIVES)
    with pytest.raises(ValueError, match=r"`scores` must have shape \[4, 3\]"):
        probe.rows(torch.ones(4), torch.ones(4, 2))
    with pytest.raises(RuntimeError, match="Call `rows` inside"), probe.step():
        surrogate(lora, batch(), torch.ones(ROWS)).backward()
    with pytest.raises(ValueError, match="Leave this layer out"), probe.step():
        probe.rows(torch.ones(4), torch.ones(4, 3))
        surrogate(lora, batch(), torch.ones(ROWS)).backward()
