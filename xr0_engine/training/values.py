"""A config's values from JSON and from the command line: typed, and refused by their keys. No torch here."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def build(kind: type[Config], raw: Any, where: str = "") -> Config:
    """A dataclass of dataclasses from JSON's mappings. where: the dotted key of raw, with a dot behind it.

    Raises ValueError for unknown keys, with the nearest known one, and wrong values.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"config: {where or 'file'}: expected a mapping, got {raw!r:.80}")
    hints = get_type_hints(kind)
    strange = [name for name in raw if name not in hints]
    if strange:
        known = [f"{where}{name}" for name in hints]
        raise ValueError("config: " + "; ".join(unknown(f"{where}{name}", known) for name in strange))
    values = {
        name: build(hints[name], value, f"{where}{name}.")
        if is_dataclass(hints[name])
        else checked(hints[name], value, f"{where}{name}")
        for name, value in raw.items()
    }
    return kind(**values)


def unknown(key: str, known: list[str]) -> str:
    """What to say of a key that is none of those known."""
    # A name without its part is a common slip: compare it with the last parts too.
    near = difflib.get_close_matches(key, known, 1)
    near = near or [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    near = near or [
        name for name in known if difflib.get_close_matches(key.split(".")[-1], [name.split(".")[-1]], 1, 0.7)
    ]
    return f"there is no key {key!r:.80}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def parse(kind: Any, text: str, key: str) -> Any:
    """A command line's text as the value of a key."""
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return checked(kind, [parse(item, part, key) for part in text.split(",") if part], key)
    if text == "none" and type(None) in get_args(kind):
        return None
    value: Any = text
    if str not in _kinds(kind):
        try:
            value = json.loads(text.lower())
        except json.JSONDecodeError:
            value = text
    return checked(kind, value, key)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The plain types that a hint allows; a Literal's are those of its values."""
    if get_origin(kind) is Literal:
        return tuple(type(value) for value in get_args(kind))
    # `int | None` has an origin of its own, written otherwise in Python 3.10 than Union's.
    return get_args(kind) if get_origin(kind) is Union or type(kind).__name__ == "UnionType" else (kind,)


def checked(kind: Any, value: Any, key: str) -> Any:
    """The value in the hint's type (lists become tuples, whole numbers floats), or ValueError."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        items = get_args(kind)
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise ValueError(f"config: {key}: expected {len(items)} values, got {list(value)}")
        return tuple(checked(items[0], item, key) for item in value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"config: {key}: expected {', '.join(get_args(kind))}, got {value!r:.80}")
        return value
    kinds = _kinds(kind)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        names = " or ".join("none" if item is type(None) else item.__name__ for item in kinds)
        raise ValueError(f"config: {key}: expected {names}, got {value!r:.80}")
    return value
