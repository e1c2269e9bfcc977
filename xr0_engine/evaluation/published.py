"""Success rates that others published, as data, each with where it stands. Only figures whose source states them.

They were measured by other code on other machines: they stand beside a run, and are never paired with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Unit = Literal["%", "tasks in a row", "pieces/min"]
TOTAL = "total"
"""In a suite's place: the mean of the benchmark's suites, as papers have it."""
OURS = "Xiaomi-Robotics-0"
LIBERO_SUITES = ("spatial", "object", "goal", "10")
"""Those that a published average is over; `10` is called Long there."""
WIDOWX_TASKS = ("spoon on towel", "carrot on plate", "stack blocks", "eggplant in basket")
GOOGLE_TASKS = ("pick coke can", "move near", "open/close drawer", "drawer apple")
PARTS = {
    "put_spoon_on_table_cloth": WIDOWX_TASKS[0],
    "put_carrot_on_plate": WIDOWX_TASKS[1],
    "stack_green_cube_on_yellow_cube": WIDOWX_TASKS[2],
    "put_eggplant_in_basket": WIDOWX_TASKS[3],
    "pick_coke_can": GOOGLE_TASKS[0],
    "move_near": GOOGLE_TASKS[1],
    "open_drawer": GOOGLE_TASKS[2],
    "close_drawer": GOOGLE_TASKS[2],
    "put_in_drawer": GOOGLE_TASKS[3],
}
"""SimplerEnv's tasks -> what papers list them as: two of them as one."""


@dataclass(frozen=True)
class Source:
    """title, year: the publication's. url: where it is. place: where in it. protocol: what it says of how it was
    measured."""

    title: str
    year: int
    url: str
    place: str
    protocol: str


@dataclass(frozen=True)
class Published:
    """policy: as its authors call it. value: in unit. parts: figures that it is made of, by name, in the same unit;
    of chains, the share in per cent that solved so many tasks in a row."""

    policy: str
    value: float
    source: Source
    unit: Unit = "%"
    parts: Mapping[str, float] | None = None


_XR0_TITLE = "Xiaomi-Robotics-0: An Open-Sourced Vision-Language-Action Model with Real-Time Execution"
_XR0_URL = "https://arxiv.org/abs/2602.12684"


def _xr0(place: str, protocol: str) -> Source:
    return Source(_XR0_TITLE, 2026, _XR0_URL, place, protocol)


_LIBERO_OWN = _xr0(
    "Table 1; eval_libero/README.md of github.com/XiaomiRobotics/Xiaomi-Robotics-0",
    "one checkpoint for four suites; 50 trials a task, two 256x256 views, 10 of 10 actions executed",
)
_LIBERO_THEIRS = _xr0("Table 1", "as the Xiaomi-Robotics-0 report lists it; not run again there")
_OPENVLA = Source(
    "OpenVLA: An Open-Source Vision-Language-Action Model",
    2024,
    "https://github.com/openvla/openvla",
    "README, LIBERO evaluations (arXiv 2406.09246)",
    "a checkpoint a suite; 3 seeds x 500 trials; standard errors 0.6 to 1.3",
)
_PI0 = Source(
    "openpi",
    2025,
    "https://github.com/Physical-Intelligence/openpi",
    "examples/libero/README.md, of the releases before π0.5",
    "fine-tuned in openpi for 30,000 steps, not tuned further",
)
_PI05 = Source(
    "openpi",
    2025,
    "https://github.com/Physical-Intelligence/openpi",
    "examples/libero/README.md",
    "checkpoint pi05_libero, fine-tuned in openpi for 30,000 steps",
)
_EO1 = Source(
    "EO-1",
    2025,
    "https://arxiv.org/abs/2508.21112",
    "README of experiments/2_libero in the authors' repository; Table 1 of arXiv 2602.12684",
    "fine-tuned for 50 epochs",
)
_UNIVLA = Source(
    "Unified Vision-Language-Action Model",
    2025,
    "https://arxiv.org/abs/2506.19850",
    "README of the authors' repository, video sft; Tables 1 and 2 of arXiv 2602.12684",
    "LIBERO: one checkpoint",
)
_FLOWER_90 = Source(
    "FLOWER: Democratizing Generalist Robot Policies with Efficient Vision-Language-Action Flow Policies",
    2025,
    "https://arxiv.org/abs/2509.04996",
    "README of the authors' repository flower_vla_calvin",
    "LIBERO-90",
)
_CALVIN_OWN = _xr0(
    "Table 2; eval_calvin/README.md of github.com/XiaomiRobotics/Xiaomi-Robotics-0",
    "1000 chains of 5; centre crop 0.95; 10 of 10 actions executed, 360 steps a subtask",
)
_CALVIN_THEIRS = _xr0("Table 2", "1000 chains of 5, as the Xiaomi-Robotics-0 report lists it")
_SIMPLER_OWN = _xr0(
    "tables of SimplerEnv; eval_simplerenv/README.md of github.com/XiaomiRobotics/Xiaomi-Robotics-0",
    "mean of four tasks, of 108 to 825 trials each; 4 of 4 actions executed",
)
_SIMPLER_THEIRS = _xr0("tables of SimplerEnv", "mean of four tasks, as the Xiaomi-Robotics-0 report lists it")
_TOWEL = _xr0("section on real robots, figure 6", "two runs of 30 minutes, six towels; a fold over 2 minutes failed")
_ACT = Source(
    "lerobot/act_aloha_sim_transfer_cube_human",
    2024,
    "https://huggingface.co/lerobot/act_aloha_sim_transfer_cube_human",
    "model card",
    "gym-aloha's AlohaTransferCube-v0, trained on 50 human demonstrations; 500 episodes",
)

