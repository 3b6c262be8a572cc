"""The kernel between two steps of the fused denoise loop against its twin, which is the three that it stands for."""

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, cases, guarded, seeded, up

from turbopi.kernels import E4M3, row_step, row_step_ref, step_misfits

# Rows, width, action_dim.
SHAPES = cases([(1, 40, 7), (3, 100, 32)], [(50, 1024, 32), (17, 1024, 24)])


def arguments(shape, dtype, normed_dtype):
    """Of both: what is read, then x_t, x and normed, which are written."""
    rows, width, action_dim = shape
    outward = seeded(action_dim, width, scale=width**-0.5), seeded(action_dim)
    inward = seeded(width, action_dim, scale=action_dim**-0.5), seeded(width)
    written = seeded(rows, action_dim), guarded(rows, width, dtype=dtype), guarded(rows, width, dtype=normed_dtype)
    return seeded(rows, width, dtype=dtype), outward, inward, written


def run(op, out_norm, outward, inward, written, modulation, inverse=1.0):
    x_t, x, normed = written
    op(out_norm, outward, x_t, inward, x, modulation, normed, inverse=inverse)
    return written


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_row_step(dtype, shape, modulated):
    width = shape[1]
    modulation = (seeded(width) * 0.3, seeded(width).roll(1) * 0.3) if modulated else None
    out_norm, *weights, written = arguments(shape, dtype, dtype)
    got = run(row_step, out_norm, *weights, written, modulation)
    twins = arguments(shape, torch.float32, torch.float32)[-1]
    want = run(row_step_ref, up(out_norm), *weights, twins, modulation)
    # The norm reads the rounded stream.
    for kernel, twin, factor in zip(got, want, (1.0, 1.0, 2.0), strict=True):
        assert_equal_up_to_rounding(kernel, twin, factor)
        assert_guard(kernel)


@pytest.mark.parametrize("shape", [(3, 100, 32), pytest.param((50, 1024, 32), marks=pytest.mark.gpu)])
def test_to_e4m3(shape):
    """Sums in another order round a few values to the other side."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    modulation = seeded(shape[1]) * 0.3, seeded(shape[1]).roll(1) * 0.3
    got, want = (run(op, *arguments(shape, dtype, E4M3), modulation, 40.0)[2] for op in (row_step, row_step_ref))
    ours, twins = (t.view(torch.uint8).int() for t in (got, want))
    apart = (ours - twins).abs()
    assert apart.max() <= 1
    assert (apart == 0).float().mean() > 0.97


def test_what_it_does_not_run_is_told():
    assert step_misfits(1024, 32) == []
    assert "65536 weights" in step_misfits(2048, 32)[0]
    out_norm, outward, inward, (x_t, x, normed) = arguments((2, 40, 7), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="inverse 2 belongs"):
        row_step(out_norm, outward, x_t, inward, x, None, normed, inverse=2.0)
    with pytest.raises(ValueError, match=r"the weight of inward has shape"):
        row_step(out_norm, outward, x_t, outward, x, None, normed)
    with pytest.raises(ValueError, match=r"x_t is torch\.float64"):
        row_step(out_norm, outward, x_t.double(), inward, x, None, normed)
    wide = [seeded(1, 2048), (seeded(32, 2048), seeded(32)), seeded(1, 32), (seeded(2048, 32), seeded(2048))]
    with pytest.raises(ValueError, match="65536 weights"):
        row_step(*wide, seeded(1, 2048).clone(), None, seeded(1, 2048).clone())
