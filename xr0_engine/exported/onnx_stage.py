"""One exported graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.bfloat16: 16}
"""TensorProto's numbers, by which ONNX Runtime is told a type that NumPy lacks."""


class OnnxStage:
    """Called with inputs by name, contiguous on the device, returns outputs by name. Tensors are bound, not copied."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises NotImplementedError for a device or precision that this ONNX Runtime does not run, ValueError for a
        graph that it cannot read."""
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        provider = PROVIDERS[device.type]
        if provider not in ort.get_available_providers():
            raise NotImplementedError(
                f"device {device}: this ONNX Runtime has no {provider} (pip install onnxruntime-gpu), use device='cpu'"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Warnings tell of weights that were folded, errors come as exceptions.
        options.log_severity_level = 4
        place = {"device_id": device.index or 0} if device.type == "cuda" else {}
        try:
            self._session = ort.InferenceSession(path, options, providers=[(provider, place)])
        except errors.NotImplemented as error:
            raise NotImplementedError(
                f"{path}: ONNX Runtime does not run this precision on {device}, use fp32 or fp16 ({error})"
            ) from None
        except (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf) as error:
            raise ValueError(f"{path} cannot be read by ONNX Runtime: {error}") from None
        self._device = device
        self._inputs = {node.name: (TORCH_TYPES[node.type], tuple(node.shape)) for node in self._session.get_inputs()}
        self._outputs = {node.name: (TORCH_TYPES[node.type], tuple(node.shape)) for node in self._session.get_outputs()}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises ValueError for inputs of other names, shapes or dtypes than the graph's."""
        check_inputs(inputs, self._inputs)
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=self._device) for name, (dtype, shape) in self._outputs.items()
        }
        binding = self._session.io_binding()
        held = {name: inputs[name].contiguous() for name in self._inputs}
        for bind, tensors in ((binding.bind_input, held), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                device = self._device.type, self._device.index or 0
                bind(name, *device, ONNX_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        return outputs


def check_inputs(inputs: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Raises ValueError that names every input at fault."""
    faults = [f"{name} is missing" for name in expected if name not in inputs]
    faults += [f"{name} is unknown" for name in inputs if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name in inputs and (inputs[name].dtype, tuple(inputs[name].shape)) != (dtype, shape):
            given = inputs[name]
            faults.append(f"{name}: expected {dtype} {shape}, got {given.dtype} {tuple(given.shape)}")
    if faults:
        raise ValueError("; ".join(faults))
