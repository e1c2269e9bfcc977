"""What a builder made of a graph: its layers, in which precision, and which ONNX operators each of them fuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SYNCHRONISATION = ("signal", "wait")
LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+.*?, Metadata: ?(?P<metadata>.*)$"
)
DATATYPE = re.compile(r"Datatype: (\w+)")
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
    fused into them; eight_bit_rows: of those, those whose rows' was too.
    """
    kernels = [layer for layer in layers if layer.type not in SYNCHRONISATION]
    products = [counts for counts in map(_products, kernels) if counts[0]]
    return {
        "count": len(kernels),
        "products": len(products),
        "eight_bit": sum(back > 0 for _, back in products),
        "eight_bit_rows": sum(back > count for count, back in products),
        "fused": sum(len(layer.operators) > 1 for layer in kernels),
        "operators": len({operator for layer in kernels for operator in layer.operators}),
        "types": dict(Counter(layer.type for layer in kernels).most_common()),
        "precisions": dict(Counter("+".join(layer.precision) for layer in kernels).most_common()),
    }


def _products(layer: Layer) -> tuple[int, int]:
    """Products within a kernel, and conversions from 8 bits."""
    products = sum(".Gemm." in name for name in layer.operators)
    return products, sum(".DequantizeLinear." in name for name in layer.operators)


def _layer(match: re.Match[str]) -> Layer:
    precision = sorted(set(DATATYPE.findall(match["outputs"])))
    return Layer(
        match["name"], match["type"], tuple(precision), match["tactic"], tuple(OPERATOR.findall(match["metadata"]))
    )
