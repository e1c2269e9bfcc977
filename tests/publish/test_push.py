"""xr0 push, to a server of ours in the hub's place: what arrives there, byte for byte, and what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.hub import TOKEN, running
from tests.support import make_config
from tests.training.support import SIZES
from xr0_engine import Engine
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.evaluation.benchmark import Episode
from xr0_engine.evaluation.benchmark import Run as EvaluationRun
from xr0_engine.evaluation.results import Writer
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.files import parse_yaml
from xr0_engine.model.weights import resolve_checkpoint
from xr0_engine.quantize.make import make
from xr0_engine.training.config import override
from xr0_engine.training.recipes import RECIPES, tiny
from xr0_engine.types import CheckpointError

COMMIT = "c" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with running(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    write_checkpoint(folder, make_config(**SIZES))
    return folder


@pytest.fixture
def checkpoint(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "made" / "model"))


def xr0(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(*arguments) -> str:
    result = xr0(*arguments)
    assert result.exit_code == 2, result.output
    return result.output


def front_matter(card: str) -> dict:
    return parse_yaml(card.split("---\n")[1])


def write_run(folder: Path, checkpoint: Path, *overrides: str) -> None:
    """As `xr0 train` leaves it, with a checkpoint in it already."""
    head = ModelConfig.load(checkpoint).head
    window = "none" if head.local_window is None else head.local_window
    made = [f"model.local_window={window}", f"model.position_offset={head.position_offset}", "flow.prefix=code"]
    made += [f"flow.max_prefix={head.max_prefix}", f"data.chunk_length={head.action_length}"]
    config = override(tiny(RECIPES["post_train_async"]()), ["data.statistics=/home/me/s.json", *made, *overrides])
    (folder / "config.json").write_text(config.to_json())
    shutil.copy(checkpoint / "preprocessor_config.json", folder / "statistics.json")
    lines = [{"step": step, "validation/l1": 0.5 / step, "validation/baseline_l1": 0.4} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_results(folder: Path, checkpoint: str | None) -> None:
    policy = {"kind": "engine", "title": "it", "checkpoint": checkpoint, "robot_type": "aloha", "dtype": "float32"}
    run = EvaluationRun("aloha", {}, {}, policy, {"rate_hz": 30.0}, {}, {}, "2026-01-01T00:00:00+00:00")
    with Writer(folder, run) as writer:
        for trial in range(4):
            ok = trial != 3
            writer.add(
                Episode(
                    suite="transfer", task=0, name="transfer", trial=trial, seed=trial, mode="sync", delay_steps=0.0,
                    success=ok, solved=int(ok), rollouts=1, steps=90, calls=9, latency_ms={}, reaction_ms={},
                    wall_s=1.0, error=None,
                )
            )  # fmt: skip


def test_what_is_pushed_comes_back_byte_for_byte(hub, checkpoint):
    result = xr0("push", checkpoint, "our/policy")
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/our/policy" in result.output
    assert "names no license yet" in result.output
    files = hub.repositories["model", "our/policy"].files()
    card = files.pop("README.md").decode()
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert [name for name in files if name.endswith(".safetensors")]
    assert len(hub.commits) == 1
    assert 'Engine.from_pretrained("our/policy")' in card
    assert resolve_checkpoint("our/policy@main") == resolve_checkpoint("our/policy")
    with pytest.raises(CheckpointError, match="our/policy@v2: the hub's our/policy has no revision v2"):
        resolve_checkpoint("our/policy@v2")
    one, other = (Engine.from_pretrained(it, dtype="float32") for it in ("our/policy", checkpoint))
    observation = other.example("libero_all")
    np.testing.assert_array_equal(one.infer(observation, seed=0).actions, other.infer(observation, seed=0).actions)


def test_card_tells_run_data_and_evaluation(hub, checkpoint):
    run = checkpoint.parent
    write_results(run / "rates", checkpoint_hash(checkpoint))
    write_results(run / "of another", "0" * 64)
    (run / "folded.yaml").write_text(f"dataset: their/shirts@{COMMIT}\n")
    (run / "beside.yaml").write_text("dataset: data/socks\n")
    yamls = f"{run / 'folded.yaml'},{run / 'beside.yaml'}"
    data = f"data.robot=our/towels@{COMMIT}=3,{yamls},/home/me/secret/episodes"
    write_run(run, checkpoint, f"model.checkpoint=org/base@{COMMIT}", data, "optim.peak_lr=3e-5")
    assert xr0("push", checkpoint, "our/policy", "--dry-run", "out").exit_code == 0
    card = Path("out/README.md").read_text()
    told = front_matter(card)
    assert told["base_model"] == "org/base"
    assert told["datasets"] == ["our/towels", "their/shirts"]
    assert told["pipeline_tag"] == "robotics"
    assert "license" not in told
    assert "# license: which one is yours to choose" in card
    assert "Recipe `post_train_async` of `xr0 train`, from org/base." in card
    assert "| `optim.peak_lr` | 3e-05 |" in card
    assert f"| [our/towels](https://huggingface.co/datasets/our/towels), revision `{COMMIT}` | robot | 3 |" in card
    assert "| episodes | robot | 1 |" in card
    assert "| beside.yaml | robot | 1 |" in card
    assert "said by whoever" not in card
    assert "after 2 steps: L1 0.25 in robot units; that of the training data's mean is 0.4." in card
    assert card.count("sync, delay 0 | 4 | 75.0 %") == 1
    assert "/home/me" not in card


def test_card_of_a_quantised_checkpoint(hub, checkpoint, tmp_path):
    make(checkpoint, tmp_path / "eight", "int8-weights")
    spread = {"mean": 0.9991, "worst": 0.998}
    (tmp_path / "eight" / "fidelity.json").write_text(json.dumps({"moments": 16, "cosine": spread}))
    assert xr0("push", "eight", "our/eight", "--dry-run", "out").exit_code == 0
    card = Path("out/README.md").read_text()
    assert "In 8 bits, from model by recipe `int8-weights`" in card
    assert "on 16 recorded moments: cosine of the chunks 0.999100 in the mean, 0.998000 at worst" in card


def test_a_fine_tuned_one_in_8_bits_comes_of_its_base_by_tuning(hub, checkpoint, tmp_path):
    run = checkpoint.parent
    write_run(run, checkpoint, f"model.checkpoint=org/base@{COMMIT}", "data.robot=e")
    make(checkpoint, run / "eight", "int8-weights")
    assert xr0("push", run / "eight", "our/eight", "--dry-run", "out").exit_code == 0
    card = Path("out/README.md").read_text()
    told = front_matter(card)
    assert (told["base_model"], told["base_model_relation"]) == ("org/base", "finetune")
    assert "from org/base. Which run made it was said by whoever published it." in card


def test_thresholds_of_a_guard_are_pushed_with_it(hub, checkpoint):
    (checkpoint / "guard.json").write_text("{}")
    assert xr0("push", checkpoint, "our/policy").exit_code == 0
    assert hub.repositories["model", "our/policy"].files()["guard.json"] == b"{}"


def test_a_card_that_nobody_touched_is_replaced(hub, checkpoint):
    for rate in ("3e-5", "4e-5"):
        write_run(checkpoint.parent, checkpoint, "model.checkpoint=base", "data.robot=e", f"optim.peak_lr={rate}")
        pushed = xr0("push", checkpoint, "our/policy")
        assert pushed.exit_code == 0, pushed.output
        assert "kept" not in pushed.output
        card = hub.repositories["model", "our/policy"].files()["README.md"].decode()
        assert f"| `optim.peak_lr` | {float(rate)} |" in card
    hub.repositories["model", "our/policy"].add({"README.md": card.replace("robots", "robot arms").encode()})
    assert "kept the README.md that is there" in xr0("push", checkpoint, "our/policy").output


def test_wrong_fidelity_names_the_file(hub, checkpoint, tmp_path):
    make(checkpoint, tmp_path / "eight", "int8-weights")
    (tmp_path / "eight" / "fidelity.json").write_text('{"moments": 16, "cosine": [1]}')
    assert "fidelity.json" in refused("push", "eight", "our/eight", "--dry-run", "out")
    assert not Path("out").exists()


def test_dry_run_is_what_would_be_pushed_and_asks_nobody(hub, checkpoint, tmp_path):
    result = xr0("push", checkpoint, "our/policy", "--dry-run", "out")
    assert "nothing was pushed" in result.output
    assert hub.asked == []
    names = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "README.md"}
    assert names == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert "out exists and is not empty" in refused("push", checkpoint, "our/policy", "--dry-run", "out")


def test_card_that_somebody_completed_is_pushed_as_it_is_and_kept(hub, checkpoint):
    xr0("push", checkpoint, "our/policy", "--dry-run", "out")
    card = Path("out/README.md")
    card.write_text(card.read_text().replace("---\n", "---\nlicense: apache-2.0\n", 1))
    assert "remove it for a new one" in refused("push", "out", "our/policy", "--run", "run")
    assert xr0("push", "out", "our/policy").exit_code == 0
    repository = hub.repositories["model", "our/policy"]
    assert repository.files()["README.md"] == card.read_bytes()
    again = xr0("push", checkpoint, "our/policy")
    assert "kept the README.md that is there" in again.output
    assert repository.files()["README.md"] == card.read_bytes()


def test_private(hub, checkpoint):
    assert xr0("push", checkpoint, "our/secret", "--private").exit_code == 0
    assert hub.repositories["model", "our/secret"].access == "private"
    xr0("push", checkpoint, "our/policy")
    before = hub.repositories["model", "our/policy"].refs["main"]
    assert "our/policy is public, and --private was asked for" in refused("push", checkpoint, "our/policy", "--private")
    assert hub.repositories["model", "our/policy"].refs["main"] == before


def test_repository_of_another_checkpoint_is_left_alone(hub, checkpoint, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model-00002-of-00002.safetensors").write_bytes(b"another's")
    hub.put("model", "our/policy", tmp_path / "other")
    assert "holds what would not fit this checkpoint: model-00002-of-00002" in refused("push", checkpoint, "our/policy")
    assert not hub.commits


def _leave_optimiser(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"moments")


def _leave_shard(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"an adapter")


def _cut_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def _other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vlm_config"]["text_config"]["intermediate_size"] += 64
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_leave_optimiser, "holds what is no part of a checkpoint: optimizer.pt: move it elsewhere"),
        (_leave_shard, "holds what is no part of a checkpoint: adapter_model.safetensors"),
        (lambda folder: (folder / "tensorboard").mkdir(), "no part of a checkpoint: tensorboard"),
        (_cut_weights, "is truncated or corrupt"),
        (_other_sizes, "the weights do not fit config.json"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda folder: shutil.rmtree(folder), "there is no checkpoint folder"),
    ],
    ids=["optimiser", "adapter", "logs", "cut", "sizes", "statistics", "gone"],
)
def test_what_is_no_checkpoint_is_refused_before_the_hub_is_asked(hub, checkpoint, change, complaint):
    change(checkpoint)
    said = refused("push", checkpoint, "our/policy")
    assert complaint in said
    assert hub.asked == []


def test_run_is_refused_and_its_export_named(hub, checkpoint):
    write_run(checkpoint.parent, checkpoint)
    assert f"push {checkpoint.parent / 'model'}" in refused("push", checkpoint.parent, "our/policy")
    shutil.rmtree(checkpoint)
    assert "`xr0 train export" in refused("push", checkpoint.parent, "our/policy")


def test_run_and_results_of_another_checkpoint_are_refused(hub, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", checkpoint)
    path = tmp_path / "run" / "statistics.json"
    content = json.loads(path.read_text())
    for entry in content["action_config"].values():
        entry["std"] = (np.asarray(entry["std"]) * 2).tolist()
    path.write_text(json.dumps(content))
    assert "it did not make it" in refused("push", checkpoint, "our/policy", "--run", "run")
    write_run(tmp_path / "run", checkpoint, "model.local_window=7")
    assert "has other statistics or settings" in refused("push", checkpoint, "our/policy", "--run", "run")
    write_results(tmp_path / "rates", "0" * 64)
    assert "is of another checkpoint" in refused("push", checkpoint, "our/policy", "--results", "rates")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "token", "complaint"),
    [
        ("our/policy", None, "the hub wants a token: log in (`hf auth login`, or HF_TOKEN)"),
        ("our/policy", "hf_wrong", "the hub refuses your token: it is wrong or has expired"),
        ("their/policy", TOKEN, "the hub forbids it: your token must have the right to it"),
        ("policy", TOKEN, "policy: expected organisation/name, the repository to push to"),
        ("our/policy@main", TOKEN, "expected organisation/name"),
    ],
    ids=["no token", "bad token", "no right", "no organisation", "revision"],
)
def test_what_the_hub_refuses(hub, checkpoint, monkeypatch, name, token, complaint):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert complaint in refused("push", checkpoint, name)
    assert not hub.commits


def test_without_a_network(hub, checkpoint):
    hub.is_down = True
    assert "our/policy: the hub was not reached, so nothing was pushed" in refused("push", checkpoint, "our/policy")
