"""Every objective's gradient, from the one backward that training does anyway."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..aggregation.conflict import cosines


@dataclass(frozen=True)
class ProbeResult:
    """What one optimizer step says about the objectives' gradients g_k, and the direction d that training takes."""

    gramian: Float[Tensor, "K K"]  # inner products of the g_k, float64
    cosine: Float[Tensor, "K K"]  # NaN where a gradient is zero
    harmony: float  # min_k cos(d, g_k): below 0, some objective gets worse to first order; NaN where all are zero
    cross: Float[Tensor, "K K"] | None  # inner products between the two halves of the prompts, where halves were given
    rows: int  # (sample, step) rows behind it, over all ranks


class GradientProbe:
    r"""Measures the objectives' gradients with hooks on linear layers.

    A group-relative policy gradient is linear in the advantages, and samples do not meet inside the network. So at a
    linear layer with inputs \(a_i\) and output gradients \(d_i\), which the training backward scales by row i's
    advantage \(A_i\), the gradient of objective k alone is

    $$g_k = \sum_i \frac{z_{ik}}{A_i}\, d_i^\top a_i$$

    No further backward is needed, where the textbook way costs K of them. A row whose ratio is clipped has
    \(d_i = 0\) and drops out by itself; one with \(|A_i|\) below `min_advantage` is left out.

    Args:
        model (`nn.Module`): what is trained, e.g. a PEFT model; not compiled.
        objectives (`list[str]`): names, in the order of the scores' columns.
        layers (`list[str]`, *optional*): regular expressions; a layer is probed if one of them is found in its name.
            By default all linear layers with a trainable weight: right for LoRA, costly for full fine-tuning, since a
            probed step holds K + 1 copies of every probed weight.
        every (`int`): optimizer steps between two probes.

    Raises:
        ValueError: if no trainable linear layer is found.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> probe = GradientProbe(model, ["a", "b"])
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> advantages, scores = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> with probe.step():
        ...     probe.rows(advantages, scores)
        ...     (-advantages * model(inputs)[:, 0]).mean().backward()
        >>> probe.result().cosine[0, 1].item()
        0.7071...

    Note:
        The rows must enter the loss through their advantage alone. A KL term breaks that: on a probed step, make its
        forward under [`paused`]; the gradients add up to the same.

        Works under gradient accumulation and checkpointing, autocast, DDP, DeepSpeed and FSDP, because it sees the layers'
        activations alone.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: list[str],
        layers: list[str] | None = None,
        every: int = 10,
        min_advantage: float = 1e-6,
    ) -> None:
        self.objectives, self.every, self.min_advantage = list(objectives), every, min_advantage
        self._layers = dict(_linear_layers(model, layers))
        if not self._layers:
            raise ValueError(
                f"The model must have a trainable linear layer{f' that matches {layers}' if layers else ''}. Found "
                "none. Pass `layers` that match the names of trainable linear layers, or build the probe after LoRA."
            )
        self._sums: dict[str, Tensor] = {}
        self._coefficients: Tensor | None = None
        self._halved = False
        self._count = 0
        self._paused = False

    @property
    def layer_names(self) -> list[str]:
        """The probed layers."""
        return list(self._layers)

    def due(self, update: int) -> bool:
        """Whether the optimizer step `update` (from 0) is to be probed."""
        return update % self.every == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Listen to the forward and backward of one micro-batch; call [`rows`] inside, before the backward."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._coefficients = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not listen to the forwards made inside, e.g. that of a KL term."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def rows(
        self, advantages: Float[Tensor, " R"], scores: Float[Tensor, "R K"], halves: Int[Tensor, " R"] | None = None
    ) -> None:
        """Say what the rows of this micro-batch are.

        Args:
            advantages: what the loss multiplies each row's log-probability with.
            scores: each objective's own, e.g. `aggregator.normalized` of the row's sample.
            halves: 0 or 1, the half that the row's *prompt* belongs to, for the cross-fitted population estimate.
        """
        size = len(self.objectives)
        if scores.ndim != 2 or scores.shape != (len(advantages), size):
            raise ValueError(
                f"`scores` must have shape [{len(advantages)}, {size}], one column per objective {self.objectives}. "
                f"Found {list(scores.shape)}. Pass the normalized scores of each row's sample."
            )
        scores, advantages = scores.detach().float(), advantages.detach().float()
        used = advantages.abs() > self.min_advantage
        ratios = torch.where(used[:, None], scores / torch.where(used, advantages, 1.0)[:, None], 0.0)
        self._halved = halves is not None
        first = torch.ones_like(used) if halves is None else halves == 0
        parts = [ratios * first[:, None], torch.ones_like(ratios[:, :1]), ratios * ~first[:, None]]
        self._coefficients = torch.cat(parts if self._halved else parts[:2], 1)
        self._count += int(used.sum())

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> ProbeResult | None:
        """What was measured since the last call, which this call forgets; None if nothing was.

        `reduce` sums a tensor over ranks, e.g. an all-reduce; then every rank must call.
        """
        sums, self._sums, count, self._count = self._sums, {}, self._count, 0
        if not sums:
            return None
        parts = []
        for name in self._layers:  # in the same order on every rank
            if name in sums:
                # Sum over ranks before the products: the product of sums is not the sum of products.
                gradients = sums.pop(name)
                gradients = reduce(gradients) if reduce else gradients
                parts.append((gradients @ gradients.T).cpu().double())  # float64 only there: some devices have none
        device = next(iter(self._layers.values())).weight.device
        counted = torch.tensor([count], dtype=torch.float32, device=device)
        rows = int(reduce(counted) if reduce else counted)
        return _summarize(torch.stack(parts).sum(0), len(self.objectives), self._halved, rows)

    def _hook(self, name: str):
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or not output.requires_grad:
                return None
            return _Listen.apply(output, arguments[0].detach(), self, name, not self._paused)

        return hook

    def _collect(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        coefficients = self._coefficients
        if coefficients is None:
            raise RuntimeError("GradientProbe: the rows must be known before the backward. Call `rows` inside `step`.")
        if len(gradient) % len(coefficients):
            raise ValueError(
                f"The first axis of every probed layer must be the rows, {len(coefficients)} or a multiple (for batched "
                f"guidance). Found {len(gradient)} in '{name}'. Leave this layer out with `layers`."
            )
        coefficients = coefficients.to(gradient.device).repeat(len(gradient) // len(coefficients), 1)
        layer = self._layers[name]
        parts = weighted_gradients(inputs, gradient, coefficients, layer.bias is not None and layer.bias.requires_grad)
        self._sums[name] = parts if name not in self._sums else self._sums[name].add_(parts)


class _Listen(torch.autograd.Function):
    """Identity that keeps a layer's input the way autograd keeps it, so that checkpointing recomputes it.

    A paused forward passes through here as well, with `listening` false: checkpointing repeats it when nothing is paused
    any more, and must find the same tensors saved. It is the first forward's graph that the backward runs through.
    """

    @staticmethod
    def forward(ctx, output: Tensor, inputs: Tensor, probe: GradientProbe, name: str, listening: bool) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.probe, ctx.name, ctx.listening = probe, name, listening
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inputs,) = ctx.saved_tensors
        if ctx.listening:
            ctx.probe._collect(ctx.name, inputs, gradient)
        return gradient, None, None, None, None


def weighted_gradients(
    inputs: Tensor, gradient: Tensor, coefficients: Float[Tensor, "R M"], bias: bool = False
) -> Float[Tensor, "M N"]:
    r"""Gradients `[M, out * in]` of a linear layer, float32, for M weightings c of its rows; with the bias `[M, out * in + out]`.

    $$g_m = \sum_i c_{im}\, d_i^\top a_i$$

    `inputs` is a `[R, ..., in]`, and `gradient` d `[R, ..., out]`, that of the layer's output.
    """
    rows, wide, narrow = len(gradient), gradient.shape[-1], inputs.shape[-1]
    d, a = gradient.float().reshape(rows, -1, wide), inputs.float().reshape(rows, -1, narrow)
    tokens, columns = d.shape[1], coefficients.shape[1]
    if 2 * wide * narrow <= columns * tokens * (wide + narrow):  # the rows' own gradients are smaller than M reads
        own = torch.bmm(d.transpose(1, 2), a)
        result = coefficients.T @ own.flatten(1)
    else:
        flat = a.flatten(0, 1)
        result = torch.stack(
            [((d * c[:, None, None]).flatten(0, 1).T @ flat).flatten() for c in coefficients.unbind(1)]
        )
    return torch.cat([result, coefficients.T @ d.sum(1)], 1) if bias else result


def _linear_layers(model: nn.Module, patterns: Iterable[str] | None) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        trainable = isinstance(module, nn.Linear) and module.weight.requires_grad
        if trainable and (patterns is None or any(re.search(pattern, name) for pattern in patterns)):
            yield name, module


def _summarize(products: Float[Tensor, "M M"], size: int, halved: bool, rows: int) -> ProbeResult:
    """Turn inner products of [objectives (of the first half of the prompts), direction, objectives of the second] into a result."""
    cross = None
    if halved:
        cross = products[:size, size + 1 :]
        merge = torch.eye(2 * size + 1, dtype=products.dtype)[: size + 1]  # a gradient is the sum of its halves
        merge[:size, size + 1 :] = torch.eye(size)
        products = merge @ products @ merge.T
    cosine = cosines(products)
    known = [value for value in cosine[size, :size].tolist() if value == value]
    return ProbeResult(products[:size, :size], cosine[:size, :size], min(known, default=math.nan), cross, rows)
