"""The prompt, byte for byte (spec section 3.2), and its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from tokenizers import Tokenizer

from xr0_engine.config import TokenIds
from xr0_engine.family import CHOICE_OFFSETS
from xr0_engine.robot.templates import IMAGE_PAD, TAIL, TASK_END, TASK_HEAD, TITLED, VIDEO_PAD, PromptForm
from xr0_engine.robot.templates import build_prompt as build_prompt
from xr0_engine.robot.tokenizer_file import TOKENIZER_FILE as TOKENIZER_FILE
from xr0_engine.robot.tokenizer_file import read_tokenizer
from xr0_engine.robot.tokenizer_process import Panic, panics
from xr0_engine.types import CheckpointError

MAX_INSTRUCTION_CHARACTERS = 4096
"""Fifty times the longest task of the benchmarks. Looked at before anything else is: tokenising takes time as well."""

MAX_TEXT_TOKENS = 4096
"""Beside those of images: what so many English letters take at most. The model was trained with prompts of some 350
tokens (spec section 3.2), images included; its time and memory grow with the square of them, to 0.2 GiB for as many as
these on the reference's smallest model."""

MAX_PROMPT_TOKENS = 8192
"""Images included: three views and a task have 350 in the released model, whose largest image has 87. A checkpoint may
ask for larger images; beyond this, one observation would take gigabytes."""

PROMPT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", IMAGE_PAD, "<|vision_end|>")
"""The special tokens of build_prompt, but for a video's."""

_IMAGE_PADS = re.compile(rf"(?:{re.escape(IMAGE_PAD)})+")
_SPECIAL_TOKEN = re.compile(r"<\|.*?\|>", re.DOTALL)
# What training alone puts behind a prompt (spec section 8).
_CHOICE_TOKEN = re.compile("|".join(map(re.escape, CHOICE_OFFSETS)))
# How the released code asks for an answer with or without reasoning. A prompt says the second, once.
_REASONING = re.compile(r"(?<!\S)/(?:no_)?cot(?![\w-])")
_WITH_REASONING = re.compile(r"(?<!\S)/cot(?![\w-])")

# A robot repeats its prompt at every step; a server sees the tasks of several robots.
_CACHED_PROMPTS = 64


def is_prompt(text: str) -> bool:
    """Whether a text is more than a task: a prompt, or a part of one."""
    return TASK_HEAD in text or "<|im_start|>" in text


def prompt_task(text: str) -> str:
    """The task in a whole prompt, or in a user's turn of one; a text that is neither, as it is."""
    return text.rpartition(TASK_HEAD)[2].removesuffix(TAIL).removesuffix(TASK_END)


def task_of(text: str, titles: Sequence[str]) -> str:
    """The task in a text that is either the task alone or the whole prompt as a released client writes it.

    titles: of the views, in the prompt's order; the prompt holds one <|image_pad|> for each, or as many as it has
    tokens. Raises ValueError for any other prompt: what else it says would be lost.
    """
    if not is_prompt(text):
        return text
    task = prompt_task(text)
    if _IMAGE_PADS.sub(IMAGE_PAD, text) != build_prompt(titles, [1] * len(titles), task):
        expected = build_prompt(titles, [1] * len(titles), "{task}")
        raise ValueError(f"expected the task alone or the prompt {expected!r}, got {text!r:.600}")
    return task


def instruction_rule(profiles: str | None, normalize_instruction: bool) -> str:
    """Which of INSTRUCTION_RULES holds. profiles: the embodiment profile's, None leaves it to the checkpoint's
    normalize_instruction (config.json)."""
    return profiles or ("sentence" if normalize_instruction else "given")


def prompt_text(instruction: str, rule: str) -> str:
    """The instruction as it stands in the prompt. rule: of INSTRUCTION_RULES. Raises ValueError as checked_instruction
    does."""
    if rule == "sentence":
        return normalize_instruction(instruction)
    text = checked_instruction(instruction)
    return text if rule == "given" else checked_instruction(text.strip().removesuffix("."))


def normalize_instruction(text: str) -> str:
    """The instruction as the benchmarks' clients send it: no outer spaces, a capital first, a full stop at the end.

    Raises ValueError as checked_instruction does.
    """
    text = checked_instruction(text).strip()
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def checked_instruction(text: str) -> str:
    """The instruction itself, outer spaces included.

    Raises ValueError if it is no text, empty or blank, longer than MAX_INSTRUCTION_CHARACTERS, or holds a special token
    such as <|im_end|>, which would end the prompt, or /cot or /no_cot.
    """
    if not isinstance(text, str):
        raise ValueError(f"instruction: expected text, got {type(text).__name__}")
    if len(text) > MAX_INSTRUCTION_CHARACTERS:
        raise ValueError(
            f"instruction: expected at most {MAX_INSTRUCTION_CHARACTERS} characters, got {len(text)}; say the task in "
            "a sentence, as the model was trained"
        )
    if not text.strip():
        raise ValueError("instruction: expected a task in words, got empty text")
    special = _SPECIAL_TOKEN.search(text)
    if special:
        raise ValueError(f"instruction: expected plain words, got the special token {special.group()!r}")
    if reasoning := _REASONING.search(text):
        raise ValueError(
            f"instruction: expected the task alone, got {reasoning.group()!r}: prompts say /no_cot by themselves, and "
            "reasoning (/cot) is not supported; leave it out"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"instruction: expected text that UTF-8 can hold: {error}") from None
    return text


