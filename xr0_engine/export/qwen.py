"""What stands beside the weights of a plain Qwen3-VL folder: configuration, tokenizer, chat template, image settings.

Every file says what transformers 4.57 and 5 both read. What a checkpoint lacks comes from a folder of Qwen3-VL's, or is
written here where Qwen3-VL leaves no choice; the rest is refused with what to copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.checkpoint import EXAMPLE_TASKS, preprocessor_config
from xr0_engine.config import ModelConfig
from xr0_engine.files import read_json, whole
from xr0_engine.robot.limits import ImageLimits
from xr0_engine.robot.prompt import TOKENIZER_FILE, PromptTokenizer
from xr0_engine.types import CheckpointError

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
PROCESSOR = "Qwen3VLProcessor"
BASE = "Qwen/Qwen3-VL-4B-Instruct"
"""What XR-0's language model was trained from: the hub's folder whose tokenizer files fit."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
COPIED = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
KEPT = {
    "text_config": ("attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "pad_token_id"),
    "vision_config": ("initializer_range",),
}
"""Keys of the checkpoint's vlm_config that stay as they are. What else is not the engine's is left out: it has no part
in what the engine computes."""
CONTEXT = 262_144
"""max_position_embeddings of Qwen3-VL, where the checkpoint says nothing."""
VIDEO_TOKEN = "<|video_pad|>"
VIDEO_PIXELS = {"shortest_edge": 4096, "longest_edge": 25_165_824}
"""Of a whole video: Qwen3-VL's own."""
CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception('this template knows no tools') }}{% endif -%}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('expected the role system, user or assistant, got ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Qwen3-VL's form of a conversation (spec section 3.2 shows it), without tools."""


@dataclass(frozen=True)
class Companions:
    """All files but the weights. copied: file name -> where it is. written: file name -> its text. told: what a user
    should know of them."""

    copied: Mapping[str, Path]
    written: Mapping[str, str]
    told: tuple[str, ...]

    def write(self, target: Path) -> None:
        """Into a folder that exists. Raises OSError."""
        for name, place in self.copied.items():
            shutil.copyfile(place, target / name)
        for name, text in self.written.items():
            (target / name).write_text(text, encoding="utf-8")


def gather(folder: Path, config: ModelConfig, dtype: str, like: Path | None, limits: ImageLimits) -> Companions:
    """The companions of a checkpoint's language model.

    folder: the checkpoint. dtype: of its weights, `bfloat16`. like: a local folder of Qwen3-VL whose tokenizer files,
    template and generation settings are taken instead of the checkpoint's. limits: of images.
    Raises CheckpointError that names what is missing or contradicts the checkpoint, and what to copy from where.
    """
    source = folder if like is None else like
    tokenizer = _tokenizer(source, folder, config)
    settings = _json_object(source / TOKENIZER_CONFIG)
    template, told = _template(source, settings)
    # The checkpoint's own processor class is a file of the released code, which the folder does without.
    for key in ("chat_template", "auto_map"):
        settings.pop(key, None)
    settings["processor_class"] = PROCESSOR
    generation, told_of_generation = _generation(source, tokenizer)
    hf = _config(config, dtype, _video_token(config, tokenizer))
    written = {
        "config.json": hf,
        "preprocessor_config.json": {
            **preprocessor_config(config),
            "processor_class": PROCESSOR,
            **limits.to_hf(),
        },
        "video_preprocessor_config.json": _video_settings(config),
        TOKENIZER_CONFIG: settings,
        GENERATION_FILE: generation,
    }
    return Companions(
        copied={name: source / name for name in COPIED if (source / name).is_file()},
        written={TEMPLATE_FILE: template, **{name: json.dumps(text, indent=2) for name, text in written.items()}},
        told=(*told, *told_of_generation),
    )


def _tokenizer(source: Path, folder: Path, config: ModelConfig) -> Mapping[str, int]:
    """Token -> id. The tokenizer is checked as for a robot's prompts, and against the checkpoint's own."""
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG):
        if not (source / name).is_file():
            raise CheckpointError(
                f"{source} holds no {name}: copy {', '.join(COPIED)} and {TOKENIZER_CONFIG}, as many as there "
                f"are, from the hub's {BASE} into a folder and name it with --tokenizer"
            )
    ours = PromptTokenizer.load(source, config.tokens, config.text.vocab_size)
    if source != folder and (folder / TOKENIZER_FILE).is_file():
        theirs = PromptTokenizer.load(folder, config.tokens, config.text.vocab_size)
        for task in EXAMPLE_TASKS:
            if not np.array_equal(ours.encode(["Base View"], [1], task), theirs.encode(["Base View"], [1], task)):
                raise CheckpointError(
                    f"{source / TOKENIZER_FILE} gives other tokens than the checkpoint's for {task!r}"
                )
    return {token["content"]: token["id"] for token in read_json(source / TOKENIZER_FILE).get("added_tokens", [])}


def _template(source: Path, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The chat template, from wherever transformers would read it, and what there is to say of it."""
    found: dict[str, Any] = {}
    if (source / TEMPLATE_FILE).is_file():
        found[TEMPLATE_FILE] = (source / TEMPLATE_FILE).read_text(encoding="utf-8")
    older = source / "chat_template.json"
    if older.is_file():
        found[older.name] = _json_object(older).get("chat_template")
    if settings.get("chat_template") is not None:
        found[TOKENIZER_CONFIG] = settings["chat_template"]
    if not found:
        return CHAT_TEMPLATE, [
            f"{source} has no chat template: {TEMPLATE_FILE} is Qwen3-VL's form of a conversation, without tools; for "
            f"Qwen's own, copy chat_template.json from the hub's {BASE} beside the tokenizer"
        ]
    name, template = next(iter(found.items()))
    if not isinstance(template, str) or "<|image_pad|>" not in template:
        raise CheckpointError(
            f"{source / name}: expected a chat template that places images (<|image_pad|>), got {template!r:.80}: put "
            f"chat_template.json of the hub's {BASE} in its place, or remove it for a plain one"
        )
    return template, []


def _generation(source: Path, tokenizer: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    if (source / GENERATION_FILE).is_file():
        return _json_object(source / GENERATION_FILE), []
    ends = [tokenizer[token] for token in ("<|im_end|>", "<|endoftext|>") if token in tokenizer]
    settings = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[-1]}
    return settings, [f"{source} has no {GENERATION_FILE}: the likeliest token is chosen, up to the end of the turn"]


def _config(config: ModelConfig, dtype: str, video_token: int) -> dict[str, Any]:
    """The checkpoint's vlm_config for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    given = config.hf["vlm_config"]
    ours = config.to_hf()["vlm_config"]
    for part, keys in KEPT.items():
        ours[part] = {**{key: given[part][key] for key in keys if key in given[part]}, **ours[part]}
    ours["text_config"]["max_position_embeddings"] = _whole(given["text_config"], "max_position_embeddings", CONTEXT)
    return {
        "architectures": [ARCHITECTURE],
        **ours,
        "video_token_id": video_token,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _video_token(config: ModelConfig, tokenizer: Mapping[str, int]) -> int:
    told = {
        "config.json": _whole(config.hf["vlm_config"], "video_token_id"),
        TOKENIZER_FILE: tokenizer.get(VIDEO_TOKEN),
    }
    ids = {number for number in told.values() if number is not None}
    if len(ids) != 1:
        raise CheckpointError(f"the id of {VIDEO_TOKEN}: expected the same in both files, got {told}")
    return ids.pop()


def _whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A number of vlm_config, which other parts of the engine do not read."""
    try:
        return default if values.get(name) is None else whole(values, name)
    except TypeError as error:
        raise CheckpointError(f"config.json holds a value of the wrong kind: {error}") from None


def _video_settings(config: ModelConfig) -> dict[str, Any]:
    image = preprocessor_config(config)
    shared = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    return {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": PROCESSOR,
        **{key: image[key] for key in shared},
        "size": VIDEO_PIXELS,
    }


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return dict(content)
