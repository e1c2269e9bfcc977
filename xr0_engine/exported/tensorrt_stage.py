"""One engine in TensorRT for RTX or plain TensorRT. Needs a GPU of the engine's kind; not yet run on one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xr0_engine.exported.onnx_stage import check_inputs

LIBRARIES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Builder -> Python module. Their interfaces are the same as far as we go."""
REMEDIES = {
    "tensorrt-rtx": "pip install 'xr0-engine[tensorrt]'",
    "tensorrt": "install NVIDIA TensorRT 10 with its Python module (JetPack brings it on a Jetson)",
}


def load_library(builder: str) -> Any:
    """The Python module of a builder. Raises ValueError for an unknown one, RuntimeError with the remedy for one that
    is not installed."""
    if builder not in LIBRARIES:
        raise ValueError(f"builder: expected {', '.join(LIBRARIES)}; got {builder!r}")
    try:
        return import_module(LIBRARIES[builder])
    except ModuleNotFoundError:
        raise RuntimeError(f"builder {builder}: {LIBRARIES[builder]} is not installed: {REMEDIES[builder]}") from None


@lru_cache(maxsize=1)
def make_logger(library: Any) -> Any:
    """The process's only logger: TensorRT takes the first and ignores others. `sink(severity, message)` may be set."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.sink: Callable[[Any, str], None] = lambda severity, message: None

        def log(self, severity: Any, message: str) -> None:
            self.sink(severity, message)

    return Logger()


class TensorRTStage:
    """Called with inputs by name on the engine's GPU, queues the work on torch's current stream and returns outputs."""

    def __init__(self, path: Path, builder: str, device: torch.device) -> None:
        """Raises RuntimeError for an engine that this library or GPU does not take."""
        library = load_library(builder)
        errors: list[str] = []
        logger = make_logger(library)
        logger.sink = lambda severity, message: (
            errors.append(message) if severity <= library.ILogger.Severity.ERROR else None
        )
        with torch.cuda.device(device):
            # The runtime must outlive its engine.
            self._runtime = library.Runtime(logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise RuntimeError(f"{path} does not load here, build it for this GPU: {'; '.join(errors)}")
            self._context = self._engine.create_execution_context()
        types = {
            library.DataType.FLOAT: torch.float32,
            library.DataType.HALF: torch.float16,
            library.DataType.BF16: torch.bfloat16,
            library.DataType.INT64: torch.int64,
            library.DataType.BOOL: torch.bool,
        }
        self._device = device
        self._inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
            kind = types[self._engine.get_tensor_dtype(name)], tuple(self._engine.get_tensor_shape(name))
            (self._inputs if is_input else self._outputs)[name] = kind

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises ValueError for inputs of other names, shapes or dtypes than the engine's, RuntimeError if it fails."""
        check_inputs(inputs, self._inputs)
        held = {name: inputs[name].contiguous() for name in self._inputs}
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=self._device) for name, (dtype, shape) in self._outputs.items()
        }
        for name, tensor in (*held.items(), *outputs.items()):
            self._context.set_tensor_address(name, tensor.data_ptr())
        # On the stream that torch allocates on, so that memory freed after this call is not reused too early.
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError(f"the TensorRT engine failed on {self._device}")
        return outputs
