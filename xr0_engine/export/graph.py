"""ONNX graphs, written operator by operator: names are the checkpoint's, weights lie in one file that all graphs share.

Nothing is traced, so a graph of the published size takes seconds, its weights stream from the checkpoint to the file
without ever being in memory together, and every operator is one that ONNX defines.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from xr0_engine import __version__
from xr0_engine.model.quantization import MOST, ROW_FORMATS, SCALE, WEIGHT_DTYPES, Format, Quantization
from xr0_engine.types import CheckpointError

OPSET = 23
"""The first in which attention and RMSNorm are operators, which ONNX Runtime and TensorRT then run as such."""
IR_VERSION = 11
WEIGHTS_FILE = "weights.data"
INLINE_BYTES = 1024
"""Initializers up to this size stay in the graph."""
MOST_OF_SCALE = 0.01
"""By so much of itself a scale may be off in a graph's dtype: more than rounding to 16 bits makes of any normal one."""
ALIGNMENT = 4096
"""Offsets in the weights file are multiples of a page, so that readers can map it."""

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
    torch.int8: TensorProto.INT8,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}


class WeightFile:
    """Writes initializers, each once. read: checkpoint name -> tensor, asked for the first time a name is used. rows:
    checkpoint name -> its first axis."""

    def __init__(self, path: Path, read: Callable[[str], Tensor], rows: Callable[[str], int]) -> None:
        self._path, self._read, self.rows = path, read, rows
        self._file = path.open("wb")
        self._known: dict[str, TensorProto] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def checkpoint(self, name: str, dtype: torch.dtype) -> TensorProto:
        if name not in self._known:
            self.add(name, self._read(name).to(dtype))
        return self._known[name]

    def joined(self, name: str, parts: Sequence[str], dtype: torch.dtype) -> TensorProto:
        """Tensors of the checkpoint, one behind the other by their first axis. Raises CheckpointError for scales that
        this dtype has not."""
        if name not in self._known:
            whole = torch.cat([self._read(part) for part in parts])
            if name.endswith(SCALE) and bool(((whole.to(dtype).float() / whole - 1).abs() > MOST_OF_SCALE).any()):
                raise CheckpointError(
                    f"{parts[0]}: a scale of {float(whole.min()):.3g} is none in {dtype}: the weights of an output are "
                    "that small, or all zero; export in fp32 or bf16"
                )
            self.add(name, whole.to(dtype))
        return self._known[name]

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """The initializer of that name; the same tensor must come with it every time."""
        if name in self._known:
            return self._known[name]
        proto = TensorProto(name=name, data_type=ONNX_TYPES[tensor.dtype], dims=list(tensor.shape))
        data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        if data.nbytes <= INLINE_BYTES:
            proto.raw_data = data.tobytes()
        else:
            offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
            self._file.seek(offset)
            self._file.write(data.data)
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": self._path.name, "offset": offset, "length": data.nbytes}
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
        self._known[name] = proto
        return proto


