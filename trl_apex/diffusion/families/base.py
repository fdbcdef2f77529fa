"""What a family of pipelines defines: how prompts are encoded, the denoiser is called and latents are decoded."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..nouns import Embeddings, Latents, PerRow, Schedule

DECODE_PIXELS = 1024 * 1024
"""Pixels that the VAE decodes at a time: four images of 512 x 512, one of 1024 x 1024."""


class DiffusionPolicy(ABC):
    """One text-to-image pipeline seen as a policy.

    The denoiser (the part that is trained) belongs to the trainer; everything else in the pipeline (text encoders, VAE,
    scheduler) is frozen and stays here. A new model family is one subclass in one file; `docs/models.md` walks through it.
    """

    denoiser_name: ClassVar[str] = "transformer"
    """Name of the trained component in the pipeline."""
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    """Names of the components that only prompts need, and that may be unloaded once these are encoded."""
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    """Those of `encoder_names` that the pipeline works without."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Default LoRA target modules of the denoiser."""
    transitions: ClassVar[tuple[str, ...]] = ("flow_sde", "cps")
    """Kinds of stochastic step that suit the schedule; the first is the default."""
    training_size: ClassVar[int | None] = None
    """Default height and width in pixels where the model's own size is larger; None for the model's own."""
    edits: ClassVar[bool] = False
    """Whether the model edits a source image: `encode` then gets instructions that hold one, `trl_apex.prompts.datasets.Edit`."""
    compute_dtype: torch.dtype | None = None
    """What an engine computes in, where it keeps the weights in another dtype."""
    batched_guidance: bool = True
    """Whether `guidance_scale > 1` means a second, unconditional prediction (False: the model is told the scale)."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)

    def check(self) -> None:
        """Raise a ValueError for a pipeline whose components cannot sample or train."""
        encoders = [name for name in self.encoder_names if name not in self.optional_encoders]
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        needed = {"scheduler", "vae", "processor", self.denoiser_name, *encoders, *tokenizers}
        for name, component in self.pipeline.components.items():
            if component is None and name in needed:
                raise ValueError(
                    f"A {type(self.pipeline).__name__} must be loaded with all that it samples with. Found `{name}` None. "
                    f"Load the pipeline without `{name}=None`."
                )
            if isinstance(component, nn.Module) and any(p.is_meta for p in component.parameters()):
                raise ValueError(
                    f"The weights of a pipeline must be in memory. Found `{name}` on the meta device, as sequential CPU "
                    "offload leaves it. Load the pipeline without `enable_sequential_cpu_offload()` or a `device_map`."
                )
        self.check_scheduler(self.pipeline.scheduler)

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise a ValueError for a scheduler whose grid or steps are not those of the family's transitions."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        found = type(scheduler).__name__
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            options = [name for name in ("invert_sigmas", "stochastic_sampling") if scheduler.config.get(name)]
            if not options:
                return
            found += f" with {' and '.join(f'{name}=True' for name in options)}"
        raise ValueError(
            f"The scheduler of a {type(self.pipeline).__name__} must be a FlowMatchEulerDiscreteScheduler, without inverted "
            f"sigmas and stochastic sampling. Found {found}. Load the model's own with "
            "`FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder='scheduler')`."
        )

    @property
    def denoiser(self) -> Any:
        """The trained component, an `nn.Module` with diffusers' `config`."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser's own weights are in, and so its inputs; timesteps stay float32, as in the pipelines."""
        stored = (p.dtype for p in self.denoiser.parameters() if p.is_floating_point())  # quantized ones are not
        return self.compute_dtype or next(stored)

    @property
    def vae_scale_factor(self) -> int:
        return self.pipeline.vae_scale_factor

    @property
    def quantized(self) -> bool:
        """Whether diffusers quantized the denoiser's weights when it loaded them."""
        return getattr(self.denoiser, "is_quantized", False)

    @property
    def distilled(self) -> bool:
        """Whether the pipeline's configuration says that the model was distilled to few steps."""
        return False

    def move_frozen(self, device: torch.device) -> None:
        """Move everything but the denoiser to `device`."""
        for name, component in self.pipeline.components.items():
            if name != self.denoiser_name and isinstance(component, nn.Module):
                component.to(device)

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels where the user gives none: the model's own, or `training_size` if that is smaller."""
        size = min(self.native_size(), self.training_size or self.native_size())
        return size, size

    def native_size(self) -> int:
        """Height and width in pixels that the denoiser was made for."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one latent for an image of `height` x `width` pixels."""
        factor = self.size_multiple()
        if height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` must be multiples of {factor} pixels for {type(self.pipeline).__name__}. "
                f"Found {height} x {width}. Use {height // factor * factor or factor} x {width // factor * factor or factor}."
            )
        return self.latent_channels(), height // self.vae_scale_factor, width // self.vae_scale_factor

    def size_multiple(self) -> int:
        """Pixels that height and width must be multiples of."""
        return self.vae_scale_factor

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def scale_initial_noise(self, noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Scale unit noise to what the schedule starts from."""
        return noise

    @abstractmethod
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        """Encode prompts; tensors of shape `[B, ...]` keyed by what [`predict`] passes on.

        Of a model that edits, `"source"` is the latents of the image, and a name that begins with `negative_` holds what
        the unconditional branch gets of the same image.
        """

    def encode_negative(self, prompt: str, max_sequence_length: int) -> Embeddings:
        """Encode the prompt of the unconditional branch; tensors of shape `[1, ...]`."""
        return self.encode([prompt], max_sequence_length)

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        """The noise grid of `num_steps` steps for images of `height` x `width` pixels; here from even levels, by the scheduler."""
        _, rows, columns = self.latent_shape(height, width)
        patch = self.size_multiple() // self.vae_scale_factor
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return flow_schedule(self.pipeline.scheduler, num_steps, rows * columns // patch**2, sigmas)

    @abstractmethod
    def predict(
        self, model: nn.Module, latents: Latents, timesteps: PerRow, embeddings: Embeddings, guidance_scale: float
    ) -> Latents:
        """One forward of `model`, unguided: the velocity `noise - image` (flows), or the noise or v (DDIM)."""

    def guide(self, without: Latents, with_prompt: Latents, guidance_scale: float) -> Latents:
        """Classifier-free guidance from the unconditional prediction and the prompt's."""
        return without + guidance_scale * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Decode latents into images in [0, 1], float32, at most `DECODE_PIXELS` at a time.

        A float16 VAE whose configuration says `force_upcast` (SDXL's overflows) decodes in float32.
        """
        vae = self.pipeline.vae
        own_dtype = vae.dtype
        upcast = own_dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        pixels = latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2
        try:
            if upcast:
                vae.float()
            chunks = latents.split(max(1, DECODE_PIXELS // pixels))
            images = [(self.decode_by_vae(chunk).float() / 2 + 0.5).clamp(0, 1) for chunk in chunks]
        finally:
            if upcast:
                vae.to(own_dtype)
        return torch.cat(images)

    def decode_by_vae(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Images in [-1, 1], in the VAE's dtype; here its configuration's scale and shift are undone."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


JOINT_ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
"""LoRA targets of the transformers that attend to image and text together (SD3, FLUX, Qwen-Image)."""


def flow_schedule(
    scheduler: Any, num_steps: int, tokens: int, sigmas: Any = None, shift: float | None = None
) -> Schedule:
    """The grid of a `FlowMatchEulerDiscreteScheduler`, which is left as it is.

    Dynamic shifting depends on `tokens`, the patches of an image, unless `shift` is given. `sigmas` are levels before shifting.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = type(scheduler).from_config(scheduler.config)
    config, kwargs = scheduler.config, {} if sigmas is None else {"sigmas": sigmas}
    if config.use_dynamic_shifting:
        bounds = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        kwargs["mu"] = calculate_shift(tokens, *bounds) if shift is None else shift
    scheduler.set_timesteps(num_steps, device="cpu", **kwargs)
    return Schedule(scheduler.sigmas.float(), scheduler.timesteps.float())
