"""Settings in the config.json files of released models, with notes of the kind that diffusers leaves beside them.

Settings are as published; notes (names that begin with an underscore) are examples, and nothing is read from them.
"""

from typing import Any

_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3

SD14: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": _DOWN,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": _UP,
}
SD15: dict[str, Any] = {
    **SD14,
    "_diffusers_version": "0.17.0.dev0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "use_linear_projection": False,
}
SD2_BASE: dict[str, Any] = {
    **SD14,
    "_diffusers_version": "0.10.0.dev0",
    "_name_or_path": "./unet",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
SD21: dict[str, Any] = {**SD2_BASE, "sample_size": 96, "upcast_attention": True}
INPAINTING: dict[str, Any] = {**SD14, "_diffusers_version": "0.6.0.dev0", "in_channels": 9, "sample_size": 32}
INPAINTING_2: dict[str, Any] = {**SD2_BASE, "_diffusers_version": "0.8.0", "in_channels": 9, "sample_size": 32}
SDXL: dict[str, Any] = {
    **SD15,
    "_diffusers_version": "0.24.0.dev0",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dropout": 0.0,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "reverse_transformer_layers_per_block": None,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
UNETS = {
    "sd1.4": SD14,
    "sd1.5": SD15,
    "sd2.1-base": SD2_BASE,
    "sd2.1": SD21,
    "inpainting 1.5": INPAINTING,
    "inpainting 2": INPAINTING_2,
    "sdxl": SDXL,
}

SD14_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL_VAE: dict[str, Any] = {
    **SD14_VAE,
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SD3_VAE: dict[str, Any] = {
    **SD14_VAE,
    "_diffusers_version": "0.29.0.dev0",
    "force_upcast": True,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
VAES: dict[str, dict[str, Any]] = {
    "sd1.4 vae": SD14_VAE,
    "sd1.5 vae": {**SD14_VAE, "_diffusers_version": "0.6.0", "scaling_factor": 0.18215},
    "sd2.1 vae": {**SD14_VAE, "_diffusers_version": "0.10.0.dev0", "sample_size": 768},
    "sd-vae-ft-mse": {**SD14_VAE, "_diffusers_version": "0.4.2", "sample_size": 256},
    "sdxl vae": SDXL_VAE,
    "sdxl vae, later": {**SDXL_VAE, "latents_mean": None, "latents_std": None, "shift_factor": None},
    "sd3 vae": SD3_VAE,
    "flux vae": {**SD3_VAE, "mid_block_add_attention": True, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}
