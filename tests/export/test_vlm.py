"""The language model of a checkpoint as a plain Qwen3-VL folder: what transformers makes of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen3VLForConditionalGeneration,
)
from typer.testing import CliRunner

from tests.support import load, random_inputs
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.comparison import FLOAT32_MAX_ERROR
from xr0_engine.config import ModelConfig
from xr0_engine.export.qwen import CHAT_TEMPLATE
from xr0_engine.export.vlm import EMBEDDINGS, export_vlm, write_shards
from xr0_engine.model.choice import choice_shapes
from xr0_engine.model.weights import TIED_LM_HEAD, read_index
from xr0_engine.types import CheckpointError

WEIGHTS = "model-00001-of-00001.safetensors"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cup."},
    {"role": "user", "content": "Why?"},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cup.<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""As Qwen3-VL's own template has it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "vlm"
    export_vlm(checkpoint, folder)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors, and the index with them."""
    tensors = {**load_file(folder / WEIGHTS), **{name: value for name, value in changes.items() if value is not None}}
    for name in [name for name, value in changes.items() if value is None]:
        del tensors[name]
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / WEIGHTS)


def test_transformers_misses_nothing_and_knows_everything(checkpoint, exported):
    model, info = AutoModelForImageTextToText.from_pretrained(exported, dtype="auto", output_loading_info=True)
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    assert {kind: list(keys) for kind, keys in info.items()} == {kind: [] for kind in info}
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    kept = {
        name.removeprefix("vlm."): tensor
        for name, tensor in load_file(checkpoint / WEIGHTS).items()
        if name.startswith("vlm.")
    }
    state = model.state_dict()
    assert state.keys() - kept.keys() == {"lm_head.weight"}
    for name, tensor in kept.items():
        assert torch.equal(state[name], tensor), name


def test_its_keys_values_and_logits_are_the_engines(checkpoint, exported):
    config = ModelConfig.load(checkpoint)
    inputs = random_inputs(config, [[(4, 6), (2, 4)], [(4, 4)]], [[2, 3, 5], [1, 2]])
    ours = load(checkpoint)
    block = ours.prefill(inputs, ours.encode_images(inputs))
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    cache = DynamicCache(config=theirs.config.text_config)
    with torch.no_grad():
        output = theirs(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.long(),
            pixel_values=inputs.pixel_values,
            image_grid_thw=torch.tensor([(1, *grid) for grid in inputs.image_grids]),
            mm_token_type_ids=(inputs.input_ids == config.tokens.image).int(),
            past_key_values=cache,
            output_hidden_states=True,
        )
    for index, layer in enumerate(cache.layers[-config.head.num_layers :]):
        for mine, other in ((block.keys[index], layer.keys), (block.values[index], layer.values)):
            difference = (mine - other).abs() * inputs.attention_mask[:, None, :, None]
            assert difference.max() <= FLOAT32_MAX_ERROR
    logits = output.hidden_states[-1] @ load_file(checkpoint / WEIGHTS)[EMBEDDINGS].float().T
    torch.testing.assert_close(output.logits, logits, atol=FLOAT32_MAX_ERROR, rtol=0)


def test_it_answers_about_a_picture(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    processor = AutoImageProcessor.from_pretrained(exported)
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    image = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert image["image_grid_thw"].tolist() == [[1, 16, 20]]
    text = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert text == RENDERED
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 80), return_tensors="pt")["input_ids"]
    model = Qwen3VLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    answers = [
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            max_new_tokens=4,
            min_new_tokens=4,
            **image,
        )[0, ids.shape[1] :].tolist()
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4


def test_its_files_name_nothing_of_the_released_code(copied, tmp_path):
    raw = json.loads((copied / "config.json").read_text())
    raw["vlm_config"] |= {"auto_map": {"AutoModel": "modeling.Model"}, "video_token_id": 1005}
    raw["vlm_config"]["text_config"] |= {"max_position_embeddings": 4096, "eos_token_id": 1004, "strange": 1}
    (copied / "config.json").write_text(json.dumps(raw))
    edit(copied / "tokenizer_config.json", processor_class="TheirProcessor", auto_map={"AutoProcessor": "code.Theirs"})
    (copied / "generation_config.json").write_text('{"do_sample": true, "top_k": 20}')
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": "<|image_pad|>{{ 'theirs' }}"}))
    out = tmp_path / "out"
    told = export_vlm(copied, out, min_pixels=2048, max_pixels=1_000_000)
    assert not any("template" in line or "generation" in line or "pixels" in line for line in told)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert "auto_map" not in config
    assert "strange" not in config["text_config"]
    assert (config["text_config"]["max_position_embeddings"], config["text_config"]["eos_token_id"]) == (4096, 1004)
    assert json.loads((out / "tokenizer_config.json").read_text()).keys() & {"auto_map", "processor_class"} == {
        "processor_class"
    }
    assert "Their" not in "".join(path.read_text() for path in out.glob("*.json"))
    assert GenerationConfig.from_pretrained(out).top_k == 20
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|image_pad|>theirs"
    )
    processor = AutoImageProcessor.from_pretrained(out)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (2048, 1_000_000)
    read = AutoConfig.from_pretrained(out)
    assert (read.model_type, read.video_token_id, read.text_config.rope_parameters["rope_theta"]) == (
        *("qwen3_vl", 1005),
        ModelConfig.load(copied).text.rope_theta,
    )


