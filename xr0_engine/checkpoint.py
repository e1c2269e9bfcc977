"""Make a complete random checkpoint in the released layout: to test, show and measure without a download.

Names, shapes, files and tokenizer have the form of a trained checkpoint (spec sections 2.1 and 3.5); the weights and
the statistics are random, so its actions are aimless.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from xr0_engine.config import ModelConfig, TokenIds
from xr0_engine.family import VARIANT
from xr0_engine.files import read_json, reading, section, text, whole
from xr0_engine.model.weights import checkpoint_shapes
from xr0_engine.model.writing import stored_sizes, write_weights
from xr0_engine.robot.embodiment import (
    CHECKPOINT_KEY,
    Embodiment,
    builtin_embodiments,
    embodiment_for,
    embodiment_from,
    load_embodiment,
)
from xr0_engine.robot.layouts import ROBODOJO, Layout
from xr0_engine.robot.limits import RELEASED_LIMITS, ImageLimits, read_limits
from xr0_engine.robot.normalize import STATISTICS_FILE
from xr0_engine.robot.prompt import build_prompt, instruction_rule, prompt_text
from xr0_engine.robot.quantiles import POST_TRAINING_RULE, ROBODOJO_RULE, StateStatistics
from xr0_engine.sizes import (
    FAMILY_ROBOTS,
    SPECIAL_ROOM,
    SPECIAL_TOKENS,
    Robots,
    config_of,
    first_special,
    special_tokens,
    token_ids,
)
from xr0_engine.types import CheckpointError
from xr0_engine.whole import refuse_used, whole_folder

DTYPE = torch.bfloat16
LIMIT_KEYS = ("min_pixels", "max_pixels")
TASK_KEY = "task"
TEXT_TOKENS = 700
"""Size of the byte-level vocabulary, trained on prompts so that their words are one token, as in Qwen's own."""
# Qwen's pre-tokenizer: contractions, words with one leading mark, single digits, punctuation, line ends, blanks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKEN = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
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


def init_checkpoint(
    folder: Path, size: str = "tiny", seed: int = 0, config: Path | None = None, family: str = "xr0"
) -> None:
    """Write a random checkpoint of one of a family's sizes (sizes.FAMILY_SIZES), bfloat16, reproducible from the seed.

    config: a file whose values stand in the place of the size's, see read_plan. Raises ValueError for an unknown family
    or size, a folder that holds something, or a wrong file, OSError if the disk lacks the room. The folder appears
    whole or not at all.
    """
    base = config_of(family, size)
    folder = Path(folder)
    refuse_used(folder)
    plan = Plan(base) if config is None else read_plan(config, size, family)
    write_checkpoint(folder, plan.model, seed, plan.limits, plan.embodiment, plan.task)


@dataclass(frozen=True)
class Plan:
    """What a random checkpoint is to be.

    embodiment: a profile of its own; None: for all built-in robot types. task: the only one that it will be asked,
    whose prompt is then one token for each stretch between special tokens, so that images are not a few among many;
    None: words are tokens.
    """

    model: ModelConfig
    limits: ImageLimits = RELEASED_LIMITS
    embodiment: Embodiment | None = None
    task: str | None = None


