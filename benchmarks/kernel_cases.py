"""What benchmarks/kernels.py times: every kernel at the full model's shapes, what and what to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from kernel_tiles import GEGLU_TILES, LARGE_TILES, Config, attention_tiles, few_rows_tiles
from torch import Tensor
from torch.nn import functional as F

from turbopi import kernels

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
VISION, PREFIX, SUFFIX = (512, 768), (552, 968), (10, 50)
IMAGE_TOKENS, VISION_HEADS, HEADS, HEAD_DIM, ACTION_DIM = 256, 16, 8, 256, 32
VISION_WIDTH, VISION_MLP, WIDTH, MLP, EXPERT, EXPERT_MLP = 1152, 4304, 2048, 16384, 1024, 4096
QKV = (HEADS + 2) * HEAD_DIM
VOCABULARY, SPLITS = 257152, (4, 8, 16)


@dataclass
class Call:
    """One set of operands.

    Attributes:
        run: the kernel, with a config or None for its own choice.
        other: torch's way to the same, and its name; None where a graph cannot hold it.
        outputs: what `run` writes.
        want: what the twin in float32 makes of the operands as they are now.
        bytes, flops: that the operation needs at least.
    """

    run: Callable[[Any], None]
    other: Callable[[], Any] | None
    other_name: str
    outputs: list[Tensor]
    want: Callable[[], list[Tensor]]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """A kernel at one shape. `sizes` is its key in the tuned file, `variant` what else decides its compilation."""

    op: str
    where: str
    sizes: tuple[int, ...]
    build: Callable[[], Call]
    candidates: tuple[Config, ...] = ()
    variant: str = ""


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal values."""
    return torch.randn(shape, device="cuda", dtype=BF16) * scale