def test_a_tied_head_that_is_stored_is_left_out_and_one_of_its_own_refused(copied, tmp_path):
    embeddings = load_file(copied / WEIGHTS)[EMBEDDINGS]
    edit_weights(copied, {TIED_LM_HEAD: embeddings.clone()})
    told = export_vlm(copied, tmp_path / "tied")
    assert "left behind: 50 of the action head" in told[0]
    assert not any("lm_head" in name for name in read_index(tmp_path / "tied"))
    embeddings[-1, -1] += 1
    edit_weights(copied, {TIED_LM_HEAD: embeddings})
    with pytest.raises(CheckpointError, match=r"vlm\.lm_head\.weight differs .* tied"):
        export_vlm(copied, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_what_only_training_has_stays_behind(tmp_path):
    """The base of Xiaomi-Robotics-1 has embeddings of its own within the language model."""
    init_checkpoint(tmp_path / "base", family="xr1")
    config = ModelConfig.load(tmp_path / "base")
    plain = {name.removeprefix("vlm.") for name in read_index(tmp_path / "base") if name.startswith("vlm.")}
    choice = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in choice_shapes(config).items()}
    edit_weights(tmp_path / "base", dict(choice))
    told = export_vlm(tmp_path / "base", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plain
    assert f"{len(plain)} tensors of the language model" in told[0]


def test_shards_keep_every_dtype_and_their_index_names_every_tensor(copied, tmp_path):
    name = "vlm.model.language_model.norm.weight"
    edit_weights(copied, {name: load_file(copied / WEIGHTS)[name].float()})
    told = export_vlm(copied, tmp_path / "out")
    assert "bfloat16 and float32" in told[0]
    assert read_index(tmp_path / "out")["language_model.norm.weight"].dtype == torch.float32
    places = {name.removeprefix("vlm."): place for name, place in read_index(copied).items() if name.startswith("vlm.")}
    many = tmp_path / "many"
    many.mkdir()
    write_shards(many, places, shard_bytes=300_000)
    files = sorted(many.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 5
    index = json.loads((many / "model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert set(tensors) == {key for key, value in index["weight_map"].items() if value == file.name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 300_000
        found |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    whole = load_file(copied / WEIGHTS)
    assert found.keys() == places.keys()
    assert all(torch.equal(tensor, whole[f"vlm.{name}"]) for name, tensor in found.items())


def test_a_tokenizer_of_ones_own(copied, tmp_path):
    theirs = tmp_path / "qwen"
    theirs.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copied / name, theirs / name)
    (theirs / "chat_template.jinja").write_text("{{ 'own' }}<|image_pad|>")
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer_config\.json: copy .* --tokenizer"):
        export_vlm(copied, tmp_path / "out")
    export_vlm(copied, tmp_path / "out", theirs)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'own' }}<|image_pad|>"
    content = json.loads((theirs / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[: len(merges) // 2]
    (theirs / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="gives other tokens than"):
        export_vlm(copied, tmp_path / "other", theirs)
    with pytest.raises(ValueError, match="tokenizer: expected a local folder"):
        export_vlm(copied, tmp_path / "other", tmp_path / "nowhere")


def no_images(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}")


def no_template_text(folder: Path) -> None:
    (folder / "chat_template.json").write_text("{}")


def other_video_token(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["vlm_config"]["video_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(raw))


def no_length(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["vlm_config"]["text_config"]["max_position_embeddings"] = "long"
    (folder / "config.json").write_text(json.dumps(raw))


def no_norm(folder: Path) -> None:
    edit_weights(folder, {"vlm.model.language_model.norm.weight": None})


def one_too_many(folder: Path) -> None:
    edit_weights(folder, {"vlm.model.language_model.adapter.weight": torch.zeros(2)})


def settings_no_object(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_images, "a chat template that places images"),
        (no_template_text, "a chat template that places images"),
        (other_video_token, r"<\|video_pad\|> has id \d+, config\.json says 7"),
        (no_length, "max_position_embeddings is 'long'"),
        (no_norm, r"missing vlm\.model\.language_model\.norm\.weight"),
        (one_too_many, r"unexpected vlm\.model\.language_model\.adapter\.weight"),
        (settings_no_object, r"generation_config\.json: expected a JSON object"),
    ],
)
def test_what_no_such_folder_can_hold_is_refused(copied, tmp_path, spoil, message):
    spoil(copied)
    with pytest.raises(CheckpointError, match=message):
        export_vlm(copied, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_nothing_half_written_stays(copied, tmp_path, monkeypatch):
    def fail(*arguments: object, **named: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("xr0_engine.export.vlm.save_file", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        export_vlm(copied, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_the_command_tells_what_it_wrote(checkpoint, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", "vlm", str(checkpoint), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    for said in (
        "121 tensors",
        "50 of the action head",
        "no chat template",
        "no generation_config.json",
        "90000 pixels",
    ):
        assert said in result.stdout
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    again = CliRunner().invoke(app, ["export", "vlm", str(checkpoint), "--out", str(out)])
    assert again.exit_code == 2
    assert "exists and is not empty" in again.stderr
