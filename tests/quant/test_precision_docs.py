"""What fills docs/precision.md from receipts, and the scripts that make them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import precision_docs as docs
import precision_errors
import precisions
from doc_tables import placed

from turbopi.checkpoint import init_checkpoint


def played(run: str, successes: int, difference: float, p: float, episodes: int = 200) -> dict[str, Any]:
    return {
        "run": run, "episodes": episodes, "successes": successes, "interval": [0.9, 1.0], "p_value": p,
        "difference": difference,
    }  # fmt: skip


def measured(ms: float) -> dict[str, Any]:
    stages = {name: {"median_ms": ms / 3} for name in ("encode_images", "prefill", "denoise")}
    engine = {"weight_bytes": {"fp8": 2_000_000_000, "bf16": 500_000_000}}
    return {"call": {"median_ms": ms + 1}, "device_ms": ms, "stages": stages, "engine": engine}


def test_an_empty_directory_gives_a_table_that_says_so(tmp_path: Path) -> None:
    receipts = docs.read(tmp_path)
    table = docs.precision_table(receipts)
    rows = table.splitlines()
    assert len(rows) == 2 + len(docs.RUNS)
    assert rows[-1].startswith("| `eager:nvfp4` | simulated | simulated | not run yet |")
    assert docs.memory_table(receipts) == docs.error_table(receipts) == "not run yet"


def test_every_cell_comes_from_a_receipt(tmp_path: Path) -> None:
    error = {
        "engine": "eager", "precision": "fp8", "cosine": 0.999,
        "median_frame": 0.02, "worst_frame": 0.05, "largest_difference": 0.1,
        "relative_error": {"image_tokens": 0.01, "keys": 0.02, "values": 0.03, "actions": 0.025},
        "weight_bytes": {"products": 4_000_000, "rest": 1_000_000},
        "calibration": {"observer": "max", "percentile": 100.0},
    }  # fmt: skip
    sizes = {"bf16": {"products": 2_000, "rest": 1_000}, "fp8": {"products": 10**9, "rest": 5 * 10**8}}
    write(tmp_path / "precision_errors.json", {"rows": [error], "full_size_bytes": sizes})
    other = {**error, "cosine": 0.5}
    turbo = {**error, "engine": "turbo"}
    write(tmp_path / "precision_errors_h200.json", {"rows": [other, turbo], "full_size_bytes": {}})
    write(
        tmp_path / "precisions.json", {"runs": [played("turbo:bf16", 190, 0, 1), played("turbo:fp8", 188, -0.01, 0.7)]}
    )
    subjects = {"turbo:bf16": measured(10.0), "turbo:fp8": measured(6.0)}
    config = {"precision": "bf16", "workload": {"name": "libero"}}
    receipt = {"what": "bench latency", "config": config, "results": {"runs": [{"batch": 1, "subjects": subjects}]}}
    (tmp_path / "bench_precisions_libero_h200.json").write_text(json.dumps(receipt))
    many = {"runs": [{"batch": 32, "subjects": {"turbo:fp8": measured(100.0)}}]}
    (tmp_path / "bench_zz_fp8_batch.json").write_text(json.dumps({**receipt, "results": many}))
    profile = {"what": "bench kernels", "config": config, "results": {"subjects": {}}}
    (tmp_path / "bench_zz_fp8_kernels.json").write_text(json.dumps(profile))
    cut = {**error, "median_frame": 0.07, "calibration": {"observer": "percentile", "percentile": 99.9}}
    write(tmp_path / "observers_p99.9.json", {"rows": [cut, {**cut, "precision": "int8"}]})
    audited = {"candidate": "turbo:fp8", "over_budget": 0, "actions": {"candidate": 0.024, "plain": 0.023}}
    write(tmp_path / "audit_libero_small_turbo_fp8_h200.json", audited)
    write(tmp_path / "audit_pi05_turbo_fp8.json", {**audited, "over_budget": 7})
    write(tmp_path / "audit_planted.json", {"bugs": []})
    receipts = docs.read(tmp_path)
    assert receipts.errors["eager:fp8"]["cosine"] == 0.999
    rows = {row.split("|")[1].strip(" `"): row for row in docs.precision_table(receipts).splitlines()}
    assert "6.0 (2.0 + 2.0 + 2.0), 1.67 × bf16 | not run yet | 2.50 | 2.0e-02 (5.0e-02)" in rows["turbo:fp8"]
    assert rows["turbo:fp8"].endswith("188/200 | 90.0-100.0 % | 0.7 | as good as bf16 |")
    assert "| 0 over budget; actions 2.4e-02, 2.3e-02 is the format's |" in rows["turbo:fp8"]
    assert rows["turbo:bf16"].endswith("190/200 | 90.0-100.0 % |  | the reference |")
    assert "| max | 2.0e-02 | not run yet |\n| percentile 99.9 | 7.0e-02 | 7.0e-02 |" in docs.observer_table(receipts)
    assert "| fp8 | 1.00 | 0.50 |" in docs.memory_table(receipts)
    turbo_errors = "| `turbo:fp8` | 1.0e-02 | 2.0e-02 | 3.0e-02 | 2.5e-02 | 2.0e-02 | 5.0e-02 | 1.0e-01 | 0.99900 |"
    assert turbo_errors in docs.error_table(receipts)


def write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps({"results": results}))


@pytest.mark.parametrize(
    ("difference", "p", "episodes", "words"),
    [
        (0.01, 0.6, 200, "as good as bf16"),
        (-0.02, 0.4, 200, "as good as bf16"),
        (-0.03, 0.3, 200, "not shown to be as good: 3.0 points lost, p = 0.3"),
        (-0.01, 0.04, 200, "worse: 1.0 points lost"),
        (-0.5, 1e-9, 200, "worse: 50.0 points lost"),
        (0.1, 0.01, 200, "as good as bf16"),
        (0.0, 1.0, 100, "not run yet"),
    ],
)
def test_the_verdict_is_the_closed_loops(difference: float, p: float, episodes: int, words: str) -> None:
    assert docs.verdict("eager:fp8", played("eager:fp8", 0, difference, p, episodes)) == words


def test_the_page_has_a_place_for_each_table() -> None:
    page = docs.PAGE.read_text()
    for name in docs.TABLES:
        page = placed(page, name, "a table")
    assert page.count("a table") >= len(docs.TABLES)


def test_runs_are_named_and_checked(tmp_path: Path) -> None:
    options = precisions.Options(out=tmp_path, runs=("eager:fp8", "turbo:fp8"), calibration=tmp_path / "c.json")
    assert options.names == ("turbo:bf16", "eager:fp8", "turbo:fp8")
    config = precisions.run_of(options, "eager:fp8")
    assert config.out == tmp_path / "eager_fp8"
    assert (config.seed, config.trials, config.replan) == (7, 20, 5)
    assert config.source.options["calibration"] == tmp_path / "c.json"
    devices = [precisions.run_of(options, name).source.options["device"] for name in options.names]
    assert devices == ["cuda", "auto", "cuda"]
    assert "calibration" not in precisions.run_of(options, "turbo:bf16").source.options
    with pytest.raises(ValueError, match=r"'compiled:nvfp4' is no run: 'nvfp4' is run by eager"):
        precisions.split("compiled:nvfp4")
    with pytest.raises(ValueError, match="'warp:fp8' is no run"):
        precisions.split("warp:fp8")
    assert precisions.collect(options) == []
    with pytest.raises(ValueError, match="name them with --runs"):
        precisions.Options(out=tmp_path, precision="bf16")


def test_errors_are_measured_and_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = np.load(data / "libero_frames.npz")
    np.savez(tmp_path / "f.npz", **{key: raw[key][:2] for key in ("agentview", "wrist", "state", "prompt")})
    checkpoint = init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="libero")
    monkeypatch.setattr(precision_errors, "FULL_SIZE", "pi05-tiny")
    monkeypatch.setattr(precision_errors, "PRECISIONS", ("fp32", "bf16", "int8", "w4a16"))
    arguments = ["--checkpoint", checkpoint, "--frames", tmp_path / "f.npz", "--precisions", "bf16", "w4a16"]
    arguments += [
        "--engines",
        "eager",
        "--steps",
        "2",
        "--noises",
        "3",
        "--device",
        "cpu",
        "--receipt",
        tmp_path / "r.json",
    ]
    monkeypatch.setattr(sys, "argv", ["precision_errors.py", *(str(a) for a in arguments)])
    precision_errors.main()
    assert "2 real frames" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    bf16, four = results["rows"]
    assert len(set(bf16["each"])) == 2 * 3  # frames, noises
    assert min(bf16["each"]) < bf16["median_frame"] < bf16["worst_frame"] == max(bf16["each"])
    assert bf16["relative_error"]["actions"] < four["relative_error"]["actions"] < 0.5
    assert four["weight_bytes"]["products"] < 0.4 * bf16["weight_bytes"]["products"]
    whole = {name: sum(held.values()) for name, held in results["full_size_bytes"].items()}
    assert whole["fp32"] > 1.6 * whole["bf16"]
    assert whole["w4a16"] < whole["int8"] < whole["bf16"]
    # Counted from shapes alone, and told by a model that is there: the same bytes.
    assert results["full_size_bytes"]["w4a16"] == four["weight_bytes"]
