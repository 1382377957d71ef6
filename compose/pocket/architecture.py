"""What pocket is made of, before it has learned anything.

Pictures are 64x64, latents `[n, 12, 8, 8]` (a factor of eight, twelve channels), prompts 24 tokens of width
96. Module names are those diffusers and transformers give, so that every adapter file layout in the wild
can name them.
"""

from __future__ import annotations

from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from compose.pocket.vocabulary import END, LENGTH, START, vocabulary

PICTURE, LATENT, CHANNELS, WIDTH = 64, 8, 12, 96
STEPS, GUIDANCE = 20, 4.0
"""What the accuracy table and the tests render with."""


def autoencoder() -> AutoencoderTiny:
    """Four levels: a factor of eight. No norms in it: with GroupNorm, flat colours stayed wrong for
    thousands of steps.
    """
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(2, 2, 2, 1),
        scaling_factor=1.0,
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(80, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def tokenizer() -> CLIPTokenizer:
    tokens, pairs = vocabulary()
    return CLIPTokenizer(
        vocab=tokens,
        merges=pairs,
        model_max_length=LENGTH,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler() -> DDIMScheduler:
    """Deterministic; v-prediction; reaches pure noise, which lets flat backgrounds have any brightness."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with trailing steps; StableDiffusionPipeline asks for it
        clip_sample=False,
        set_alpha_to_one=True,
    )


def pipeline() -> StableDiffusionPipeline:
    """The untrained pipeline, from torch's global seed."""
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
