"""Compile the kernels for a compute capability, such as 90, at the full model's shapes; no GPU is needed.

    python tests/kernels/compile_kernels.py 90

Prints a line a kernel: name, shared memory in bytes, grid. Triton takes its target from its driver, so a driver that
only names one stands in, and a launch becomes a compilation.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from turbopi import kernels
from turbopi.kernels import AttentionConfig, GemmConfig, _dependent, row_attention_wgmma, row_products_tma
from turbopi.kernels._triton import GLUON

BF16, F32, I32, E4M3 = torch.bfloat16, torch.float32, torch.int32, torch.float8_e4m3fn


class NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_instead(kernel, grid):
    def compile_and_report(*args, **options):
        compiled = kernel.warmup(*args, grid=grid, **options)
        print(kernel.__name__, compiled.metadata.shared, "x".join(map(str, grid)), flush=True)

    return compile_and_report


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def rows_of(m):
    x, out, vector, one = empty(m, 2048), empty(m, 2048), empty(2048, dtype=F32), empty(1, dtype=I32)
    kernels.layer_norm(empty(512, 1152), empty(512, 1152))
    kernels.layer_norm(empty(512, 1152), empty(512, 1152), empty(1, 1152, dtype=F32))
    kernels.layer_norm(empty(512, 1152, dtype=F32), empty(512, 1152), empty(256, 1152, dtype=F32), empty(512, 1152))
    kernels.rms_norm(x, out, vector, vector)
    kernels.gated_residual_norm(x, out, vector, vector, vector, empty(m, 2048))
    kernels.gated_residual(x, out, vector)
    kernels.geglu(empty(m, 32768), empty(m, 16384))
    kernels.gelu(empty(512, 4304), empty(512, 4304))
    kernels.patches(empty(2, 3, 224, 224, dtype=torch.uint8), empty(512, 588))
    kernels.patches(empty(2, 3, 224, 224, dtype=torch.uint8), empty(512, 3 * 592), 3)
    kernels.action_in(empty(10, 32, dtype=F32), empty(1024, 32, dtype=F32), empty(1024, dtype=F32), empty(10, 1024))
    kernels.action_out(
        empty(10, 1024), empty(32, 1024, dtype=F32), empty(32, dtype=F32), empty(10, 32, dtype=F32), horizon=10
    )
    kernels.embed_tokens(empty(1, 40, dtype=torch.int64), empty(1000, 2048), 45.25, x, one, m)


def heads_of(m):
    one, table = empty(1, dtype=I32), empty(2048, 128, dtype=F32)
    cache, qkv = empty(1, 1, 1024, 256), empty(512, 3456)
    kernels.rotate_and_store(empty(m, 2560), table, table, one, empty(m, 2048), cache, cache, m)
    kernels.attention(empty(m, 2048), cache, cache, one, empty(m, 2048), m, state_token=True)
    parts = [
        qkv[:, 1152 * i : 1152 * (i + 1)].unflatten(0, (2, 256)).unflatten(-1, (16, 72)).transpose(1, 2) for i in (1, 2)
    ]
    kernels.attention(qkv[:, :1152], *parts, None, empty(512, 1152), 256)
    partial = empty(16, 80, 256, dtype=F32), empty(16, 80, dtype=F32)
    kernels.attention_split(
        empty(10, 2048), cache, cache, one, empty(10, 2048), 10, *partial, config=AttentionConfig(16, 32)
    )


def products_of(m, descriptors):
    x, w, out, gate = empty(m, 2048), empty(32768, 2048), empty(m, 32768), empty(1024, dtype=F32)
    few, narrow = empty(10, 4096), empty(1024, 4096)
    kernels.linear(x, w, out)
    kernels.linear(empty(1, 1024), empty(1024, 1024), empty(1, 1024), bias=empty(1024), activation="gelu")
    partial = empty(4, 10, 1024, dtype=F32)
    config = GemmConfig(16, 32, 128, group_m=1, stages=4, splits=4)
    kernels.linear(few, narrow, empty(10, 1024), None, "none", empty(10, 1024), gate, config, partial)
    kernels.geglu_linear(x, w, empty(m, 16384))
    if descriptors:
        for persistent in (False, True):
            config = GemmConfig(128, 128, 64, warps=8, stages=3, descriptors=True, persistent=persistent)
            kernels.linear(x, w, out, config=config)
            kernels.geglu_linear(x, w, empty(m, 16384), config)


def quantised(m):
    """Every kernel that writes E4M3, and the products that read it."""
    x, narrow, one, vector = empty(m, 2048), empty(m, 2048, dtype=E4M3), empty(1, dtype=I32), empty(2048, dtype=F32)
    stream, eighth = empty(512, 1152), empty(512, 1152, dtype=E4M3)
    kernels.layer_norm(stream, eighth, inverse=2.5)
    kernels.residual_layer_norm(stream, stream, eighth, inverse=2.5)
    kernels.rms_norm(x, narrow, vector, vector, inverse=2.5)
    kernels.gated_residual_norm(x, x, None, None, None, narrow, inverse=2.5)
    kernels.geglu(empty(m, 32768), empty(m, 16384, dtype=E4M3), 2.5)
    kernels.gelu(empty(512, 4352), empty(512, 4352, dtype=E4M3), 2.5)
    cache, partial = empty(1, 1, 1024, 256), (empty(16, 80, 256, dtype=F32), empty(16, 80, dtype=F32))
    kernels.attention(x, cache, cache, one, narrow, m, inverse=2.5)
    few = empty(10, 2048, dtype=E4M3)
    kernels.attention_split(empty(10, 2048), cache, cache, one, few, 10, *partial, inverse=2.5)
    weight, columns = empty(32768, 2048, dtype=E4M3), empty(32768, dtype=F32)
    for tokens, other in (
        (m, GemmConfig(128, 128, 128, warps=8, stages=3, descriptors=True, persistent=True)),
        (10, None),
    ):
        rows, hidden = empty(tokens, 2048, dtype=E4M3), empty(tokens, 16384, dtype=E4M3)
        kernels.linear(rows, weight, empty(tokens, 32768), empty(32768), scale=columns, config=other)
        gelu = {"activation": "gelu", "scale": columns, "inverse": 2.5}
        kernels.linear(rows, weight, empty(tokens, 32768, dtype=E4M3), empty(32768), **gelu)
        kernels.geglu_linear(rows, weight, hidden, other, columns, 2.5)


def fused(m, hopper):
    """The kernels of the fused denoise loop, launched ahead of their turn, for any GPU or Hopper's own."""
    _dependent.dependent = lambda like: True
    row_attention_wgmma.on_hopper = row_products_tma.on_hopper = lambda like: hopper
    x, one, vector = empty(m, 1024), empty(1, dtype=I32), empty(1024, dtype=F32)
    table, cache, q = empty(2048, 128, dtype=F32), empty(1, 1, 1018, 256), empty(m, 2048)
    weight, parts, hidden = empty(2560, 1024), empty(8, m, 1024, dtype=F32), empty(m, 4096)
    kernels.row_qkv(x, weight, table, table, one, q, cache, cache, m)
    partial = empty(8, m * 8, 256, dtype=F32), empty(8, m * 8, dtype=F32)
    kernels.row_attention(q, cache, cache, one, q, m, *partial, extra=m, ahead=weight)
    kernels.row_parts(hidden, empty(1024, 4096), parts)
    kernels.row_sum_norm(parts, x, vector, vector, vector, x)
    kernels.row_geglu(x, empty(8192, 1024), hidden)
    weights = empty(32, 1024, dtype=F32), empty(32, dtype=F32), empty(1024, 32, dtype=F32)
    x_t = empty(m, 32, dtype=F32)
    for normed, inverse in ((x, 1.0), (empty(m, 1024, dtype=E4M3), 2.5)):
        kernels.row_step(
            x, weights[:2], x_t, (weights[2], vector), empty(m, 1024), (vector, vector), normed, inverse=inverse
        )
    narrow, wide, columns = empty(m, 1024, dtype=E4M3), empty(m, 4096, dtype=E4M3), empty(8192, dtype=F32)
    kernels.row_qkv(narrow, empty(2560, 1024, dtype=E4M3), table, table, one, q, cache, cache, m, scale=columns[:2560])
    kernels.row_attention(q, cache, cache, one, empty(m, 2048, dtype=E4M3), m, *partial, extra=m, inverse=2.5)
    kernels.row_parts(wide, empty(1024, 4096, dtype=E4M3), parts, scale=columns[:1024])
    kernels.row_sum_norm(parts, x, vector, vector, vector, narrow, inverse=2.5)
    gate_up = GemmConfig(64, 32, 128, stages=8, descriptors=True) if hopper else None
    kernels.row_geglu(narrow, empty(8192, 1024, dtype=E4M3), wide, gate_up, columns, 2.5)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(NoGpu(capability))
    JITFunction.__getitem__ = compile_instead
    if capability >= 90:
        rows_of(552)
        quantised(552)
    heads_of(552)
    products_of(552, descriptors=capability >= 90)
    if capability >= 90:
        for hopper in (False, True)[: 1 + GLUON]:
            fused(50, hopper)
