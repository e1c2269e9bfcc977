#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native operators of xr0-engine; signatures and contracts are in _C.pyi.";
    module.def("instruction_sets", &instruction_sets);
    module.def("images_to_patches", &images_to_patches, "frames"_a, "sizes"_a, "out"_a, "patch_size"_a = 16,
               "temporal_patch_size"_a = 2, "merge_size"_a = 2, "vertical_first"_a = py::tuple(), "bgr"_a = false,
               "threads"_a = 1, "instruction_set"_a = py::none());
    module.def("cuda_fault", &cuda_fault, "device"_a = 0);
    module.def("resize_table", &resize_table, "in_size"_a, "out_size"_a);
    module.def("images_to_patches_cuda", &images_to_patches_cuda, "frames"_a, "sizes"_a, "columns"_a, "rows"_a, "out"_a,
               "dtype"_a, "temporal_patch_size"_a, "merge_size"_a, "vertical_first"_a, "slices"_a, "bgr"_a, "device"_a,
               "stream"_a);
}
