"""Make a complete random checkpoint in the released layout: to test, show and measure without a download.

Names, shapes, files and tokenizer have the form of a trained checkpoint (spec sections 2.1 and 3.5); the weights and
the statistics are random, so its actions are aimless.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from xr0_engine.config import ActionHeadConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from xr0_engine.model.weights import INDEX_FILE, checkpoint_shapes
from xr0_engine.robot.embodiment import builtin_embodiments, load_embodiment
from xr0_engine.robot.limits import RELEASED_LIMITS
from xr0_engine.robot.normalize import STATISTICS_FILE
from xr0_engine.robot.prompt import build_prompt
from xr0_engine.whole import whole_folder

SHARD_BYTES = 2 * 2**30
DTYPE = torch.bfloat16
TEXT_TOKENS = 700
"""Size of the byte-level vocabulary, trained on prompts so that their words are one token, as in Qwen's own."""
SPECIAL_TOKENS = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|vision_start|>": 9,
    "<|vision_end|>": 10,
    "<|image_pad|>": 12,
    "<|video_pad|>": 13,
}
"""Offsets from the first special id, which is 151643 in Qwen's vocabulary."""
QWEN_FIRST_SPECIAL = 151643
# Qwen's pre-tokenizer: contractions, words with one leading mark, single digits, punctuation, line ends, blanks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXAMPLE_TASKS = (
    "Pick up the black bowl next to the plate and place it on the plate.",
    "Put the cream cheese in the drawer and close it.",
    "Open the top drawer of the cabinet.",
    "Turn on the stove and put the moka pot on it.",
    "Pick up the red cube with the right arm and hand it over to the left arm.",
    "Fold the towel in half and stack it on the pile.",
    "Push the sliding door to the left side.",
    "Move the orange can near the green sponge.",
)
ROBOTS = {
    "libero_all": (10, range(7)),
    "calvin_abc_orig": (10, range(7)),
    "calvin_abcd_orig": (10, range(7)),
    "bridge_delta": (4, range(7)),
    "fractal_delta": (4, range(7)),
    "bimanual": (30, [*range(13), *range(14, 27)]),
}
"""Robot type -> chunk length and active columns."""


def published_config() -> ModelConfig:
    """Xiaomi-Robotics-0's sizes (spec section 1)."""
    return ModelConfig(
        text=TextConfig(151936, 2560, 36, 32, 8, 128, 9728, 1e-6, 5_000_000.0, (24, 20, 20)),
        vision=VisionConfig(24, 1024, 16, 4096, 2560, 16, 2, 2, 3, 2304, (5, 11, 17)),
        head=ActionHeadConfig(1024, 16, 128, 8, 1, 32, 30, 32),
        tokens=_token_ids(QWEN_FIRST_SPECIAL),
    )


def small_config() -> ModelConfig:
    """A thirtieth of the published size, for measurements on a CPU."""
    return ModelConfig(
        text=TextConfig(1024, 640, 18, 8, 4, 64, 2432, 1e-6, 5_000_000.0, (12, 10, 10)),
        vision=VisionConfig(12, 320, 5, 1280, 640, 16, 2, 2, 3, 2304, (3, 6, 9)),
        head=ActionHeadConfig(256, 8, 64, 4, 1, 32, 30, 32),
        tokens=_token_ids(1024 - 32),
    )


def tiny_config() -> ModelConfig:
    """A model of a few megabytes with every feature of the published one, for tests and the demo."""
    return ModelConfig(
        text=TextConfig(1024, 128, 4, 8, 4, 32, 384, 1e-6, 5_000_000.0, (6, 5, 5)),
        vision=VisionConfig(4, 64, 2, 256, 128, 16, 2, 2, 3, 144, (0, 1, 2)),
        head=ActionHeadConfig(128, 3, 32, 4, 1, 32, 30, 32),
        tokens=_token_ids(1024 - 32),
    )


SIZES = {"tiny": tiny_config, "small": small_config, "4b": published_config}


