"""README's picture comes from receipts, and says which one is missing."""

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
overview = pytest.importorskip("overview")


def test_what_is_shown_is_what_was_measured() -> None:
    shown = overview.success(overview.RESULTS)
    assert shown["all of it, 10 steps"]["episodes"] == 200
    assert set(shown) == set(overview.SHOWN.values())
    measured = overview.ticks(overview.RESULTS)
    assert list(measured.values()) == sorted(measured.values(), reverse=True)


def test_red_is_worse_by_the_paired_test_alone() -> None:
    def row(rate: float, p: float, lost: int, won: int) -> dict[str, object]:
        fields = {"only_reference": lost, "only_this": won, "successes": round(200 * rate)}
        return {"rate": rate, "interval": [rate - 0.05, rate + 0.05], "p_value": p, **fields}

    axes = Figure().subplots()
    overview.draw_success(
        axes, {"worse": row(0.5, 0.01, 90, 1), "not shown": row(0.5, 0.06, 9, 3), "better": row(0.9, 0.01, 1, 9)}
    )
    colours = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert len(set(colours)) == 2
    assert colours[-1] not in colours[:-1]  # drawn from below: the first row is the last bar


def test_a_missing_receipt_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bench_libero_engines_h200\.json"):
        overview.ticks(tmp_path)
