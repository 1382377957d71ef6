"""Real diffusers pipelines of every family, tiny, with random weights, in directories."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from compose import pocket

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = "▁abcdefghijklmnopqrstuvwxyz,.<>"


def tiny(family: str, path: Path, *, clip: int = 32) -> Path:
    """Writes a tiny pipeline of a family into `path`; `clip` is the width of the first text encoder where the
    family leaves it free: at 768 the attention of its three layers has the shapes of real bases, and takes
    real adapters.
    """
    torch.manual_seed(0)
    _BUILDERS[family](clip).save_pretrained(path)
    return path


def _clip(width: int, *, project: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=width,
        vocab_size=len(_tokenizer()),
        max_position_embeddings=24,
        bos_token_id=_tokenizer().bos_token_id,
        eos_token_id=_tokenizer().eos_token_id,
    )
    return (CLIPTextModelWithProjection if project else CLIPTextModel)(config)


def _tokenizer() -> CLIPTokenizer:
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(pocket.WEIGHTS / "tokenizer")
    return tokenizer


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in LETTERS)]
    model = Tokenizer(models.Unigram(pieces, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    return T5TokenizerFast(tokenizer_object=model, extra_ids=0, model_max_length=256)


def _vae(latents: int, **more: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents,
        norm_num_groups=2,
        sample_size=32,
        **more,
    )


def _unet(width: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=(2, 4),
        norm_num_groups=2,
        **more,
    )


def _sd(width: int) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=_unet(width),
        vae=_vae(4),
        text_encoder=_clip(width),
        tokenizer=_tokenizer(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(clip: int) -> StableDiffusionXLPipeline:
    unet = _unet(
        clip + 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(4),
        text_encoder=_clip(clip),
        text_encoder_2=_clip(32, project=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        scheduler=EulerDiscreteScheduler(**BETAS),
    )


def _sd3(clip: int, **more: object) -> StableDiffusion3Pipeline:
    wide = max(96, clip + 32)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=wide,
        caption_projection_dim=32,
        pooled_projection_dim=clip + 32,
        pos_embed_max_size=32,
        **more,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(16, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=_clip(clip, project=True),
        text_encoder_2=_clip(32, project=True),
        text_encoder_3=_t5(wide),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _flux(clip: int) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=clip,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer,
        vae=_vae(4, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=_clip(clip),
        text_encoder_2=_t5(32),
        tokenizer=_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


_BUILDERS: Mapping[str, Callable[[int], DiffusionPipeline]] = {
    "sd1": lambda _: _sd(768),
    "sd2": lambda _: _sd(1024),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd35-medium": lambda clip: _sd3(clip, dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux": _flux,
}
FAMILIES = tuple(_BUILDERS)
