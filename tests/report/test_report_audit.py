import json
import math
from pathlib import Path
from typing import Any

import pytest

from turbopi.report import write_audit_report
from turbopi.report.heat import HeatMap, heat_map, logarithmic


def tensors(broken: bool) -> dict[str, list[Any]]:
    names = [
        "vision.cam0.layers.0.q",
        "prefix.layers.0.hidden",
        "step0.layers.0.stream",
        "step1.x_t",
        "step1.layers.0.stream",
        "actions",
    ]
    ratios: list[float | None] = [0.5, 7.5 if broken else 0.9, 1.0, 0.1, None if broken else 1.1, 1.0]
    table: dict[str, list[Any]] = {"name": names, "over": [r is None or r > 2 for r in ratios], "ratio": ratios}
    for who in ("candidate", "plain"):
        for mode in ("alone", "forced", "free"):
            for figure in ("rms", "max"):
                table[f"{who}_{mode}_{figure}"] = [1e-3, 2e-3, 3e-3, 0.0, None if broken else 4e-3, 5e-3]
    for mode in ("alone", "forced", "free"):
        table[f"candidate_{mode}_cosine"] = [0.99] * len(names)
    return table


def receipt(path: Path, broken: bool) -> Path:
    divergence = {"tensor": "prefix.layers.0.hidden", "look_at": "activation <function>", "ratio": 7.5}
    switch = {"tensors": 4, "error": 1e-4, "healed": 0.97}
    results: dict[str, Any] = {
        "candidate": "turbo:fp8",
        "reference": "eager:fp32",
        "plain": "eager:fp8",
        "granularity": "every buffer",
        "frames": ["frame 0"],
        "steps": 2,
        "budget": {"allowed_rms": 2.0},
        "tensors": tensors(broken),
        "amplification": {"actions": 1.25, "step1.x_t": None},
        "over_budget": 2 if broken else 0,
        "first_divergence": divergence if broken else None,
        "actions": {"candidate": 4e-3, "plain": None if broken else 3e-3},
        "closed_loop": {"played": False, "verdict": "No verdict on tasks was made."},
        "seconds": {"all": 3.0},
    }
    if broken:
        results["sensitivity"] = {
            "frame": "frame 0",
            "actions_error": 4e-3,
            "healer": "mlp",
            "switches": [
                {"kind": "stage", "name": "prefill", **switch},
                {"kind": "group", "name": "mlp", **switch},
                {"kind": "layer", "name": "prefix layer 0", **switch},
                {"kind": "layer and group", "name": "prefix layer 0 mlp", **{**switch, "healed": None}},
                {"kind": "tensor", "name": "prefix.layers.0.hidden", **switch},
            ],
        }
        results["checks"] = [{"name": "determinism", "passed": False, "detail": "differ"}]
        row = {"tensor": "prefix.embs", "amax": None, "crest": 5.0, "e4m3_lost": 0.25}
        results["ranges"] = [row | {f"{f}_saturates": f == "fp16" for f in ("fp16", "bf16", "e4m3")}]
        results["plan"] = {
            "plan": {"default": "fp8", "exceptions": {"expert.layers.0.down": "bf16"}},
            "share": 0.02,
            "actions_error": 4e-3,
            "with_exceptions": 2e-3,
            "products": {"expert.layers.0.down": 3e-3, "expert.layers.0.out": 1e-3},
        }
        results["deployed"] = {"actions_error": 4e-3}
    path.write_text(
        json.dumps(
            {
                "what": "audit",
                "when": "2026-11-21",
                "command": "turbo-pi audit",
                "commit": "abc",
                "uncommitted_changes": False,
                "machine": {"cpu": "a processor"},
                "config": {"steps": 2},
                "results": results,
            }
        )
    )
    return path


def test_a_page_shows_what_was_found(tmp_path: Path) -> None:
    page = write_audit_report(receipt(tmp_path / "audit.json", broken=True)).read_text()
    for words in (
        "First divergence: prefix.layers.0.hidden. Look at: activation &lt;function&gt;.",
        "7.50",
        "not finite",
        "not a number",
        "Smallest switch that heals: mlp",
        "+97.0 %",
        "determinism",
        "25.00 %",
        "1 of 2 products stay in bf16",
        "Action expert: layer by step",
        "vision.cam0: layer by operation",
        "No verdict on tasks was made.",
    ):
        assert words in page
    assert "safe" not in page


def test_a_clean_page_says_no_more_than_that(tmp_path: Path) -> None:
    page = write_audit_report(receipt(tmp_path / "audit.json", broken=False)).read_text()
    assert "Every operation is within what eager:fp8 costs." in page
    assert "Switches" not in page


def test_a_check_without_ranges_has_its_table(tmp_path: Path) -> None:
    path = receipt(tmp_path / "audit.json", broken=False)
    content = json.loads(path.read_text())
    content["results"]["checks"] = [{"name": "deployed, the whole tick", "passed": False, "detail": "off"}]
    path.write_text(json.dumps(content))
    page = write_audit_report(path).read_text()
    assert "deployed, the whole tick" in page
    assert "Ranges" not in page


def test_played_episodes_have_their_table(tmp_path: Path) -> None:
    path = receipt(tmp_path / "audit.json", broken=False)
    content = json.loads(path.read_text())
    total = {"rate_a": 0.95, "rate_b": 0.9, "interval_a": [0.9, 0.98], "interval_b": [0.85, 0.94]}
    content["results"]["closed_loop"] = {"played": True, "verdict": "no difference shown", "total": total}
    path.write_text(json.dumps(content))
    page = write_audit_report(path).read_text()
    assert "85.0 to 94.0 %" in page
    assert "no difference shown" in page


def test_what_is_no_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no receipt at"):
        write_audit_report(tmp_path / "none.json")
    other = tmp_path / "bench.json"
    other.write_text('{"what": "bench latency"}')
    with pytest.raises(ValueError, match="expected one of `turbo-pi audit`"):
        write_audit_report(other)


def test_colours_follow_the_value() -> None:
    scale = logarithmic(0.5, 20.0)
    assert (scale(0.0), scale(0.5), scale(20.0), scale(math.inf)) == (0.0, 0.0, 1.0, 1.0)
    heat = HeatMap(["a"], ["x", "y", "z"], [[0.5, 20.0, None]], lambda v: f"{v:g} times", scale)
    drawn = heat_map(heat)
    assert drawn.count("<rect") == 2
    assert "var(--bad) 0%" in drawn
    assert "var(--bad) 100%" in drawn
    assert "a, y: 20 times" in drawn