def _of_training(expected: str, token: str) -> str:
    return f"{expected}, got {token}: it stands in a turn that training alone sends; at run time there is no such turn"


def preamble_length(input_ids: np.ndarray, vision_start: int) -> int:
    """How many tokens come before the first image token: up to the first <|vision_start|>, itself included.

    input_ids: (N,) int64, not padded. vision_start: its id. Raises ValueError if there is none.
    """
    starts = np.flatnonzero(input_ids == vision_start)
    if not len(starts):
        raise ValueError(f"input_ids: expected at least one <|vision_start|> ({vision_start}), got none")
    return int(starts[0]) + 1


def check_prompt_tokens(tokens: int, of_text: int = 0) -> None:
    """tokens: of a whole prompt; of_text: those among them that are no images'. Raises ValueError for too many."""
    if of_text > MAX_TEXT_TOKENS:
        raise ValueError(
            f"instruction: expected at most {MAX_TEXT_TOKENS} tokens of text, got {of_text}; say the task in a "
            "sentence, as the model was trained"
        )
    if tokens > MAX_PROMPT_TOKENS:
        raise ValueError(
            f"images: expected a prompt of at most {MAX_PROMPT_TOKENS} tokens, got {tokens}; the checkpoint's "
            "max_pixels or min_pixels make larger images of these than a prompt holds"
        )


