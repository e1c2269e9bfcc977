"""Datasets by their id on the hub, from a server of ours in its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.hub import TOKEN, running
from tests.support import make_config
from tests.training.data.fixtures import write_dataset
from tests.training.support import SIZES
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.cli import app
from xr0_engine.training.data import hub as datasets
from xr0_engine.training.data.convert import to_lerobot
from xr0_engine.training.data.description import DESCRIPTION_FILE
from xr0_engine.training.data.language import LanguageLines
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.stream import Mixture, Stream

UNUSED = "videos/observation.images.unused/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Episode files, and the same as a LeRobot dataset."""
    folder = tmp_path_factory.mktemp("datasets")
    write_dataset(folder / "episodes", (12, 7))
    (folder / "episodes" / DESCRIPTION_FILE).write_text("robot_type: bimanual\n")
    to_lerobot(open_source(folder / "episodes"), folder / "lerobot")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with running(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def xr0(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def same(one, other) -> bool:
    """Whether two sources have the same episodes."""
    first, second = one.load(0), other.load(0)
    return one.lengths == other.lengths and all(
        np.array_equal(first.image(view, 3), second.image(view, 3)) for view in first.clips
    )


@pytest.mark.parametrize("kind", ["episodes", "lerobot"])
def test_id_is_read_as_the_folder_is(hub, folders, kind):
    commit = hub.put("dataset", "our/towels", folders / kind)
    source = open_source(Path("our/towels"))
    assert same(source, open_source(folders / kind))
    assert source.description.folder.name == commit
    # Once: a second look downloads nothing.
    asked = len(hub.asked)
    assert same(open_source(Path("our/towels")), source)
    assert len(hub.asked) == asked


def test_only_the_views_that_are_mapped_are_fetched(hub, folders):
    hub.put("dataset", "our/towels", folders / "lerobot")
    hub.repositories["dataset", "our/towels"].add({UNUSED: b"a camera's", "checkpoints/old.bin": b"something else"})
    copy = open_source(Path("our/towels")).description.folder
    assert len(hub.fetched()) == len(set(hub.fetched()))
    assert len([*copy.rglob("*.mp4")]) == 3
    assert not {UNUSED, "checkpoints/old.bin"} & set(hub.fetched())


def test_local_folder_wins(hub, folders, tmp_path):
    hub.put("dataset", "our/towels", folders / "lerobot")
    write_dataset(tmp_path / "our" / "towels", (5,))
    assert open_source(Path("our/towels")).lengths == (5,)
    assert hub.asked == []


def test_revision_and_commit(hub, folders, tmp_path):
    first = hub.put("dataset", "our/towels", folders / "lerobot")
    repository = hub.repositories["dataset", "our/towels"]
    repository.refs["v1.0"] = first
    repository.add({DESCRIPTION_FILE: b"robot_type: 7\n"})
    for revision in ("v1.0", first):
        assert len(open_source(Path(f"our/towels@{revision}")).lengths) == 2
    with pytest.raises(DataError, match="robot_type"):
        open_source(Path("our/towels"))


def test_commit_that_is_in_the_cache_needs_no_network(hub, folders):
    commit = hub.put("dataset", "our/towels", folders / "episodes")
    expected = open_source(Path("our/towels")).names
    datasets._fetch.cache_clear()
    hub.is_down = True
    assert open_source(Path(f"our/towels@{commit}")).names == expected


def test_part_of_a_dataset_in_the_cache_is_not_taken_for_it(hub, folders):
    commit = hub.put("dataset", "our/towels", folders / "episodes")
    open_source(Path("our/towels"))
    datasets._fetch.cache_clear()
    next(datasets.description_folder(datasets.hub_id(f"our/towels@{commit}")).glob("episode_*.json")).unlink()
    datasets._fetch.cache_clear()
    hub.is_down = True
    with pytest.raises(DataError, match=r"the hub gave no dataset of that name\. Without a network"):
        open_source(Path(f"our/towels@{commit}"))


def test_description_of_ones_own_names_a_commit(hub, folders, tmp_path):
    commit = hub.put("dataset", "their/towels", folders / "lerobot")
    own = yaml.safe_load((folders / "lerobot" / DESCRIPTION_FILE).read_text())
    del hub.repositories["dataset", "their/towels"].commits[commit][DESCRIPTION_FILE]
    with pytest.raises(DataError, match=f"without xr0.yaml.*`dataset: their/towels@{commit}`"):
        open_source(Path("their/towels"))
    file = tmp_path / "towels.yaml"
    file.write_text(yaml.safe_dump(own | {"dataset": "their/towels"}))
    with pytest.raises(DataError, match=f"towels.yaml: dataset: expected a commit.*write their/towels@{commit}$"):
        open_source(file)
    file.write_text(yaml.safe_dump(own | {"dataset": f"their/towels@{commit}"}))
    assert same(open_source(file), open_source(folders / "lerobot"))


def test_description_on_the_hub_points_nowhere_else(hub, folders):
    hub.put("dataset", "our/towels", folders / "lerobot")
    hub.repositories["dataset", "our/towels"].add({DESCRIPTION_FILE: b"robot_type: bimanual\ndataset: ../../..\n"})
    with pytest.raises(DataError, match="dataset: expected none in a file of the hub"):
        open_source(Path("our/towels"))


def test_language_by_id(hub, tmp_path):
    (tmp_path / "vl").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "vl" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dot."}]
    (tmp_path / "vl" / "lines.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    hub.put("dataset", "our/talk", tmp_path / "vl")
    assert LanguageLines(Path("our/talk")).sample(0).images[0].shape == (7, 9, 3)
    hub.repositories["dataset", "our/talk"].add({"more.jsonl": b"{}"})
    datasets._fetch.cache_clear()
    with pytest.raises(DataError, match=r"expected one \.jsonl file, the repository has lines.jsonl, more.jsonl"):
        LanguageLines(Path("our/talk"))


@pytest.mark.parametrize("name", ["../private.png", "/private.png", "a/../../private.png"])
def test_language_of_others_names_no_pictures_of_this_machine(hub, tmp_path, name):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dot."}]
    (tmp_path / "vl").mkdir()
    (tmp_path / "vl" / "lines.jsonl").write_text(json.dumps({"image": name, "conversations": turns}) + "\n")
    hub.put("dataset", "our/talk", tmp_path / "vl")
    with pytest.raises(DataError, match=r"lines.jsonl:1: images: expected files of the repository, got"):
        LanguageLines(Path("our/talk")).sample(0)


def test_mixture_of_repositories(hub, folders):
    hub.put("dataset", "our/one", folders / "lerobot")
    hub.put("dataset", "our/two", folders / "episodes")
    stream = Stream(Mixture(("our/one=3", "our/two")), batch_size=40, seed=0, chunk_length=5, augment=False)
    names = [sample.source for sample in next(stream)]
    one = sum("datasets--our--one" in name for name in names)
    # Of 40 draws three in four, the order is by chance.
    assert 25 <= one <= 35
    assert len(names) - one == sum("datasets--our--two" in name for name in names)


def test_commands_take_ids(hub, folders, tmp_path):
    hub.put("dataset", "our/towels", folders / "lerobot")
    checked = xr0("data", "check", "our/towels", "--fast")
    assert "our/towels: 2 checked, 0 broken" in checked.output
    told = xr0("data", "stats", "our/towels", "--out", "statistics.json", "--chunk-length", "5")
    assert "bimanual, 5 steps" in told.output, told.output
    assert "episodes: 2 episodes" in xr0("data", "convert", "our/towels@main", "episodes").output


def test_run_keeps_the_commit(hub, folders, tmp_path):
    commit = hub.put("dataset", "our/towels", folders / "lerobot")
    write_checkpoint(tmp_path / "base", make_config(**SIZES))
    of_base = hub.put("model", "our/base", tmp_path / "base")
    assert xr0("data", "stats", "our/towels", "--out", "statistics.json", "--chunk-length", "5").exit_code == 0
    paths = ["model.checkpoint=our/base", "data.robot=our/towels=2", "data.statistics=statistics.json"]
    short = ["data.chunk_length=5", "data.batch_size=2", "data.workers=0", "data.validation_samples=2", "optim.steps=2"]
    started = xr0("train", "finetune_head", "--tiny", "--out", "run", *paths, *short)
    assert started.exit_code == 0, started.output
    assert f"our/towels@{commit}: trains on ego, left_wrist, right_wrist" in started.output
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["data"]["robot"] == [f"our/towels@{commit}=2"]
    assert told["model"]["checkpoint"] == f"our/base@{of_base}"
    hub.repositories["dataset", "our/towels"].add({DESCRIPTION_FILE: b"robot_type: another\n"})
    datasets._fetch.cache_clear()
    hub.is_down = True
    resumed = xr0("train", "resume", "run")
    assert resumed.exit_code == 0, resumed.output
    assert xr0("push", "run/model", "our/policy", "--dry-run", "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| [our/towels](https://huggingface.co/datasets/our/towels), revision `{commit}` | robot | 2 |" in card
    assert "Recipe `finetune_head` of `xr0 train`, from our/base." in card
    assert "Open loop, on episodes that were held out, after 2 steps: L1 " in card


FAULTS = {
    "unknown": ("our/nothing", None, "the hub gave no dataset of that name that is public; for a private one log in"),
    "unknown, logged in": ("our/nothing", TOKEN, "that your token may see: check its name"),
    "private": ("our/private", None, "for a private one log in (`hf auth login`, or HF_TOKEN): check its name"),
    "gated": ("our/gated", None, "do so on the hub's page datasets/our/gated, then log in"),
    "bad token": ("our/towels", "hf_wrong", "the hub refuses your token: it is wrong or has expired: log in"),
    "wrong revision": ("our/towels@v9", None, "has no revision v9: name a branch, tag or commit"),
    "wrong commit": (f"our/towels@{40 * 'a'}", None, f"has no revision {40 * 'a'}: name a branch"),
    "no dataset of ours": ("our/text", None, "is no dataset that is read: it has neither meta/info.json"),
    "no id": ("our/a--b", None, "expected organisation/name, as the hub has them"),
    "typing error": ("our/towls.yaml", None, "expected a dataset's folder|cannot be read as YAML"),
}


@pytest.mark.parametrize(("name", "token", "complaint"), FAULTS.values(), ids=FAULTS)
def test_what_the_hub_refuses_is_one_line(hub, folders, tmp_path, monkeypatch, capfd, name, token, complaint):
    hub.put("dataset", "our/towels", folders / "lerobot")
    hub.put("dataset", "our/private", folders / "lerobot", "private")
    hub.put("dataset", "our/gated", folders / "lerobot", "gated")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.json").write_text("[]")
    hub.put("dataset", "our/text", tmp_path / "text")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    result = xr0("data", "stats", name, "--out", "statistics.json")
    said = result.output + capfd.readouterr().err
    assert result.exit_code == 2, said
    assert any(part in said for part in complaint.split("|")), said
    assert len([line for line in said.splitlines() if line.startswith("xr0: error:")]) == 1
    assert not (tmp_path / "statistics.json").exists()
    assert not [path for path in hub.fetched() if path.endswith((".json", ".mp4"))]


def test_private_dataset_with_a_token(hub, folders, monkeypatch):
    hub.put("dataset", "our/private", folders / "lerobot", "private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(open_source(Path("our/private")).lengths) == 2


@pytest.mark.parametrize("how", ["down", "offline"])
def test_without_a_network(hub, monkeypatch, how):
    if how == "down":
        hub.is_down = True
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"there is no folder our/towels.*Without a network, download it elsewhere"):
        open_source(Path("our/towels"))


def test_processes_that_train_together_need_a_commit(hub, folders, monkeypatch):
    commit = hub.put("dataset", "our/towels", folders / "lerobot")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=f"all must read the same commit: write our/towels@{commit}"):
        datasets.pinned(datasets.hub_id("our/towels"))
    assert str(datasets.pinned(datasets.hub_id(f"our/towels@{commit}"))) == f"our/towels@{commit}"
