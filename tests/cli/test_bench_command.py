import json
from pathlib import Path

import pytest

from turbopi.cli.bench import kernel_tables, latency_tables
from turbopi.cli.main import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--preset", "pi05-tiny", "--device", "cpu", *(str(a) for a in arguments)])
    return int(exit_.value.code or 0)


def test_a_receipt_and_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "r.json"
    few = ("--calls", 2, "--warmup", 1, "--blocks", 1, "--steps", 1, "--prompt-tokens", 7, "--batch", 1, 2)
    assert run(*few, "--hz", 50, "--out", out) == 0
    said = capsys.readouterr().out
    assert "batch 2, 39 prefix tokens" in said
    receipt = json.loads(out.read_text())
    assert receipt["config"]["workload"]["name"] == "libero-prompt-tokens7-steps1"
    assert receipt["config"]["precision"] == "fp32"
    assert [r["subjects"]["eager"]["call"]["count"] for r in receipt["results"]["runs"]] == [2, 2]
    assert out.with_suffix(".html").is_file()


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.json"
    assert run("--what", "memory", "--prompt-lengths", 3, "--stage-calls", 1, "--steps", 1, "--out", out) == 0
    assert "working set" in capsys.readouterr().out
    assert json.loads(out.read_text())["results"]["ticks"]["eager"][0]["prompt_tokens"] == 3


def test_what_the_device_timed_has_a_table() -> None:
    times = {key: 8.0 + i / 4 for i, key in enumerate(("median_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms"))}
    call = times | {"deadline_miss_rate": 0.0, "samples_per_s": 125.0}
    subjects = {"turbo": {"call": call, "device_in_call": times | {"p99_over_p50": 1.0625}}, "eager": {"call": call}}
    run = {"batch": 1, "prefix_tokens": 552, "subjects": subjects}
    _, table = latency_tables({"runs": [run]})
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["turbo"], ["8.00"], ["8.25"], ["8.50"], ["8.75"], ["9.00"], ["1.062"]]


def test_kernels_in_tables() -> None:
    row = {"label": "gemm", "count": 27.0, "own_ms": 0.5, "share": 0.25, "median_us": 18.25}
    stage = {"span_ms": 2.0, "launches": 54.0, "gaps_ms": 0.25, "kernels": [row]}
    (table,) = kernel_tables({"engines": {"turbo": {"stages": {"prefill": stage}}}})
    assert table.title == "turbo, prefill: 2.000 ms, 54 launches, gaps 0.250 ms"
    assert [list(column.cells) for column in table.columns] == [["gemm"], ["27"], ["0.500"], ["25.0 %"], ["18.2"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "warp"], "unknown engine 'warp'"),
        (["--engines", "graphed"], "use the engine 'eager'"),
        (["--peer", "lerobot"], "published pi05 sizes only"),
        (["--views", "4"], "has 4 views, the model has 3"),
        (["--batch", "0"], "between 1 and 256"),
        (["--what", "kernels"], "a profile per kernel needs a CUDA GPU"),
        (["--what", "kernels", "--batch", "1", "2"], "of one batch size, got --batch (1, 2)"),
    ],
)
def test_errors_take_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--calls", 1, "--blocks", 1, "--out", tmp_path / "r.json") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "r.json").exists()
