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


def backwards(parameters, losses) -> torch.Tensor:
    """The gradient of each loss, one row each."""
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    return torch.stack([torch.cat([part.flatten() for part in gradient]).double() for gradient in gradients])


def separate_backwards(model, probe, b, advantages=None, loss_of=surrogate) -> torch.Tensor:
    """Gram matrix by the textbook way: one backward per objective, over the same parameters, and the direction."""
    modules = dict(model.named_modules())
    parameters = [p for name in probe.layer_names for p in modules[name].parameters() if p.requires_grad]
    advantages = advantages_of(b["scores"]) if advantages is None else advantages
    rows = backwards(parameters, (loss_of(model, b, weights) for weights in (*b["scores"].T, advantages)))
    return rows @ rows.T


def probe_step(probe, model, b, advantages=None, halves=None, loss_of=surrogate) -> None:
    """The training backward that the probe listens to."""
    advantages = advantages_of(b["scores"]) if advantages is None else advantages
    with probe.step():
        probe.rows(advantages, b["scores"], halves)
        loss_of(model, b, advantages).backward()


def joined(parts):
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def set_checkpointing(lora, on) -> None:
    transformer = lora.base_model.model
    transformer.enable_gradient_checkpointing() if on else transformer.disable_gradient_checkpointing()


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
    set_checkpointing(lora, checkpointing)
    lora.train()
    probe = GradientProbe(lora, OBJECTIVES)
    assert len(probe.layer_names) >= 14
    expected = separate_backwards(lora, probe, b)
    lora.zero_grad()
    probe_step(probe, lora, b)
    set_checkpointing(lora, False)
    check(probe.result(), expected)


