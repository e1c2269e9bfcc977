"""xr0 bench memory: which precision fits which card."""

from __future__ import annotations

from typing import Annotated

import typer

from xr0_engine.sizes import PUBLISHED, size_of


def memory(
    cases: Annotated[str, typer.Option("--case", help="Cases of `xr0 bench`, with commas.")] = "libero,bimanual",
    size: Annotated[
        str, typer.Option(help="tiny, small, 4b or 5b; published: 4b or 5b, as the case has it.")
    ] = PUBLISHED,
    checkpoint: Annotated[
        str | None, typer.Option(help="Your own checkpoint instead: folder or Hugging Face hub id.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what has no 8 bits: bfloat16, float16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """What a call takes in 16 bits and by each recipe of 8, and which cards of 8, 12, 16 and 24 GB have it.

    Estimated from sizes alone: needs no weights and no GPU.
    """
    from xr0_engine.bench.cases import Setup, find_case
    from xr0_engine.bench.step.cards import run

    found = [find_case(name.strip()) for name in cases.split(",")]
    run([Setup(case, size_of(case.family, size), checkpoint, "cpu", dtype) for case in found], as_json)
