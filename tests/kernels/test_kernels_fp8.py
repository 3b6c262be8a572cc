"""E4M3 outputs of every kernel that quantises, and products of E4M3 operands, against their twins."""

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, cases, guarded, seeded, up
from torch import Tensor

from turbopi import kernels
from turbopi.kernels import E4M3, E4M3_MAX, GemmConfig, store_ref

ROWS = cases([(1, 24), (5, 100)], [(512, 1152), (552, 2048), (10, 1024)])
PRODUCTS = [(1, 32, 48), (17, 48, 80), (37, 64, 96)]
FULL = [(10, 2560, 1024), (50, 1024, 4096), (552, 2048, 2048), (512, 4352, 1152), (968, 2560, 2048)]
TMA = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="descriptors need capability 9.0"
)
NO_FP8 = DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9)
pytestmark = pytest.mark.skipif(NO_FP8, reason="E4M3 needs compute capability 8.9")
INVERSE = 37.5
SHORT_SUMS = 20.0 if DEVICE == "cuda" else 1.0
"""Tensor cores add products of E4M3 in about 14 bits; `TOLERANCE` is made for float32."""
SAME, SLACK = (0.8, 2e-2) if DEVICE == "cuda" else (0.97, 0.0)


def shapes(small, full):
    """Shapes in the interpreter; on a GPU those and the full ones."""
    here = [pytest.param(s, id="x".join(map(str, s))) for s in small]
    return here + [pytest.param(s, id="gpu-" + "x".join(map(str, s)), marks=pytest.mark.gpu) for s in small + full]


def eighths(*shape: int, scale: float = 1.0) -> Tensor:
    """`seeded` values in E4M3."""
    t = guarded(*shape, dtype=E4M3)
    store_ref(seeded(*shape) * scale, t)
    return t


def assert_one_step(got: Tensor, want: Tensor, same: float = 0.97, slack: float = 0.0) -> None:
    """Equal but for rounding the other way: nearly everywhere the same, nowhere more than one E4M3 step apart.

    `slack` is what the values themselves may differ by, of their root mean square.
    """
    assert got.dtype == want.dtype == E4M3
    assert_guard(got)
    a, b = got.float().cpu(), want.float().cpu()
    step = torch.exp2(b.abs().clamp(min=2.0**-6).log2().floor() - 3)
    step += slack * b.square().mean().sqrt()
    assert ((a - b).abs() <= step).all(), f"largest error {((a - b).abs() / step).max()} steps"
    assert (a == b).float().mean() > same


def both(op, x, make, *args, inverse=INVERSE, **more):
    """A kernel's E4M3 output and its twin's."""
    got, want = make(), make()
    op(x, got, *args, inverse=inverse, **more)
    getattr(kernels, f"{op.__name__}_ref")(up(x), want, *map(up_if, args), inverse=inverse, **more)
    assert_one_step(got, want)


def up_if(value):
    return up(value) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_norms(dtype, shape):
    def out():
        return guarded(*shape, dtype=E4M3)

    x, scale, shift = seeded(*shape, dtype=dtype), seeded(shape[1]), seeded(shape[1])
    both(kernels.rms_norm, x, out)
    both(kernels.rms_norm, x, out, scale, shift)
    both(kernels.layer_norm, x, out)
    both(kernels.layer_norm, x, out, seeded(1, shape[1]))


@pytest.mark.parametrize("dtype_out", [E4M3, None])
@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_residual_norms(dtype, shape, dtype_out):
    """Also without E4M3: `residual_layer_norm` is new with it."""
    for name, more in (("residual_layer_norm", ()), ("gated_residual_norm", (None, None, None))):
        got, want = guarded(*shape, dtype=dtype_out or dtype), guarded(*shape, dtype=dtype_out or torch.float32)
        x, update = seeded(*shape, dtype=dtype), seeded(*shape, dtype=dtype, scale=0.5)
        wide, inverse = x.clone(), INVERSE if dtype_out else 1.0
        getattr(kernels, name)(x, update, *more, got, inverse=inverse)
        getattr(kernels, f"{name}_ref")(wide, update, *more, want, inverse=inverse)
        assert torch.equal(x, wide)
        assert_guard(x)
        if dtype_out:
            assert_one_step(got, want)
        else:
            assert_equal_up_to_rounding(got, want)


