"""The products against their twins: every variant, every epilogue."""

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, cases, guarded, seeded, up

from turbopi import kernels
from turbopi.kernels import GemmConfig

# Rows, columns, depth.
SHAPES = cases(
    [(1, 24, 40), (17, 33, 48), (37, 70, 100)],
    [(10, 2560, 1024), (51, 1024, 4096), (552, 2048, 2048), (512, 4304, 1152), (968, 2560, 2048)],
)
ALIGNED = cases([(1, 24, 40), (37, 72, 96)], [(552, 2048, 2048), (50, 1024, 4096)])
EPILOGUES = ["", "bias", "bias gelu", "residual", "gate residual", "bias gelu gate residual"]
TINY = GemmConfig(16, 16, 16, group_m=2, stages=2)
TMA = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="descriptors need capability 9.0"
)


def operands(dtype, shape, epilogue=""):
    m, n, k = shape
    x, w, out = seeded(m, k, dtype=dtype), seeded(n, k, dtype=dtype, scale=k**-0.5), guarded(m, n, dtype=dtype)
    extras = {
        "bias": seeded(n, dtype=dtype) if "bias" in epilogue else None,
        "activation": "gelu" if "gelu" in epilogue else "none",
        "residual": seeded(m, n, dtype=dtype) if "residual" in epilogue else None,
        "gate": seeded(n) if "gate" in epilogue else None,
    }
    return x, w, out, extras


def twin(x, w, out, extras):
    want = guarded(*out.shape)
    floats = {key: up(value) if isinstance(value, torch.Tensor) else value for key, value in extras.items()}
    kernels.linear_ref(up(x), up(w), want, **floats)
    return want


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_linear(dtype, shape, epilogue):
    x, w, out, extras = operands(dtype, shape, epilogue)
    kernels.linear(x, w, out, **extras)
    assert_equal_up_to_rounding(out, twin(x, w, out, extras))
    assert_guard(out)


@pytest.mark.parametrize("config", [TINY, GemmConfig(32, 16, 32, group_m=1)], ids=str)
@pytest.mark.parametrize(("dtype", "shape"), cases([(37, 70, 100)], [(552, 1024, 1152)]))
def test_linear_in_other_tiles(dtype, shape, config):
    x, w, out, extras = operands(dtype, shape, "bias residual")
    kernels.linear(x, w, out, **extras, config=config)
    assert_equal_up_to_rounding(out, twin(x, w, out, extras))
    assert_guard(out)


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize(("dtype", "shape"), cases([(1, 24, 40), (17, 33, 48)], [(10, 1024, 4096), (50, 1024, 2048)]))
def test_split_product(dtype, shape, splits):
    x, w, out, extras = operands(dtype, shape, "bias gelu gate residual")
    # More splits than blocks of K: some parts are empty, and must count as zeros.
    partial = guarded(splits, shape[0], shape[1])
    config = GemmConfig(16, 16, 16, splits=splits)
    kernels.linear(x, w, out, **extras, config=config, partial=partial)
    assert_equal_up_to_rounding(out, twin(x, w, out, extras))
    assert_guard(out)
    assert_guard(partial)
    first = out.clone()
    kernels.linear(x, w, out, **extras, config=config, partial=partial)
    assert torch.equal(out, first)


@TMA
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("epilogue", ["", "bias gelu gate residual"])
@pytest.mark.parametrize(("dtype", "shape"), ALIGNED)
def test_linear_on_descriptors(dtype, shape, epilogue, persistent):
    x, w, out, extras = operands(dtype, shape, epilogue)
    config = GemmConfig(16, 16, 32, group_m=2, descriptors=True, persistent=persistent)
    kernels.linear(x, w, out, **extras, config=config)
    assert_equal_up_to_rounding(out, twin(x, w, out, extras))
    assert_guard(out)


@pytest.mark.parametrize(("dtype", "shape"), cases([(17, 32, 48)], [(552, 2048, 4096)]))
def test_residual_may_be_the_output_and_rows_may_stand_apart(dtype, shape):
    m, n, k = shape
    _, w, _, _ = operands(dtype, shape)
    wide_x, wide_out = seeded(m, k + 16, dtype=dtype), seeded(m, n + 16, dtype=dtype)
    out = wide_out[:, 16:]
    want = out.float().clone()
    kernels.linear(wide_x[:, :k], w, out, residual=out)
    kernels.linear_ref(up(wide_x[:, :k]), up(w), want, residual=want.clone())
    assert_equal_up_to_rounding(out, want)
    assert_guard(wide_out)


@pytest.mark.parametrize("config", [None, TINY], ids=str)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    cases([(1, 24, 40), (17, 33, 48), (37, 40, 100)], [(10, 4096, 1024), (552, 16384, 2048), (50, 4096, 1024)]),
)
def test_geglu_linear(dtype, shape, config):
    check_geglu_linear(dtype, shape, config)


@TMA
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), ALIGNED)
def test_geglu_linear_on_descriptors(dtype, shape, persistent):
    check_geglu_linear(dtype, shape, GemmConfig(16, 16, 32, group_m=2, descriptors=True, persistent=persistent))


def check_geglu_linear(dtype, shape, config):
    m, f, k = shape
    x, w, out = seeded(m, k, dtype=dtype), seeded(2 * f, k, dtype=dtype, scale=2 * k**-0.5), guarded(m, f, dtype=dtype)
    kernels.geglu_linear(x, w, out, config=config)
    want = guarded(m, f)
    kernels.geglu_linear_ref(up(x), up(w), want)
    assert_equal_up_to_rounding(out, want, factor=2)
    assert_guard(out)


def test_wrong_products_are_refused():
    x, w, out = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"w has shape \(6, 7\), expected \(any, 8\)"):
        kernels.linear(x, w[:, :7].contiguous(), out)
    with pytest.raises(ValueError, match=r"w is torch\.float16"):
        kernels.linear(x, w.half(), out)
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: none, gelu"):
        kernels.linear(x, w, out, activation="relu")
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels.linear(x, torch.zeros(8, 6).T, out)
    with pytest.raises(ValueError, match="2 splits needs partial of as many planes, got 1"):
        kernels.linear(x, w, out, config=GemmConfig(16, 16, 16, splits=2))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernels.linear(x, w, out, config=GemmConfig(16, 16, 16, descriptors=True))
    with pytest.raises(ValueError, match=r"expected float32 \(splits, 4, 6\)"):
        kernels.linear(x, w, out, partial=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"w_gate_up has shape \(6, 8\), expected \(12, 8\)"):
        kernels.geglu_linear(x, w, out)
    with pytest.raises(ValueError, match="cannot be split"):
        kernels.geglu_linear(x, torch.zeros(12, 8), out, GemmConfig(16, 16, 16, splits=2))
