"""What LeRobot finds a policy by: the distribution's name, the modules' and the classes'. And the folder it loads."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest
from lerobot_policy_xr0 import XR0Config
from lerobot_policy_xr0.__main__ import main
from lerobot_policy_xr0.modeling_xr0 import XR0Policy

ARGUMENTS = [
    "--server",
    "ws://127.0.0.1:8000",
    "--view",
    "base=image",
    "--view",
    "left_wrist=image2",
    "--image-size",
    "256x256",
    "--state",
    "8",
    "--action",
    "7",
]


def test_names_are_lerobots_convention():
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["name"] == "lerobot_policy_xr0"
    import_module(project["name"])
    module = XR0Config.__module__
    assert module.split(".")[-1] == "configuration_xr0"
    modeling = import_module(module.replace("configuration_", "modeling_"))
    assert getattr(modeling, XR0Config.__name__.removesuffix("Config") + "Policy") is XR0Policy
    processing = import_module(module.replace("configuration_", "processor_"))
    make = processing.make_xr0_pre_post_processors
    assert list(inspect.signature(make).parameters) == ["config", "dataset_stats"]
    assert (XR0Policy.name, XR0Policy.config_class) == ("xr0", XR0Config)


def test_rtc_may_call_it():
    call = inspect.signature(XR0Policy.predict_action_chunk)
    call.bind(object(), object(), inference_delay=0, prev_chunk_left_over=None)


def test_a_folder_holds_settings_and_pipelines(tmp_path, capsys):
    folder = tmp_path / "policy"
    assert main([str(folder), *ARGUMENTS, "--prepared", "--action-columns", "0,1,2,3,4,5,6", "--seed", "4"]) == 0
    assert "lerobot-rollout --policy.path" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "policy_postprocessor.json",
        "policy_preprocessor.json",
    ]
    content = json.loads((folder / "config.json").read_text())
    assert (content["type"], content["device"]) == ("xr0", None)
    assert (content["prepared"], content["seed"], content["views"]) == (
        *(True, 4),
        {"base": "image", "left_wrist": "image2"},
    )
    read = XR0Config.from_pretrained(folder)
    assert isinstance(read, XR0Config)
    assert read.image_features["observation.images.image"].shape == (3, 256, 256)
    assert set(read.normalization_mapping.values()) == {"IDENTITY"}


def test_a_folder_of_settings_becomes_the_policy(tmp_path, monkeypatch):
    folder = tmp_path / "policy"
    main([str(folder), *ARGUMENTS])
    made = []
    monkeypatch.setattr(XR0Policy, "__init__", lambda self, config, **kwargs: made.append((config, kwargs)))
    monkeypatch.setattr(XR0Policy, "eval", lambda self: self)
    XR0Policy.from_pretrained(folder, revision=None, dataset_stats={"action": 1})
    ((config, kwargs),) = made
    assert config.server == "ws://127.0.0.1:8000"
    assert kwargs == {"dataset_stats": {"action": 1}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--view", "base"], "--view: expected VIEW=CAMERA"),
        (["--image-size", "big"], "--image-size: expected WIDTHxHEIGHT"),
        (["--n-action-steps", "0"], "n_action_steps: expected at least 1"),
    ],
)
def test_a_wrong_folder_is_not_written(arguments, message, tmp_path, capsys):
    folder = tmp_path / "policy"
    assert main([str(folder), *ARGUMENTS, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine").touch()
    assert main([str(folder), *ARGUMENTS]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
