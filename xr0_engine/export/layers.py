"""What a builder made of a graph: its layers, in which precision, and which ONNX operators each of them fuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SYNCHRONISATION = ("signal", "wait")
LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+.*?, Metadata: ?(?P<metadata>.*)$"
)
DATATYPE = re.compile(r"Datatype: (\w+)")
STEP_AND_KIND = re.compile(r"^step\d+\.|\.Gemm\.\d+$")
"""What an operator's name has around a layer's."""
OPERATOR = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine. type: the builder's word (gemm, kgen: generated, runtime_fusion: chosen on the GPU).

    precision: of its results. operators: the ONNX nodes that it computes.
    """

    name: str
    type: str
    precision: tuple[str, ...]
    tactic: str
    operators: tuple[str, ...]


def parse_layers(log: Sequence[str]) -> list[Layer]:
    """The layers from a verbose builder log, which prints what the engine inspector would: that needs a GPU.

    Raises RuntimeError if the log does not hold them in the form that TensorRT for RTX 1.7 writes.
    """
    tables = [message for message in log if message.startswith("Layers:\n")]
    lines = tables[-1].split("\n\n")[0].splitlines()[1:] if tables else []
    matches = [LAYER.match(line) for line in lines]
    if not lines or not all(matches):
        raise RuntimeError("the builder's log does not tell the layers of the engine: another version of it?")
    return [_layer(match) for match in matches if match is not None]


def summarise(layers: Sequence[Layer]) -> dict[str, Any]:
    """count: kernels, synchronisation apart; fused: those of several operators; how many of which type, precision.

    products: kernels with a layer's product; eight_bit: of these, those by 8-bit weights, whose conversion back was
    fused into them; eight_bit_rows: of those, those whose rows' was too. in_16: where some
    are, what the other products are of.
    """
    kernels = [layer for layer in layers if layer.type not in SYNCHRONISATION]
    products = list(_products(kernels))
    return {
        "count": len(kernels),
        "products": len(products),
        "eight_bit": sum(back > 0 for _, back in products),
        "eight_bit_rows": sum(back > len(names) for names, back in products),
        "in_16": _in_16(products),
        "fused": sum(len(layer.operators) > 1 for layer in kernels),
        "operators": len({operator for layer in kernels for operator in layer.operators}),
        "types": dict(Counter(layer.type for layer in kernels).most_common()),
        "precisions": dict(Counter("+".join(layer.precision) for layer in kernels).most_common()),
    }


def _products(kernels: Sequence[Layer]) -> Iterator[tuple[list[str], int]]:
    """Kernel by kernel that computes some: its products, and its conversions from 8 bits. What multiplies by a float8
    weight's scales afterwards is listed as part of the product too: the first kernel that is computes it."""
    known: set[str] = set()
    for layer in kernels:
        names = [name for name in layer.operators if ".Gemm." in name and name not in known]
        known.update(names)
        if names:
            yield names, sum(".DequantizeLinear." in name for name in layer.operators)


def _in_16(products: Sequence[tuple[list[str], int]]) -> list[str]:
    others = [names for names, back in products if back <= len(names)]
    if len(others) == len(products):
        return []
    return list(dict.fromkeys(STEP_AND_KIND.sub("", name) for names in others for name in names))


def _layer(match: re.Match[str]) -> Layer:
    precision = sorted(set(DATATYPE.findall(match["outputs"])))
    return Layer(
        match["name"], match["type"], tuple(precision), match["tactic"], tuple(OPERATOR.findall(match["metadata"]))
    )
