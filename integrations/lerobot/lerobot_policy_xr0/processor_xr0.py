"""LeRobot's pipelines around the policy: names, a batch dimension, devices. Nothing is normalised: the engine does it,
by the checkpoint's statistics of each time step."""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.factory import make_policy_processor_pipelines

from lerobot_policy_xr0.configuration_xr0 import XR0Config


def make_xr0_pre_post_processors(
    config: XR0Config, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """What LeRobot calls for policy type xr0. dataset_stats: not used."""
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            # Images and state go to a server, or to an engine that brings them to its device itself.
            DeviceProcessorStep(device="cpu"),
        ],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