def f32(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal values."""
    return torch.randn(shape, device="cuda") * scale


def int32(value: int) -> Tensor:
    """A length on the device."""
    return torch.tensor([value], dtype=I32, device="cuda")


def call(
    op: str,
    outputs: tuple[str, ...],
    *,
    moved: int | None = None,
    flops: int = 0,
    tunable: bool = False,
    other: Callable[[], Any] | None = None,
    other_name: str = "twin",
    **arguments: Any,
) -> Call:
    """A call of a kernel by keywords. `moved` bytes, or every tensor once; without `other` it is the twin."""
    kernel, twin = getattr(kernels, op), getattr(kernels, f"{op}_ref")

    def want() -> list[Tensor]:
        wide = {k: v.float() if isinstance(v, Tensor) and v.dtype == BF16 else v for k, v in arguments.items()}
        wide |= {name: arguments[name].float().clone() for name in outputs}
        twin(**wide)
        return [wide[name] for name in outputs]

    if moved is None:
        moved = sum(t.numel() * t.itemsize for t in arguments.values() if isinstance(t, Tensor))
    return Call(
        run=(lambda config: kernel(**arguments, config=config)) if tunable else (lambda _: kernel(**arguments)),
        other=None if other_name == "" else other or (lambda: twin(**arguments)),
        other_name=other_name,
        outputs=[arguments[name] for name in outputs],
        want=want,
        bytes=moved,
        flops=flops,
    )


def rms_norm(m: int, width: int, modulated: bool) -> Call:
    """With scale and shift, as in π0.5's expert, or without."""
    scale, shift = (f32(width), f32(width)) if modulated else (None, None)
    return call("rms_norm", ("out",), x=bf16(m, width), out=bf16(m, width), scale=scale, shift=shift)


def gated_residual_norm(m: int, width: int, modulated: bool) -> Call:
    """The update is small, so that a residual that grows from launch to launch stays finite."""
    x, update, out = bf16(m, width), bf16(m, width, scale=1e-3), bf16(m, width)
    gate, scale, shift = (f32(width), f32(width), f32(width)) if modulated else (None, None, None)
    moved = 4 * m * width * 2
    vectors = {"gate": gate, "scale": scale, "shift": shift}
    return call("gated_residual_norm", ("x", "out"), moved=moved, x=x, update=update, out=out, **vectors)


def rope(m: int, prefix: int) -> Call:
    """m rows behind `prefix` cached ones."""
    angles = torch.rand(prefix + m, HEAD_DIM // 2, device="cuda") * 6
    return call(
        "rotate_and_store",
        ("q_out", "keys", "values"),
        moved=2 * m * QKV * 2 + m * HEAD_DIM * 4,
        qkv=bf16(m, QKV),
        cos=angles.cos(),
        sin=angles.sin(),
        first=int32(prefix),
        q_out=bf16(m, HEADS * HEAD_DIM),
        keys=bf16(1, 1, prefix + m, HEAD_DIM),
        values=bf16(1, 1, prefix + m, HEAD_DIM),
        rows_per_sample=m,
    )


def attention(m: int, prefix: int, splits: int) -> Call:
    """m queries of 8 heads over prefix + m keys of one head; splits 0: the kernel without parts."""
    q, keys, values = bf16(m, HEADS * HEAD_DIM, scale=1 / 16), *(bf16(1, 1, prefix + m, HEAD_DIM) for _ in range(2))
    out, heads = bf16(m, HEADS * HEAD_DIM), q.view(1, m, HEADS, HEAD_DIM).transpose(1, 2)
    scratch = {}
    if splits:
        scratch = {"partial": f32(splits, m * HEADS, HEAD_DIM), "partial_lse": f32(splits, m * HEADS)}
    return call(
        "attention_split" if splits else "attention",
        ("out",),
        moved=2 * (q.numel() + out.numel() + keys.numel() + values.numel()),
        flops=4 * m * HEADS * HEAD_DIM * (prefix + m),
        tunable=True,
        other=lambda: F.scaled_dot_product_attention(heads, keys, values, scale=1.0, enable_gqa=True),
        other_name="SDPA",
        q=q,
        keys=keys,
        values=values,
        lengths=int32(prefix),
        out=out,
        rows_per_sample=m,
        extra=m,
        **scratch,
    )


def vision_attention(m: int) -> Call:
    """m / 256 images of 16 heads of 72, read out of the merged product."""
    qkv, head_dim = bf16(m, 3 * VISION_WIDTH), VISION_WIDTH // VISION_HEADS
    q, k, v = (
        t.view(-1, IMAGE_TOKENS, VISION_HEADS, head_dim).transpose(1, 2)
        for t in qkv.view(-1, IMAGE_TOKENS, 3 * VISION_WIDTH).split(VISION_WIDTH, dim=-1)
    )
    return call(
        "attention",
        ("out",),
        moved=4 * m * VISION_WIDTH * 2,
        flops=4 * m * IMAGE_TOKENS * VISION_WIDTH,
        tunable=True,
        other=lambda: F.scaled_dot_product_attention(q, k, v),
        other_name="SDPA",
        q=qkv[:, :VISION_WIDTH],
        keys=k,
        values=v,
        lengths=None,
        out=bf16(m, VISION_WIDTH),
        rows_per_sample=IMAGE_TOKENS,
        scale=head_dim**-0.5,
    )


def linear(m: int, n: int, k: int, epilogue: str = "", splits: int = 1) -> Call:
    """x (m,k) by w (n,k); `epilogue` names bias, gelu, residual and gate. cuBLAS does what it can of it."""
    x, w, out = bf16(m, k), bf16(n, k, scale=k**-0.5), bf16(m, n)
    bias = bf16(n) if "bias" in epilogue else None
    residual = bf16(m, n) if "residual" in epilogue else None

    def other() -> None:
        if bias is not None and "gelu" in epilogue:
            torch._addmm_activation(bias, x, w.t(), use_gelu=True, out=out)
        elif bias is not None or (residual is not None and "gate" not in epilogue):
            torch.addmm(residual if bias is None else bias, x, w.t(), out=out)
        else:
            torch.mm(x, w.t(), out=out)

    return call(
        "linear",
        ("out",),
        moved=2 * (m * k + n * k + m * n * (1 if residual is None else 2)),
        flops=2 * m * n * k,
        tunable=True,
        other=other,
        other_name="cuBLAS",
        x=x,
        w=w,
        out=out,
        bias=bias,
        activation="gelu" if "gelu" in epilogue else "none",
        residual=residual,
        gate=f32(n) if "gate" in epilogue else None,
        partial=f32(splits, m, n) if splits > 1 else None,
    )


def geglu_linear(m: int, f: int, k: int) -> Call:
    """Against cuBLAS's product with our geglu behind it."""
    x, w, out, product = bf16(m, k), bf16(2 * f, k, scale=k**-0.5), bf16(m, f), bf16(m, 2 * f)

    def other() -> None:
        torch.mm(x, w.t(), out=product)
        kernels.geglu(product, out)

    more = {"tunable": True, "other": other, "other_name": "cuBLAS+geglu", "flops": 4 * m * f * k}
    return call("geglu_linear", ("out",), x=x, w_gate_up=w, out=out, **more)


@cache
def embedding_table() -> Tensor:
    """The full one, once."""
    return bf16(VOCABULARY, WIDTH)


def embed_tokens(count: int) -> Call:
    """Into the rows behind 512 image tokens. The twin's mask cannot be captured: nothing to compare with."""
    return call(
        "embed_tokens",
        ("out",),
        moved=2 * count * WIDTH * 2,
        other_name="",
        tokens=torch.randint(0, VOCABULARY, (1, count), device="cuda"),
        table=embedding_table(),
        scale=45.2548,
        out=bf16(512 + count, WIDTH),
        first=int32(512),
        rows_per_sample=512 + count,
    )


def row_cases() -> Iterator[Case]:
    """The kernels that only move bytes."""
    for m in VISION:
        yield Case("patches", f"vision {m}", (m,), partial(_patches, m))
        yield Case("layer_norm", f"vision {m}", (m, VISION_WIDTH), partial(_in_out, "layer_norm", m, VISION_WIDTH))
        yield Case("gelu", f"vision {m}", (m, VISION_MLP), partial(_in_out, "gelu", m, VISION_MLP))
    for rows, width, hidden in ((PREFIX, WIDTH, MLP), (SUFFIX, EXPERT, EXPERT_MLP)):
        for m, prefix in zip(rows, PREFIX, strict=True):
            few = rows is SUFFIX
            where = f"{'suffix' if few else 'prefix'} {m}"
            yield Case("rms_norm", where, (m, width), partial(rms_norm, m, width, few))
            yield Case("gated_residual_norm", where, (m, width), partial(gated_residual_norm, m, width, few))
            yield Case("rotate_and_store", where, (m, QKV), partial(rope, m, prefix if few else 0))
            yield Case("geglu", where, (m, hidden), partial(_geglu, m, hidden))
    for m in SUFFIX:
        yield Case("action_in", f"suffix {m}", (m, EXPERT), partial(_action_in, m))
        yield Case("action_out", f"suffix {m}", (m, EXPERT), partial(_action_out, m))
    for count in (40, 200):
        yield Case("embed_tokens", f"prompt {count}", (count, WIDTH), partial(embed_tokens, count))


def _in_out(op: str, m: int, width: int) -> Call:
    return call(op, ("out",), x=bf16(m, width), out=bf16(m, width))


def _geglu(m: int, f: int) -> Call:
    return call("geglu", ("out",), gate_up=bf16(m, 2 * f), out=bf16(m, f))


def _patches(m: int) -> Call:
    images = torch.randint(0, 256, (m // IMAGE_TOKENS, 3, 224, 224), device="cuda").byte()
    return call("patches", ("out",), images=images, out=f32(m, 588))


def _action_in(m: int) -> Call:
    return call(
        "action_in",
        ("out",),
        x_t=f32(m, ACTION_DIM),
        weight=f32(EXPERT, ACTION_DIM),
        bias=f32(EXPERT),
        out=bf16(m, EXPERT),
    )


def _action_out(m: int) -> Call:
    small = {"weight": f32(ACTION_DIM, EXPERT, scale=1e-4), "bias": f32(ACTION_DIM, scale=1e-4)}
    return call("action_out", ("x_t",), out_norm=bf16(m, EXPERT), x_t=f32(m, ACTION_DIM), **small)


def attention_cases() -> Iterator[Case]:
    """Vision, prefix whole and in two parts, suffix whole and in more parts."""
    for m in VISION:
        sizes = (IMAGE_TOKENS, VISION_WIDTH // VISION_HEADS, VISION_HEADS, 1)
        tiles = attention_tiles(128, (64, 128), (32, 64, 128))
        yield Case("attention", f"vision {m}", sizes, partial(vision_attention, m), tiles, "vision")
    wide, narrow = (
        attention_tiles(HEAD_DIM, (64, 128), (32, 64)),
        attention_tiles(HEAD_DIM, (16, 32, 64), (32, 64), (1, 2)),
    )
    for m in PREFIX:
        for splits in (0, 2):
            yield _attention(f"prefix {m}", m, 0, splits, wide)
    for m, prefix in zip(SUFFIX, PREFIX, strict=True):
        for splits in (0, *SPLITS):
            yield _attention(f"suffix {m} on {prefix}", m, prefix, splits, narrow)


def _attention(where: str, m: int, prefix: int, splits: int, tiles: tuple[Config, ...]) -> Case:
    op, sizes = "attention_split" if splits else "attention", (m * HEADS, HEAD_DIM, 1, max(splits, 1))
    return Case(op, where, sizes, partial(attention, m, prefix, splits), tiles, f"{HEAD_DIM} in {splits}")


def product_cases() -> Iterator[Case]:
    """Every linear of the model."""
    for m in VISION:
        yield _linear(f"vision {m}", m, 3 * VISION_WIDTH, VISION_WIDTH, "bias")
        yield _linear(f"vision {m}", m, VISION_WIDTH, VISION_WIDTH, "bias residual")
        yield _linear(f"vision {m}", m, VISION_MLP, VISION_WIDTH, "bias gelu")
        yield _linear(f"vision {m}", m, VISION_WIDTH, VISION_MLP, "bias residual")
        yield _linear(f"vision {m}", m, WIDTH, VISION_WIDTH, "bias")
    for m in PREFIX:
        yield _linear(f"prefix {m}", m, QKV, WIDTH, "")
        yield _linear(f"prefix {m}", m, WIDTH, HEADS * HEAD_DIM, "residual")
        yield _linear(f"prefix {m}", m, 2 * MLP, WIDTH, "")
        yield _linear(f"prefix {m}", m, WIDTH, MLP, "residual")
        yield Case("geglu_linear", f"prefix {m}", (m, MLP, WIDTH), partial(geglu_linear, m, MLP, WIDTH), GEGLU_TILES)
    for m in SUFFIX:
        for n, k, epilogue in ((QKV, EXPERT, ""), (EXPERT, HEADS * HEAD_DIM, "gate"), (EXPERT, EXPERT_MLP, "gate")):
            for splits in (1, 2, 4, 8):
                yield _linear(f"suffix {m}", m, n, k, f"{epilogue} residual" if epilogue else "", splits)
        tiles = few_rows_tiles(m, 1, gated=True)
        yield Case(
            "geglu_linear", f"suffix {m}", (m, EXPERT_MLP, EXPERT), partial(geglu_linear, m, EXPERT_MLP, EXPERT), tiles
        )


def _linear(where: str, m: int, n: int, k: int, epilogue: str, splits: int = 1) -> Case:
    build, tiles = partial(linear, m, n, k, epilogue, splits), few_rows_tiles(m, splits) if m <= 64 else LARGE_TILES
    if splits > 1:
        return Case("linear_split", where, (m, n, k, splits), build, tiles, epilogue)
    return Case("linear", where, (m, n, k), build, tiles, epilogue)


def all_cases() -> list[Case]:
    """In the order of the report."""
    return [*row_cases(), *attention_cases(), *product_cases()]
