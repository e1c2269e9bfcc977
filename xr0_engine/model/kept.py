"""What is kept from call to call, bounded: the one not used for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """At most `limit` values. drop: called with each that has to go."""

    def __init__(self, limit: int, drop: Callable[[Value], None] = lambda value: None) -> None:
        self._limit, self._drop = limit, drop
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made where there is none. What must go for it goes first: its memory is free then."""
        if key not in self._values:
            while len(self._values) >= self._limit:
                self._drop(self._values.popitem(last=False)[1])
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]
