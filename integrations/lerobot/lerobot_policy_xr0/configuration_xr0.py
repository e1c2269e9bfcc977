"""The policy type `xr0` as LeRobot configures it: where the policy is, and which of its columns and views are which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

IMAGES = "observation.images."
KINDS = ("VISUAL", "STATE", "ACTION")


@PreTrainedConfig.register_subclass("xr0")
@dataclass
class XR0Config(PreTrainedConfig):
    """One of server and checkpoint.

    server: ws://host:port of an `xr0 serve`; its key comes from XR0_API_KEY. checkpoint: folder or hub id, for an
    engine in this process on `device`, in `dtype`. robot_type: key of the checkpoint's statistics; None: its only one.
    views: view key of the embodiment profile -> LeRobot's image key without `observation.images.`; views that are not
    named have the same name in both. prepared: images are already what the model saw (LeRobot's LIBERO turns them);
    False: they are the camera's, and the profile turns, resizes and crops them.
    state_columns, action_columns: for each entry of observation.state and of action the policy's column; None: the
    first ones, in order; layout bimanual has no such order and needs both.
    n_action_steps: actions of a chunk that select_action gives before it looks again; None: the profile's.
    seed: of the noise; None: drawn anew each time. timeout_s: for the server to come, and for each reply.
    rtc_config: LeRobot's, set by its rollout.

    Statistics are per time step and belong to the checkpoint: nothing is normalised here, and statistics of a data set
    have no part in it.
    """

    server: str | None = None
    checkpoint: str | None = None
    robot_type: str | None = None
    views: dict[str, str] = field(default_factory=dict)
    prepared: bool = False
    state_columns: list[int] | None = None
    action_columns: list[int] | None = None
    n_action_steps: int | None = None
    seed: int | None = None
    dtype: str = "bfloat16"
    timeout_s: float = 30.0
    rtc_config: RTCConfig | None = None
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(KINDS, NormalizationMode.IDENTITY)
    )

    def validate_settings(self) -> None:
        """The policy asks this when it is made: LeRobot fills a configuration in piece by piece.

        Raises ValueError that names every wrong field."""
        faults = []
        if (self.server is None) == (self.checkpoint is None):
            faults.append("server, checkpoint: expected one of them (--policy.server ws://HOST:PORT)")
        if self.n_obs_steps != 1:
            faults.append(f"n_obs_steps: expected 1, the policy sees one instant, got {self.n_obs_steps}")
        for name in ("state_columns", "action_columns"):
            columns = getattr(self, name)
            if columns is not None and (min(columns, default=-1) < 0 or len(set(columns)) != len(columns)):
                faults.append(f"{name}: expected columns from 0, none twice, got {columns}")
        if len(set(self.views.values())) != len(self.views):
            faults.append(f"views: expected one camera for each view, got {self.views}")
        if self.n_action_steps is not None and self.n_action_steps < 1:
            faults.append(f"n_action_steps: expected at least 1, got {self.n_action_steps}")
        scaled = {
            kind: str(mode) for kind, mode in self.normalization_mapping.items() if mode != NormalizationMode.IDENTITY
        }
        if scaled:
            faults.append(f"normalization_mapping: expected IDENTITY, statistics are the checkpoint's, got {scaled}")
        if faults:
            raise ValueError("; ".join(faults))

    def validate_features(self) -> None:
        """Raises ValueError for features that are not this policy's kind."""
        if not self.image_features:
            raise ValueError(f"input_features: expected images ({IMAGES}NAME), got {sorted(self.input_features or {})}")
        if self.robot_state_feature is None:
            raise ValueError(f"input_features: expected observation.state, got {sorted(self.input_features or {})}")
        if self.action_feature is None:
            raise ValueError(f"output_features: expected action, got {sorted(self.output_features or {})}")
        extra = [name for name, feature in (self.input_features or {}).items() if feature.type is FeatureType.ENV]
        if extra:
            raise ValueError(f"input_features: the policy sees no state of the environment, got {extra}")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        """Raises NotImplementedError: this policy is trained by `xr0 train`."""
        raise NotImplementedError("policy xr0 runs checkpoints; train them with `xr0 train` (docs/training.md)")

    def get_scheduler_preset(self) -> None:
        return None