def read_plan(path: Path, size: str = "tiny", family: str = "xr0") -> Plan:
    """What a JSON file says of a checkpoint in the form of config.json; all that it does not say is as in the family's
    size.

    Some of what it leaves out follows from what it gives: vision_config.out_hidden_size from the text's hidden_size,
    the DiT's head_dim and num_key_value_heads from the text's, mrope_section from head_dim, and the special tokens from
    vocab_size, of which they are the last. Beside config.json's keys it may have `min_pixels` and `max_pixels`, which
    preprocessor_config.json holds, for `embodiment` also the name of a built-in profile or the path of a YAML file,
    from the file's own folder, and with an embodiment `task`, see Plan. Raises CheckpointError that names the file and
    the field: for a key that xr0 does not write, with the nearest one that it does, for what ModelConfig.from_hf
    refuses, and for a vocabulary that the tokenizer does not fit into.
    """
    given = read_json(path)
    with reading(path):
        if not isinstance(given, Mapping):
            raise ValueError(f"expected an object with keys of config.json, got {given!r:.80}")
        base = config_of(family, size).to_hf()
        limits = {name: given[name] for name in LIMIT_KEYS if name in given}
        told = {name: value for name, value in given.items() if name not in (*limits, CHECKPOINT_KEY, TASK_KEY)}
        _refuse_unknown(told, base, "")
        try:
            model = ModelConfig.from_hf(_laid_over(base, told, SPECIAL_ROOM[family]))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        _check_tokens(model)
        embodiment = _own_embodiment(path, given.get(CHECKPOINT_KEY))
        task = text(given, TASK_KEY) if TASK_KEY in given else None
        if task is not None:
            if embodiment is None:
                raise ValueError(f"{TASK_KEY}: expected with `{CHECKPOINT_KEY}`, whose views are in the prompt")
            task = prompt_text(task, instruction_rule(embodiment.instruction, model.normalize_instruction))
        return Plan(model, read_limits(path, limits, model.vision), embodiment, task)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    seed: int = 0,
    limits: ImageLimits = RELEASED_LIMITS,
    embodiment: Embodiment | None = None,
    task: str | None = None,
) -> None:
    """As init_checkpoint, for any configuration; the folder must be absent or empty.

    embodiment: the profile that the checkpoint names; its statistics are then of that profile's robot types alone.
    task: see Plan; only with an embodiment.
    """
    shapes = checkpoint_shapes(config)
    sizes = stored_sizes(shapes, DTYPE)
    with whole_folder(folder, sum(sizes.values())) as target:
        told = {} if embodiment is None else {CHECKPOINT_KEY: asdict(embodiment)}
        (target / "config.json").write_text(json.dumps(config.to_hf() | told, indent=2), encoding="utf-8")
        statistics = _random_statistics(config, seed, embodiment)
        preprocessor = {**preprocessor_config(config, limits), "action_config": statistics}
        (target / STATISTICS_FILE).write_text(json.dumps(preprocessor), encoding="utf-8")
        _write_tokenizer(target, config, _task_texts(config, embodiment, task) if embodiment and task else None)
        numbered = {name: index for index, name in enumerate(shapes)}
        write_weights(
            target,
            sizes,
            lambda names: {name: _random_weight(name, shapes[name], seed, numbered[name]) for name in names},
        )


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        others = [
            *known,
            *(VARIANT if where == "dit_config." else ()),
            *([] if where else (*LIMIT_KEYS, CHECKPOINT_KEY, TASK_KEY)),
        ]
        if name not in others:
            near = difflib.get_close_matches(name, others, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(others)}"
            raise ValueError(f"there is no key {where + name!r:.80}; {hint}")
        if isinstance(known.get(name), Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}{name}: expected an object, got {value!r:.80}")
            _refuse_unknown(value, known[name], f"{where}{name}.")


