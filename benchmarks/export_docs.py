"""The tables of docs/export.md, made from receipts and from nothing else.

    python benchmarks/export_docs.py           # prints the tables
    python benchmarks/export_docs.py --write   # puts them into docs/export.md

What no receipt tells says "not run yet". A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->`.
Receipts, all in benchmarks/results/: `onnx_parity.json`, `onnx_parity_pi05.json` and `onnx_precisions.json`
(benchmarks/onnx_parity.py), `onnx_engine_cpu.json` and `onnx_engine_h200.json` (benchmarks/onnx_engine.py),
`onnx_robot.json` (examples/onnx_robot/play.py), and the runs `libero_spatial_onnx` and `libero_spatial_eager_cpu` of
`turbo-pi eval`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tyro
from doc_tables import RESULTS, ROOT, Options, fill, markdown_table, receipt

from turbopi.sim.compare import compare
from turbopi.sim.episodes_file import EPISODES_FILE

PAGE = ROOT / "docs" / "export.md"
NOT_RUN = "not run yet"
EAGER, ONNX = RESULTS / "libero_spatial_software", RESULTS / "libero_spatial_onnx"
MINIMUM = 200
"""Pairs below which no verdict is given."""
WAYS = {
    "vision forced": "vision",
    "prefill forced": "prefill, fed by the reference",
    "denoise forced": "denoise, every step fed by the reference",
    "denoise stage": "denoise, its loop left to itself",
    "whole free": "whole, from images to actions",
}


def main() -> None:
    """Print or write the tables."""
    options = tyro.cli(Options, description=__doc__)
    fill(PAGE, TABLES, options.write)


def parity() -> str:
    """The worst tap of each graph and way: fixtures, and full size."""
    small, full = receipt("onnx_parity", RESULTS), receipt("onnx_parity_pi05", RESULTS)
    rows = []
    for key, words in WAYS.items():
        cells = [words]
        found = [] if small is None else [row[key] for row in small["results"]["rows"] if key in row]
        cells.append(f"{max(row['worst_relative'] for row in found):.1e}" if found else NOT_RUN)
        stage = key.split()[0]
        cells.append(NOT_RUN if full is None else _full_cell(full["results"], stage, key))
        rows.append(tuple(cells))
    records = 0 if small is None else len({row["record"] for row in small["results"]["rows"]})
    header = ("graph", f"tiny and long, {records} records, explicit and fused", "π0.5, 3.3 billion parameters")
    return f"{markdown_table(header, rows)}\n\n{_memory(full)}"


def _full_cell(results: dict[str, Any], stage: str, key: str) -> str:
    """At full size the whole way goes through the three stage graphs, of whose outputs the last are the actions."""
    if stage != "whole":
        found = results[stage]["prove"]["worst"][key]
        return f"{found['worst_relative']:.1e} ({found['taps']} taps)"
    if "free" not in results:
        return NOT_RUN
    rows = results["free"]["worst"].values()
    return f"{max(row['worst_relative'] for row in rows):.1e} ({sum(row['taps'] for row in rows)} stage outputs)"


def _memory(full: dict[str, Any] | None) -> str:
    if full is None:
        return f"Memory of the full-size export: {NOT_RUN}."
    exported = full["results"]["export"]
    size = sum(exported["weight_bytes"].values()) / 1e9
    return (
        f"Exporting the full size wrote {size:.1f} GB of float32 weights in {exported['seconds']:.0f} s and held at "
        f"most {exported['peak_bytes'] / 1e9:.1f} GB of memory."
    )


def lower_precisions() -> str:
    """Actions of the whole graph against float32, beside the quantised reference's own."""
    found = receipt("onnx_precisions", RESULTS)
    header = ("precision", "actions against float32", "the quantised reference's own", "graph against that reference")
    rows = []
    for precision in ("fp16", "fp8-qdq", "int8-qdq"):
        row = None if found is None else found["results"]["rows"].get(precision)
        if row is None:
            rows.append((precision, NOT_RUN, NOT_RUN, NOT_RUN))
            continue
        against = row.get("against the quantised reference")
        rows.append(
            (
                precision,
                f"{row['against float32']['whole free']['actions_max_relative']:.1e}",
                f"{row['simulated']['max_relative']:.1e}" if "simulated" in row else "-",
                "-" if against is None else f"{against['whole free']['actions_max_relative']:.1e}",
            )
        )
    rows.append(("bf16", "tiny models only, by ONNX's own reference, in the tests", "-", "-"))
    return markdown_table(header, rows)


def engine(name: str, where: str) -> str:
    """Ticks and stages of all engines in one run; `where` is the machine's word for what they ran on."""
    found = receipt(name, RESULTS)
    if found is None:
        return NOT_RUN
    results, machine = found["results"], found["machine"]
    digits = 0 if where == "cpu" else 2
    rows = []
    for each, ratio in results["ratio_to_eager"].items():
        stages = " / ".join(f"{ms:.{digits}f}" for ms in results["stages_median_ms"][each].values())
        handed = results["hand_over_ms"].get(each, {})
        cost = ", ".join(f"{place}: {told['median']:.2f} ms" for place, told in handed.items()) or "-"
        tick = results["tick"][each]["median_ms"]
        apart = results["actions_max_relative_to_eager"][each]
        apart_cell = f"{apart:.0e}" if apart else "0"
        rows.append((f"`{each}`", f"{tick:.{digits}f} ms", f"{ratio:.2f}", stages, cost, apart_cell))
    header = ("engine", "tick, median", "of eager", "stages, ms", "handing over", "actions apart from eager")
    count = f"{results['tick']['eager']['count']} ticks each"
    ran = f"{machine['cpu']}, {machine['torch_threads']} thread(s)" if where == "cpu" else machine[where][0]
    return f"{markdown_table(header, rows)}\n\n{ran}, {count}."


def closed_loop() -> str:
    """Paired success, and the robot without PyTorch."""
    rows = []
    if all((run / EPISODES_FILE).is_file() for run in (EAGER, ONNX)):
        paired = compare(EAGER, ONNX, MINIMUM)
        total = paired["total"]
        both = (total["rate_a"], total["rate_b"])
        rows += [
            (f"`{name}`, {total['pairs']} episodes", f"{100 * rate:.1f} %")
            for name, rate in zip(("eager", "onnx"), both, strict=True)
        ]
        rows.append(("paired", paired["verdict"]))
    else:
        rows += [("`eager` and `onnx`, the same 200 episodes", NOT_RUN)]
    robot = receipt("onnx_robot", RESULTS)
    played = NOT_RUN
    if robot is not None:
        results = robot["results"]
        played = f"{results['successes']} of {len(results['episodes'])} episodes"
    rows.append(("the robot without PyTorch", played))
    return markdown_table(("LIBERO, libero_spatial", "success"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "parity": parity,
    "lower precisions": lower_precisions,
    "engine": partial(engine, "onnx_engine_cpu", "cpu"),
    "engine on a GPU": partial(engine, "onnx_engine_h200", "gpus"),
    "closed loop": closed_loop,
}


if __name__ == "__main__":
    main()
