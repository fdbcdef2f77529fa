"""Pipelines of every supported family at toy size, with random weights and real classes."""

from unittest.mock import patch

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from trl_apex.prompts.datasets import edits_of
from trl_apex.tiny.pipeline import PROMPT_VOCABULARY, build_tokenizer, token_ids


def vae(channels: int, shift: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.3,
        shift_factor=shift,
    )


def clip(projected: bool, width: int = 16):
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        **token_ids(tokenizer),
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int):
    return T5EncoderModel(T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def chat_tokenizer(*images: str) -> PreTrainedTokenizerFast:
    """Words, single capitals and line ends, so that Qwen-Image's instruction has its 34 tokens; a chat is the user's words."""
    special = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *images)
    ids = {token: index for index, token in enumerate((*special, "\n", *PROMPT_VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words = Regex(r"\n|[A-Z](?![a-z])|[A-Z]?[a-z]+|\S")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *images],
        chat_template="{% set words = messages[-1].content %}{{ words if words is string else words[0].text }}",
        padding_side="right",
    )


LANGUAGE_MODEL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def sd3(dual: bool = True) -> StableDiffusion3Pipeline:
    """SD3.5-medium-shaped: dual attention in the first layer, qk-norm, three encoders, 16 channels, a shift."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 0.06),
        text_encoder=clip(True),
        tokenizer=build_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=build_tokenizer(begin=False),
    )


def flux(cls=FluxPipeline) -> FluxPipeline | FluxKontextPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return cls(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(4, 0.1),
        text_encoder=clip(False),
        tokenizer=build_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=build_tokenizer(begin=False),
    )


def qwen_image(edits: bool = False) -> QwenImagePipeline | QwenImageEditPlusPipeline:
    """The scheduler stretches its shifted grid to end at a given noise level, as the published one."""
    vision_tokens = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = chat_tokenizer(*vision_tokens) if edits else chat_tokenizer()
    text = {**LANGUAGE_MODEL, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    extra = {}
    if edits:
        config.vision_start_token_id, config.image_token_id, config.vision_end_token_id = 4, 5, 6
        images = Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=56**2)
        with patch.object(Qwen2VLProcessor, "check_argument_for_proper_class"):  # of videos, which needs torchvision
            extra["processor"] = Qwen2VLProcessor(images, tokenizer)
    return (QwenImageEditPlusPipeline if edits else QwenImagePipeline)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.2, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        **extra,
    )


def qwen3(cls=Qwen3ForCausalLM, layers: int = 27):
    return cls(Qwen3Config(**{**LANGUAGE_MODEL, "num_hidden_layers": layers, "head_dim": 8}))


def flux2(klein: bool = True, distilled: bool = False) -> Flux2Pipeline | Flux2KleinPipeline:
    """The deepest layer of the language model that the pipelines read is 27 (klein) or 30."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    shared = {
        "transformer": transformer,
        "vae": autoencoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "tokenizer": chat_tokenizer(),
    }
    if klein:
        return Flux2KleinPipeline(text_encoder=qwen3(), is_distilled=distilled, **shared)
    text = {"model_type": "mistral", **LANGUAGE_MODEL, "num_hidden_layers": 30, "head_dim": 8}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 4}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(text_encoder=encoder, **shared)


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )
    with torch.no_grad():  # made without values
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(4, 0.1),
        text_encoder=qwen3(Qwen3Model, 2),
        tokenizer=chat_tokenizer(),
    )


def unet(cross: int, **extra) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        **extra,
    )


def scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def stable_diffusion(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet(16),
        scheduler=scheduler(prediction_type),
        vae=vae(4, None),
        text_encoder=clip(False),
        tokenizer=build_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            use_linear_projection=True,
        ),
        scheduler=scheduler("epsilon"),
        vae=vae(4, None),
        text_encoder=clip(False),
        tokenizer=build_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=build_tokenizer(),
    )


FAMILIES = {
    "sd3.5-medium": sd3,
    "sd3": lambda: sd3(dual=False),
    "flux": flux,
    "flux-kontext": lambda: flux(FluxKontextPipeline),
    "flux2": lambda: flux2(klein=False),
    "flux2-klein": flux2,
    "flux2-klein-distilled": lambda: flux2(distilled=True),
    "qwen-image": qwen_image,
    "qwen-image-edit": lambda: qwen_image(edits=True),
    "z-image": z_image,
    "sd1.5": stable_diffusion,
    "sd2-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
}


def sources() -> list[Image.Image]:
    """Two images to edit, of 32 x 32 random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def conditions(policy, prompts: list[str], negative: str | None = None) -> list[str]:
    """What a policy encodes: the prompts, of a model that edits with an image each."""
    rows = [{"prompt": prompt, "source_image": image} for prompt, image in zip(prompts, sources(), strict=True)]
    return edits_of(rows, [(32, 32)] * len(rows), negative) if policy.edits else prompts


def longest(name: str) -> int:
    """Tokens of the longest prompt: beside an image, a language model has an instruction and the image."""
    return 40 if name == "qwen-image-edit" else 12


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    pipeline = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_call(pipeline, noise: torch.Tensor | None = None, guidance_scale: float = 1.0) -> dict:
    """Arguments with which a pipeline draws two prompts at 16 pixels as our sampler does, from unpacked noise."""
    name = type(pipeline).__name__
    call = {"height": 16, "width": 16, "output_type": "pt", "guidance_scale": guidance_scale}
    if "StableDiffusionPipeline" not in name and "XL" not in name:
        call["max_sequence_length"] = 12
    if name == "QwenImageEditPlusPipeline":
        call["image"] = sources()
    if "QwenImage" in name:
        call["true_cfg_scale"] = call.pop("guidance_scale")
        call |= {"negative_prompt": ["", ""]} if guidance_scale > 1 else {}
    if name == "ZImagePipeline":
        call["guidance_scale"] -= 1
    if name == "FluxKontextPipeline":
        call |= {"image": sources(), "max_area": 16 * 16, "_auto_resize": False}
    if noise is not None and (name in ("FluxPipeline", "FluxKontextPipeline") or "QwenImage" in name):
        noise = pipeline._pack_latents(noise, len(noise), *noise.shape[1:])
    return call if noise is None else {**call, "latents": noise}


def draw(
    pipeline, prompts: list[str], steps: int, noise: torch.Tensor, guidance_scale: float = 1.0, size=(16, 16)
) -> torch.Tensor:
    """The pipeline's own images of two prompts, of a height and width."""
    height, width = size
    call = plain_call(pipeline, noise, guidance_scale) | {"height": height, "width": width}
    call |= {"prompt": prompts, "num_inference_steps": steps}
    if "max_area" in call:
        call["max_area"] = height * width
    if not isinstance(pipeline, QwenImageEditPlusPipeline):
        return pipeline(**call).images
    with patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32):  # instead of 1024 x 1024
        of_one = [
            {
                name: v[i] if name == "image" else v[i : i + 1]
                for name, v in call.items()
                if isinstance(v, list | torch.Tensor)
            }
            for i in (0, 1)
        ]
        return torch.cat([pipeline(**(call | own)).images for own in of_one])