def init_checkpoint(folder: Path, size: str = "tiny", seed: int = 0) -> None:
    """Write a random checkpoint of one of SIZES, bfloat16, reproducible from the seed.

    Raises ValueError for an unknown size or a folder that holds something, OSError if the disk lacks the room. The
    folder appears whole or not at all.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected {', '.join(SIZES)}; got {size!r}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; remove it or choose another folder")
    write_checkpoint(folder, SIZES[size](), seed)


def write_checkpoint(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """As init_checkpoint, for any configuration; the folder must be absent or empty."""
    shapes = checkpoint_shapes(config)
    num_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * DTYPE.itemsize
    with whole_folder(folder, num_bytes) as target:
        (target / "config.json").write_text(json.dumps(config.to_hf(), indent=2), encoding="utf-8")
        preprocessor = {**preprocessor_config(config), "action_config": _random_statistics(config, seed)}
        (target / STATISTICS_FILE).write_text(json.dumps(preprocessor), encoding="utf-8")
        _write_tokenizer(target, config)
        numbered = {name: index for index, name in enumerate(shapes)}
        write_weights(
            target,
            shapes,
            DTYPE,
            lambda names: {name: _random_weight(name, shapes[name], seed, numbered[name]) for name in names},
        )


def _token_ids(first: int) -> TokenIds:
    return TokenIds(
        image=first + SPECIAL_TOKENS["<|image_pad|>"],
        vision_start=first + SPECIAL_TOKENS["<|vision_start|>"],
        vision_end=first + SPECIAL_TOKENS["<|vision_end|>"],
    )


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Callable[[list[str]], dict[str, torch.Tensor]],
) -> None:
    """Safetensors shards of at most SHARD_BYTES, and their index. tensors: those of one shard, in dtype."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(track(shards, "writing weights", disable=len(shards) == 1), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors(names), folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _random_weight(name: str, shape: tuple[int, ...], seed: int, number: int) -> torch.Tensor:
    """Scaled so that activations keep their size through the depth; norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    value = torch.empty(shape, dtype=DTYPE).normal_(generator=generator)
    if name.endswith("bias"):
        return value.mul_(0.02)
    if len(shape) == 1:
        return value.mul_(0.1).add_(1)
    if name.endswith("adaln_table"):
        return value.div_(shape[-1] ** 0.5)
    return value.div_(value[0].numel() ** 0.5)


def preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    """What preprocessor_config.json says of images: the released values (spec section 3.1). No statistics."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **RELEASED_LIMITS.to_hf(),
    }


def _random_statistics(config: ModelConfig, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    action_config = {}
    for robot_type, (length, columns) in ROBOTS.items():
        mean, std = np.zeros((2, length, config.head.action_dim))
        active = [column for column in columns if column < config.head.action_dim]
        # Deltas from the observation's pose spread with time, up to some centimetres and a tenth of a radian.
        spread = 0.02 * np.sqrt(np.arange(1, length + 1))[:, None]
        std[:, active] = spread * rng.uniform(0.5, 1.5, len(active))
        mean[:, active] = 0.1 * spread * rng.standard_normal(len(active))
        action_config[robot_type] = {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
    return action_config


def _write_tokenizer(folder: Path, config: ModelConfig) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    titles = [[view.title for view in load_embodiment(name).views] for name in builtin_embodiments()]
    corpus = [build_prompt(views, [1] * len(views), task) for views in titles for task in EXAMPLE_TASKS]
    for special in SPECIAL_TOKENS:
        corpus = [text.replace(special, "\n") for text in corpus]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=TEXT_TOKENS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    first = config.tokens.image - SPECIAL_TOKENS["<|image_pad|>"]
    # The library numbers added tokens itself, right after the vocabulary; only the file can put them at Qwen's ids.
    content = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["model"]["vocab"] |= {token: first + offset for token, offset in SPECIAL_TOKENS.items()}
    content["added_tokens"] = [
        {"id": first + offset, "content": token, **flags} for token, offset in SPECIAL_TOKENS.items()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
