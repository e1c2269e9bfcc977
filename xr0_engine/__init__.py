"""xr0-engine: from camera images and an instruction to robot actions, with the model Xiaomi-Robotics-0.

Importing this package imports neither torch nor NumPy: the names below are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xr0_engine.config import ModelConfig
    from xr0_engine.engine import Engine
    from xr0_engine.robot.embodiment import load_embodiment
    from xr0_engine.serve.async_client import AsyncClient
    from xr0_engine.serve.client import Client
    from xr0_engine.types import ActionChunk, CheckpointError, KVBlock, Observation

__version__ = "0.1.0.dev0"

__all__ = [
    "ActionChunk",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "Engine",
    "KVBlock",
    "ModelConfig",
    "Observation",
    "__version__",
    "load_embodiment",
]

_HOMES = {
    "ActionChunk": "types",
    "AsyncClient": "serve.async_client",
    "CheckpointError": "types",
    "Client": "serve.client",
    "Engine": "engine",
    "KVBlock": "types",
    "Observation": "types",
    "ModelConfig": "config",
    "load_embodiment": "robot.embodiment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
