"""A small table that forgets what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most `capacity` values by key. Raises ValueError if the capacity is not positive."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not there, in the place of the one used longest ago if all are taken."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        # First out, then in: what is made may need the memory of what goes.
        while len(self._values) >= self.capacity:
            self._values.popitem(last=False)
        self._values[key] = make()
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values
