#include "machine.h"

namespace ptx {

Ops& Ops::all() {
    static Ops ops;
    return ops;
}

Ops::Ops() {
    for (const auto family : {add_moves,
                              add_integers,
                              add_bit_fields,
                              add_comparisons,
                              add_floats,
                              add_halves,
                              add_integer_conversions,
                              add_float_conversions,
                              add_packed_conversions,
                              add_exchange,
                              add_barriers,
                              add_global_memory,
                              add_shared_memory,
                              add_atomics,
                              add_fences,
                              add_matrices,
                              add_copies,
                              add_matrix_products,
                              add_warpgroup_products,
                              add_wgmma_queue,
                              add_mbarriers,
                              add_bulk_copies,
                              add_tensor_copies,
                              add_clusters,
                              add_grids}) {
        family(*this);
    }
}

void Ops::add(const std::string& name, Handler handler, Control control) {
    if (!numbers_.emplace(name, static_cast<int32_t>(list_.size())).second) {
        throw Fault({}, "two ops are named " + name);
    }
    list_.push_back({name, handler, control});
}

int32_t Ops::find(const std::string& name) const {
    const auto at = numbers_.find(name);
    return at == numbers_.end() ? -1 : at->second;
}

}  // namespace ptx