# Policy -> success on spatial, object, goal, 10, and their mean as printed.
_LIBERO: tuple[tuple[str, tuple[float, float, float, float], float, Source], ...] = (
    (OURS, (98.8, 100.0, 98.8, 97.2), 98.7, _LIBERO_OWN),
    ("EO-1", (99.7, 99.8, 99.2, 94.8), 98.2, _EO1),
    ("OpenVLA-OFT", (97.6, 98.4, 97.9, 94.5), 97.1, _LIBERO_THEIRS),
    ("FLOWER", (97.5, 99.1, 96.1, 94.9), 96.9, _LIBERO_THEIRS),
    ("π0.5", (98.8, 98.2, 98.0, 92.4), 96.85, _PI05),
    ("MemoryVLA", (98.4, 98.4, 96.4, 93.4), 96.7, _LIBERO_THEIRS),
    ("Discrete Diffusion VLA", (97.2, 98.6, 97.4, 92.0), 96.3, _LIBERO_THEIRS),
    ("UniVLA", (95.4, 98.8, 93.6, 94.0), 95.5, _UNIVLA),
    ("π0", (96.8, 98.8, 95.8, 85.2), 94.15, _PI0),
    ("GR00T-N1", (94.4, 97.6, 93.0, 90.6), 93.9, _LIBERO_THEIRS),
    ("π0-FAST", (96.4, 96.8, 88.6, 60.2), 85.5, _PI0),
    ("OpenVLA", (84.7, 88.4, 79.2, 53.7), 76.5, _OPENVLA),
)

# Training split -> policy -> chains in per cent that solved 1 to 5 tasks (None: not taken), and the average length.
_Chains = tuple[str, tuple[float, float, float, float, float], float, Source]
_CALVIN: Mapping[str, tuple[_Chains, ...]] = {
    "ABCD_D": (
        (OURS, (99.7, 98.0, 96.7, 94.2, 91.8), 4.80, _CALVIN_OWN),
        # Printed so, though these five add up to 4.74.
        ("FLOWER", (99.2, 96.9, 96.9, 92.3, 88.3), 4.67, _CALVIN_THEIRS),
        ("UniVLA", (98.5, 96.1, 93.1, 89.9, 85.1), 4.63, _UNIVLA),
        ("MDT", (98.6, 95.8, 91.6, 86.2, 80.1), 4.52, _CALVIN_THEIRS),
        ("RoboVLMs", (96.7, 93.0, 89.9, 86.5, 82.6), 4.49, _CALVIN_THEIRS),
        ("MoDE", (97.1, 92.5, 87.9, 83.5, 77.9), 4.39, _CALVIN_THEIRS),
        ("GR-1", (94.9, 89.6, 84.4, 78.9, 73.1), 4.21, _CALVIN_THEIRS),
        ("RoboFlamingo", (96.4, 89.6, 82.4, 74.0, 66.0), 4.09, _CALVIN_THEIRS),
    ),
    "ABC_D": (
        (OURS, (100.0, 98.3, 96.0, 92.6, 88.1), 4.75, _CALVIN_OWN),
        # Printed so, though these five add up to 4.49.
        ("FLOWER", (99.4, 95.8, 90.7, 84.9, 77.8), 4.53, _CALVIN_THEIRS),
        ("UniVLA", (98.9, 94.8, 89.0, 82.8, 75.1), 4.41, _CALVIN_THEIRS),
        ("VPP", (95.7, 91.2, 86.3, 81.0, 75.0), 4.29, _CALVIN_THEIRS),
        ("Seer-Large", (96.3, 91.6, 86.1, 80.3, 74.0), 4.28, _CALVIN_THEIRS),
        ("RoboVLMs", (98.0, 93.6, 85.4, 77.8, 70.4), 4.25, _CALVIN_THEIRS),
        ("GR-MG", (96.8, 89.3, 81.5, 72.7, 64.4), 4.04, _CALVIN_THEIRS),
        ("MoDE", (96.2, 88.9, 81.1, 71.8, 63.5), 4.01, _CALVIN_THEIRS),
        ("3D Diffuser Actor", (93.8, 80.3, 66.2, 53.3, 41.2), 3.35, _CALVIN_THEIRS),
        ("GR-1", (85.4, 71.2, 59.6, 49.7, 40.1), 3.06, _CALVIN_THEIRS),
    ),
}

