"""What is run, in order of worth: a list of steps, each a command, its time, and why it is left out if it is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xr0_engine.bench.machine.facts import sanitizer
from xr0_engine.env import EMULATED_CHIPS, cache_dir

PARTS = {
    "machine": "What the machine is",
    "correct": "Does it compute the right thing?",
    "sanitizer": "compute-sanitizer on a small model",
    "tune": "Tuning",
    "latency": "Latency",
    "tails": "Tails: 10,000 replays",
    "ablation": "What each optimisation buys",
    "kernels": "Kernels against their bound",
    "released": "The released way, eager and compiled",
    "throughput": "Throughput",
    "memory": "Memory",
    "training": "Fine-tuning step",
    "loop": "A control loop and cold starts",
}
"""In order of worth."""
CASES, SIZES = ("libero", "bimanual"), ("tiny", "small", "4b")
CHECKOUT, EMULATOR = Path(__file__).resolve().parents[3], "tests/ptx/__init__.py"
SELF_CHECK, CHECKPOINT = "self-check", "checkpoint"
DEVICE = re.compile(r"auto|cuda(:\d+)?")
GRAPHS = "CUDA graphs need a GPU"
SLOWER = 6
"""The emulator takes so many times a step's longest time: it compiles and computes on a CPU."""
GIB = 2**30
DISK_OF_4B, GPU_OF_4B = 10 * GIB, 14 * GIB
"""Bytes for the random checkpoint of the published sizes (8.8 GiB); of a GPU, for the engine with it and its graphs."""
GPU_OF_MANY = 30 * GIB
"""Bytes of a GPU for batches of more than 8."""


@dataclass(frozen=True)
class Step:
    """One process.

    arguments: behind the interpreter; `{minutes}` stands for six tenths of the time that it gets. file: what it leaves
    in results/, empty if nothing; printed: its standard output is that file. least_s: with less it is not begun;
    share: of all minutes, that it may take; most_s: whatever the share. left_out: why it cannot run here. wrapper: a
    command in front of the interpreter. copied: (what it leaves elsewhere, where in the folder
    that is copied to). needs: a step that must have passed before.
    """

    name: str
    part: str
    what: str
    arguments: tuple[str, ...]
    file: str = ""
    printed: bool = False
    least_s: float = 20
    share: float = 0.1
    most_s: float = 120
    left_out: str | None = None
    wrapper: tuple[str, ...] = ()
    copied: tuple[Path, Path] | None = None
    needs: str | None = None

    def limit_s(self, minutes: float, remaining_s: float) -> float:
        """Its share of all minutes, at least what it needs, at most its own limit and what remains."""
        return min(self.most_s, max(self.least_s, 60 * minutes * self.share), remaining_s)


