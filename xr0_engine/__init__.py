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
    from xr0_engine.types import ActionChunk, CheckpointError, Guide, KVBlock, Observation

__version__ = "0.1.0.dev0"

__all__ = [
    "ActionChunk",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "Engine",
    "Guide",
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
    "Guide": "types",
    "KVBlock": "types",
    "Observation": "types",
    "ModelConfig": "config",
    "load_embodiment": "robot.embodiment",
}

# Package, as it is imported -> what installs it. All but torch come with the package itself.
_INSTALLED_BY = {
    "torch": "pip install 'xr0-engine[cpu]', or 'xr0-engine[cuda]' for an NVIDIA GPU",
    **dict.fromkeys(
        ("msgpack", "numpy", "PIL", "yaml", "rich", "safetensors", "tokenizers", "typer", "websockets"),
        "pip install xr0-engine",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        # What a package lacks within itself is its own affair.
        if error.name not in _INSTALLED_BY:
            raise
        message = f"{__name__}.{name} needs {error.name}, which is not installed: {_INSTALLED_BY[error.name]}"
        raise ModuleNotFoundError(message, name=error.name) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
