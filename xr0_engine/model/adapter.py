"""Adapters: what a fine-tuning run has changed of a base, as a folder of its own, and how it becomes one model again.

A layer that was adapted computes `weight x + scale up (down x)`; merged, its weight is `weight + scale up down`,
rounded to what the base stores. The folder describes the tuned model (config.json, statistics, tokenizer), says in
adapter.json whose adapter it is, and holds in adapter.safetensors the pairs of thin matrices, float32, and whole
tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from xr0_engine.files import number, read_json, reading, text, whole
from xr0_engine.model.quantization import read_quantization
from xr0_engine.model.weights import (
    ADAPTER_FILE,
    DTYPES,
    StoredTensor,
    raise_if,
    read_headers,
    read_tensor,
    resolve_checkpoint,
)
from xr0_engine.types import CheckpointError

WEIGHTS_FILE = "adapter.safetensors"
FORMAT, VERSION = "xr0-adapter", 1
DOWN, UP = "lora_down", "lora_up"
"""Of an adapted layer, beside its `weight`: (rank, in) and (out, rank)."""


def pair_of(name: str) -> tuple[str, str]:
    """A tensor's name -> those of the pair that adapts it, where there is one."""
    layer, _, kind = name.rpartition(".")
    return (f"{layer}.{DOWN}", f"{layer}.{UP}") if kind == "weight" else ("", "")


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """(out, in), in the weight's dtype: the one place that says what a pair does to its layer."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


@dataclass(frozen=True)
class AdapterInfo:
    """What adapter.json says. alpha / rank: the scale. targets: parts with adapters, as the trainer names them. base:
    its folder's name; base_sha256: of all its files (exported/manifest.py: checkpoint_hash)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str
    base_sha256: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Beside the tuned model's description, which is there."""
        told = {"format": FORMAT, "version": VERSION, **vars(self), "targets": list(self.targets)}
        (folder / ADAPTER_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        # safetensors makes files that only their owner reads.
        (folder / WEIGHTS_FILE).touch()
        mode = (folder / WEIGHTS_FILE).stat().st_mode
        save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / WEIGHTS_FILE).chmod(mode)


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder. stored: the places of its tensors, pairs and whole ones."""

    folder: Path
    info: AdapterInfo
    stored: Mapping[str, StoredTensor]

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """No tensor is read yet. Raises CheckpointError for a folder that is no adapter or is damaged."""
        folder = resolve_checkpoint(path)
        if not (folder / ADAPTER_FILE).is_file():
            raise CheckpointError(
                f"adapter: {folder} holds no {ADAPTER_FILE}; expected a folder of `xr0 train export RUN --adapter`"
            )
        told = read_json(folder / ADAPTER_FILE)
        with reading(folder / ADAPTER_FILE):
            if not isinstance(told, dict) or told.get("format") != FORMAT:
                raise ValueError(f"format: expected {FORMAT!r}")
            if (version := whole(told, "version")) != VERSION:
                raise ValueError(f"version: expected {VERSION}, got {version}: export the adapter anew")
            targets = told["targets"]
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise TypeError(f"targets: expected a list of names, got {targets!r:.80}")
            rank, alpha = whole(told, "rank", least=1), number(told, "alpha")
            if alpha <= 0:
                raise ValueError(f"alpha: expected more than 0, got {alpha}")
            info = AdapterInfo(rank, alpha, tuple(targets), text(told, "base"), text(told, "base_sha256"))
        stored, faults = read_headers([folder / WEIGHTS_FILE], DTYPES)
        raise_if(faults, f"{folder} cannot be read")
        return cls(folder, info, stored)

    def check_base(self, base: Path, sha256: Callable[[Path], str]) -> None:
        """Raises CheckpointError for a base that is quantised, or whose files are not those of the training."""
        if (quantization := read_quantization(base)) is not None:
            raise CheckpointError(
                f"adapter: {base} is quantised (recipe {quantization.recipe}), and an adapter is merged into weights "
                "in 16 bits: export the run without --adapter, and `xr0 quantize` that folder"
            )
        found = sha256(base)
        if found != self.info.base_sha256:
            raise CheckpointError(
                f"adapter: {self.folder} is of another base, {self.info.base} with SHA-256 {self.info.base_sha256}; "
                f"{base} has {found}: pass the checkpoint that the run started from, unchanged"
            )

    def over(self, base: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The base's tensors with the whole ones of the adapter in their places.

        Raises CheckpointError for pairs that lack a half, have no layer in the base, or are of other shapes.
        """
        halves = {name for name in self.stored if name.endswith((f".{DOWN}", f".{UP}"))}
        pairs = {name: pair_of(name) for name in base if halves.intersection(pair_of(name))}
        known = {half for pair in pairs.values() for half in pair}
        faults = [f"{half} is of no layer of the base" for half in sorted(halves - known)]
        faults += [f"missing {half}" for half in sorted(known - halves)]
        for name, (down, up) in pairs.items():
            out, width = base[name].shape if len(base[name].shape) == 2 else (0, 0)
            expected = {down: (self.info.rank, width), up: (out, self.info.rank)}
            faults += [
                f"{half} has shape {list(self.stored[half].shape)}, expected {list(shape)}"
                for half, shape in expected.items()
                if half in halves and self.stored[half].shape != shape
            ]
        raise_if(faults, f"{self.folder / WEIGHTS_FILE} does not fit its base")
        return {**base, **{name: place for name, place in self.stored.items() if name not in halves}}

    def merges(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Name of an adapted weight -> what makes the merged one of the base's."""

        def merge(name: str) -> Callable[[Tensor], Tensor]:
            down, up = pair_of(name)
            return lambda weight: merged(
                weight, read_tensor(self.stored[down]), read_tensor(self.stored[up]), self.info.scale
            )

        layers = (name.removesuffix(DOWN) for name in self.stored if name.endswith(f".{DOWN}"))
        return {f"{layer}weight": merge(f"{layer}weight") for layer in layers}
