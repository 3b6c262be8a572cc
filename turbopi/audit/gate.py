"""The audit as a gate: an engine that fails it is not taken, however fast it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..engine import EagerEngine, Engine, Precision, TickEngine, create_engine
from ..engine.selection import Verdict
from ..model import Pi0
from ..quant import Quantisation
from .measure import Reordered
from .probe import ModuleSubject
from .sample import Sample, Subject
from .session import AuditOptions, audit
from .subjects import Pair, StageSubject


def audit_gate(
    model: Pi0,
    precision: Precision,
    reference: Pi0,
    samples: Sequence[Sample],
    quantisation: Quantisation | None = None,
) -> Callable[[str, Engine], Verdict]:
    """Judges engines by what goes from stage to stage, and by the whole tick of those that have one, on a few frames.

    Args:
        model: in `precision_dtype(precision)`; its plain run sets the budget.
        precision: of the engines.
        reference: in float32, on the same device.
        samples: frames; real ones say more than noise.
        quantisation: of a quantised precision.
    """
    plain = create_engine("eager", model, precision, quantisation)
    assert isinstance(plain, EagerEngine)
    budget: Subject = Reordered(plain) if precision == "fp32" else ModuleSubject(f"eager:{precision}", plain)

    def judge(name: str, engine: Engine) -> Verdict:
        tick = engine if isinstance(engine, TickEngine) else None
        pair = Pair(StageSubject(f"{name}:{precision}", engine), budget, tick)
        found = audit(pair, reference, samples, AuditOptions(switches=False, checks=False))
        first = found["first_divergence"]
        if first is not None:
            count = found["over_budget"]
            return Verdict(False, f"fails its audit: {count} tensors are over budget, the first is {first['tensor']}")
        failed = [check for check in found.get("checks", []) if check["passed"] is False]
        if failed:
            return Verdict(False, f"fails its audit: {failed[0]['name']}: {failed[0]['detail']}")
        return Verdict(True, f"passes its audit on {len(samples)} frames")

    return judge