class PromptTokenizer:
    """Prompt to token ids, with the checkpoint's own tokenizer. The last prompts are kept. choice: id -> token of those
    that stand in a turn of training alone: ModelConfig.choice_tokens, and what the tokenizer itself calls so."""

    def __init__(
        self, tokenizer: Tokenizer, tokens: TokenIds, choice: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        # tokenizer.json may ask for padding or truncation, and a prompt must have neither.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._image = tokens.image
        self._video = tokenizer.token_to_id(VIDEO_PAD)
        vocabulary = tokenizer.get_added_tokens_decoder()
        named = {n: token.content for n, token in vocabulary.items() if _CHOICE_TOKEN.fullmatch(token.content)}
        self.choice = {**choice, **named}
        self._unknown = _unknown_id(tokenizer)
        self._cached_encode = lru_cache(maxsize=_CACHED_PROMPTS)(self._encode)
        self._cached_check = lru_cache(maxsize=_CACHED_PROMPTS)(self._check_words)
        pad = tokenizer.token_to_id("<|endoftext|>")
        self.pad_id: int = 0 if pad is None else pad

    @staticmethod
    def load(
        folder: Path,
        tokens: TokenIds,
        vocab_size: int | None = None,
        choice: Mapping[int, str] = MappingProxyType({}),
    ) -> PromptTokenizer:
        """Read folder/tokenizer.json. vocab_size: of config.json; choice: ModelConfig.choice_tokens.

        Raises CheckpointError if it is missing or corrupt, if it lacks a token of the prompt, cuts one into pieces or
        does not give a prompt back, if its special tokens have other ids than config.json says, or ids that the model
        has no embedding for.
        """
        path = folder / TOKENIZER_FILE
        tokenizer = read_tokenizer(path)
        expected = {
            IMAGE_PAD: tokens.image,
            **({} if tokens.video is None else {VIDEO_PAD: tokens.video}),
            "<|vision_start|>": tokens.vision_start,
            "<|vision_end|>": tokens.vision_end,
        }
        faults = [
            f"{token} has id {tokenizer.token_to_id(token)}, config.json says {token_id}"
            for token, token_id in expected.items()
            if tokenizer.token_to_id(token) not in (token_id, None)
        ]
        own = PromptTokenizer(tokenizer, tokens, choice)
        faults += _faults(tokenizer, vocab_size)
        if faults:
            raise CheckpointError(f"{path}: {'; '.join(faults)}: put the {TOKENIZER_FILE} of the training there")
        return own

    def check_videos(self) -> None:
        """Raises CheckpointError if the tokenizer has no token that stands for a video's."""
        if self._video is None:
            raise CheckpointError(
                f"{TOKENIZER_FILE}: it lacks {VIDEO_PAD}, and the embodiment profile has a history: videos need the "
                "tokenizer of the training, or the profile no history"
            )

    def encode(
        self,
        titles: Sequence[str],
        image_tokens: Sequence[int],
        instruction: str,
        rule: str = "sentence",
        form: PromptForm = TITLED,
    ) -> np.ndarray:
        """Token ids of one observation's prompt, (N,) int64, read-only; a video's tokens have the id of an image's.

        titles, image_tokens, form: as in build_prompt; rule: as in prompt_text. Raises ValueError as these do, and for
        more tokens than MAX_TEXT_TOKENS beside the images' or MAX_PROMPT_TOKENS with them.
        """
        check_prompt_tokens(sum(image_tokens))
        return self._cached_encode(tuple(titles), tuple(image_tokens), prompt_text(instruction, rule), form)

    def check_sent(self, input_ids: np.ndarray) -> None:
        """input_ids: (N,) int64 within the vocabulary, of a prompt that others have made. Raises ValueError for a token
        of training's turns, and for a prompt that asks for reasoning (/cot)."""
        self._check_turns("input_ids: expected the prompt alone", input_ids)
        words = input_ids[(input_ids != self._image) & (input_ids != self._video)]
        # What it asks for its text tells, and a robot sends the same at every step.
        self._cached_check(words.astype(np.int64).tobytes())

    def _check_words(self, ids: bytes) -> None:
        """ids: int64, those of text."""
        try:
            with panics():
                text = self._tokenizer.decode(np.frombuffer(ids, np.int64).tolist(), skip_special_tokens=False)
        except Panic as error:
            raise ValueError(f"input_ids: the checkpoint's tokenizer fails on them: {error}") from None
        if _WITH_REASONING.search(text):
            raise ValueError(
                "input_ids: expected a prompt that ends in /no_cot, got one that asks for reasoning (/cot), which is "
                "not supported"
            )

    def _check_turns(self, expected: str, input_ids: np.ndarray) -> None:
        if turn := [self.choice[number] for number in input_ids.tolist() if number in self.choice]:
            raise ValueError(_of_training(expected, turn[0]))

    def _encode(
        self, titles: tuple[str, ...], image_tokens: tuple[int, ...], instruction: str, form: PromptForm
    ) -> np.ndarray:
        # Of families that train with such turns, whatever this tokenizer makes of the text.
        if self.choice and (turn := _CHOICE_TOKEN.search(instruction)):
            raise ValueError(_of_training("instruction: expected plain words", turn.group()))
        prompt = build_prompt(titles, image_tokens, instruction, form)
        try:
            with panics():
                encoded = self._tokenizer.encode(prompt, add_special_tokens=False)
        except Panic as error:
            told = f"the checkpoint's tokenizer fails on {instruction!r:.200}"
            raise ValueError(f"instruction: {told}: {error}") from None
        input_ids = np.array(encoded.ids, dtype=np.int64)
        pad = self._image if form.pad == IMAGE_PAD else self._video
        found = np.count_nonzero(input_ids == pad)
        if found != sum(image_tokens):
            raise ValueError(f"prompt: expected {sum(image_tokens)} image tokens, got {found}")
        if self._unknown is not None and self._unknown in input_ids:
            raise ValueError(f"instruction: the checkpoint's tokenizer does not know some of {instruction!r:.200}")
        self._check_turns("instruction: expected plain words", input_ids)
        check_prompt_tokens(len(input_ids), len(input_ids) - found)
        # The network computes a video's tokens as images' (spec section 8).
        input_ids[input_ids == pad] = self._image
        # It is shared between calls.
        input_ids.flags.writeable = False
        return input_ids


# A tokenizer must be able to give it back.
_PROBE = build_prompt(["Base View"], [2], "Öffne die Schublade, 打开抽屉 🤖.")


def _faults(tokenizer: Tokenizer, vocab_size: int | None) -> list[str]:
    """What is wrong with a tokenizer for prompts; it neither pads nor truncates."""
    faults = []
    for token in PROMPT_TOKENS:
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if tokenizer.token_to_id(token) is None:
            faults.append(f"it lacks {token}")
        elif ids != [tokenizer.token_to_id(token)]:
            faults.append(f"it cuts {token} into {len(ids)} tokens: it is not among added_tokens")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        faults.append(f"it has the id {largest}, config.json a vocab_size of {vocab_size}")
    if not faults:
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        # Without a decoder there is nothing to compare with.
        lossy = tokenizer.decoder is not None and tokenizer.decode(ids, skip_special_tokens=False) != _PROBE
        if lossy or _unknown_id(tokenizer) in ids:
            faults.append("it loses parts of a prompt, as no tokenizer of Qwen does")
    return faults


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of what the tokenizer does not know; None if it knows everything."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    return None if unknown is None else tokenizer.token_to_id(unknown)
