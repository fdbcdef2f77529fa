"""Whether a run learns at all: a few numbers an iteration that cost one small forward, and one warning each."""

import logging
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..diffusion.nouns import Rollout
from ..diffusion.rollout import INITIAL_NOISE, guided_prediction, keyed_noise
from ..distributed import gather_rows, local_shard, named_trainable

logger = logging.getLogger(__name__)

LIMITS = {"drift/mean_pixel": 0.15, "drift/latent_rms": 0.25, "drift/velocity_rms": 0.25}
"""Distance from the first iteration above which a drift is warned about: of the mean in [0, 1], relative for the others."""
LOWEST = 4.0
"""Ranges of the first iterations below the median, beyond which an iteration's lowest reward is warned about."""
DEAD_ITERATIONS, DEAD_SHARE = 8, 0.5
PATIENCE = 3
"""Iterations without any score after which an objective is named in a warning, and whose rewards others are compared with."""
SKETCH = 64
"""Numbers of the velocity that are kept to compare with, at most."""


class LearningDetectors(TrainerCallback):
    """Warns of a run that learns nothing, or something other than the reward. In a sound run

    - every objective scores some image, and most iterations have an advantage;
    - no image has a reward far below those of the first iterations;
    - the denoiser that samples gives another velocity for the same noise once its weights have changed;
    - the importance ratio of a first update is 1, up to rounding;
    - pixels, latents and velocities keep the size that they had in the first iteration.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._first: dict[str, float] = {}  # of the run's first iteration
        self._sketch: list[float] | None = None  # of the velocity in the last rollout
        self._ranges: dict[str, list[float]] = {}  # of each objective's rewards in the first iterations
        self._warned: set[str] = set()
        self._dead: deque[bool] = deque(maxlen=DEAD_ITERATIONS)
        self._scored: list[Tensor] = []  # of the first iterations, which objectives had a score
        self._ratios: list[Tensor] = []  # of the first update in progress
        self._probe: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None  # latent, timestep, embeddings
        self._velocity: Tensor | None = None
        self._weights: Tensor | None = None
        self._weights_changed = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": self._first,
            "ranges": self._ranges,
            "sketch": self._sketch,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state["warned"], list):
            raise TypeError(f"`warned` must be a list. Found {state['warned']!r}.")
        self._first = {name: float(value) for name, value in state["first"].items()}
        self._ranges = {name: list(map(float, values)) for name, values in state.get("ranges", {}).items()}
        self._sketch = None if state["sketch"] is None else [float(value) for value in state["sketch"]]
        self._warned = set(state["warned"])

    # Is there anything to learn from?

    def see_rewards(self, rewards: Tensor) -> None:
        """Take in an iteration's rewards `[B, K]`: warn of an objective that had no score in the first ones."""
        if len(self._scored) == PATIENCE:
            return
        self._scored.append(rewards.isfinite().any(0))
        for name, scored in zip(self.trainer.reward_func_names, torch.stack(self._scored).any(0), strict=True):
            if len(self._scored) == PATIENCE and not scored:
                self._warn(
                    f"unscored/{name}",
                    f"The reward {name!r} has scored no image in {PATIENCE} iterations, so nothing is learned from it. It "
                    "returns None or fails for every prompt: check the column it reads and the prompts it applies to.",
                )

    # Does the adapter reach the rollout?

    def on_train_begin(self, args, state, control, **kwargs):
        self._weights, self._weights_changed = None, False

    def note_weights(self) -> None:
        """Remember the norms of the trained weights that this rank holds, before a rollout gathers them."""
        shards = [local_shard(p) for _, p in named_trainable(self.trainer.model)]
        norms = torch.stack([shard.float().norm() for shard in shards]).cpu()
        self._weights_changed = self._weights is not None and not torch.equal(norms, self._weights)
        self._weights = norms

    def probe_velocity(self) -> None:
        """Predict the velocity of a kept latent with the model that samples; every rank calls it once a rollout."""
        trainer = self.trainer
        model = trainer._rollout_model()
        if self._probe is None:
            self._probe = self._kept_input()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            guidance = trainer.args.guidance_scale
            self._velocity = guided_prediction(trainer.policy, model, *self._probe, None, guidance).flatten()
        model.train(was_training)

    def _kept_input(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The first step of the first training prompt, the same in every iteration, on every rank and after a resume."""
        trainer = self.trainer
        device = trainer.accelerator.device
        first = trainer.train_dataset[0]
        shape = trainer.policy.latent_shape(*trainer._size_of(first))
        noise = keyed_noise([(trainer.args.seed, INITIAL_NOISE, 0, 0)], shape)
        timestep = trainer.sampler.timesteps(torch.zeros(1, dtype=torch.long)).to(device)
        embeddings = trainer._conditions(trainer._conditions.keys([first], [trainer._size_of(first)]))
        return trainer.policy.scale_initial_noise(noise).to(device), timestep, embeddings

    # Is the first update on-policy?

    def watch_ratio(self, ratio: Tensor) -> None:
        """Take in the importance ratios of a micro-batch of an iteration's first update."""
        self._ratios.append((ratio.detach() - 1).abs().max())

    def on_step_end(self, args, state, control, **kwargs):
        if not self._ratios:
            return
        deviation = gather_rows(torch.stack(self._ratios).max()[None]).max().item()
        self._ratios = []
        trainer = self.trainer
        trainer._metrics["train"]["ratio/first_update_deviation"].append(deviation)
        limit = min(trainer.epsilon_low, trainer.epsilon_high) / 4
        if deviation > limit:
            modules = trainer.model.named_modules()
            dropout = next((name for name, m in modules if isinstance(m, nn.Dropout) and m.p > 0), None)
            because = f"Dropout is active in {dropout}: set disable_dropout=True. " if dropout else ""
            self._warn(
                "ratio",
                f"On the first update of an iteration the importance ratio must be 1. Found a distance of {deviation:.2g}, "
                f"more than a quarter of epsilon={trainer.args.epsilon:g}, with guidance_scale={trainer.args.guidance_scale:g} "
                f"and mixed precision {trainer.accelerator.mixed_precision!r}: rows are clipped for no reason. {because}Raise "
                "`epsilon`, lower `guidance_scale`, or use equal batch sizes in rollout and update.",
            )

    # Does something else move than the reward?

    def see_rollout(self, rollouts: list[Rollout], rewards: Tensor, advantages: Tensor) -> None:
        """Compare an iteration with earlier ones: `rewards` `[B, K]` and `advantages` of all ranks, the rollouts of this one."""
        assert self._velocity is not None, "probed in the rollout"
        velocity = self._velocity.float()
        pixel = torch.cat([r.images.float().mean((1, 2, 3)) for r in rollouts]).mean()
        power = torch.cat([r.latents.float().square().mean((1, 2, 3)) for r in rollouts]).mean()
        changed = torch.full_like(pixel, float(self._weights_changed))
        numbers = torch.stack([pixel, power, changed, velocity.square().mean().sqrt()])
        ranks = gather_rows(torch.cat([numbers, velocity[:: -(-len(velocity) // SKETCH)]])[None]).cpu()
        pixel, power, changed = ranks[:, :3].double().mean(0).tolist()
        self._drift("drift/mean_pixel", pixel)
        self._drift("drift/latent_rms", power**0.5, relative=True)
        self._drift("drift/velocity_rms", ranks[0, 3].item(), relative=True)
        for name, column in zip(self.trainer.reward_func_names, rewards.double().T, strict=True):
            self._see_lowest(name, column[column.isfinite()])
        self._compare_velocity(ranks[0, 4:], bool(changed))
        self._dead.append(bool((advantages == 0).all()))
        dead = sum(self._dead)
        if dead >= DEAD_SHARE * DEAD_ITERATIONS:
            self._warn(
                "dead",
                f"In {dead} of the last {len(self._dead)} iterations every advantage was 0, so nothing was learned from them. "
                "The rewards score the images of each prompt alike: use a graded reward, more images a prompt, or more "
                "`noise_level`.",
            )

    def _compare_velocity(self, sketch: Tensor, weights_changed: bool) -> None:
        before, self._sketch = self._sketch, sketch.tolist()
        if before is None or len(before) != len(sketch):
            return
        change = ((sketch - torch.tensor(before)).norm() / sketch.norm().clamp(min=1e-12)).item()
        self.trainer._metrics["train"]["velocity_change"].append(change)
        learned = not (self._dead and self._dead[-1])  # else only weight decay moved the weights
        if change == 0 and weights_changed and learned:
            self._warn(
                "velocity",
                "The trained weights changed, but the same noise gives the same velocity: the denoiser that samples does not see "
                "the update, so nothing can be learned. Look for a second copy of the model, an adapter that is not active, or "
                "a compiled or merged one that keeps old weights.",
            )

    def _drift(self, name: str, value: float, relative: bool = False) -> None:
        first = self._first.setdefault(name.removeprefix("drift/").removesuffix("_rms"), value)
        distance = (value / first - 1 if first else 0.0) if relative else value - first
        self.trainer._metrics["train"][name].append(distance)
        if abs(distance) > LIMITS[name]:
            what = name.removeprefix("drift/").replace("_", " ")
            self._warn(
                name,
                f"The {what} has drifted from {first:.3g} in the first iteration to {value:.3g}. Look at the images: this often "
                "comes before they collapse. `beta` > 0, a lower learning rate or a held-out reward in `monitor_funcs` help.",
            )

    def _see_lowest(self, name: str, scores: Tensor) -> None:
        if len(scores) < 2:
            return
        lowest, highest = (extreme.item() for extreme in scores.aminmax())
        ranges = self._ranges.setdefault(name, [])
        if len(ranges) < PATIENCE:
            ranges.append(highest - lowest)
        elif not any(ranges):  # nothing to compare with yet
            ranges.clear()
        else:
            median = scores.median().item()
            depth = (median - lowest) / max(ranges)
            self.trainer._metrics["train"][f"drift/lowest/{name}"].append(depth)
            if depth > LOWEST:
                self._warn(
                    f"drift/lowest/{name}",
                    f"The lowest reward of {name!r} is {lowest:.3g}, where half of the images have {median:.3g} or more. In the "
                    f"first {PATIENCE} iterations all rewards lay within {max(ranges):.2g}. A few images have broken, and more may "
                    "follow. Look at them, and keep the best checkpoint (save_strategy='best'). `beta` > 0, a lower learning "
                    "rate or more prompts an iteration help.",
                )

    def _warn(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            if self.trainer.is_world_process_zero():
                logger.warning("%s", text)
