"""The page of one `turbo-pi audit` receipt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from .heat import HeatMap, heat_map, logarithmic
from .page import flat_rows, heading, page, table, tiles

_RATIOS = (0.5, 20.0)
"""Times the budget at which a heat map begins and is full."""
_LISTED = 24
_LAYER = re.compile(r"(?P<tower>.+)\.layers\.(?P<layer>\d+)\.(?P<tensor>\w+)")
GROUPS = ("attention", "softmax", "norm", "rope", "mlp", "projections", "residual")
Line = dict[str, Any]


def write_audit_report(receipt: Path) -> Path:
    """Write the receipt's page beside it, under its name with `.html`. Returns the page's path.

    Raises:
        FileNotFoundError: no such receipt.
        ValueError: it is not one of `turbo-pi audit`.
    """
    if not receipt.is_file():
        raise FileNotFoundError(f"no receipt at {receipt}; write one with `turbo-pi audit --out {receipt}`")
    content = json.loads(receipt.read_text())
    if content.get("what") != "audit":
        raise ValueError(f"{receipt} is a receipt of {content.get('what')!r}, expected one of `turbo-pi audit`")
    path = receipt.with_suffix(".html")
    path.write_text(page(f"Audit: {receipt.stem}", _parts(content)))
    return path


def _parts(content: dict[str, Any]) -> Iterator[str]:
    results, machine = content["results"], content["machine"]
    lines = _lines(results["tensors"])
    yield f"<h1>Audit: {escape(results['candidate'])} against {escape(results['reference'])}</h1>"
    where = machine["gpus"][0] if machine.get("gpus") else machine["cpu"]
    frames = f"{len(results['frames'])} frames, {results['steps']} steps"
    yield f'<p class="soft">{escape(" · ".join((where, frames, results["granularity"], content["when"])))}</p>'
    yield from _verdict(results)
    yield from _maps(lines)
    yield from _worst(lines, results)
    if "sensitivity" in results:
        yield from _switches(results["sensitivity"])
    if "checks" in results:
        yield from _checks(results)
    if "plan" in results:
        yield from _plan(results["plan"])
    yield heading("Receipt", "what was run, and on what")
    known = {key: content[key] for key in ("command", "commit", "uncommitted_changes", "machine", "config")}
    yield table(("field", "value"), flat_rows({**known, "seconds": results["seconds"], "budget": results["budget"]}))


def _lines(columns: dict[str, list[Any]]) -> list[Line]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _verdict(results: dict[str, Any]) -> Iterator[str]:
    found = results["first_divergence"]
    if found is None:
        words, kind = f"Every operation is within what {results['plain']} costs.", "ok"
    else:
        words = f"First divergence: {found['tensor']}. Look at: {found['look_at']}."
        kind = "bad"
    yield f'<p class="verdict {kind}">{escape(words)}</p>'
    errors, checks = results["actions"], results.get("checks", [])
    failed = sum(check["passed"] is False for check in checks)
    values = [
        (_figure(errors["candidate"]), "relative error of the actions"),
        (_figure(errors["plain"]), f"the same of {results['plain']}"),
        (str(results["over_budget"]), f"of {len(results['tensors']['name'])} tensors over budget"),
        (f"{failed} of {len(checks)}", "checks failed"),
    ]
    if found is not None:
        values.insert(0, (_times(found["ratio"]), f"times the budget at {found['tensor']}"))
    if "deployed" in results:
        values.append((_figure(results["deployed"]["actions_error"]), "actions' error of the engine as it is deployed"))
    yield tiles(values)
    loop = results["closed_loop"]
    yield heading("On tasks")
    yield f"<p>{escape(loop['verdict'])}</p>"
    if loop["played"]:
        total = loop["total"]
        yield table(
            ("", "success", "95 % interval"),
            [
                (name, f"{100 * total[f'rate_{key}']:.1f} %", _interval(total[f"interval_{key}"]))
                for name, key in ((results["reference"], "a"), (results["candidate"], "b"))
            ],
        )


def _interval(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


# Heat maps


def _maps(lines: list[Line]) -> Iterator[str]:
    placed = [(match, line) for line in lines if (match := _LAYER.fullmatch(line["name"]))]
    towers: dict[str, list[tuple[re.Match[str], Line]]] = {}
    for match, line in placed:
        towers.setdefault("step" if match["tower"].startswith("step") else match["tower"], []).append((match, line))
    ratios = logarithmic(*_RATIOS)
    if "step" in towers:
        steps = towers["step"]
        yield heading("Action expert: layer by step", "the worst operation of each layer, in times its budget")
        yield _map(steps, lambda m: m["tower"], lambda line: line["ratio"], ratios, "times the budget")
        yield heading("Action expert: accumulated error", "of each layer's output, relative to the reference's own run")
        streams = [(match, line) for match, line in steps if match["tensor"] == "stream"]
        errors = [line["candidate_free_rms"] for _, line in streams if line["candidate_free_rms"]]
        scale = logarithmic(min(errors, default=0.0), max(errors, default=0.0))
        yield _map(streams, lambda m: m["tower"], lambda line: line["candidate_free_rms"], scale, "relative error")
    for tower, members in towers.items():
        name = "Action expert, all steps" if tower == "step" else tower
        yield heading(f"{name}: layer by operation", "error alone, in times the budget")
        yield _map(members, lambda m: m["tensor"], lambda line: line["ratio"], ratios, "times the budget")


def _map(
    members: list[tuple[re.Match[str], Line]],
    column: Callable[[re.Match[str]], str],
    value: Callable[[Line], float | None],
    scale: Callable[[float], float],
    words: str,
) -> str:
    """The largest value of each layer and column."""
    layers = sorted({int(match["layer"]) for match, _ in members})
    columns = list(dict.fromkeys(column(match) for match, _ in members))
    cells: dict[tuple[int, str], float] = {}
    for match, line in members:
        key, found = (int(match["layer"]), column(match)), value(line)
        cells[key] = max(cells.get(key, 0.0), math.inf if found is None else found)
    rows = [[cells.get((layer, name)) for name in columns] for layer in layers]
    labels = [f"layer {layer}" for layer in layers]
    return heat_map(HeatMap(labels, columns, rows, lambda v: f"{v:.3g} {words}", scale))


# Tables


def _worst(lines: list[Line], results: dict[str, Any]) -> Iterator[str]:
    yield heading(
        "Largest errors alone",
        "alone: each operation on the candidate's own input; forced: each layer fed the reference's input; free: the "
        "candidate's own run. The budget is the same reading of the reference in the candidate's precision.",
    )
    ranked = sorted(lines, key=lambda line: -math.inf if line["ratio"] is None else -line["ratio"])
    header = ("tensor", "alone", "budget", "times", "max", "forced", "budget", "free", "budget", "cosine", "growth")
    growth = results["amplification"]
    yield table(
        header,
        [
            (
                line["name"],
                _figure(line["candidate_alone_rms"]),
                _figure(line["plain_alone_rms"]),
                _times(line["ratio"]),
                _figure(line["candidate_alone_max"]),
                *(_figure(line[f"{who}_{mode}_rms"]) for mode in ("forced", "free") for who in ("candidate", "plain")),
                f"{line['candidate_free_cosine']:.6f}",
                "" if growth.get(line["name"]) is None else f"{growth[line['name']]:.2f}",
            )
            for line in ranked[:_LISTED]
        ],
    )
    chain = [line for line in lines if line["name"].endswith(("x_t", "actions"))]
    yield heading("From step to step", "accumulated error of x_t, and how much it grew")
    yield table(
        ("tensor", "candidate", "budget", "growth"),
        [
            (
                line["name"],
                _figure(line["candidate_free_rms"]),
                _figure(line["plain_free_rms"]),
                "" if growth.get(line["name"]) is None else f"{growth[line['name']]:.2f}",
            )
            for line in chain
        ],
    )


def _switches(found: dict[str, Any]) -> Iterator[str]:
    healer = found["healer"] or "none, or there is nothing to heal"
    yield heading(
        "Switches",
        f"{found['frame']}: the actions' error is {_figure(found['actions_error'])}; how much of it is gone when the "
        f"reference computes a part. Smallest switch that heals: {healer}",
    )
    by_name = {switch["name"]: switch for switch in found["switches"]}
    rows = []
    for name, switch in by_name.items():
        if switch["kind"] == "layer" or name in ("vision", "prefix", "expert"):
            cells = [_healed(by_name.get(f"{name} {group}")) for group in GROUPS]
            rows.append((name, _healed(switch), *cells))
    for tower in ("vision", "prefix", "expert"):
        rows.append((f"{tower}, all layers", "", *(_healed(by_name.get(f"{tower} {group}")) for group in GROUPS)))
    rows.append(("everywhere", "", *(_healed(by_name.get(group)) for group in GROUPS)))
    yield table(("", "whole layer", *GROUPS), rows)
    others = [s for s in found["switches"] if s["kind"] in ("stage", "tensor")]
    yield table(
        ("switched", "tensors", "actions' error", "healed"),
        [(s["name"], str(s["tensors"]), _figure(s["error"]), _healed(s)) for s in others],
    )


def _healed(switch: Line | None) -> str:
    return "" if switch is None or switch["healed"] is None else f"{100 * switch['healed']:+.1f} %"


def _checks(results: dict[str, Any]) -> Iterator[str]:
    yield heading("Checks", "what must hold of any right implementation")
    words = {True: "passed", False: "failed", None: "not asked"}
    yield table(("check", "", "seen"), [(c["name"], words[c["passed"]], c["detail"]) for c in results["checks"]])
    if "ranges" in results:
        yield from _ranges(results)


def _ranges(results: dict[str, Any]) -> Iterator[str]:
    yield heading(
        "Ranges",
        "of the candidate's tensors, largest first. Crest: largest value over root mean square. Lost in E4M3: the part "
        "that becomes zero if one scale puts the largest value at the format's limit.",
    )
    ranked = sorted(results["ranges"], key=lambda row: -math.inf if row["amax"] is None else -row["amax"])
    yield table(
        ("tensor", "largest", "crest", "beyond fp16", "beyond bf16", "beyond E4M3", "lost in E4M3"),
        [
            (
                row["tensor"],
                _figure(row["amax"]),
                _times(row["crest"]),
                *("yes" if row[f"{fmt}_saturates"] else "" for fmt in ("fp16", "bf16", "e4m3")),
                "" if row["e4m3_lost"] is None else f"{100 * row['e4m3_lost']:.2f} %",
            )
            for row in ranked[:_LISTED]
        ],
    )


def _plan(found: dict[str, Any]) -> Iterator[str]:
    kept, share = found["plan"]["exceptions"], f"{100 * found['share']:g} %"
    before, after = _figure(found["actions_error"]), _figure(found["with_exceptions"])
    yield heading(
        "Precision plan",
        f"{len(kept)} of {len(found['products'])} products stay in bf16: each makes at least {share} of the squared "
        f"error. Actions' error {before}; with these products computed by the reference {after}",
    )
    ranked = sorted(found["products"].items(), key=lambda item: -item[1])
    yield table(
        ("product", "actions' error alone", "plan"),
        [(name, _figure(error), kept.get(name, found["plan"]["default"])) for name, error in ranked[:_LISTED]],
    )


def _figure(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2e}"


def _times(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"
