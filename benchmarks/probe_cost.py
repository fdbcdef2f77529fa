"""What the gradient probe costs, against a plain training step and against one backward per objective.

    python benchmarks/probe_cost.py [--smoke] [--out benchmarks/results]

On SD3 transformers with LoRA, with the loss of a group-relative policy gradient. In every round all kinds of step are
run one after another, in a changing order, and each is compared with the plain step of its own round; the median ratio
over rounds is reported, with its quartiles. Seconds are the processor's, on one thread, so that a busy machine hardly
shows. `every 10th` is what training pays on average.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _bench import arguments, table, write
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.trainers.probe import GradientProbe

OBJECTIVES = ["ocr", "pickscore", "deqa", "aesthetic"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MODELS: dict[str, dict[str, int]] = {
    "tiny world": {"rank": 8, "text": 24, "rows": 16},
    "100M": {"rank": 32, "text": 32, "rows": 2},
}


def transformer(name: str) -> SD3Transformer2DModel:
    """The tiny world's transformer, or a mid-size one of the same family."""
    if name == "tiny world":
        return build_pipeline(0).transformer
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=10,
        joint_attention_dim=640,
        caption_projection_dim=640,
        pooled_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=32,
    )


def adapted(base: SD3Transformer2DModel, rank: int) -> nn.Module:
    """The transformer with LoRA on its attention, B not zero."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ATTENTION))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


class Steps:
    """The kinds of step that are compared, on one model and batch."""

    def __init__(self, model: nn.Module, config: Any, rows: int, text: int) -> None:
        g = torch.Generator().manual_seed(1)
        side = config.sample_size
        self.model = model
        self.inputs = {
            "hidden_states": torch.randn(rows, 16, side, side, generator=g),
            "timestep": 1000 * torch.rand(rows, generator=g),
            "encoder_hidden_states": torch.randn(rows, text, config.joint_attention_dim, generator=g),
            "pooled_projections": torch.randn(rows, config.pooled_projection_dim, generator=g),
        }
        self.action = torch.randn(rows, 16, side, side, generator=g)
        self.scores = torch.randn(rows, len(OBJECTIVES), generator=g)
        self.advantages = self.scores @ torch.tensor([0.4, 0.3, 0.2, 0.1])
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)

    def log_prob(self) -> Tensor:
        output = self.model(**self.inputs, return_dict=False)[0]
        return -((output - self.action) ** 2).flatten(1).mean(1)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain(self) -> None:
        (-self.advantages * self.log_prob()).mean().backward()
        self.update()

    def probed(self, probe: GradientProbe) -> Tensor:
        with probe.step():
            probe.rows(self.advantages, self.scores)
            (-self.advantages * self.log_prob()).mean().backward()
        result = probe.result()
        self.update()
        assert result is not None
        return result.cosine

    def textbook(self) -> Tensor:
        """One backward per objective, then the training backward."""
        log_prob = self.log_prob()
        rows = []
        for k in range(len(OBJECTIVES)):
            loss = (-self.scores[:, k] * log_prob).mean()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.trained, retain_graph=True)]))
        (-self.advantages * log_prob).mean().backward()
        self.update()
        gradients = torch.stack(rows).double()
        gramian = gradients @ gradients.T
        size = gramian.diagonal().sqrt()
        return gramian / torch.outer(size, size)


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Ratios of the step times on one model."""
    settings = MODELS[name]
    base = transformer(name)
    tokens = (base.config.sample_size // base.config.patch_size) ** 2 + settings["text"]
    model = adapted(base, settings["rank"])
    steps = Steps(model, base.config, settings["rows"], settings["text"])
    every = GradientProbe(model, OBJECTIVES)
    some = GradientProbe(model, OBJECTIVES, layers=[r"to_(add_)?out.*lora_B"])
    kinds: dict[str, Callable[[], Any]] = {
        "plain": steps.plain,
        "probe, all LoRA layers": lambda: steps.probed(every),
        "probe, B of attention outputs": lambda: steps.probed(some),
        "one backward per objective": steps.textbook,
    }
    exact = steps.textbook()
    errors = {kind: float((call() - exact).abs().max()) for kind, call in list(kinds.items())[1:]}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = list(kinds)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for kind in order:
            start = time.process_time()
            kinds[kind]()
            seconds[kind].append(time.process_time() - start)
    rows = []
    for kind in kinds:
        ratios = [mine / plain for mine, plain in zip(seconds[kind], seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append({
            "step": kind,
            "seconds": statistics.median(seconds[kind]),
            "ratio": middle,
            "quartiles": [low, high],
            "every_10th": 1 + (middle - 1) / 10,
            "cosine_error": errors.get(kind),
        })  # fmt: skip
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in steps.trained)
    return {
        "model": name,
        "parameters": total,
        "trained": trained,
        "layers": len(every.layer_names),
        "tokens": tokens,
        "rows": settings["rows"],
        "rounds": rounds,
        "steps": rows,
    }


def markdown(found: list[dict[str, Any]]) -> str:
    """One table per model."""
    text = ""
    head = ["step", "CPU seconds", "against plain", "quartiles", "on every 10th", "max cosine error"]
    for model in found:
        lines = []
        for row in model["steps"]:
            low, high = row["quartiles"]
            error = "" if row["cosine_error"] is None else f"{row['cosine_error']:.1e}"
            numbers = (
                f"{row['seconds']:.3f}",
                f"{row['ratio']:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{row['every_10th']:.3f}",
            )
            lines.append([row["step"], *numbers, error])
        text += (
            f"\n{model['model']}: {model['parameters'] / 1e6:.1f}M parameters, {model['trained'] / 1e6:.2f}M of LoRA in "
            f"{model['layers']} matrices, {model['rows']} rows of {model['tokens']} tokens, {model['rounds']} rounds\n\n"
            f"{table(head, lines)}\n"
        )
    return text


def main() -> None:
    rounds = {"type": int, "nargs": 2, "default": [60, 12], "help": "on the tiny and the 100M model"}
    given = arguments(__doc__, "one round on the tiny model", rounds=rounds).parse_args()
    torch.set_num_threads(1)
    plan = {"tiny world": 1} if given.smoke else dict(zip(MODELS, given.rounds, strict=True))
    found = [compare(name, rounds) for name, rounds in plan.items()]
    made = markdown(found)
    print(made)
    result = {"settings": {"torch": torch.__version__, "threads": 1, "dtype": "float32"}, "models": found}
    write(given.out / "probe_cost.json", result, made)


if __name__ == "__main__":
    main()