class Graph:
    """A graph under construction. Values are their names; dtype is that of weights and activations.

    `scope` enters a module of the checkpoint: weights are named relative to it, and operators carry its name. step: of
    the flow, None outside. quantization: of a checkpoint whose layers have 8 bits; those whose rows have too round them
    by a constant, of the flow by the step's own.
    """

    def __init__(self, weights: WeightFile, dtype: torch.dtype, quantization: Quantization | None = None) -> None:
        self.dtype = dtype
        self._quantization = quantization
        self._rounded: dict[tuple[str, float, Format], str] = {}
        self.step: int | None = None
        self._weights = weights
        self._scope: list[str] = []
        self._nodes: list[NodeProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._count: Counter[str] = Counter()

    @contextmanager
    def scope(self, *modules: str) -> Iterator[None]:
        self._scope += modules
        yield
        del self._scope[-len(modules) :]

    def input(self, name: str, dtype: torch.dtype, *shape: int) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape))
        return name

    def output(self, name: str, value: str, dtype: torch.dtype, *shape: int) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"output.{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape))

    def weight(self, name: str) -> str:
        """The checkpoint's tensor of that name in this scope, in the graph's dtype."""
        return self._use(self._weights.checkpoint(".".join((*self._scope, name)), self.dtype))

    def table(self, name: str, tensor: Tensor) -> str:
        """A tensor derived from the checkpoint, under its own name in this scope."""
        return self._use(self._weights.add(".".join((*self._scope, name)), tensor))

    def constant(self, value: Tensor) -> str:
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        key = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + data).hexdigest()[:16]
        return self._use(self._weights.add(f"constant.{key}", value))

    def op(self, kind: str, *inputs: str, **attributes: int | float | str | list[int]) -> str:
        """Append an operator with one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: int | float | str | list[int]) -> list[str]:
        step = "" if self.step is None else f"step{self.step}."
        path = step + ".".join((*self._scope, kind))
        self._count[path] += 1
        name = f"{path}.{self._count[path]}"
        values = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        node = helper.make_node(kind, list(inputs), values, name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self._nodes.append(node)
        return values

    def cast(self, x: str, dtype: torch.dtype) -> str:
        return self.op("Cast", x, to=ONNX_TYPES[dtype])

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.constant(torch.tensor(shape)))

    def transpose(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, perm=list(order))

    def unsqueeze(self, x: str, axis: int) -> str:
        return self.op("Unsqueeze", x, self.constant(torch.tensor([axis])))

    def expand(self, x: str, *shape: int) -> str:
        return self.op("Expand", x, self.constant(torch.tensor(shape)))

    def concat(self, *parts: str, axis: int) -> str:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def split(self, x: str, *sizes: int, axis: int) -> list[str]:
        """Consecutive parts of x along an axis, of the given sizes."""
        if len(sizes) == 1:
            return [x]
        return self.ops("Split", len(sizes), x, self.constant(torch.tensor(sizes)), axis=axis)

    def take(self, x: str, index: str, axis: int = 0) -> str:
        return self.op("Gather", x, index, axis=axis)

    def linear(self, x: str, module: str, bias: bool = False) -> str:
        """x: (rows, in_features) -> (rows, out_features); the weight keeps the checkpoint's layout."""
        with self.scope(module):
            layer, eight = ".".join(self._scope), self._quantization
            format = None if eight is None else eight.layers.get(layer)
            if eight is not None and format in ROW_FORMATS:
                x = self._round(x, eight.largest[layer][self.step or 0], format)
            weight = self.weight("weight") if format is None else self._eight_bit_weight(format, layer)
            return self.op("Gemm", x, weight, *([self.weight("bias")] if bias else []), transB=1)

    def linears(self, x: str, *modules: str) -> list[str]:
        """Layers without biases that read the same x. By 8-bit weights alone they are one product: TensorRT-RTX 1.7
        breaks down where it joins them itself."""
        eight, layers = self._quantization, [".".join((*self._scope, module)) for module in modules]
        if eight is None or any(eight.layers.get(layer) != "int8-weights" for layer in layers):
            return [self.linear(x, module) for module in modules]
        both = "+".join(modules)
        with self.scope(both):
            y = self.op("Gemm", x, self._eight_bit_weight("int8-weights", *layers), transB=1)
        sizes = [self._weights.rows(f"{layer}.weight") for layer in layers]
        return self.split(y, *sizes, axis=1)

    def _eight_bit_weight(self, format: Format, *layers: str) -> str:
        """Of layers one behind the other, in this scope. Raises CheckpointError for scales that are none in the graph's
        dtype."""
        weight, scale = (
            self._weights.joined(".".join((*self._scope, kind)), [f"{layer}.{kind}" for layer in layers], dtype)
            for kind, dtype in (("weight", WEIGHT_DTYPES[format]), (SCALE, self.dtype))
        )
        return self.op("DequantizeLinear", self._use(weight), self._use(scale), axis=0)

    def _round(self, x: str, largest: float, format: Format) -> str:
        """To 8 bits and back; layers that share an input share this."""
        if (x, largest, format) not in self._rounded:
            scale = self.constant(torch.tensor(largest / MOST[format], dtype=self.dtype))
            # Whose type is what it is rounded to.
            zero = self.constant(torch.tensor(0, dtype=WEIGHT_DTYPES[format]))
            q = self.op("QuantizeLinear", x, scale, zero)
            self._rounded[x, largest, format] = self.op("DequantizeLinear", q, scale, zero)
        return self._rounded[x, largest, format]

    def rms_norm(self, x: str, module: str, eps: float, dtype: torch.dtype | None = None) -> str:
        """dtype: of x and the result; None is the graph's."""
        with self.scope(module):
            weight = self.weight("weight")
            weight = weight if dtype in (None, self.dtype) else self.cast(weight, dtype)
            return self.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)

    def layer_norm(self, x: str, module: str, eps: float) -> str:
        with self.scope(module):
            parts = self.weight("weight"), self.weight("bias")
            return self.op("LayerNormalization", x, *parts, axis=-1, epsilon=eps)

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def attention(self, q: str, k: str, v: str, mask: str | None = None) -> str:
        """q: (B, H, Q, D); k, v: (B, G, N, D); mask: bool, broadcastable to (B, H, Q, N). Returns (B, H, Q, D).

        The precision of the softmax is left to the runtime: TensorRT takes no graph that asks for one.
        """
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        return self.op("Attention", *inputs)

    def model(self, name: str, metadata: Mapping[str, str]) -> ModelProto:
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="xr0-engine",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _use(self, proto: TensorProto) -> str:
        self._initializers[proto.name] = proto
        return proto.name
