"""xr0 export: a checkpoint as ONNX graphs and TensorRT engines, and the proof that they compute the same; its language
model as a plain Qwen3-VL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xr0_engine.cli.verify import report

if TYPE_CHECKING:
    from xr0_engine.exported.manifest import ExportCase

app = typer.Typer(name="export", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Folder = Annotated[Path, typer.Argument(help="Folder that `xr0 export onnx` wrote.")]


@app.callback()
def _export() -> None:
    """Take a checkpoint to another toolchain: ONNX graphs, TensorRT engines, their verification, a plain Qwen3-VL."""


@app.command()
def onnx(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a folder, or a Hugging Face hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    case: Annotated[
        str,
        typer.Option(
            help="Views, sizes, batch: libero, bimanual, two_views or stress; of Xiaomi-Robotics-1: mobile, robocasa, "
            "robocasa365, robodojo or vlabench."
        ),
    ] = "libero",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Longest prompt; several give several graphs. Not given: an example's, with some room."),
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="vision, prefill, flow or step (all in one); all four if not given.")
    ] = None,
) -> None:
    """Write the stages of one case as ONNX graphs of static shapes, with one file of weights and a manifest."""
    from xr0_engine.export.folder import STAGES, export_onnx

    manifest = export_onnx(checkpoint, _case(case), precision, out, tokens or (), stage or tuple(STAGES))
    size = sum(record.bytes for record in manifest.files.values())
    print(f"wrote {', '.join(manifest.stages.values())} to {out}: {size / 2**20:.0f} MiB, opset {manifest.opset}")
    print(f"next: xr0 export verify {out}")


def _case(name: str) -> ExportCase:
    """Raises ValueError that lists the known ones."""
    from xr0_engine.bench.cases import CASES as MEASURED
    from xr0_engine.export.inputs import CASES
    from xr0_engine.exported.manifest import ExportCase

    if name in MEASURED:
        case = MEASURED[name]
        return ExportCase(case.name, case.robot_type, case.image_size, case.batch, case.profile)
    if name not in CASES:
        raise ValueError(f"case: expected one of {', '.join((*MEASURED, *CASES))}; got {name!r}")
    return CASES[name]


@app.command()
def tensorrt(
    folder: Folder,
    target: Annotated[str, typer.Option(help="rtx4090, rtx5090, a100, or local: this machine's GPU.")] = "local",
    builder: Annotated[str, typer.Option(help="tensorrt-rtx, or tensorrt: plain TensorRT, for local only.")] = (
        "tensorrt-rtx"
    ),
    stage: Annotated[
        list[str] | None, typer.Option(help="vision, prefill, flow or step; the first three if not given.")
    ] = None,
) -> None:
    """Build engines from exported graphs, for a GPU that need not be here, into a subfolder named as the target."""
    from rich.console import Console
    from rich.table import Table

    from xr0_engine.export.engines import STAGES, build_engines

    engines = build_engines(folder, target, builder, stage or STAGES)
    title = f"{folder / target}: {engines.builder} {engines.builder_version}, SM {engines.compute_capability}"
    table = Table(
        "stage",
        "engine MiB",
        "built in s",
        "peak MiB",
        "layers",
        "of which fused",
        "products",
        "8-bit weights",
        "rows too",
        title=title,
    )
    for key, facts in engines.facts.items():
        layers = facts["layers"]
        sizes = (facts["engine_bytes"] / 2**20, facts["build_s"], facts["peak_memory_bytes"] / 2**20)
        table.add_row(
            key,
            *(f"{value:.0f}" for value in sizes),
            str(layers["count"]),
            str(layers["fused"]),
            *(str(layers.get(name, "")) for name in ("products", "eight_bit", "eight_bit_rows")),
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for key, facts in engines.facts.items():
        if others := facts["layers"].get("in_16"):
            console.print(f"{key}: in 16 bits: {', '.join(others)}", markup=False)


@app.command()
def verify(
    folder: Folder,
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint, if it is elsewhere by now.")] = None,
    device: Device = "auto",
    backend: Annotated[str, typer.Option(help="onnx (ONNX Runtime), or tensorrt, which needs its GPU.")] = "onnx",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON instead of a table.")] = False,
) -> None:
    """Compare every stage, and all of them in a row, with the reference engine.

    Exit code 0: all within tolerance and no file changed; 1: something is not; 2: another checkpoint, or no export.
    """
    from xr0_engine.export.agreement import compare_export

    report(compare_export(folder, checkpoint, device, backend), str(folder), as_json)


@app.command()
def vlm(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a folder, or a Hugging Face hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Local folder of Qwen3-VL whose tokenizer files and chat template are taken instead."),
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Smallest image; the checkpoint's if not given.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image; the checkpoint's if not given.")] = None,
) -> None:
    """Write the fine-tuned language model as a plain Qwen3-VL folder that transformers, vLLM and lmms-eval load."""
    from xr0_engine.export.vlm import export_vlm

    for line in export_vlm(checkpoint, out, tokenizer, min_pixels, max_pixels):
        print(line)
    print(f"wrote {out}: load it as Qwen3VLForConditionalGeneration, or see docs/evaluation.md for lmms-eval")
