"""Against LeRobot itself, where it is installed (Python 3.12, `pip install lerobot==0.6.*`)."""

from __future__ import annotations

import inspect

import lerobot
import numpy as np
import pytest
import torch

if getattr(lerobot, "STANDIN", False):
    pytest.skip("LeRobot is not installed: stand-ins are in its place", allow_module_level=True)

from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.rollout.inference.rtc import supports_rtc_inference
from lerobot_policy_xr0 import XR0Config
from lerobot_policy_xr0.__main__ import main
from lerobot_policy_xr0.modeling_xr0 import XR0Policy

from xr0_engine import ActionChunk
from xr0_engine.robot.embodiment import load_embodiment

ARGUMENTS = [
    "--server",
    "ws://127.0.0.1:8000",
    "--view",
    "base=image",
    "--view",
    "left_wrist=image2",
    "--image-size",
    "32x24",
    "--state",
    "8",
    "--action",
    "7",
]


class Echo:
    def infer(self, observation, prefix=None, *, seed=None):
        actions = np.repeat(observation.state, 10, axis=0)
        if prefix is not None:
            actions[: len(prefix)] = prefix
        return ActionChunk(actions, actions, np.ones(32, bool), "libero_all", 0)


@pytest.fixture
def folder(tmp_path):
    assert main([str(tmp_path / "policy"), *ARGUMENTS]) == 0
    return tmp_path / "policy"


@pytest.fixture
def policy(folder):
    info = load_embodiment("libero").robot_info(10, 32, 6)
    return XR0Policy.from_pretrained(folder, source=Echo(), info=info)


def test_lerobot_knows_the_type():
    assert "xr0" in PreTrainedConfig.get_known_choices()
    assert get_policy_class("xr0") is XR0Policy
    assert isinstance(make_policy_config("xr0", server="ws://127.0.0.1:8000"), XR0Config)
    assert not XR0Policy.__abstractmethods__


def test_methods_take_what_lerobots_take():
    for name in ("predict_action_chunk", "select_action", "forward", "reset", "supports_rtc", "get_optim_params"):
        theirs = inspect.signature(getattr(PreTrainedPolicy, name)).parameters
        ours = inspect.signature(getattr(XR0Policy, name)).parameters
        positional = [key for key, value in theirs.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(positional)] == positional


def test_a_folder_survives_the_round_trip(folder):
    read = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(read, XR0Config)
    assert (read.views, read.server) == ({"base": "image", "left_wrist": "image2"}, "ws://127.0.0.1:8000")
    assert read.action_feature.shape == (7,)


def test_a_robots_frame_goes_through_lerobots_pipelines(folder, policy):
    overrides = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {}}}
    before, after = make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=overrides)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    state = torch.arange(8, dtype=torch.float32)[None]
    frame = {"observation.images.image": image, "observation.images.image2": image, "observation.state": state}
    batch = before({**frame, "task": "open the drawer", "robot_type": ""})
    torch.testing.assert_close(batch["observation.state"], state, rtol=0, atol=0)
    policy.reset()
    action = after(policy.select_action(batch))
    assert action[0].tolist() == list(range(7))


def test_lerobots_rtc_takes_it(policy):
    assert supports_rtc_inference(policy)
    batch = {
        "observation.images.image": torch.zeros(1, 3, 24, 32),
        "observation.images.image2": torch.zeros(1, 3, 24, 32),
        "observation.state": torch.ones(1, 8),
        "task": ["go"],
    }
    left_over = torch.full((10, 7), 3.0)
    chunk = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left_over)
    assert chunk[0, :, 0].tolist() == [3, 3, *[1] * 8]


def test_saved_and_read_again(policy, tmp_path):
    policy.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["config.json"]
    assert PreTrainedConfig.from_pretrained(tmp_path / "again").server == policy.config.server
