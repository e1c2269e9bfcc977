"""Vision-language lines."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from xr0_engine.training.data.language import LanguageLines
from xr0_engine.training.data.samples import DataError

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A dot."}


def write(folder, *lines):
    Image.new("RGB", (9, 7), (1, 2, 3)).save(folder / "a.png")
    Image.new("L", (4, 4), 9).save(folder / "grey.png")
    Image.new("RGBA", (4, 4)).save(folder / "alpha.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "vl.jsonl").write_text(text, encoding="utf-8")
    return LanguageLines(folder / "vl.jsonl")


def test_lines_in_either_spelling(tmp_path):
    other = {
        "image": "grey.png",
        "conversations": [{"role": "user", "content": "Größe? 大"}, {"role": "assistant", "content": "4"}],
    }
    plain = {"conversations": [QUESTION | {"value": "1 + 1?"}, ANSWER | {"value": "2"}] * 2}
    lines = write(tmp_path, {"images": ["a.png"], "conversations": [QUESTION, ANSWER]}, "", other, plain)
    assert len(lines) == 3
    first, second, third = (lines.sample(index) for index in range(3))
    assert first.conversations == (("user", "<image>\nWhat is it?"), ("assistant", "A dot."))
    assert first.source == f"{tmp_path / 'vl.jsonl'}:1"
    np.testing.assert_array_equal(first.images[0], np.full((7, 9, 3), (1, 2, 3), np.uint8))
    assert second.source.endswith(":3")
    assert second.conversations[0] == ("user", "Größe? 大")
    np.testing.assert_array_equal(second.images[0], np.full((4, 4, 3), 9, np.uint8))
    assert (len(third.conversations), third.images) == (4, ())


def test_pictures_stand_upright_and_keep_their_range(tmp_path):
    lines = write(tmp_path, {"image": "deep.png", "conversations": [QUESTION, ANSWER]})
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(4, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "deep.png", exif=exif)
    expected = np.repeat(np.rot90(ramp >> 8, -1)[..., None], 3, axis=2)
    np.testing.assert_array_equal(lines.sample(0).images[0], expected)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        pytest.param("{", "Expecting", id="cut off"),
        pytest.param([QUESTION, ANSWER], "expected a JSON object", id="no object"),
        pytest.param({"images": []}, "'conversations' is missing", id="no conversation"),
        pytest.param({"conversations": []}, "expected turns of user and assistant", id="empty"),
        pytest.param({"conversations": [ANSWER, QUESTION]}, "the user's first", id="order"),
        pytest.param({"conversations": [QUESTION, {"from": "dog", "value": "w"}]}, "expected a role", id="role"),
        pytest.param({"images": ["a.png", "a.png"], "conversations": [QUESTION, ANSWER]}, "2 images", id="count"),
        pytest.param({"images": "a.png", "conversations": [QUESTION, ANSWER]}, "list of file names", id="no list"),
        pytest.param({"conversations": [QUESTION, ANSWER | {"value": "\ud83d"}]}, "UTF-8 can hold", id="half a sign"),
        pytest.param({"images": ["b.png"], "conversations": [QUESTION, ANSWER]}, "b.png cannot be read", id="image"),
        pytest.param({"images": ["vl.jsonl"], "conversations": [QUESTION, ANSWER]}, "cannot be read", id="no image"),
        pytest.param({"images": ["alpha.png"], "conversations": [QUESTION, ANSWER]}, "alpha.png has an", id="alpha"),
    ],
)
def test_wrong_line_names_file_and_line(tmp_path, line, complaint):
    good = {"images": ["a.png"], "conversations": [QUESTION, ANSWER]}
    lines = write(tmp_path, good, line)
    lines.sample(0)
    with pytest.raises(DataError, match=rf"vl.jsonl:2: .*{complaint}"):
        lines.sample(1)


def test_several_images_under_the_key_of_one(tmp_path):
    plain = {"from": "human", "value": "Which is larger?"}
    both = {"image": ["a.png", "a.png"], "conversations": [plain, ANSWER]}
    assert len(write(tmp_path, both).sample(0).images) == 2


def test_missing_or_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        LanguageLines(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no line"):
        LanguageLines(tmp_path / "empty.jsonl")
