"""Samples to tensors: what one micro-batch of the trainer is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import Preprocessor, images_to_patches, position_ids
from xr0_engine.robot.prompt import PROMPT_TOKENS, PromptTokenizer
from xr0_engine.robot.tokenizer_file import TOKENIZER_FILE, read_tokenizer
from xr0_engine.robot.views import orient
from xr0_engine.training.base import base_limits, base_video_limits
from xr0_engine.training.choice_turn import ChoiceTurn, choice_turn
from xr0_engine.training.data.samples import LanguageSample, RobotSample
from xr0_engine.types import ModelInputs, Observation

IMAGE_TAG = "<image>"
EXAMPLE_FRAME = (480, 640)
"""More pixels than published checkpoints take; what is smaller has fewer tokens."""
IGNORED = -100
"""Label of a token that is not to be predicted, as torch's cross entropy has it."""


@dataclass(frozen=True)
class RobotBatch:
    """inputs: as the engine's. actions: (B, T, A) float32, the model's units. mask: (B, T, A) float32, 1 = learn it.
    turn: what stands behind the prompt with objective joint."""

    inputs: ModelInputs
    actions: Tensor
    mask: Tensor
    sources: tuple[str, ...]
    turn: ChoiceTurn | None = None

    def to(self, device: torch.device) -> RobotBatch:
        return replace(
            self,
            inputs=_to(self.inputs, device),
            actions=self.actions.to(device),
            mask=self.mask.to(device),
            turn=None if self.turn is None else self.turn.to(device),
        )


@dataclass(frozen=True)
class LanguageBatch:
    """inputs: state and action_mask are empty. labels: (B, N) int64, the token itself, or IGNORED."""

    inputs: ModelInputs
    labels: Tensor
    sources: tuple[str, ...]

    def to(self, device: torch.device) -> LanguageBatch:
        return replace(self, inputs=_to(self.inputs, device), labels=self.labels.to(device))


