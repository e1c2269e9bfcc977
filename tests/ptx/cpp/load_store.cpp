// ld and st, global and shared.
#include "memory.h"

namespace ptx {
namespace {

template <Finder kFind, bool kWideAddress>
void load(Warp& warp, const Instruction& instruction, Lanes lanes) {
    uint64_t addresses[kLanes];
    load_addresses(warp, instruction, instruction.vec, kWideAddress, addresses);
    LaneBytes data;
    read_lanes(warp, instruction, lanes, addresses, instruction.size * instruction.vec, kFind, data);
    bytes_to_registers(warp, instruction, 0, lanes, data);
}

template <Finder kFind, bool kWideAddress>
void store_bytes(Warp& warp, const Instruction& instruction, Lanes lanes) {
    uint64_t addresses[kLanes];
    load_addresses(warp, instruction, instruction.vec, kWideAddress, addresses);
    LaneBytes data;
    registers_to_bytes(warp, instruction, 0, data);
    write_lanes(warp, instruction, lanes, addresses, instruction.size * instruction.vec, kFind, data);
}

}  // namespace

void add_global_memory(Ops& ops) {
    ops.add("ld.global", load<find_global, true>);
    ops.add("st.global", store_bytes<find_global, true>);
}

void add_shared_memory(Ops& ops) {
    ops.add("ld.shared", load<find_shared, false>);
    ops.add("st.shared", store_bytes<find_shared, false>);
}

}  // namespace ptx
