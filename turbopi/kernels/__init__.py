"""Triton kernels, one op a file, each beside its plain-torch twin `*_ref`: the same call, the same result.

Every op writes into the buffers it is given and allocates nothing. Importing needs no Triton; launching does.
"""

from ._fp8 import E4M3, E4M3_MAX, store_ref
from .actions import action_in, action_in_ref, action_out, action_out_ref
from .attention import attention, attention_ref, attention_split, attention_split_ref
from .early_norm import early_norm, early_norm_obstacles
from .embed import embed_tokens, embed_tokens_ref
from .geglu import geglu, geglu_ref, gelu, gelu_ref
from .geglu_linear import geglu_linear, geglu_linear_ref
from .layer_norm import layer_norm, layer_norm_ref, residual_layer_norm, residual_layer_norm_ref
from .linear import linear, linear_ref
from .patches import patches, patches_ref
from .prefix_attention import (
    attention_misfits,
    prefix_attention,
    prefix_attention_config,
    prefix_attention_obstacles,
)
from .residual import gated_residual, gated_residual_norm, gated_residual_norm_ref, gated_residual_ref
from .rms_norm import rms_norm, rms_norm_ref
from .rope import rotate_and_store, rotate_and_store_ref
from .row_attention import row_attention, row_attention_ref
from .row_products import row_geglu, row_geglu_ref, row_parts, row_parts_ref, row_qkv, row_qkv_ref
from .row_step import row_step, row_step_ref, step_misfits
from .row_sums import row_sum_norm, row_sum_norm_ref
from .tiled_geglu import TiledGeglu, geglu_obstacles, tile_geglu, tiled_geglu, tiled_geglu_ref
from .tiled_linear import LinearTiling, Norm, moments_of, tiled_linear, tiled_linear_obstacles, tiled_linear_ref
from .tuning import AttentionConfig, GemmConfig
from .vision_attention import (
    vision_attention,
    vision_attention_misfits,
    vision_attention_named,
    vision_attention_obstacles,
    vision_attention_ref,
)
from .vision_tilings import VisionTilings, vision_tilings

__all__ = [
    "E4M3",
    "E4M3_MAX",
    "AttentionConfig",
    "GemmConfig",
    "LinearTiling",
    "Norm",
    "TiledGeglu",
    "VisionTilings",
    "action_in",
    "action_in_ref",
    "action_out",
    "action_out_ref",
    "attention",
    "attention_misfits",
    "attention_ref",
    "attention_split",
    "attention_split_ref",
    "early_norm",
    "early_norm_obstacles",
    "embed_tokens",
    "embed_tokens_ref",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_ref",
    "gated_residual_ref",
    "geglu",
    "geglu_linear",
    "geglu_linear_ref",
    "geglu_obstacles",
    "geglu_ref",
    "gelu",
    "gelu_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_ref",
    "moments_of",
    "patches",
    "patches_ref",
    "prefix_attention",
    "prefix_attention_config",
    "prefix_attention_obstacles",
    "residual_layer_norm",
    "residual_layer_norm_ref",
    "rms_norm",
    "rms_norm_ref",
    "rotate_and_store",
    "rotate_and_store_ref",
    "row_attention",
    "row_attention_ref",
    "row_geglu",
    "row_geglu_ref",
    "row_parts",
    "row_parts_ref",
    "row_qkv",
    "row_qkv_ref",
    "row_step",
    "row_step_ref",
    "row_sum_norm",
    "row_sum_norm_ref",
    "step_misfits",
    "store_ref",
    "tile_geglu",
    "tiled_geglu",
    "tiled_geglu_ref",
    "tiled_linear",
    "tiled_linear_obstacles",
    "tiled_linear_ref",
    "vision_attention",
    "vision_attention_misfits",
    "vision_attention_named",
    "vision_attention_obstacles",
    "vision_attention_ref",
    "vision_tilings",
]
