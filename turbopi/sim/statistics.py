"""What a count of successes says: Wilson's interval for one run, McNemar's exact test for two runs over the same."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
Key = TypeVar("Key", bound=Hashable)


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a success rate.

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
        confidence: between 0 and 1.

    Returns:
        (low, high), within [0, 1].

    Raises:
        ValueError: counts or confidence that make no sense.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1, such as 0.95")
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: expected one trial or more, and no more successes")
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value that two runs are equally good, given their discordant pairs.

    Args:
        b: pairs in which only the first run succeeded.
        c: pairs in which only the second did.

    Raises:
        ValueError: a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"{b} and {c} discordant pairs: counts cannot be negative")
    if b + c == 0:
        return 1.0
    return float(binomtest(b, b + c, 0.5).pvalue)


@dataclass(frozen=True)
class PairedTable:
    """Outcomes of two runs, A and B, over the same episodes.

    Attributes:
        both: pairs in which both succeeded.
        only_a: only A did.
        only_b: only B did.
        neither: neither did.
    """

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def p_value(self) -> float:
        """McNemar's exact test."""
        return mcnemar_exact(self.only_a, self.only_b)

    def difference(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Interval of (rate of B - rate of A), within [-1, 1]: Agresti and Min's, half a pair added to each cell."""
        pairs = self.pairs + 2
        lost, gained = self.only_a + 0.5, self.only_b + 0.5
        middle = (gained - lost) / pairs
        deviation = math.sqrt(lost + gained - (gained - lost) ** 2 / pairs) / pairs
        reach = float(norm.ppf(0.5 + confidence / 2)) * deviation
        return max(-1.0, middle - reach), min(1.0, middle + reach)


def paired_table(a: Mapping[Key, bool], b: Mapping[Key, bool]) -> PairedTable:
    """Count the outcomes of the episodes that both runs have; the others do not count."""
    pairs = [(a[key], b[key]) for key in a.keys() & b.keys()]
    return PairedTable(
        both=pairs.count((True, True)),
        only_a=pairs.count((True, False)),
        only_b=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )
