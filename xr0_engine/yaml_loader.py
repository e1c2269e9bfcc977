"""YAML of plain values whose cost is bounded: what `files.read_yaml` parses with."""

from __future__ import annotations

import math
from typing import Any

import yaml

VALUES = 1 << 14
"""After aliases: ten of ten, nested eight times, would be a hundred million. A released configuration with statistics
has 2,000; the parser, which is Python, takes two seconds for as many as these."""
DEPTH = 64
"""Lists and mappings in each other, as in files.py. No file that is read has more than ten."""
LARGEST = 2.0**63
DIGITS = 64
"""Of a number as it is written: Python needs a square of the digits' time."""


class CheckedLoader(yaml.SafeLoader):
    """The safe loader, with limits. No tags: they are for kinds of values that no file here has.

    Values are counted as if every alias were written out, and counted while they are composed, before any is made.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark, before = event.start_mark, self._values
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            # An alias inside what it stands for is not known yet.
            if anchor not in self._sizes:
                raise yaml.composer.ComposerError(None, None, f"the alias {anchor!r:.40} has no end", mark)
            self._values += self._sizes[anchor]
        elif getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"expected no tags, got {event.tag!r:.40}", mark)
        self._values += 1
        self._depth += 1
        if self._values > VALUES:
            raise yaml.composer.ComposerError(None, None, f"expected at most {VALUES} values", mark)
        if self._depth > DEPTH:
            raise yaml.composer.ComposerError(None, None, f"expected at most {DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._sizes[anchor] = self._values - before
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r:.80} stands twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        kind = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        value = kind(node) if len(node.value) <= DIGITS else math.inf
        if not abs(value) < LARGEST:
            raise yaml.constructor.ConstructorError(
                None, None, f"expected finite numbers of 64 bits, got {node.value!r:.40}", node.start_mark
            )
        return value


for _kind in ("int", "float"):
    CheckedLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", CheckedLoader.construct_number)