_Tasks = tuple[str, tuple[float, float, float, float], float]
_SIMPLER: Mapping[str, tuple[tuple[str, ...], tuple[_Tasks, ...]]] = {
    "widowx": (
        WIDOWX_TASKS,
        (
            (OURS, (95.8, 62.5, 75.0, 83.3), 79.2),
            ("EO-1", (63.6, 54.5, 81.8, 90.9), 72.7),
            ("π0", (83.8, 52.5, 52.5, 87.9), 69.2),
            ("SpatialVLA", (16.7, 25.0, 29.2, 100.0), 42.7),
            ("Octo-Small", (47.2, 9.7, 4.2, 56.9), 29.5),
            ("OpenVLA", (0.0, 0.0, 0.0, 4.1), 1.0),
        ),
    ),
    "google_vm": (
        GOOGLE_TASKS,
        (
            (OURS, (98.7, 88.8, 79.6, 75.0), 85.5),
            ("EO-1", (98.0, 83.8, 71.3, 52.8), 76.5),
            ("π0", (97.9, 78.7, 62.3, 46.6), 71.4),
            ("RT-1", (85.7, 44.2, 73.0, 6.5), 52.4),
            ("RT-2-X", (78.7, 77.9, 25.0, 7.4), 47.3),
            ("OpenVLA", (16.3, 46.2, 35.6, 0.0), 24.5),
        ),
    ),
    # Of the drawers, 254 of 378 trials that the README counts.
    "google_va": (GOOGLE_TASKS, ((OURS, (88.2, 76.8, 67.2, 66.7), 74.7),)),
}
# Of this policy, what was found says the mean and the last task alone.
_EO1_VA = Published("EO-1", 63.0, _SIMPLER_THEIRS, parts={GOOGLE_TASKS[3]: 23.8})


def benchmark_title(benchmark: str) -> str:
    """As its authors write it."""
    return {"libero": "LIBERO", "calvin": "CALVIN", "simpler": "SimplerEnv", "aloha": "ALOHA"}.get(benchmark, benchmark)


def published(benchmark: str, suite: str) -> tuple[Published, ...]:
    """Figures for a suite of a benchmark, or for TOTAL, Xiaomi-Robotics-0's first and then the best first; empty where
    none was taken down. LIBERO's suites may have their `libero_` before them; a suite of CALVIN that names no training
    split gets the figures of both."""
    name = suite.lower().removeprefix(f"{benchmark}_").replace("-", "_")
    if benchmark == "libero":
        return _libero(name)
    if benchmark == "calvin":
        return _calvin(name)
    if benchmark == "simpler":
        return _simpler(name)
    if benchmark == "aloha" and name == "transfer":
        return (Published("ACT (LeRobot)", 83.0, _ACT),)
    return throughputs() if benchmark == "aloha" and name == "throughput" else ()


def throughputs() -> tuple[Published, ...]:
    """Towels folded a minute by real robots: to have seen the order of magnitude beside a throughput in simulation."""
    return (
        Published(f"{OURS}, asynchronous", 1.2, _TOWEL, "pieces/min"),
        Published(f"{OURS}, synchronous", 1.0, _TOWEL, "pieces/min"),
        Published("π0.5", 1.0, _TOWEL, "pieces/min"),
    )


def _libero(name: str) -> tuple[Published, ...]:
    if name == "90":
        return (Published("FLOWER", 93.4, _FLOWER_90),)
    if name == TOTAL:
        return tuple(
            Published(policy, mean, source, parts=dict(zip(LIBERO_SUITES, rates, strict=True)))
            for policy, rates, mean, source in _LIBERO
        )
    column = {suite: index for index, suite in enumerate(LIBERO_SUITES)}.get("10" if name == "long" else name)
    if column is None:
        return ()
    found = [Published(policy, rates[column], source) for policy, rates, _, source in _LIBERO]
    return tuple(sorted(found, key=lambda figure: (figure.policy != OURS, -figure.value)))


def _calvin(name: str) -> tuple[Published, ...]:
    splits = [split for split in _CALVIN if split.lower() == name] or ([] if name == TOTAL else list(_CALVIN))
    return tuple(
        Published(
            policy if len(splits) == 1 else f"{policy}, {split.replace('_', '→')}",
            length,
            source,
            "tasks in a row",
            {str(place): share for place, share in enumerate(shares, 1)},
        )
        for split in splits
        for policy, shares, length, source in _CALVIN[split]
    )


def _simpler(name: str) -> tuple[Published, ...]:
    tasks, rows = _SIMPLER.get(name, ((), ()))
    found = tuple(
        Published(
            policy,
            mean,
            _SIMPLER_OWN if policy == OURS else _SIMPLER_THEIRS,
            parts=dict(zip(tasks, rates, strict=True)),
        )
        for policy, rates, mean in rows
    )
    return (*found, _EO1_VA) if name == "google_va" else found
