"""Configurations of well-known models, so that a plan needs neither their weights nor a connection.

Architectures as published in the `config.json` files of each model's components on the Hugging Face Hub, under the first
id of each entry (e.g. https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, folders `transformer`, `vae`,
`text_encoder*`); only what decides shapes is listed. Parameter counts in `tests/plan` guard against typing errors.
"""

from typing import Any

CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "max_position_embeddings": 77,
}  # fmt: skip
CLIP_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "max_position_embeddings": 77,
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
VAE_16 = {
    **VAE, "latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
SD35_LARGE = {
    **SD35_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "pos_embed_max_size": 192, "dual_attention_layers": [],
}  # fmt: skip
FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
UNET_15 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
UNET_XL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2, "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
DDIM = (
    "DDIMScheduler",
    {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
)  # fmt: skip

SD3_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
    "text_encoder_3": ("T5EncoderModel", T5_XXL),
}
# Pipeline class, and component name -> (class, configuration).
CONFIGS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", SD35_MEDIUM),
            "vae": ("AutoencoderKL", VAE_16),
            "scheduler": FLOW,
            **SD3_TEXT,
        },
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", SD35_LARGE),
            "vae": ("AutoencoderKL", VAE_16),
            "scheduler": FLOW,
            **SD3_TEXT,
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", FLUX_DEV),
            "vae": ("AutoencoderKL", {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("T5EncoderModel", T5_XXL),
        },
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {
            "unet": ("UNet2DConditionModel", UNET_15),
            "vae": ("AutoencoderKL", VAE),
            "scheduler": DDIM,
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", UNET_XL),
            "vae": ("AutoencoderKL", {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
            "scheduler": DDIM,
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
    ),
}
SHORT_NAMES = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
