"""The prompt, byte for byte (spec section 3.2), and its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from xr0_engine.config import TokenIds
from xr0_engine.types import CheckpointError

TOKENIZER_FILE = "tokenizer.json"

_SPECIAL_TOKEN = re.compile(r"<\|.*?\|>", re.DOTALL)

# A robot repeats its prompt at every step; a server sees the tasks of several robots.
_CACHED_PROMPTS = 64


def build_prompt(titles: Sequence[str], image_tokens: Sequence[int], instruction: str) -> str:
    """The prompt for one observation.

    titles: one per view, as the embodiment orders them. image_tokens: tokens of each view after the merge.
    instruction: as normalize_instruction returns it.
    """
    views = "".join(
        f"# {title}\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>\n"
        for title, count in zip(titles, image_tokens, strict=True)
    )
    return (
        f"<|im_start|>user\nThe following observations are captured from multiple views.\n{views}"
        f"Generate robot actions for the task:\n{instruction} /no_cot<|im_end|>\n"
        "<|im_start|>assistant\n<cot></cot><|im_end|>\n"
    )


def normalize_instruction(text: str) -> str:
    """The instruction as in training: no outer spaces, first letter upper case, a full stop at the end.

    Raises ValueError if it is no text, empty, or holds a special token such as <|im_end|>, which would end the prompt.
    """
    if not isinstance(text, str):
        raise ValueError(f"instruction: expected text, got {type(text).__name__}")
    text = text.strip()
    if not text:
        raise ValueError("instruction: expected a task in words, got empty text")
    special = _SPECIAL_TOKEN.search(text)
    if special:
        raise ValueError(f"instruction: expected plain words, got the special token {special.group()!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"instruction: expected text that UTF-8 can hold: {error}") from None
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def preamble_length(input_ids: np.ndarray, vision_start: int) -> int:
    """How many tokens come before the first image token: up to the first <|vision_start|>, itself included.

    input_ids: (N,) int64, not padded. vision_start: its id. Raises ValueError if there is none.
    """
    starts = np.flatnonzero(input_ids == vision_start)
    if not len(starts):
        raise ValueError(f"input_ids: expected at least one <|vision_start|> ({vision_start}), got none")
    return int(starts[0]) + 1


class PromptTokenizer:
    """Prompt to token ids, with the checkpoint's own tokenizer. The last prompts are kept."""

    def __init__(self, tokenizer: Tokenizer, tokens: TokenIds) -> None:
        # tokenizer.json may ask for padding or truncation, and a prompt must have neither.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._image = tokens.image
        self._cached_encode = lru_cache(maxsize=_CACHED_PROMPTS)(self._encode)
        pad = tokenizer.token_to_id("<|endoftext|>")
        self.pad_id: int = 0 if pad is None else pad

    @staticmethod
    def load(folder: Path, tokens: TokenIds) -> PromptTokenizer:
        """Read folder/tokenizer.json.

        Raises CheckpointError if it is missing, corrupt, or its special tokens have other ids than config.json says.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no {TOKENIZER_FILE}: the tokenizer is missing")
        try:
            tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is no tokenizer: {error}") from None
        expected = {
            "<|image_pad|>": tokens.image,
            "<|vision_start|>": tokens.vision_start,
            "<|vision_end|>": tokens.vision_end,
        }
        faults = [
            f"{token} has id {tokenizer.token_to_id(token)}, config.json says {token_id}"
            for token, token_id in expected.items()
            if tokenizer.token_to_id(token) != token_id
        ]
        if faults:
            raise CheckpointError(f"{path}: " + "; ".join(faults))
        return PromptTokenizer(tokenizer, tokens)

    def encode(self, titles: Sequence[str], image_tokens: Sequence[int], instruction: str) -> np.ndarray:
        """Token ids of one observation's prompt, (N,) int64, read-only. The instruction is normalised first.

        Raises ValueError as normalize_instruction does.
        """
        return self._cached_encode(tuple(titles), tuple(image_tokens), normalize_instruction(instruction))

    def _encode(self, titles: tuple[str, ...], image_tokens: tuple[int, ...], instruction: str) -> np.ndarray:
        prompt = build_prompt(titles, image_tokens, instruction)
        input_ids = np.array(self._tokenizer.encode(prompt, add_special_tokens=False).ids, dtype=np.int64)
        found = np.count_nonzero(input_ids == self._image)
        if found != sum(image_tokens):
            raise ValueError(f"prompt: expected {sum(image_tokens)} image tokens, got {found}")
        # It is shared between calls.
        input_ids.flags.writeable = False
        return input_ids
