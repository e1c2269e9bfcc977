"""`python -m lerobot_policy_xr0 FOLDER ...`: a policy folder for LeRobot's --policy.path; it holds settings alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature

from lerobot_policy_xr0.configuration_xr0 import IMAGES, XR0Config
from lerobot_policy_xr0.processor_xr0 import make_xr0_pre_post_processors


def write_folder(config: XR0Config, folder: Path) -> None:
    """config.json, and the two pipelines that LeRobot loads beside it. Raises ValueError for settings that do not fit,
    and for a folder that holds something."""
    config.validate_settings()
    config.validate_features()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; remove it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for pipeline in make_xr0_pre_post_processors(config):
        pipeline.save_pretrained(folder)
    # The folder may be read on another machine, which has a device of its own.
    config.device = None
    # Last: a folder without it is no policy.
    config._save_pretrained(folder)


def features(
    views: Sequence[str], size: tuple[int, int], state: int, action: int
) -> dict[str, dict[str, PolicyFeature]]:
    """LeRobot's description of what goes in and comes out. views: camera names; size: (height, width) of images."""
    images = {IMAGES + name: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size)) for name in views}
    state_feature = PolicyFeature(type=FeatureType.STATE, shape=(state,))
    return {
        "input_features": {**images, "observation.state": state_feature},
        "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(action,))},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with what is wrong on standard error."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_xr0", description=__doc__)
    parser.add_argument("folder", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", help="ws://HOST:PORT of an `xr0 serve`")
    where.add_argument("--checkpoint", help="folder or hub id, for an engine in LeRobot's process")
    parser.add_argument("--robot-type", help="key of the checkpoint's statistics; its only one if not given")
    parser.add_argument("--view", action="append", required=True, metavar="VIEW=CAMERA", help="one for each view")
    parser.add_argument("--image-size", default="640x480", metavar="WIDTHxHEIGHT")
    parser.add_argument("--state", type=int, required=True, help="numbers of observation.state")
    parser.add_argument("--action", type=int, required=True, help="numbers of action")
    parser.add_argument(
        "--state-columns", type=_columns, help="the policy's column of each, with commas; 0,1,2 ... else"
    )
    parser.add_argument("--action-columns", type=_columns)
    parser.add_argument("--n-action-steps", type=int, help="actions executed before the next look")
    parser.add_argument("--prepared", action="store_true", help="images are what the model saw: LeRobot's LIBERO")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args(arguments)
    try:
        views = dict(_pair(text) for text in options.view)
        config = XR0Config(
            server=options.server,
            checkpoint=options.checkpoint,
            robot_type=options.robot_type,
            views=views,
            prepared=options.prepared,
            state_columns=options.state_columns,
            action_columns=options.action_columns,
            n_action_steps=options.n_action_steps,
            seed=options.seed,
            push_to_hub=False,
            **features(list(views.values()), _size(options.image_size), options.state, options.action),
        )
        write_folder(config, options.folder)
    except (ValueError, OSError) as error:
        print(f"lerobot_policy_xr0: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.folder}: lerobot-rollout --policy.path={options.folder} ...")
    return 0


def _pair(text: str) -> tuple[str, str]:
    view, separator, camera = text.partition("=")
    if not (view and separator and camera):
        raise ValueError(f"--view: expected VIEW=CAMERA, got {text!r}")
    return view, camera


def _columns(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--image-size: expected WIDTHxHEIGHT in pixels, got {text!r}")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
