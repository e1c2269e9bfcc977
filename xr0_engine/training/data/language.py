"""Vision-language data: one JSON object a line, with images and a conversation about them (docs/data.md)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xr0_engine.files import FAULTS, LINE_BYTES, one_line, parse_json
from xr0_engine.robot.images import aspect_fault, read_picture
from xr0_engine.robot.picture_cost import PictureError
from xr0_engine.training.data.hub import find_on_hub, language_file
from xr0_engine.training.data.samples import DataError, LanguageSample

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_PLACEHOLDER = "<image>"


class LanguageLines:
    """A JSONL file, or the one of a dataset of the hub, by its id; read line by line when asked.

    Raises DataError for a file that is missing or empty.
    """

    def __init__(self, path: Path) -> None:
        source = find_on_hub(path)
        self.path = path = path if source is None else language_file(source)
        self._is_foreign = source is not None
        self._offsets: list[int] = []
        self._lines: list[int] = []
        try:
            with path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._lines.append(number)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if not self._offsets:
            raise DataError(f"{path} holds no line")

    def __len__(self) -> int:
        return len(self._offsets)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> LanguageSample:
        """The conversation of a number from 0 to len - 1; nothing is drawn. Raises DataError with file and line."""
        source = f"{self.path}:{self._lines[index]}"
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline(LINE_BYTES + 1)
        if len(line) > LINE_BYTES:
            raise DataError(f"{source}: expected a line of at most {LINE_BYTES >> 20} MiB")
        try:
            raw = parse_json(line)
            if not isinstance(raw, dict):
                raise ValueError(f"expected a JSON object, got {raw!r:.80}")
            turns = tuple(_turn(turn) for turn in raw["conversations"])
            one = raw.get("image", [])
            names = raw.get("images", [one] if isinstance(one, str) else one)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"images: expected a list of file names, got {names!r:.80}")
            # Your own file may name pictures anywhere; somebody else's none of your machine.
            paths = [PurePosixPath(name) for name in names]
            if self._is_foreign and any(path.is_absolute() or ".." in path.parts for path in paths):
                raise ValueError(f"images: expected files of the repository, got {names!r:.80}")
        except FAULTS as error:
            raise DataError(f"{source}: {one_line(error)}") from None
        except KeyError as error:
            raise DataError(f"{source}: {error.args[0]!r} is missing") from None
        if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
            raise DataError(f"{source}: conversations: expected turns of user and assistant, the user's first")
        mentioned = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
        if mentioned not in (0, len(names)):
            raise DataError(f"{source}: {len(names)} images, but the text has {mentioned} {IMAGE_PLACEHOLDER}")
        return LanguageSample(tuple(_image(self.path.parent / name, source) for name in names), turns, source)


def _turn(raw: Any) -> tuple[str, str]:
    role = raw["from"] if "from" in raw else raw["role"]
    text = raw["value"] if "value" in raw else raw["content"]
    if role not in ROLES or not isinstance(text, str) or not text.strip():
        raise ValueError(f"conversations: expected a role of {', '.join(ROLES)} with some text, got {raw!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"conversations: expected text that UTF-8 can hold: {error}") from None
    return ROLES[role], text


def _image(path: Path, source: str) -> np.ndarray:
    try:
        image = read_picture(path, grey=True)
    except PictureError as error:
        raise DataError(f"{source}: image: {error}") from None
    if fault := aspect_fault(*image.shape[:2]):
        raise DataError(f"{source}: image {path}: {fault}")
    return image
