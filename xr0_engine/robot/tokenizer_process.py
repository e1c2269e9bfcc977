"""A tokenizer file read and tried in a process of its own, which may panic, hang or take memory as it likes:
`python -m xr0_engine.robot.tokenizer_process FILE` prints one line of JSON and ends with 0 if the file can be used.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

MEMORY_BYTES = 2 << 30
"""Address space: Python and Qwen3's tokenizer take a fifth."""

# Words, what byte-level alphabets and normalisers are apt to stumble over, and what a regular expression may take a
# square of the length for.
TEXTS = (
    "<|im_start|>user\n# Base View\n<|vision_start|><|image_pad|><|vision_end|>\nÖffne die Schublade, 打开抽屉 🤖.",
    "a" * 4096,
    " " * 4096,
    "a1 .\n" * 800,
    "\U0001f9bf\u0301\u200d\u0000" * 256,
)


class Panic(Exception):
    """What a library in Rust raises for its own mistakes. The library is as it was."""


@contextmanager
def panics() -> Iterator[None]:
    """Raises Panic for a panic inside, whose own class is no Exception and can only be told by its name."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panic(str(error)) from None


def fault_of(content: bytes) -> str | None:
    """What is wrong with a tokenizer file; None: nothing that reading and trying it shows."""
    try:
        with panics():
            tokenizer = Tokenizer.from_buffer(content)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            for text in TEXTS:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                tokenizer.decode(ids[:256], skip_special_tokens=False)
    except Panic as error:
        return f"the library panics: {error}"
    # The library has classes of its own for nothing: what it raises is an Exception.
    except Exception as error:
        return str(error)
    return None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(sys.argv[1], "rb") as file:
        fault = fault_of(file.read())
    print(json.dumps(fault))


if __name__ == "__main__":
    main()
