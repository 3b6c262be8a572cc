"""What is to be exported, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..config import ModelConfig
from ..quant import Format, PrecisionPlan, Quantisation
from .layers import AttentionForm
from .writer import IR_VERSIONS

GraphName = Literal["vision", "prefill", "denoise", "whole"]
STAGE_GRAPHS: tuple[GraphName, ...] = ("vision", "prefill", "denoise")
"""One graph a stage, in the order in which they run."""

ExportPrecision = Literal["fp32", "fp16", "bf16", "fp8-qdq", "int8-qdq"]
FloatType = Literal["fp32", "fp16", "bf16"]
QDQ: dict[str, Format] = {"fp8-qdq": "fp8", "int8-qdq": "int8"}
"""Number format of the products by quantised precision."""
UNQUANTISED: Format = "bf16"
"""How a precision plan names products that are left alone; the export computes them in its base type."""

OPSETS = tuple(IR_VERSIONS)
OLDEST_OPSET = min(OPSETS)
"""The first with Gelu, and with fp8 and scales of every float type but bfloat16."""
FUSED_OPSET, BF16_SCALES_OPSET = 23, 21
"""The first with Attention, and the first whose Q/DQ take scales in bfloat16."""


@dataclass(frozen=True)
class ExportSpec:
    """One export.

    Attributes:
        graphs: stage graphs, or "whole": all stages in one.
        precision: of the matrix products. fp8-qdq and int8-qdq mark them by QuantizeLinear and DequantizeLinear.
        base: type of everything that is neither quantised nor an island of float32; None is the precision's own, and
            float32 for quantised ones.
        attention: "explicit" is MatMul, Softmax, MatMul; "fused" the Attention operator of opset 23.
        steps: flow-matching evaluations that the denoise graph unrolls.
        views: cameras that are there.
        prompt_buckets: prompt slots, a prefill and a denoise graph each; a shorter prompt is masked.
        opset: version of the ONNX operators; None is the oldest that has all that is needed.
    """

    graphs: tuple[GraphName, ...] = STAGE_GRAPHS
    precision: ExportPrecision = "fp32"
    base: FloatType | None = None
    attention: AttentionForm = "explicit"
    steps: int = 10
    views: int = 2
    prompt_buckets: tuple[int, ...] = (64,)
    opset: int | None = None

    def __post_init__(self) -> None:
        _choice("graphs", self.graphs or ("none",), get_args(GraphName))
        _choice("precision", (self.precision,), get_args(ExportPrecision))
        _choice("attention", (self.attention,), get_args(AttentionForm))
        if self.base is not None:
            _choice("base", (self.base,), get_args(FloatType))
        if self.precision not in QDQ and self.base not in (None, self.precision):
            raise ValueError(f"precision {self.precision!r} is its own base type; leave out base={self.base!r}")
        for name, values in (("steps", (self.steps,)), ("views", (self.views,)), ("buckets", self.prompt_buckets)):
            if not values or any(value < 1 for value in values):
                raise ValueError(f"{name} must be at least 1, got {values}")
        self._check_opset()

    def _check_opset(self) -> None:
        chosen = self.chosen_opset
        if chosen not in OPSETS:
            raise ValueError(f"opset {chosen} is not written here; choose one of {', '.join(map(str, OPSETS))}")
        if self.attention == "fused" and chosen < FUSED_OPSET:
            raise ValueError(
                f"opset {chosen} has no Attention, which 'fused' needs; choose opset {FUSED_OPSET} or later, or "
                "explicit attention"
            )
        if self.precision in QDQ and self.float_type == "bf16" and chosen < BF16_SCALES_OPSET:
            raise ValueError(
                f"opset {chosen} has no scales in bf16, which {self.precision!r} over base 'bf16' needs; choose "
                f"opset {BF16_SCALES_OPSET} or later, or another base"
            )

    @property
    def chosen_opset(self) -> int:
        """The opset that the graphs are written in."""
        if self.opset is not None:
            return self.opset
        return 23 if self.attention == "fused" else 21

    @property
    def float_type(self) -> FloatType:
        """What is neither quantised nor an island of float32 is computed in."""
        if self.base is not None:
            return self.base
        return "fp32" if self.precision in QDQ else self.precision  # type: ignore[return-value]

    def plan(self, quantisation: Quantisation | None) -> PrecisionPlan | None:
        """The formats of the products, None where nothing is quantised.

        Raises ValueError if a calibration is missing or not wanted, or the plan has a format that Q/DQ cannot say.
        """
        wanted = QDQ.get(self.precision)
        if wanted is None:
            if quantisation is not None:
                raise ValueError(f"precision {self.precision!r} quantises nothing; leave out plan and calibration")
            return None
        if quantisation is None or quantisation.calibration is None:
            raise ValueError(
                f"precision {self.precision!r} needs a calibration, and none was given; make one with "
                "`turbo-pi calibrate --checkpoint ...`"
            )
        plan = quantisation.plan
        known = {wanted, UNQUANTISED}
        for where, chosen in (("default", plan.default), *plan.exceptions.items()):
            if chosen not in known:
                raise ValueError(
                    f"the plan gives {where!r} the format {chosen!r}; {self.precision!r} is written with "
                    f"{' or '.join(sorted(known))} (left in the base type)"
                )
        return plan

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the model cannot be exported like this."""
        if self.views > config.cameras:
            raise ValueError(f"views is {self.views}, the model has {config.cameras} cameras")
        if max(self.prompt_buckets) > config.max_tokens:
            raise ValueError(
                f"prompt bucket {max(self.prompt_buckets)} is more than the model's {config.max_tokens} prompt slots"
            )
        if self.float_type != "fp32" and config.numerics not in ("exact", "jax"):
            raise ValueError(
                f"numerics {config.numerics!r} reproduces another port's roundings in bfloat16, which a graph in "
                f"{self.float_type} does not; export with numerics 'exact', or in fp32"
            )


def _choice(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")
