// Decoded programs: what records become when they are loaded.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.h"

namespace ptx {

// Bit i is lane i's.
using Lanes = uint32_t;
constexpr int kLanes = 32;
constexpr Lanes kAllLanes = 0xffffffff;

struct Warp;
struct Instruction;

// lanes: those that execute it, at least one.
using Handler = void (*)(Warp& warp, const Instruction& instruction, Lanes lanes);

// When something asynchronous was issued: the number of accesses so far, and the warp's clock.
struct Issue {
    uint32_t number = 0, clock = 0;
};

// What the scheduler does about an instruction besides calling its handler.
enum class Control : uint8_t {
    kPlain,
    kBranch,
    kReturn,
    // The handler may block the warp or end its turn.
    kYields,
    // Otherwise plain.
    kWgmma,
};

struct Instruction {
    Handler handler = nullptr;
    const int32_t* operands = nullptr;
    int64_t imm = 0, imm2 = 0;
    int32_t predicate = -1, target = 0;
    uint32_t line = 0, flags = 0;
    uint16_t size = 0, vec = 0, count = 0, written = 0;
    bool negated = false;
    // One of its operands is a register that wgmma uses, and it is no wgmma.
    bool touches_wgmma = false;
    // It copies a register, no constant, into one that wgmma uses or that is copied into one.
    bool copies_to_wgmma = false;
    Control control = Control::kPlain;
    // The range of global memory that it touched last.
    mutable uint32_t last_range = 0;

    bool has(uint32_t flag) const { return flags & flag; }
};

struct Program {
    std::vector<Instruction> code;
    std::vector<int32_t> pool;
    std::vector<Constant> constants;
    uint32_t register_bytes = 0;
    bool uses_wgmma = false;
};

// All ops by name. Families of ops add theirs when the library is loaded.
class Ops {
  public:
    struct Op {
        std::string name;
        Handler handler;
        Control control;
    };

    static Ops& all();

    void add(const std::string& name, Handler handler, Control control = Control::kPlain);
    int32_t find(const std::string& name) const;
    const std::vector<Op>& list() const { return list_; }

  private:
    Ops();

    std::vector<Op> list_;
    std::unordered_map<std::string, int32_t> numbers_;
};

// One function for each family of ops.
void add_moves(Ops& ops);
void add_integers(Ops& ops);
void add_bit_fields(Ops& ops);
void add_comparisons(Ops& ops);
void add_floats(Ops& ops);
void add_halves(Ops& ops);
void add_integer_conversions(Ops& ops);
void add_float_conversions(Ops& ops);
void add_packed_conversions(Ops& ops);
void add_exchange(Ops& ops);
void add_barriers(Ops& ops);
void add_global_memory(Ops& ops);
void add_shared_memory(Ops& ops);
void add_atomics(Ops& ops);
void add_fences(Ops& ops);
void add_matrices(Ops& ops);
void add_copies(Ops& ops);
void add_matrix_products(Ops& ops);
void add_warpgroup_products(Ops& ops);
void add_wgmma_queue(Ops& ops);
void add_mbarriers(Ops& ops);
void add_bulk_copies(Ops& ops);
void add_tensor_copies(Ops& ops);
void add_clusters(Ops& ops);
void add_grids(Ops& ops);

}  // namespace ptx
