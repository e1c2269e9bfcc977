"""What a quantised policy must keep to: budgets, from a file or these defaults, and what misses them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from xr0_engine.files import number, read_json, reading
from xr0_engine.quantize.fidelity import Fidelity
from xr0_engine.types import FileError


@dataclass(frozen=True)
class Gate:
    """mean_cosine, least_cosine: of chunks, at least: those that others demand of their engines in 8 bits. seam: the
    mean change behind a prefix in 8 bits, over that in 16, at most. Others at most, None asks for nothing: mm, mrad:
    the largest difference of a column in metres, in radians; error: of any column, in the model's units."""

    mean_cosine: float = 0.999
    least_cosine: float = 0.995
    seam: float | None = 1.1
    mm: float | None = None
    mrad: float | None = None
    error: float | None = None

    @classmethod
    def load(cls, path: Path) -> Gate:
        """From a JSON file with some of the fields. Raises FileError that names file and field."""
        told = read_json(path, FileError)
        with reading(path, FileError):
            if not isinstance(told, dict):
                raise TypeError("expected an object")
            known = [field.name for field in fields(cls)]
            for name in told:
                if name not in known:
                    raise ValueError(f"{name}: expected some of {', '.join(known)}")
            return cls(**{name: number(told, name) for name in told})

    def missed(self, fidelity: Fidelity) -> list[str]:
        """What does not keep to it, in words; a budget for a unit that the robot has not is missed too."""
        found = []
        cosine, largest = fidelity.cosine, {"error": fidelity.error, **fidelity.units}
        for name, value, least in (
            ("mean_cosine", cosine.mean, self.mean_cosine),
            ("least_cosine", cosine.worst, self.least_cosine),
        ):
            if not value >= least:
                found.append(f"{name} {value:.6f}, at least {least:g}")
        for name, most in (("mm", self.mm), ("mrad", self.mrad), ("error", self.error)):
            if most is None:
                continue
            if name not in largest:
                found.append(f"{name}: the robot's layout has no column in that unit")
            elif not largest[name].worst <= most:
                found.append(f"{name} {largest[name].worst:.4g}, at most {most:g}")
        if self.seam is not None and fidelity.seam:
            ratio = fidelity.seam["8 bit"].mean / max(fidelity.seam["16 bit"].mean, 1e-30)
            if not ratio <= self.seam:
                found.append(f"seam {ratio:.3f} times that in 16 bits, at most {self.seam:g}")
        return found
