"""What this package uses of LeRobot 0.6, as small as it can be: its tests run where LeRobot is not installed.

Names, arguments and fields are LeRobot's; test_against_lerobot.py holds the package against the real one where that is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


class FeatureType(str, Enum):
    STATE = "STATE"
    VISUAL = "VISUAL"
    ENV = "ENV"
    ACTION = "ACTION"


class NormalizationMode(str, Enum):
    IDENTITY = "IDENTITY"
    MEAN_STD = "MEAN_STD"


@dataclass
class PolicyFeature:
    type: FeatureType
    shape: tuple[int, ...]


CHOICES: dict[str, type] = {}


@dataclass
class PreTrainedConfig:
    n_obs_steps: int = 1
    input_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    device: str | None = None
    use_amp: bool = False
    push_to_hub: bool = True
    pretrained_path: Path | None = None

    def __post_init__(self) -> None:
        self.device = self.device or "cpu"

    @classmethod
    def register_subclass(cls, name: str) -> Callable[[type], type]:
        def register(chosen: type) -> type:
            CHOICES[name] = chosen
            return chosen

        return register

    @property
    def type(self) -> str:
        return next(name for name, chosen in CHOICES.items() if chosen is type(self))

    @property
    def robot_state_feature(self) -> PolicyFeature | None:
        return (self.input_features or {}).get("observation.state")

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        return {key: value for key, value in (self.input_features or {}).items() if value.type is FeatureType.VISUAL}

    @property
    def action_feature(self) -> PolicyFeature | None:
        return (self.output_features or {}).get("action")

    def _save_pretrained(self, save_directory: Path) -> None:
        kept = {item.name: getattr(self, item.name) for item in fields(self)}
        for key in ("input_features", "output_features"):
            kept[key] = {name: [value.type.value, list(value.shape)] for name, value in (kept[key] or {}).items()}
        content = {"type": self.type, **kept}
        (Path(save_directory) / "config.json").write_text(json.dumps(content))

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **_: Any) -> PreTrainedConfig:
        content = json.loads((Path(pretrained_name_or_path) / "config.json").read_text())
        for key in ("input_features", "output_features"):
            content[key] = {
                name: PolicyFeature(FeatureType(kind), tuple(shape)) for name, (kind, shape) in content[key].items()
            }
        made: PreTrainedConfig = CHOICES[content.pop("type")](**content)
        return made


class PreTrainedPolicy(nn.Module):
    config_class: Any = None
    name: Any = None

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.config_class or not cls.name:
            raise TypeError(f"{cls.__name__} must define config_class and name")

    def save_pretrained(self, save_directory: str | Path) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(save_directory))


@dataclass
class RTCConfig:
    enabled: bool = True
    execution_horizon: int = 10


@dataclass
class RenameObservationsProcessorStep:
    rename_map: dict[str, str]


class AddBatchDimensionProcessorStep:
    pass


@dataclass
class DeviceProcessorStep:
    device: str = "cpu"


@dataclass
class PolicyProcessorPipeline:
    steps: list[Any]
    name: str

    def __class_getitem__(cls, kinds: object) -> type:
        return cls

    def save_pretrained(self, save_directory: Path) -> None:
        names = [type(step).__name__ for step in self.steps]
        (Path(save_directory) / f"{self.name}.json").write_text(json.dumps(names))


def make_policy_processor_pipelines(
    input_steps: list[Any], output_steps: list[Any]
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    return (
        PolicyProcessorPipeline(input_steps, "policy_preprocessor"),
        PolicyProcessorPipeline(output_steps, "policy_postprocessor"),
    )


MODULES: dict[str, tuple[Any, ...]] = {
    "lerobot": (),
    "lerobot.configs": (FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig),
    "lerobot.policies": (),
    "lerobot.policies.pretrained": (PreTrainedPolicy,),
    "lerobot.policies.rtc": (),
    "lerobot.policies.rtc.configuration_rtc": (RTCConfig,),
    "lerobot.processor": (
        RenameObservationsProcessorStep,
        AddBatchDimensionProcessorStep,
        DeviceProcessorStep,
        PolicyProcessorPipeline,
    ),
    "lerobot.processor.factory": (make_policy_processor_pipelines,),
}


def install() -> None:
    """Put the stand-ins where LeRobot would be. STANDIN of module lerobot tells them from it."""
    for name, contents in MODULES.items():
        module = ModuleType(name)
        for content in contents:
            setattr(module, content.__name__, content)
        sys.modules[name] = module
    sys.modules["lerobot.processor"].PolicyAction = Any  # type: ignore[attr-defined]
    sys.modules["lerobot"].STANDIN = True  # type: ignore[attr-defined]
