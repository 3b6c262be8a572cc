"""A precision plan from an audit: the products that must not be quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from ..quant import Format, PrecisionPlan
from .graph import ReferenceGraph
from .names import product_of
from .sample import Subject
from .switches import Switch, heal


def product_switches(told: Sequence[str]) -> list[Switch]:
    """A switch for every matrix product whose result a candidate tells."""
    products: dict[str, set[str]] = {}
    for name in told:
        product = product_of(name)
        if product is not None:
            products.setdefault(product, set()).add(name)
    return [Switch("product", product, frozenset(names)) for product, names in products.items()]


def suggest_plan(
    candidate: Subject, graph: ReferenceGraph, told: Sequence[str], share: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Keep in bf16 the products that make at least `share` of the actions' squared error each.

    Each product's error is measured alone, all else being computed by the reference: taken away from the whole instead,
    a product's error may as well have cancelled another's.

    Returns:
        "plan" for `PrecisionPlan.from_dict`; "actions_error" as it is and "with_exceptions", if the reference computes
        those products; "products": the error that each makes alone, relative.

    Raises ValueError for a candidate whose precision quantises nothing, or a share beyond 0 to 1.
    """
    precision = candidate.name.partition(":")[2]
    check_share(precision, share)
    switches = product_switches(told)
    alone = [Switch("product", s.name, frozenset(told) - s.names) for s in switches]
    before, found = heal(candidate, graph, alone, progress)
    whole = sum(healing.error**2 for healing in found)
    kept = {h.switch.name for h in found if whole > 0 and h.error**2 >= share * whole}
    plan = PrecisionPlan(precision, {s.name: "bf16" for s in switches if s.name in kept})  # type: ignore[arg-type]
    together = frozenset(name for s in switches if s.name in kept for name in s.names)
    after = heal(candidate, graph, [Switch("product", "exceptions", together)], progress)[1][0].error
    return {
        "plan": plan.to_dict(),
        "share": share,
        "actions_error": before,
        "with_exceptions": after,
        "products": {h.switch.name: float(f"{h.error:.4g}") for h in found},
    }


def check_share(precision: str, share: float) -> None:
    """Raise ValueError unless the precision quantises, and the share lies between 0 and 1."""
    if precision not in get_args(Format) or precision == "bf16":
        raise ValueError(f"precision {precision!r} quantises nothing; a precision plan needs a quantised candidate")
    if not 0 < share < 1:
        raise ValueError(f"--plan-share must lie between 0 and 1, got {share}")