def test_leaves_the_training_gradient_alone(lora):
    b = batch()
    gradients = []
    for probed in (False, True):
        lora.zero_grad()
        if probed:
            probe_step(GradientProbe(lora, OBJECTIVES), lora, b)
        else:
            surrogate(lora, b, advantages_of(b["scores"])).backward()
        gradients.append([p.grad.clone() for p in lora.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(module._forward_hooks for module in lora.modules() if isinstance(module, nn.Linear))


def test_micro_batches_accumulate(lora):
    parts = [batch(4, seed) for seed in (1, 2)]
    probe = GradientProbe(lora, OBJECTIVES)
    for part in parts:
        probe_step(probe, lora, part, loss_of=lambda *given: surrogate(*given) / 2)
    result = probe.result()
    check(result, separate_backwards(lora, probe, joined(parts)))
    assert result.rows == 8
    assert probe.result() is None  # forgotten


def test_several_steps_of_a_sample_and_batched_guidance(lora):
    """Rows are (sample, step) pairs; with guidance in one forward the rows come twice."""
    b = batch()
    b["scores"] = b["scores"][[0, 0, 1, 1, 2, 2]]
    double = {key: torch.cat([b[key], b[key]]) for key in b}
    double["text"] = torch.cat([torch.zeros_like(b["text"]), b["text"]])

    def loss_of(model, b, advantages):
        out = model(
            hidden_states=double["latents"],
            timestep=double["timestep"],
            encoder_hidden_states=double["text"],
            pooled_projections=double["pooled"],
            return_dict=False,
        )[0]
        without, with_prompt = out.chunk(2)
        guided = without + 3.0 * (with_prompt - without)
        now = -((guided - b["noise"]) ** 2).flatten(1).mean(1)
        return -(now * advantages).mean()

    probe = GradientProbe(lora, OBJECTIVES)
    probe_step(probe, lora, b, loss_of=loss_of)
    check(probe.result(), separate_backwards(lora, probe, b, loss_of=loss_of))


def test_clipped_and_tiny_rows_are_left_out(lora):
    b = batch()
    advantages = advantages_of(b["scores"]).abs() + 0.1
    advantages[0] = 0.0
    drift = torch.zeros(ROWS)
    drift[1] = 0.5  # the ratio is above the clip range, with a positive advantage
    probe = GradientProbe(lora, OBJECTIVES)
    probe_step(probe, lora, b, advantages, loss_of=lambda *given: surrogate(*given, drift))
    result = probe.result()
    rest = {key: b[key][2:] for key in b}
    share = (ROWS - 2) / ROWS
    check(result, separate_backwards(lora, probe, rest, advantages[2:], lambda *given: surrogate(*given) * share))
    assert result.rows == ROWS - 1


def test_full_fine_tuning_of_chosen_layers():
    model, b = tiny_transformer(), batch()
    probe = GradientProbe(model, OBJECTIVES, layers=[r"attn\.to_(q|out)", r"ff\.net\.2$"])
    assert 0 < len(probe.layer_names) < 12
    probe_step(probe, model, b)
    check(probe.result(), separate_backwards(model, probe, b))


def test_under_autocast_the_cosines_stay_close(lora):
    b = batch()
    probe = GradientProbe(lora, OBJECTIVES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = separate_backwards(lora, probe, b)
        probe_step(probe, lora, b)
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
    expected = separate_backwards(lora, probe, b)
    set_checkpointing(lora, checkpointing)
    lora.train()
    lora.zero_grad()
    with probe.step():
        probe.rows(advantages, b["scores"])
        loss = surrogate(lora, b, advantages)
        with probe.paused():
            loss = loss + kl()
        loss.backward()
    set_checkpointing(lora, False)
    check(probe.result(), expected)
    apart = [p.grad.clone() for p in lora.parameters() if p.grad is not None]
    lora.zero_grad()
    probe_step(probe, lora, b, loss_of=lambda *given: surrogate(*given) + kl())
    together = [p.grad for p in lora.parameters() if p.grad is not None]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert (probe.result().cosine - cosines(expected)[:3, :3]).abs().max() > 1e-3  # why it must be separate


def test_reduce_sums_gradients_over_ranks_before_the_products(lora):
    parts = [batch(4, seed) for seed in (3, 4)]
    probes = [GradientProbe(lora, OBJECTIVES) for _ in parts]
    whole = GradientProbe(lora, OBJECTIVES)
    for part, probe in zip(parts, probes, strict=True):
        for listener in (probe, whole):
            probe_step(listener, lora, part)
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
    probe_step(probe, ddp, batch(4, seed=3 + rank))

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
    expected = separate_backwards(lora, GradientProbe(lora, OBJECTIVES), joined([batch(4, seed) for seed in (3, 4)]))
    for _rank_number, cosine, rows, world in found:
        assert world == 2 and rows == 8
        assert (torch.tensor(cosine) - cosines(expected)[:3, :3]).abs().max() < 1e-4


def test_halves_give_the_products_between_prompts(lora):
    b, halves = batch(), torch.tensor([0, 0, 0, 1, 1, 1])
    probe, whole = GradientProbe(lora, OBJECTIVES), GradientProbe(lora, OBJECTIVES)
    probe_step(probe, lora, b, halves=halves)
    probe_step(whole, lora, b)
    parameters = [p for p in lora.parameters() if p.requires_grad]
    masked = [[torch.where(halves == half, scores, 0.0) for scores in b["scores"].T] for half in (0, 1)]
    first, second = (backwards(parameters, (surrogate(lora, b, weights) for weights in side)) for side in masked)
    result, plain = probe.result(), whole.result()
    expected = first @ second.T
    torch.testing.assert_close(result.cross, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(result.gramian, plain.gramian, rtol=1e-3, atol=1e-6)
    assert abs(result.harmony - plain.harmony) < 1e-4


def test_one_objective_is_its_own_direction(lora):
    b = batch()
    b["scores"] = b["scores"][:, :1]
    probe = GradientProbe(lora, ["only"])
    probe_step(probe, lora, b, b["scores"][:, 0])
    assert probe.result().harmony == pytest.approx(1.0, abs=1e-6)


def test_an_objective_without_scores_has_no_cosine(lora):
    b = batch()
    b["scores"][:, 1] = 0.0
    probe = GradientProbe(lora, OBJECTIVES)
    probe_step(probe, lora, b)
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