@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_gelu_and_geglu(dtype, shape):
    rows, width = shape
    both(kernels.gelu, seeded(rows, width, dtype=dtype), lambda: guarded(rows, width, dtype=E4M3))
    both(kernels.geglu, seeded(rows, 2 * width, dtype=dtype), lambda: guarded(rows, width, dtype=E4M3))


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize(("dtype", "shape"), cases([(5, 32, 12)], [(552, 256, 0), (10, 256, 552)]))
def test_attention(dtype, shape, splits):
    n, d, prefix = shape
    q, keys, values = seeded(n, 4 * d, dtype=dtype), *(seeded(1, 2, prefix + n, d, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([prefix], dtype=torch.int32, device=DEVICE)
    got, want = (guarded(n, 4 * d, dtype=E4M3) for _ in range(2))
    more = {"extra": n, "scale": d**-0.5, "inverse": INVERSE}
    kernels.attention_ref(up(q), up(keys), up(values), lengths, want, n, **more)
    if splits:
        partial, lse = guarded(splits, n * 4, d), guarded(splits, n * 4)
        kernels.attention_split(q, keys, values, lengths, got, n, partial, lse, **more)
    else:
        kernels.attention(q, keys, values, lengths, got, n, **more)
    # In bfloat16 the kernel rounds the softmax's weights, which the twin leaves in float32.
    assert_one_step(got, want, **({"same": 0.9, "slack": 2e-2} if dtype == torch.bfloat16 else {}))


def test_saturated_and_not_a_number():
    """Beyond the range is the largest value; NaN stays NaN, so that the tick's last check sees it."""
    gate_up = torch.tensor([[30.0, 30.0, 1.0, 1e4, -1e4, 2.0]], device=DEVICE)
    out = guarded(1, 3, dtype=E4M3)
    kernels.geglu(gate_up, out)
    assert out.tolist()[0][:2] == [E4M3_MAX, -E4M3_MAX]
    gate_up[0, 5] = float("nan")
    kernels.geglu_ref(gate_up, out)
    assert out.float().isnan().tolist() == [[False, False, True]]
    out.zero_()
    kernels.geglu(gate_up, out)
    assert out.float().isnan().tolist() == [[False, False, True]]


# Products


def product(shape, dtype):
    m, n, k = shape
    return eighths(m, k), eighths(n, k), guarded(m, n, dtype=dtype), seeded(n).abs() / k


@pytest.mark.parametrize("parts", ["", "bias", "bias gelu", "residual"])
@pytest.mark.parametrize("shape", shapes(PRODUCTS, FULL))
def test_linear_of_e4m3(shape, parts):
    x, w, out, scale = product(shape, torch.float16)
    m, n, _ = shape
    extras = {
        "bias": seeded(n, dtype=torch.float16) if "bias" in parts else None,
        "activation": "gelu" if "gelu" in parts else "none",
        "residual": seeded(m, n, dtype=torch.float16) if "residual" in parts else None,
    }
    kernels.linear(x, w, out, **extras, scale=scale)
    want = guarded(m, n)
    kernels.linear_ref(x, w, want, **{k: up_if(v) for k, v in extras.items()}, scale=scale)
    assert_equal_up_to_rounding(out, want, SHORT_SUMS)
    assert_guard(out)


@pytest.mark.parametrize("config", [None, GemmConfig(16, 16, 32, group_m=2)], ids=str)
@pytest.mark.parametrize("shape", shapes(PRODUCTS, FULL))
def test_products_into_e4m3(shape, config):
    x, w, _, scale = product(shape, torch.float32)
    m, n, _ = shape
    bias = seeded(n)
    got, want = (guarded(m, n, dtype=E4M3) for _ in range(2))
    for op, out in ((kernels.linear, got), (kernels.linear_ref, want)):
        op(x, w, out, bias, "gelu", config=config, scale=scale, inverse=INVERSE)
    assert_one_step(got, want, SAME, SLACK)
    got, want = (guarded(m, n // 2, dtype=E4M3) for _ in range(2))
    for op, out in ((kernels.geglu_linear, got), (kernels.geglu_linear_ref, want)):
        op(x, w, out, config, scale * 9, INVERSE)
    assert_one_step(got, want, SAME, SLACK)


@TMA
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("shape", shapes([(37, 64, 96)], [(552, 2048, 2048), (50, 1024, 4096)]))
def test_e4m3_on_descriptors(shape, persistent):
    x, w, out, scale = product(shape, torch.float16)
    m, n, _ = shape
    config = GemmConfig(32, 32, 32, group_m=2, descriptors=True, persistent=persistent)
    kernels.linear(x, w, out, config=config, scale=scale)
    want = guarded(m, n)
    kernels.linear_ref(x, w, want, scale=scale)
    assert_equal_up_to_rounding(out, want, SHORT_SUMS)
    assert_guard(out)
    got, want = (guarded(m, n // 2, dtype=E4M3) for _ in range(2))
    kernels.geglu_linear(x, w, got, config, scale * 9, INVERSE)
    kernels.geglu_linear_ref(x, w, want, None, scale * 9, INVERSE)
    assert_one_step(got, want, SAME, SLACK)


@pytest.mark.parametrize("shape", shapes([(17, 48, 80)], [(10, 1024, 4096)]))
def test_split_product_of_e4m3(shape):
    x, w, out, scale = product(shape, torch.float32)
    partial = guarded(3, *out.shape)
    kernels.linear(x, w, out, config=GemmConfig(16, 16, 32, splits=3), partial=partial, scale=scale)
    want = guarded(*out.shape)
    kernels.linear_ref(x, w, want, scale=scale)
    # Float32's tolerance is 100 times float16's.
    assert_equal_up_to_rounding(out, want, 100 * SHORT_SUMS if DEVICE == "cuda" else 1.0)
    assert_guard(out)


def test_wrong_e4m3_is_refused():
    x, w, out = torch.zeros(4, 16), torch.zeros(8, 16), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"inverse 2 belongs to an output in torch\.float8_e4m3fn, out is"):
        kernels.linear(x, w, out, inverse=2.0)
    with pytest.raises(ValueError, match="inverse 2 belongs"):
        kernels.rms_norm_ref(x, x.clone(), inverse=2.0)
    with pytest.raises(ValueError, match=r"w is torch\.float32, expected the dtype of x"):
        kernels.linear(x.to(E4M3), w, out)
    with pytest.raises(ValueError, match=r"scale has shape \(4,\), expected a contiguous \(8,\)"):
        kernels.linear(x, w, out, scale=torch.ones(4))
    with pytest.raises(ValueError, match="update is"):
        kernels.residual_layer_norm(x, x.half(), x.clone())
