import math

import pytest

from turbopi.sim.statistics import PairedTable, mcnemar_exact, paired_table, wilson


def wilson_formula(k: int, n: int, z: float) -> tuple[float, float]:
    p, z2 = k / n, z * z
    middle, reach = (p + z2 / (2 * n)) / (1 + z2 / n), z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return middle - reach, middle + reach


@pytest.mark.parametrize(("k", "n"), [(61, 70), (1, 20), (190, 200), (7, 7), (0, 3)])
def test_wilson_is_the_formula(k: int, n: int) -> None:
    assert wilson(k, n) == pytest.approx(wilson_formula(k, n, 1.959963984540054), abs=1e-9)


def test_wilson_known_values() -> None:
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-7)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)
    assert wilson(5, 10) == pytest.approx((0.2365931, 0.7634069), abs=1e-7)
    assert wilson(50, 100, 0.90) == pytest.approx(wilson_formula(50, 100, 1.6448536269514722))


@pytest.mark.parametrize(("k", "n", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_nonsense(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson(k, n, confidence)


def test_mcnemar_known_values() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar_exact(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar_exact(8, 1) == mcnemar_exact(1, 8)
    assert mcnemar_exact(6, 16) == pytest.approx(0.0524790, abs=1e-6)
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 3)


def test_pairs_are_counted() -> None:
    a = {1: True, 2: True, 3: False, 4: False, 5: True, "only a": True}
    b = {1: True, 2: False, 3: True, 4: False, 5: True, "only b": False}
    table = paired_table(a, b)
    assert table == PairedTable(both=2, only_a=1, only_b=1, neither=1)
    assert (table.pairs, table.p_value) == (5, 1.0)


def test_the_paired_difference_covers_and_has_a_sign() -> None:
    low, high = PairedTable(both=180, only_a=4, only_b=4, neither=12).difference()
    assert low == pytest.approx(-high)
    assert 0.02 < high < 0.04
    low, high = PairedTable(both=100, only_a=0, only_b=30, neither=70).difference()
    assert 0.09 < low < 0.15 < high < 0.21
    assert PairedTable(0, 1, 0, 0).difference()[0] == -1.0
