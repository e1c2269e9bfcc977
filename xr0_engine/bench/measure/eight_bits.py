"""The same checkpoint in 8 bits as a rival: how far its actions are from the engine's, what either's weights take."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.engine import Engine
from xr0_engine.files import read_json, reading
from xr0_engine.model.quantization import read_quantization

LEAST_COSINE = 0.995
"""Of a chunk in 8 bits and the engine's: what a gate asks of the worst chunk by default (quantize/gate.py). Rounding to
8 bits is no other order of sums, so that rivals' tolerance in the engine's own precision says nothing of it; and a
random network amplifies it more than a trained one. Whether a policy is good enough in 8 bits, `xr0 quantize` tells."""


def check_recipe(setup: Setup, alone: bool) -> None:
    """Before anything is loaded. alone: without the released way. Raises ValueError."""
    setup.prepare()
    stored = read_quantization(setup.folder())
    if stored is None:
        return
    if setup.quantize is not None:
        raise ValueError(f"quantize: {setup.checkpoint} is quantised already (recipe {stored.recipe})")
    if not alone:
        raise ValueError(f"{setup.checkpoint} is quantised, and the released way has no 8 bits: take --alone")


def eight_bit_engine(subject: Subject, recipe: str) -> Engine:
    """The subject's checkpoint, rounded while it loads. Raises NotImplementedError if it is not run by the backend that
    runs the engine: the ratio would be of two things."""
    setup, ours = subject.setup, subject.engine
    engine = Engine.from_pretrained(
        subject.folder, str(ours.model.device), setup.dtype, setup.backend, setup.case.profile, recipe
    )
    if engine.backend != ours.backend:
        raise NotImplementedError(
            f"quantize {recipe}: {engine.backend} runs it ({engine.backend_reason}), and {ours.backend} the engine in "
            f"16 bits: take --backend {engine.backend} for both"
        )
    # Of a folder in 16 bits, what was read to be rounded.
    gc.collect()
    return engine


def agreement(eight: np.ndarray, engine: np.ndarray) -> dict[str, float]:
    """Of chunks (B, T, A) in the model's units: the least cosine of a pair, the largest difference of a value."""
    pairs = zip(eight.reshape(len(eight), -1), engine.reshape(len(engine), -1), strict=True)
    cosines = [float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)) for a, b in pairs]
    return {"cosine": min(cosines), "largest_difference": float(np.abs(eight - engine).max())}


def check_agreement(recipe: str, found: Mapping[str, float]) -> None:
    """Raises RuntimeError."""
    if not found["cosine"] >= LEAST_COSINE:
        raise RuntimeError(
            f"nothing was timed: the cosine of chunks by recipe {recipe} and the engine's is {found['cosine']:.4f}, "
            f"less than {LEAST_COSINE}"
        )


def compared(folder: Path) -> dict[str, Any] | None:
    """Of a quantised folder: what `xr0 quantize` found on recordings, if it was given any. Raises CheckpointError."""
    path = folder / "fidelity.json"
    if not path.is_file():
        return None
    told = read_json(path)
    with reading(path):
        return {name: told[name] for name in ("moments", "moments_of", "cosine", "error", "units")}


def weights_bytes(model: nn.Module) -> int:
    """What a network's parameters take, scales included; what several share counts once."""
    shared = {}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        shared[storage.data_ptr()] = storage.nbytes()
    return sum(shared.values())


def precisions(subject: Subject, recipe: str | None) -> dict[str, str]:
    """Rival -> its precision in words, of the engine and the one in 8 bits."""
    dtype, own = subject.setup.dtype, subject.recipe
    told = {"engine": dtype if own is None else f"{dtype}, 8 bits by recipe {own}"}
    return told if recipe is None else told | {recipe: f"{dtype}, 8 bits by recipe {recipe}"}
