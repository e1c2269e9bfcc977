"""Run by LeRobot's own Python: what LeRobot reads out of a dataset, as JSON on the last line of the output.

LeRobot needs another PyAV than we do, so it has an environment of its own.
"""

from __future__ import annotations

import json
import sys

from lerobot.datasets.lerobot_dataset import LeRobotDataset

CAMERA = "observation.images.ego"


def main(folder: str) -> None:
    dataset = LeRobotDataset("local/dataset", root=folder, video_backend="pyav")
    rows = []
    for item in (dataset[index] for index in range(len(dataset))):
        stripes = item[CAMERA][0, 16, 4::8] > 0.5
        rows.append([int(item["episode_index"]), int(item["frame_index"]), item["task"], stripes.tolist()])
    stats = {
        feature: {name: list(value.shape) for name, value in of.items()} for feature, of in dataset.meta.stats.items()
    }
    print(json.dumps({"rows": rows, "stats": stats, "robot_type": dataset.meta.robot_type}))


if __name__ == "__main__":
    main(sys.argv[1])
