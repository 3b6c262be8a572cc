"""What makes the tables of docs/closed-loop.md out of receipts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_eval_compare import run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import closed_loop_docs as docs
from classic_knobs import Options as KnobOptions
from doc_tables import placed
from paired_runs import is_complete, joined, row
from planted_mistakes import noise_threshold


def result(name: str, where: str, successes: int, error: float, p: float) -> dict[str, Any]:
    return {
        "name": name, "title": f"the {name}", "where": where, "steps": 10, "replan": 5,
        "episodes": 20, "successes": successes, "rate": successes / 20, "interval": [0.0, 1.0],
        "p_value": p, "difference": successes / 20 - 1, "median_steps_of_successes": None,
        "audit": {"relative_error": error, "first_step_relative_error": None, "cosine": 0.5},
    }  # fmt: skip


ROWS = [
    result("unbroken", "none", 20, 0.0, 1.0),
    result("positions", "model", 12, 0.3, 0.01),
    result("noise-0.1", "noise", 20, 0.1, 1.0),
    result("noise-1", "noise", 5, 1.0, 1e-5),
]


def test_tables_come_from_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.mistakes_table(docs.Options()) is None
    assert docs.knobs_table(docs.Options()) is None
    (tmp_path / "planted_mistakes.json").write_text(
        json.dumps({"results": {"reference": "unbroken", "mistakes": ROWS}})
    )
    (tmp_path / "classic_knobs.json").write_text(
        json.dumps({"results": {"reference": "steps10_replan5", "settings": ROWS[:1]}})
    )
    table = docs.mistakes_table(docs.Options())
    assert "| the positions | 12/20 | 0.0-100.0 % | 0.01 | 3.0e-01 |  | 0.5000 |" in table
    assert "| the unbroken | 20/20 | 0.0-100.0 % |  |" in table
    assert "| 10 | 5 | 20/20 | 0.0-100.0 % |  |  |" in docs.knobs_table(docs.Options())
    for draw, key in ((docs.draw_mistakes, "mistakes"), (docs.draw_knobs, "settings")):
        picture = tmp_path / "images" / f"{key}.svg"
        drawn = [draw({"reference": "unbroken", key: ROWS}, picture).read_bytes() for _ in range(2)]
        assert drawn[0].startswith(b"<?xml")
        assert drawn[0] == drawn[1]


def test_tables_have_their_places() -> None:
    page = docs.PAGE.read_text()
    for name in docs.TABLES:
        changed = placed(page, name, "| new |")
        assert f"<!-- {name} -->\n| new |\n<!-- end of {name} -->" in changed
        assert placed(changed, name, "| new |") == changed
    with pytest.raises(ValueError, match="once each"):
        placed(page, "nowhere", "")


def test_language_in_a_table(tmp_path: Path) -> None:
    own, other = run(tmp_path / "own", "s" * 40), run(tmp_path / "other", "sf" * 20)
    lines = (other / "episodes.jsonl").read_text().splitlines()
    asked = [json.dumps({**json.loads(line), "asked": index % 4 == 0}) for index, line in enumerate(lines)]
    (other / "episodes.jsonl").write_text("\n".join([*asked, ""]))
    table = docs.language_table(docs.Options(own=own, other_bowl=other))
    assert "| all | 40/40 | 20/40 | 10/40 |" in table
    assert "B succeeds less often than A" in table
    assert docs.language_table(docs.Options(own=own, other_bowl=tmp_path / "absent")) is None


def test_a_row_compares_with_the_reference(tmp_path: Path) -> None:
    policy = {"engine": "eager", "device": "cpu"}
    for name, outcomes in (("a", "s" * 40), ("b", "s" * 30 + "f" * 9 + "e")):
        directory = run(tmp_path / name, outcomes)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "policy": policy}))
    found = row(tmp_path / "a", tmp_path / "b", 30)
    assert (found["successes"], found["episodes"], found["only_reference"], found["only_this"]) == (30, 39, 9, 0)
    assert found["p_value"] == pytest.approx(2 / 2**9)
    assert len(found["errors"]) == 1
    assert is_complete(tmp_path / "a", 40)
    assert not is_complete(tmp_path / "b", 40)
    assert not is_complete(tmp_path / "c", 1)


def ended(name: str, successes: int) -> dict[str, Any]:
    return {"name": name, "per_task": [[successes, 20]], "latency": {"inferences": 90}}


def test_rows_that_were_played_elsewhere_stay(tmp_path: Path) -> None:
    receipt = tmp_path / "receipt.json"
    first = joined(receipt, "settings", "name", "reference", [ended("reference", 18), ended("a", 3), ended("b", 4)])
    assert not any("kept_from" in found for found in first)
    source = {"when": "then", "commit": "abc", "command": "python x.py"}
    receipt.write_text(json.dumps({**source, "results": {"settings": first}}))
    second = joined(receipt, "settings", "name", "reference", [ended("reference", 18), ended("b", 5)])
    assert second == [ended("reference", 18), ended("b", 5), {**ended("a", 3), "kept_from": source}]
    receipt.write_text(json.dumps({**source, "when": "later", "results": {"settings": second}}))
    third = joined(receipt, "settings", "name", "reference", [ended("reference", 18)])
    assert [found["kept_from"]["when"] for found in third[1:]] == ["later", "then"]


@pytest.mark.parametrize("found", [[ended("reference", 17), ended("a", 3)], [ended("a", 3)]])
def test_rows_of_another_reference_are_not_joined(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    receipt = tmp_path / "receipt.json"
    earlier = {"settings": [ended("reference", 18), ended("b", 4)]}
    receipt.write_text(json.dumps({"when": "then", "commit": None, "command": "x", "results": earlier}))
    with pytest.raises(ValueError, match="pairs with a reference of other episodes"):
        joined(receipt, "settings", "name", "reference", found)


def test_the_noise_that_costs() -> None:
    assert noise_threshold(ROWS) == {"smallest_costly": 1.0, "largest_without_shown_cost": 0.1}
    assert noise_threshold(ROWS[:3]) == {"smallest_costly": None, "largest_without_shown_cost": 0.1}
    assert noise_threshold([]) == {"smallest_costly": None, "largest_without_shown_cost": None}


def test_settings_of_the_knobs(tmp_path: Path) -> None:
    names = [s.name for s in KnobOptions(out=tmp_path, steps=(1, 10), replans=(8,)).settings]
    assert names == ["steps10_replan5", "steps1_replan5", "steps10_replan8"]
    assert len(KnobOptions(out=tmp_path).settings) == 10
