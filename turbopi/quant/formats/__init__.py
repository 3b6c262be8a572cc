"""Number formats: how real numbers are rounded into few bits, each in a file of its own.

All are symmetric about zero, round half to even, and saturate: a value beyond the range becomes the largest one.
"""

from .e4m3 import E4M3_MAX, e4m3_scale, to_e4m3
from .int4 import Int4Groups, group_size, pack_int4, to_int4, unpack_int4
from .int8 import INT8_MAX, int8_scale, to_int8
from .nvfp4 import BLOCK, E2M1_MAX, E2M1_VALUES, Nvfp4, nvfp4_tensor_scale, round_e2m1, through_nvfp4, to_nvfp4
from .smooth import balance

__all__ = [
    "BLOCK",
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "INT8_MAX",
    "Int4Groups",
    "Nvfp4",
    "balance",
    "e4m3_scale",
    "group_size",
    "int8_scale",
    "nvfp4_tensor_scale",
    "pack_int4",
    "round_e2m1",
    "through_nvfp4",
    "to_e4m3",
    "to_int4",
    "to_int8",
    "to_nvfp4",
    "unpack_int4",
]
