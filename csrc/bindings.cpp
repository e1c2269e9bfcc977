#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native operators of xr0-engine; signatures and contracts are in _C.pyi.";
    module.def("instruction_sets", &instruction_sets);
    module.def("images_to_patches", &images_to_patches, "frames"_a, "sizes"_a, "out"_a, "patch_size"_a = 16,
               "temporal_patch_size"_a = 2, "merge_size"_a = 2, "vertical_first"_a = py::tuple(), "bgr"_a = false,
               "threads"_a = 1, "instruction_set"_a = py::none());
}