def _laid_over(base: dict[str, Any], given: Mapping[str, Any], special_room: int) -> dict[str, Any]:
    """A size's config.json, which is used up, with what a file says in its place, and what follows from that."""
    told = section(section(given, "vlm_config"), "text_config")
    vlm, dit = base["vlm_config"], base["dit_config"]
    text = vlm["text_config"]
    # Two versions of transformers have it in two places; what the file says in one of them is said.
    rope = {**text.pop("rope_parameters"), **text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    if "head_dim" in told:
        rope["mrope_section"] = _mrope_section(whole(told, "head_dim"))
    places = (told, section(told, "rope_scaling"), section(told, "rope_parameters"))
    text["rope_scaling"] = {key: value for key, value in rope.items() if not any(key in place for place in places)}
    vlm["vision_config"]["out_hidden_size"] = told.get("hidden_size", text["hidden_size"])
    for name in ("head_dim", "num_key_value_heads"):
        dit[name] = told.get(name, text[name])
    if "vocab_size" in told:
        vlm |= _token_keys(token_ids(whole(told, "vocab_size") - special_room))
    return _merged(base, given)


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """given's values in the place of base's, within mappings too."""
    both = {
        name: _merged(base[name], value) if isinstance(base.get(name), Mapping) and value is not None else value
        for name, value in given.items()
    }
    return {**base, **both}


def _mrope_section(head_dim: int) -> list[int]:
    """Of time, height and width, in the published proportion: 24, 20, 20 of 64."""
    space = head_dim * 5 // 32
    return [head_dim // 2 - 2 * space, space, space]


def _token_keys(tokens: TokenIds) -> dict[str, int]:
    """As config.json has them."""
    return {
        "image_token_id": tokens.image,
        "vision_start_token_id": tokens.vision_start,
        "vision_end_token_id": tokens.vision_end,
        **({} if tokens.video is None else {"video_token_id": tokens.video}),
    }


def _check_tokens(model: ModelConfig) -> None:
    """Raises ValueError for special tokens that the random tokenizer cannot have."""
    first = first_special(model.tokens)
    last = first + max(special_tokens(model.family).values())
    if model.tokens != token_ids(first):
        others = list(_token_keys(token_ids(first)).items())[1:]
        expected = ", ".join(f"{name} {value}" for name, value in others)
        raise ValueError(f"image_token_id is {model.tokens.image}: expected {expected}, as Qwen has them")
    if not (first >= TEXT_TOKENS and last < model.text.vocab_size):
        raise ValueError(
            f"vocab_size is {model.text.vocab_size}, image_token_id {model.tokens.image}: expected special tokens "
            f"{first} to {last} behind the {TEXT_TOKENS} of the text and within the vocabulary: vocab_size at least "
            f"{TEXT_TOKENS + SPECIAL_ROOM[model.family]}, or image_token_id left out"
        )


def _own_embodiment(path: Path, told: Any) -> Embodiment | None:
    if told is None:
        return None
    if isinstance(told, Mapping):
        embodiment = embodiment_from(f"{path}: {CHECKPOINT_KEY}", told)
    else:
        named = text({CHECKPOINT_KEY: told}, CHECKPOINT_KEY)
        beside = path.parent / named
        embodiment = load_embodiment(beside if beside.is_file() else named)
    if not embodiment.robot_types:
        raise ValueError(f"{CHECKPOINT_KEY}: {embodiment.name!r} lists no robot_types: whose statistics shall it have?")
    return embodiment


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


def preprocessor_config(config: ModelConfig, limits: ImageLimits = RELEASED_LIMITS) -> dict[str, Any]:
    """What preprocessor_config.json says of images: but for limits the released values (spec section 3.1)."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **limits.to_hf(),
    }


def _random_statistics(config: ModelConfig, seed: int, embodiment: Embodiment | None) -> dict[str, Any]:
    """Of the profile's robot types, or of the family's."""
    robots: Robots = FAMILY_ROBOTS[config.family]
    if embodiment is not None:
        used = embodiment.action_layout.active_columns or range(config.head.action_dim)
        robots = dict.fromkeys(embodiment.robot_types, (config.head.action_length, used))
    profiles = {name: embodiment or embodiment_for(name) for name in robots}
    rng = np.random.default_rng(seed)
    action_config = {}
    for robot_type, (length, columns) in robots.items():
        mean, std = np.zeros((2, length, config.head.action_dim))
        active = [column for column in columns if column < config.head.action_dim]
        # Deltas from the observation's pose spread with time, up to some centimetres and a tenth of a radian.
        spread = 0.02 * np.sqrt(np.arange(1, length + 1))[:, None]
        std[:, active] = spread * rng.uniform(0.5, 1.5, len(active))
        mean[:, active] = 0.1 * spread * rng.standard_normal(len(active))
        action_config[robot_type] = {
            "mean": mean.round(6).tolist(),
            "std": std.round(6).tolist(),
            **_random_rules(config, profiles[robot_type].action_layout, active),
        }
    return action_config


def _random_rules(config: ModelConfig, layout: Layout, active: list[int]) -> dict[str, Any]:
    """What XR-1's post-training code and RoboDojo's client go by beside mean and std, of their layouts' robots."""
    if layout.mobile is None or not config.double_statistics:
        return {}
    # Joints and grippers move by a radian or two; what stands behind them is no part of a state.
    q99 = np.zeros(config.head.state_dim)
    for arm in (layout.mobile.left, layout.mobile.right):
        q99[arm.state_joints] = q99[arm.state_gripper] = 2.0
    is_robodojo = layout is ROBODOJO
    state = StateStatistics(ROBODOJO_RULE if is_robodojo else POST_TRAINING_RULE, -q99, q99).to_json()
    return {"state": state, **({"rule": ROBODOJO_RULE, "active_columns": active} if is_robodojo else {})}


def _task_texts(config: ModelConfig, embodiment: Embodiment, task: str) -> list[str]:
    """What stands between the special tokens of one robot's prompts of one task."""
    titles, form = [view.title for view in embodiment.views], embodiment.prompt_form(config.vision.temporal_patch_size)
    prompt = build_prompt(titles, [1] * len(titles) * len(form.stamps), task, form)
    return [text for text in _SPECIAL_TOKEN.split(prompt) if text]


def _write_tokenizer(folder: Path, config: ModelConfig, stretches: list[str] | None = None) -> None:
    """stretches: texts that shall be one token each; None: words of the built-in robots' prompts are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), to_bytes])
    tokenizer.pre_tokenizer = words if stretches is None else to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    corpus = stretches
    if corpus is None:
        titles = [[view.title for view in load_embodiment(name).views] for name in builtin_embodiments()]
        corpus = [build_prompt(views, [1] * len(views), task) for views in titles for task in EXAMPLE_TASKS]
        corpus = [_SPECIAL_TOKEN.sub("\n", text) for text in corpus]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=TEXT_TOKENS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    first, tokens = first_special(config.tokens), special_tokens(config.family)
    # The library numbers added tokens itself, right after the vocabulary; only the file can put them at Qwen's ids.
    content = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["model"]["vocab"] |= {token: first + offset for token, offset in tokens.items()}
    content["added_tokens"] = [{"id": first + offset, "content": token, **flags} for token, offset in tokens.items()]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