class Collator:
    """Turns samples into batches for one checkpoint folder, with the engine's own preprocessing.

    statistics: of the training data, by robot type; embodiment: None chooses the built-in profile by robot type.
    with_turn: whether robot batches have the choice turn; state_tokens: ChoiceConfig's, of it. Raises ValueError for a
    history that the model's temporal patches do not divide, CheckpointError for a tokenizer or processor file that fits
    no videos, if there are any.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        statistics: Mapping[str, ActionStatistics],
        embodiment: Embodiment | None = None,
        with_turn: bool = False,
        state_tokens: str = "last",
    ) -> None:
        self.config, self.statistics, self.with_turn = config, statistics, with_turn
        self._turn_states = config.head.state_length if state_tokens == "each" else 1
        tokenizer = PromptTokenizer.load(folder, config.tokens, config.text.vocab_size)
        self._preprocess = Preprocessor(config, tokenizer, statistics, embodiment, base_limits(folder, config.vision))
        if self._preprocess.sees_videos():
            self._preprocess.video_limits = base_video_limits(folder, config.vision)
        self._check_videos([embodiment] if embodiment is not None else self._built_in())
        self._markup, self._plain = (_whole_text_tokenizer(folder) for _ in range(2))
        self._plain.encode_special_tokens = True
        added = self._markup.get_added_tokens_decoder().items()
        self._markup_ids = {number for number, token in added if token.special or token.content in PROMPT_TOKENS}

    def robot(self, samples: Sequence[RobotSample]) -> RobotBatch:
        """Raises ValueError that names the sample: unknown robot type, another chunk length, a wrong observation."""
        for sample in samples:
            self._check(sample)
        inputs = self._preprocess(
            [
                Observation(sample.images, sample.instruction, sample.state, sample.robot_type, prepared=True)
                for sample in samples
            ]
        )
        actions = np.stack([self.statistics[sample.robot_type].normalize(sample.actions) for sample in samples])
        mask = torch.from_numpy(np.stack([sample.mask for sample in samples])).float()
        sources = tuple(sample.source for sample in samples)
        mask = mask * inputs.action_mask
        return RobotBatch(
            inputs, torch.from_numpy(actions), mask, sources, self._turn(mask) if self.with_turn else None
        )

    def example(self, rows: int) -> RobotBatch:
        """A made-up batch, of the robot type whose prompts are longest where cameras give EXAMPLE_FRAME."""
        batches = [self.robot([self._made_up(robot_type)] * rows) for robot_type in self.statistics]
        return max(batches, key=lambda batch: batch.inputs.input_ids.shape[1])

    def _made_up(self, robot_type: str) -> RobotSample:
        observation = self._preprocess.example(robot_type, EXAMPLE_FRAME)
        views = {view.key: view for view in self._preprocess.resolve(robot_type)[1].views}
        images = {key: orient(frames, views[key]) for key, frames in observation.images.items()}
        actions = np.zeros_like(self.statistics[robot_type].mean, np.float32)
        state = observation.state.reshape(-1, observation.state.shape[-1])
        mask = np.ones(actions.shape, bool)
        return RobotSample(images, observation.instruction, state, actions, mask, robot_type, "made up")

    def _built_in(self) -> list[Embodiment]:
        """The profiles of the statistics' robot types; one that no profile is known for has none."""
        profiles = []
        for robot_type in self.statistics:
            with suppress(ValueError):
                profiles.append(self._preprocess.resolve(robot_type)[1])
        return profiles

    def _check_videos(self, profiles: Sequence[Embodiment]) -> None:
        """What the first batch of videos would be refused for."""
        for profile in profiles:
            if profile.history is not None:
                profile.prompt_form(self.config.vision.temporal_patch_size)
                self._preprocess.tokenizer.check_videos()

    def _turn(self, mask: Tensor) -> ChoiceTurn:
        """mask: (B, T, A). A sample's steps go to the last that is supervised."""
        length = mask.shape[1]
        steps = (mask.amax(2) * torch.arange(1, length + 1)).amax(1).int().tolist()
        return choice_turn(self._encode, steps, length, self._preprocess.tokenizer.pad_id, self._turn_states)

    def language(self, samples: Sequence[LanguageSample]) -> LanguageBatch:
        """Conversations in Qwen's chat format; what the assistant says, its end marker included, is to be predicted."""
        rows, row_grids, patches = [], [], []
        for sample in samples:
            values, grids = images_to_patches(
                list(sample.images), self.config.vision, torch.get_num_threads(), self._preprocess.limits
            )
            rows.append(self._conversation(sample, grids))
            row_grids.append(grids)
            patches.append(values)
        longest = max(len(ids) for ids, _ in rows)
        input_ids = np.full((len(rows), longest), self._preprocess.tokenizer.pad_id, dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        attention = np.zeros((len(rows), longest), dtype=bool)
        for row, (ids, targets) in enumerate(rows):
            input_ids[row, longest - len(ids) :], labels[row, longest - len(ids) :] = ids, targets
            attention[row, longest - len(ids) :] = True
        merge = self.config.vision.spatial_merge_size
        positions = [
            position_ids(ids, kept, grids, self.config.tokens.image, merge)
            for ids, kept, grids in zip(input_ids, attention, row_grids, strict=True)
        ]
        inputs = ModelInputs(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention),
            pixel_values=torch.cat(patches),
            image_grids=tuple(grid for grids in row_grids for grid in grids),
            position_ids=torch.from_numpy(np.stack(positions, axis=1)),
            preamble_length=0,
            state=torch.empty(len(rows), 0, 0),
            action_mask=torch.empty(len(rows), 0, 0),
        )
        return LanguageBatch(inputs, torch.from_numpy(labels), tuple(sample.source for sample in samples))

    def _check(self, sample: RobotSample) -> None:
        statistics = self.statistics.get(sample.robot_type)
        if statistics is None:
            known = ", ".join(sorted(self.statistics))
            raise ValueError(
                f"{sample.source}: statistics are of robot type {known}; the sample is {sample.robot_type!r}"
            )
        if sample.actions.shape != statistics.mean.shape or sample.mask.shape != statistics.mean.shape:
            raise ValueError(
                f"{sample.source}: expected actions and mask of shape {statistics.mean.shape} as the statistics have, "
                f"got {sample.actions.shape} and {sample.mask.shape}"
            )
        if not np.isfinite(sample.actions[sample.mask]).all():
            raise ValueError(f"{sample.source}: actions hold NaN or infinity where they are supervised")

    def _conversation(self, sample: LanguageSample, grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) token ids and (N,) labels. Images stand where the text says <image>, or else open the first turn."""
        merge = self.config.vision.spatial_merge_size
        visions = [
            self._encode(f"<|vision_start|>{'<|image_pad|>' * (height * width // merge**2)}<|vision_end|>")
            for height, width in grids
        ]
        tags = sum(text.count(IMAGE_TAG) for _, text in sample.conversations)
        if tags not in (0, len(visions)):
            raise ValueError(f"{sample.source}: expected {len(visions)} {IMAGE_TAG} in the text or none, got {tags}")
        remaining = iter(visions)
        ids: list[int] = []
        labels: list[int] = []
        for turn, (role, text) in enumerate(sample.conversations):
            said = [] if tags or turn else list(chain.from_iterable(visions))
            for place, part in enumerate(text.split(IMAGE_TAG)):
                said += (next(remaining) if place else []) + self._encode_plain(part, sample.source)
            said += self._encode("<|im_end|>")
            opening, closing = self._encode(f"<|im_start|>{role}\n"), self._encode("\n")
            ids += opening + said + closing
            target = said if role == "assistant" else [IGNORED] * len(said)
            labels += [IGNORED] * len(opening) + target + [IGNORED] * len(closing)
        return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)

    def _encode(self, text: str) -> list[int]:
        """Of our own text, in which markup is markup."""
        return list(self._markup.encode(text, add_special_tokens=False).ids)

    def _encode_plain(self, text: str, source: str) -> list[int]:
        """Of the data's text, in which markup such as <|im_end|> is text: letters and signs like any other."""
        ids = list(self._plain.encode(text, add_special_tokens=False).ids)
        markup = self._markup_ids.intersection(ids)
        if markup:
            token = self._plain.id_to_token(min(markup))
            raise ValueError(
                f"{source}: the text holds {token}, which the checkpoint's tokenizer takes for markup: its "
                f"{TOKENIZER_FILE} must call it special; or write it otherwise in the text"
            )
        return ids


def _whole_text_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's, without the padding and truncation that its file may ask for."""
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _to(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(inputs).items() if isinstance(value, Tensor)
    }
    return replace(inputs, **moved)
