"""Prompt tokens to prefix rows (SPEC 1.2)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import cdiv, dense, next_power_of_2, samples, vector
from ._triton import tl, triton


def _check(tokens: Tensor, table: Tensor, out: Tensor, first: Tensor, rows_per_sample: int) -> tuple[int, int]:
    batch, count = dense("tokens", tokens)
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens are {tokens.dtype}, expected int64")
    _, width = dense("table", table)
    rows, _ = dense("out", out, width=width)
    if samples("out", rows, rows_per_sample) != batch:
        raise ValueError(f"out has {rows} rows of {rows_per_sample} a sample, expected {batch} samples as in tokens")
    vector("first", first, batch, torch.int32)
    return batch, count


def embed_tokens_ref(
    tokens: Tensor, table: Tensor, scale: float, out: Tensor, first: Tensor, rows_per_sample: int
) -> None:
    """Twin of `embed_tokens`."""
    batch, count = _check(tokens, table, out, first, rows_per_sample)
    known = (tokens >= 0) & (tokens < len(table))
    embedded = table[torch.where(known, tokens, 0)].float() * scale
    embedded = torch.where(known[:, :, None], embedded, float("nan")).to(out.dtype)
    place = first.long()[:, None] + torch.arange(count, device=tokens.device)
    sample = torch.arange(batch, device=tokens.device)[:, None].expand_as(place)
    fits = place < rows_per_sample
    out.unflatten(0, (batch, rows_per_sample))[sample[fits], place[fits]] = embedded[fits]


@triton.jit
def _embed_tokens(tokens, table, scale, out, first, count, vocabulary, rows_per_sample, width, BLOCK: tl.constexpr):
    sample, index = tl.program_id(0) // count, tl.program_id(0) % count
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + tl.program_id(0))
    known = (token >= 0) & (token < vocabulary)
    # int64: the full table has more than 2^29 entries, and products of rows and widths pass 2^31 in bytes.
    source = table + token.to(tl.int64) * width + columns
    f = tl.load(source, mask=columns < tl.where(known, width, 0), other=0.0).to(tl.float32) * scale
    f = tl.where(known, f, float("nan"))
    place = tl.load(first + sample) + index
    target = out + (sample * rows_per_sample + place).to(tl.int64) * width + columns
    tl.store(target, f.to(out.dtype.element_ty), mask=columns < tl.where(place < rows_per_sample, width, 0))


def embed_tokens(tokens: Tensor, table: Tensor, scale: float, out: Tensor, first: Tensor, rows_per_sample: int) -> None:
    """Row b*P + first[b] + t of out (B*P, D) = table[tokens[b, t]] * scale, in float32, rounded once.

    tokens (B,T) int64, table (V,D), first (B,) int32, P = rows_per_sample. A token that would fall past its sample's
    rows is dropped. An id outside the vocabulary gives a row of NaN: it cannot raise on the device, and must not look
    like a prompt. Raises ValueError where shapes do not fit.
    """
    batch, count = _check(tokens, table, out, first, rows_per_sample)
    width = table.shape[1]
    block = min(1024, next_power_of_2(width))
    _embed_tokens[(batch * count, cdiv(width, block))](
        tokens,
        table,
        scale,
        out,
        first,
        count,
        table.shape[0],
        rows_per_sample,
        width,
        BLOCK=block,
        num_warps=4,
    )
