"""What leaves the machine names nobody: paths, the user and the host are taken out of texts and results."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xr0_engine.env import cache_dir

NO_NAMES = {"root", "user", "ubuntu", "localhost", "host", "nobody"}
"""Users and hosts who are nobody, and words that a text needs."""


class Scrubber:
    """Takes out of texts what says whose machine this is."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """places: absolute path -> what stands for it. The home, the package, its cache and a
        virtual environment join them."""
        known = {
            str(Path.home()): "~",
            str(cache_dir().absolute()): "XR0_CACHE",
            str(Path(__file__).parents[3]): "PACKAGE",
        }
        if sys.prefix != sys.base_prefix:
            known[sys.prefix] = "PYTHON"
        known |= dict(places)
        known |= {os.path.realpath(path): name for path, name in known.items()}
        # The longest first: one may lie in another.
        ordered = sorted((path for path in known if len(path) > 1), key=len, reverse=True)
        self._rules = [(re.compile(re.escape(path) + r"(?![\w.-])"), known[path]) for path in ordered]
        users = {os.environ.get(key, "") for key in ("USER", "LOGNAME", "SUDO_USER")} | {Path.home().name}
        for name in users - NO_NAMES - {""}:
            self._rules.append((re.compile(rf"(?<=/){re.escape(name)}(?![\w.-])"), "USER"))
        hosts = {socket.gethostname(), socket.gethostname().partition(".")[0]} - NO_NAMES
        # Not within a path: there it is a word as any other.
        self._hosts = [
            (re.compile(rf"(?<![\w/.-]){re.escape(name)}(?![\w-]|\.\w)"), "HOST")
            for name in sorted(hosts - {""}, key=len, reverse=True)
        ]

    def text(self, text: str) -> str:
        """Of a log, free text."""
        return _apply(self._rules + self._hosts, text)

    def value(self, value: Any) -> Any:
        """Of JSON. Keys stay; a host's name, which may be a word that a result needs, is no part of a result."""
        if isinstance(value, str):
            return _apply(self._rules, value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list) else value

    def file(self, path: Path) -> None:
        """In place; nothing where there is no such file. Raises OSError."""
        if not path.is_file():
            return
        before = path.read_text(encoding="utf-8", errors="replace")
        try:
            after = json.dumps(self.value(json.loads(before)), indent=1) + "\n" if path.suffix == ".json" else None
        except json.JSONDecodeError:
            after = None
        after = self.text(before) if after is None else after
        if after != before:
            partial = path.with_name(f".{path.name}-partial")
            partial.write_text(after, encoding="utf-8")
            os.replace(partial, path)


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, name in rules:
        text = pattern.sub(name, text)
    return text
