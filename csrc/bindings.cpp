#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native operators of xr0-engine; signatures and contracts are in _C.pyi.";
    module.def("frame_to_patches", &frame_to_patches, "frame"_a, "out"_a, "patch_size"_a = 16,
               "temporal_patch_size"_a = 2, "merge_size"_a = 2);
}