@dataclass(frozen=True)
class Wish:
    """What was asked for. size: None for what fits. golden: a folder of golden cases. emulate: compute capability.
    only: parts, or steps; none is all of them."""

    device: str = "auto"
    size: str | None = None
    golden: Path | None = None
    emulate: int | None = None
    only: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError for what is wrong in it, NotImplementedError for an emulator that is not there."""
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"--device: expected auto, cuda or cuda:N; got {self.device!r}")
        if self.golden is not None and not self.golden.is_dir():
            raise ValueError(f"--golden: there is no folder {self.golden}")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"--size: expected one of {', '.join(SIZES)}; got {self.size!r}")
        if self.emulate is None:
            return
        if self.size not in (None, "tiny"):
            raise ValueError(f"--size: the emulator is for tiny models, got {self.size!r}")
        if self.emulate not in EMULATED_CHIPS.values():
            raise ValueError(f"--emulate: expected one of {', '.join(EMULATED_CHIPS)}; got {self.emulate}")
        if not (CHECKOUT / EMULATOR).is_file():
            raise NotImplementedError(f"--emulate: the emulator is in a checkout's {EMULATOR}, and {CHECKOUT} is none")

    def environment(self) -> dict[str, str]:
        """Of all steps: nothing is downloaded, kernels run as compiled code, and no GPU but the chosen one is seen.

        Raises ValueError for a GPU that CUDA_VISIBLE_DEVICES hides.
        """
        ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
        ours["XR0_EMULATE"] = "" if self.emulate is None else str(self.emulate)
        _, _, index = self.device.partition(":")
        if index:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            visible = seen.split(",") if seen else [str(number) for number in range(int(index) + 1)]
            if int(index) >= len(visible):
                raise ValueError(f"--device: CUDA_VISIBLE_DEVICES shows {len(visible)} GPUs, got {self.device!r}")
            ours["CUDA_VISIBLE_DEVICES"] = visible[int(index)]
        return ours


def choose_size(facts: Mapping[str, Any], wish: Wish) -> tuple[str, str | None]:
    """The size of the random checkpoint, and why it is a smaller one than the published, if it is."""
    if wish.emulate is not None:
        return "tiny", "an emulator takes minutes for a step of the published sizes"
    if wish.size is not None:
        return wish.size, None
    memory, disk = facts["gpu"]["memory_bytes"], facts["disk_free_bytes"]
    if memory < GPU_OF_4B:
        return "small", f"the GPU has {memory / GIB:.0f} GiB, and {GPU_OF_4B / GIB:.0f} are needed"
    if "4b" not in facts["checkpoints"] and disk < DISK_OF_4B:
        return "small", f"XR0_CACHE has {disk / GIB:.1f} GiB free, and {DISK_OF_4B / GIB:.0f} are needed"
    return "4b", None


def plan(facts: Mapping[str, Any], wish: Wish, size: str, out: Path) -> list[Step]:
    """Every step, in order of worth. Raises ValueError if the wish names a part or step that there is not."""
    made = _Plan(facts, wish, size, out)
    steps = [
        *made.machine(),
        *made.correct(),
        *made.sanitizer(),
        *made.tune(),
        *made.latency(),
        *made.tails(),
        *made.ablation(),
        *made.kernels(),
        *made.released(),
        *made.throughput(),
        *made.memory(),
        *made.training(),
        *made.loop(),
    ]
    steps = [replace(step, most_s=SLOWER * step.most_s) for step in steps] if wish.emulate is not None else steps
    known = {*PARTS, *(step.name for step in steps)}
    if unknown := [name for name in wish.only if name not in known]:
        raise ValueError(f"--only: expected some of {', '.join(PARTS)}, or steps of theirs; got {', '.join(unknown)}")
    if CHECKPOINT in known:
        steps = [replace(step, needs=CHECKPOINT) if _reads_weights(step, size) else step for step in steps]
    asked = {step.name for step in steps if not wish.only or {step.part, step.name} & {*wish.only}}
    asked |= {step.needs for step in steps if step.name in asked and step.needs}
    return [step if step.name in asked else replace(step, left_out="not asked for (--only)") for step in steps]


def _reads_weights(step: Step, size: str) -> bool:
    return size in step.arguments and step.name != CHECKPOINT


class _Plan:
    """The steps of one machine, part by part."""

    def __init__(self, facts: Mapping[str, Any], wish: Wish, size: str, out: Path) -> None:
        self.facts, self.wish, self.size, self.out = facts, wish, size, out
        self.emulated = wish.emulate is not None
        # The chosen GPU is the only one that is seen.
        self.device = ("--device", "cpu" if self.emulated else "cuda")
        self.setup = ("--size", size, *self.device, "--dtype", "bfloat16")
        self.engine = (*self.setup, "--backend", "triton")

    def machine(self) -> list[Step]:
        what = "versions, GPUs, backends, and what is missing"
        return [self._printed("doctor", "machine", what, "doctor", "--json", most_s=60)]

    def correct(self) -> list[Step]:
        what = "the self-check: fused kernels against PyTorch, on small models"
        steps = [self._printed(SELF_CHECK, "correct", what, "doctor", "--check", "--json", most_s=150)]
        ways = {
            "chained": "the flow as a chain of kernels",
            "layered": "the flow as one kernel a layer",
            "persistent": "the flow as one kernel",
            "streamed": "the flow as one kernel whose weights stream",
            "overlap": "the flow's first step beside the VLM's last layers",
            "separate": "no kernel starts before the one ahead of it has ended",
        }
        golden = self.wish.golden
        for way, told in ways.items():
            where = () if golden is None else (str(golden.absolute()),)
            options = ("--backend", "triton", *self.device, "--dtype", "bfloat16", "--way", way, "--json")
            step = self._printed(f"golden-{way}", "correct", f"golden cases: {told}", "verify", *where, *options)
            if golden is None:
                step = replace(step, left_out="no folder of golden cases was given (--golden DIR)")
            elif self.emulated and way == "overlap":
                step = replace(step, left_out="two streams need a GPU")
            steps.append(step)
        if golden is not None:
            half = ("--backend", "triton", *self.device, "--dtype", "float16", "--json")
            what = "golden cases in float16"
            steps.append(self._printed("golden-float16", "correct", what, "verify", str(golden.absolute()), *half))
        tiny = ("--size", "tiny", *self.device, "--json")
        graphs = self._printed("graphs", "correct", "what captured graphs hold", "bench", "graph", *tiny)
        what = "camera frames to patches by the native CUDA operator, bit by bit as on the host"
        images = self._bench("images", "correct", what, "images", *self.device, most_s=60)
        return [
            *steps,
            self._on_gpu(graphs, GRAPHS),
            self._unless(self._on_gpu(images, "it needs a GPU"), self.facts["native_cuda_fault"]),
        ]

    def sanitizer(self) -> list[Step]:
        tools = {
            "memcheck": "out-of-bounds and misaligned accesses",
            "racecheck": "races in shared memory",
            "synccheck": "barriers that not all reach",
        }
        found = sanitizer()
        steps = []
        for tool, what in tools.items():
            step = self._run("sanitizer-" + tool, "sanitizer", what, "doctor", "--check", least_s=40, most_s=150)
            options = ("--tool", tool, "--error-exitcode", "9", "--target-processes", "all", "--print-limit", "20")
            if found is not None:
                step = replace(step, wrapper=(found, *options))
            told = None if found else "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
            step = self._on_gpu(step, "it needs a GPU; the emulator does these checks itself")
            steps.append(self._unless(step, told))
        return steps

    def tune(self) -> list[Step]:
        steps = []
        if self.size == "4b" and "4b" not in self.facts["checkpoints"]:
            what = "the random checkpoint of the published sizes, kept in XR0_CACHE"
            where = ("--out", str(cache_dir().absolute() / "4b"))
            command = ("init", "--size", "4b", *where)
            steps.append(self._run(CHECKPOINT, "tune", what, *command, least_s=60, share=0.2, most_s=400))
        cases = ("--case", "libero" if self.emulated else ",".join(CASES))
        arguments = ["bench", "tune", *self.setup, *cases, "--minutes", "{minutes}"]
        what = "the fastest variant of each kernel; the engine uses the table from here on"
        table = self.out / "tactics.json"
        if self.emulated:
            arguments += ["--out", str(table)]
        step = self._run("tune", "tune", what, *arguments, least_s=60, share=0.2, most_s=600)
        if not self.emulated:
            step = replace(step, copied=(cache_dir() / "tactics" / f"{self.facts['gpu']['slug']}.json", table))
        return [*steps, step]

    def latency(self) -> list[Step]:
        steps = []
        boundaries = {
            "replay": "inputs on the device to the chunk on the device",
            "update+replay": "preprocessed inputs on the host to the chunk on the host",
            "infer": "images and state to actions",
        }
        for boundary, what in boundaries.items():
            for case in CASES:
                step = self._latency(case, boundary, "latency", what)
                steps.append(step if boundary == "infer" else self._on_gpu(step, GRAPHS))
        return steps

    def tails(self) -> list[Step]:
        what = "10,000 replays one after the other: p99.9, and what is worse"
        options = (*self.engine, "--case", "libero", "--boundary", "replay", "--alone", "--rounds", "10000")
        step = self._bench("tails-libero", "tails", what, "latency", *options, share=0.2, most_s=400)
        return [self._on_gpu(step, "an emulator's times have no tails")]

    def ablation(self) -> list[Step]:
        what = "without graphs, tactics, dependent launch; each way of the flow"
        step = self._bench("ablation-libero", "ablation", what, "ablate", *self.setup, "--rounds", "10", most_s=180)
        return [self._on_gpu(step, "it times CUDA graphs, which need a GPU")]

    def kernels(self) -> list[Step]:
        steps = []
        for case in CASES[: 1 if self.emulated else None]:
            what = "the bound, with this machine's own bandwidth and arithmetic"
            bound = (*self.setup, "--case", case, "--chip", "here")
            steps.append(self._bench(f"bound-{case}", "kernels", what, "roofline", *bound, most_s=60))
            what = "every kernel of a step alone, as correct as its oracle"
            options = (*self.engine, "--case", case, "--rounds", self._rounds(20))
            steps.append(self._bench(f"kernels-{case}", "kernels", what, "kernels", *options))
        return steps

    def released(self) -> list[Step]:
        boundary = "infer" if self.emulated else "replay"
        rounds = ("--boundary", boundary, "--rounds", self._rounds(30))
        steps = []
        for case in CASES[: 1 if self.emulated else None]:
            options = (*self.engine, "--case", case, *rounds)
            what = "the same actions by the structure of the released code, stage by stage"
            steps.append(self._bench(f"released-{case}", "released", what, "latency", *options, most_s=150))
        command = ("latency", *self.engine, "--case", "libero", *rounds, "--compile")
        what = "the same, and under torch.compile"
        compiled = self._bench("compiled-libero", "released", what, *command, least_s=90, most_s=420)
        steps.append(self._on_gpu(compiled, "torch.compile takes minutes, and on a CPU it is no rival"))
        return [self._with_packages(step, "transformers") for step in steps]

    def throughput(self) -> list[Step]:
        steps = []
        for case in CASES[: 1 if self.emulated else None]:
            options = (*self.engine, "--case", case, "--batches", self._batches(), "--rounds", self._rounds(20))
            what = "chunks per second by batch size"
            steps.append(self._bench(f"throughput-{case}", "throughput", what, "throughput", *options))
        return steps

    def memory(self) -> list[Step]:
        what = "the most that the engine holds, in a process of its own; batch 8, a long prompt"
        step = self._latency("stress", "infer", "memory", what, rounds=3)
        stress = self._unless(step, "batches of 8 take an emulator too long" if self.emulated else None)
        reference = ("--case", "libero", "--boundary", "infer", "--alone", "--rounds", self._rounds(3))
        what = "the same of PyTorch's operators"
        options = (*self.setup, "--backend", "reference", *reference)
        return [stress, self._bench("memory-reference", "memory", what, "latency", *options, most_s=90)]

    def training(self) -> list[Step]:
        what = "one step of the recipe finetune_head, by the trainer itself"
        options = (*self.setup, "--case", "libero", "--rounds", self._rounds(10))
        step = self._bench("finetune-libero", "training", what, "finetune", *options, least_s=30, most_s=180)
        return [self._with_packages(step, "transformers", "huggingface_hub", "tensorboard")]

    def loop(self) -> list[Step]:
        what = "a call in every tick of 30 Hz for ten seconds: missed deadlines"
        jitter = self._bench("jitter-libero", "loop", what, "jitter", *self.engine, "--case", "libero", most_s=90)
        what = "from the start of a process to its first action"
        cold = self._bench("coldstart-libero", "loop", what, "coldstart", *self.engine, "--rounds", "3", most_s=180)
        return [self._on_gpu(step, "an emulator meets no deadlines") for step in (jitter, cold)]

    def _latency(self, case: str, boundary: str, part: str, what: str, rounds: int = 100) -> Step:
        options = (*self.engine, "--case", case, "--boundary", boundary, "--alone", "--rounds", self._rounds(rounds))
        name = f"{part}-{case}-{boundary.replace('+', '-')}"
        return self._bench(name, part, f"{case}, {boundary}: {what}", "latency", *options)

    def _bench(self, name: str, part: str, what: str, *command: str, **times: float) -> Step:
        """A command that writes a result."""
        file = f"{name}.json"
        where = ("--json", str(self.out / "results" / file))
        return replace(self._run(name, part, what, "bench", *command, *where, **times), file=file)

    def _printed(self, name: str, part: str, what: str, *arguments: str, **times: float) -> Step:
        """A command that prints JSON."""
        return replace(self._run(name, part, what, *arguments, **times), file=f"{name}.json", printed=True)

    def _run(self, name: str, part: str, what: str, *arguments: str, **times: float) -> Step:
        return Step(name, part, what, ("-m", "xr0_engine", *arguments), **times)  # type: ignore[arg-type]

    def _batches(self) -> str:
        if self.emulated:
            return "1,2"
        return "1,2,4,8,16,32" if self.facts["gpu"]["memory_bytes"] >= GPU_OF_MANY else "1,2,4,8"

    def _rounds(self, rounds: int) -> str:
        """On the emulator one is enough: its times say nothing."""
        return "1" if self.emulated else str(rounds)

    def _on_gpu(self, step: Step, otherwise: str) -> Step:
        return self._unless(step, otherwise if self.emulated else None)

    def _with_packages(self, step: Step, *names: str) -> Step:
        missing = [name for name in names if not self.facts["optional"][name]]
        return self._unless(step, f"{' and '.join(missing)} not installed" if missing else None)

    def _unless(self, step: Step, reason: str | None) -> Step:
        return step if reason is None or step.left_out else replace(step, left_out=reason)


def parts_of(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Part -> its steps, in order of worth."""
    return {part: found for part in PARTS if (found := [step for step in steps if step.part == part])}
