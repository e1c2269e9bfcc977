"""The policy type `xr0`: LeRobot's PreTrainedPolicy over an `xr0 serve`, or over an engine in this process."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_xr0.configuration_xr0 import IMAGES, XR0Config
from lerobot_policy_xr0.mapping import RobotMap, default_columns
from xr0_engine import ActionChunk, Observation
from xr0_engine.types import RobotInfo

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Engine and Client."""

    def infer(
        self, observation: Observation, prefix: np.ndarray | None = None, *, seed: int | None = None
    ) -> ActionChunk: ...


class XR0Policy(PreTrainedPolicy):
    """Its weights are not LeRobot's: the module has no parameters, and a folder of it holds settings alone.

    source, info, widths: instead of what config says, for tests: the policy, how its robot is driven, and the columns
    of its state and action. Other arguments are LeRobot's and have no part in it. Raises ValueError for settings,
    features and a policy that do not fit, ConnectionError without a server.
    """

    config_class = XR0Config
    name = "xr0"
    config: XR0Config

    def __init__(
        self,
        config: XR0Config,
        *,
        source: Source | None = None,
        info: RobotInfo | None = None,
        widths: tuple[int, int] = (32, 32),
        **_: Any,
    ) -> None:
        super().__init__(config)
        config.validate_settings()
        config.validate_features()
        if source is None or info is None:
            source, robot_type, info, widths = _connect(config)
        else:
            robot_type = config.robot_type or "robot"
        self._source, self._info = source, info
        self._map = _map(config, robot_type, info, widths)
        steps = config.n_action_steps or info.replan_every or info.chunk_length
        if steps > info.chunk_length:
            raise ValueError(f"n_action_steps: expected 1 to {info.chunk_length}, a chunk's actions, got {steps}")
        self._steps = steps
        self._queue: deque[Tensor] = deque()
        self._episode = self._calls = 0
        self._said_short = False
        logger.info(
            "%s: %d actions a chunk, to be executed at %g Hz", robot_type, info.chunk_length, info.control_rate_hz
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> XR0Policy:
        """pretrained_name_or_path: a folder that save_pretrained wrote, whose config.json says where the policy is."""
        hub = ("force_download", "resume_download", "proxies", "token", "cache_dir", "local_files_only", "revision")
        fetched = {key: kwargs.pop(key) for key in hub if key in kwargs}
        kwargs.pop("strict", None)
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **fetched)
        if not isinstance(config, XR0Config):
            raise ValueError(f"config: expected policy type xr0, got {type(config).__name__}")
        policy = cls(config, **kwargs)
        policy.eval()
        return policy

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self.config._save_pretrained(save_directory)

    def supports_rtc(self) -> bool:
        """Where leftover actions can be told the policy, and it was trained with some."""
        return self._map.takes_prefix and (self._info.max_prefix or 0) > 0

    def reset(self) -> None:
        """A new episode: nothing of the last one is executed, and with a seed its noise is another."""
        self._queue.clear()
        self._episode += 1
        self._calls = 0

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        **unknown: Any,
    ) -> Tensor:
        """(rows, T, action) float32 on the state's device, in robot units.

        inference_delay: actions of prev_chunk_left_over that will have been executed when this chunk comes: they are
        the policy's prefix, and come back as the chunk's first, as far as the policy was trained with so many. The
        rest of LeRobot's guidance (execution_horizon, weights) has no part in it: the policy was trained with prefixes.
        Raises ValueError for an input that is not as expected, RuntimeError and ConnectionError of the policy's.
        """
        if noise is not None:
            raise ValueError(
                "noise: expected none, it is the engine's to draw: set --policy.seed for the same each time"
            )
        if unknown:
            raise ValueError(f"expected no further arguments, got {', '.join(sorted(unknown))}")
        observations = self._map.observations(batch)
        prefix = self._prefix(prev_chunk_left_over, inference_delay, len(observations))
        chunks = []
        for row, observation in enumerate(observations):
            chunk = self._source.infer(observation, prefix, seed=self._seed(row))
            chunks.append(self._map.actions(chunk.actions, observation))
        self._calls += 1
        return torch.from_numpy(np.stack(chunks)).to(batch["observation.state"].device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """(rows, action) float32: the next of the chunk, or the first of a new one after n_action_steps."""
        if self.config.rtc_config is not None and self.config.rtc_config.enabled:
            raise ValueError("rtc_config: select_action executes chunk after chunk; RTC calls predict_action_chunk")
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(chunk[:, : self._steps].transpose(0, 1))
        return self._queue.popleft()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        """Raises NotImplementedError: this policy is trained by `xr0 train`."""
        raise NotImplementedError("policy xr0 runs checkpoints; train them with `xr0 train` (docs/training.md)")

    def get_optim_params(self) -> dict[str, Any]:
        """Raises NotImplementedError, as forward."""
        raise NotImplementedError("policy xr0 runs checkpoints; train them with `xr0 train` (docs/training.md)")

    def _prefix(self, left_over: Tensor | None, delay: int | None, rows: int) -> np.ndarray | None:
        if left_over is None or not delay:
            return None
        if not self.supports_rtc():
            raise ValueError(
                "prev_chunk_left_over: this policy takes none: "
                + (
                    "it was trained without prefixes"
                    if self._map.takes_prefix
                    else "its actions are relative to the pose at the observation, which LeRobot does not tell"
                )
            )
        if rows != 1:
            raise ValueError(f"prev_chunk_left_over: expected one robot, got a batch of {rows}")
        most = self._info.max_prefix or 0
        if delay > most and not self._said_short:
            logger.warning("inference takes %d steps; the policy was trained with prefixes of %d at most", delay, most)
            self._said_short = True
        actions = left_over[0] if left_over.ndim == 3 else left_over
        return self._map.prefix(actions.detach().to("cpu", torch.float32).numpy(), min(delay, most))

    def _seed(self, row: int) -> int | None:
        if self.config.seed is None:
            return None
        key = [self.config.seed, self._episode, self._calls, row]
        return int(np.random.SeedSequence(key).generate_state(1)[0])


def _connect(config: XR0Config) -> tuple[Source, str, RobotInfo, tuple[int, int]]:
    """The policy, its robot type, how that is driven, and the columns of its state and action."""
    if config.server is not None:
        from xr0_engine import Client

        client = Client(config.server, os.environ.get("XR0_API_KEY"), timeout_s=config.timeout_s)
        metadata = client.metadata
        name = metadata.resolve(config.robot_type)
        return client, name, metadata.robot(name), (metadata.state_width, metadata.action_width)
    from xr0_engine import Engine

    assert config.checkpoint is not None
    engine = Engine.from_pretrained(config.checkpoint, config.device or "auto", config.dtype)
    if config.robot_type is None and len(engine.robot_types) != 1:
        raise ValueError(f"robot_type: expected one of {', '.join(engine.robot_types)}, got none")
    name = config.robot_type or engine.robot_types[0]
    return engine, name, engine.robot_info(name), (engine.config.head.state_dim, engine.config.head.action_dim)


def _map(config: XR0Config, robot_type: str, info: RobotInfo, widths: tuple[int, int]) -> RobotMap:
    unknown = sorted(set(config.views) - set(info.views))
    if unknown:
        raise ValueError(f"views: expected some of {', '.join(info.views)}, got {', '.join(unknown)}")
    images = {view: IMAGES + config.views.get(view, view) for view in info.views}
    missing = [f"{view} ({key})" for view, key in images.items() if key not in config.image_features]
    if missing:
        raise ValueError(
            f"views: the policy sees {', '.join(missing)}, and there is {', '.join(config.image_features)}: name them "
            '(--policy.views={"VIEW": "CAMERA"})'
        )
    state, action = config.robot_state_feature, config.action_feature
    assert state is not None
    assert action is not None
    return RobotMap(
        images=images,
        state_columns=default_columns(config.state_columns, state.shape[0], info.layout, "state_columns"),
        action_columns=default_columns(config.action_columns, action.shape[0], info.layout, "action_columns"),
        state_width=widths[0],
        action_width=widths[1],
        layout=info.layout,
        robot_type=robot_type,
        prepared=config.prepared,
    )
