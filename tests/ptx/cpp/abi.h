// The contract between the machine and whoever decodes PTX for it. The machine is C++20.
//
// A warp's registers are bytes in its register file. An operand is the offset of a register there, or -1 for none:
//   predicate         4 bytes, bit i is lane i's
//   up to 32 bits     32 lanes x 4 bytes; what lies above a narrower value is ignored when read, and not kept
//   64 bits           32 lanes x 8 bytes
// Registers other than predicates lie at multiples of 64. An instruction reads all its operands before it writes one,
// so that a destination may take the place of any source. Constants are registers that are set when a warp starts and
// are never written. Registers start as bytes 0xa5, shared memory as 0xff. Registers of a wgmma must not share their
// place with other registers, since it reads and writes them until its wait.
//
// Shared memory starts at address 0 of each block. Bits 24 and up of an address hold 1 + the block's rank in its
// cluster if it came from mapa, else 0: the own block.
#pragma once

#include <cstdint>

namespace ptx {

// Flags of records. Those that mean the same everywhere come first; the lower ones belong to a family of ops.
enum Flag : uint32_t {
    // ld, ld.param (param): extend by the sign; registers are of 64 bits though size is less.
    kSigned = 1,
    kWide = 2,
    // ld.shared, st.shared, atom.shared, mbarrier, cp.async.bulk: .shared::cluster, so mapped addresses are allowed.
    kCluster = 4,
    // atom, fence, mbarrier, barrier.cluster: their ordering; neither is relaxed. Scopes: none of the two is .gpu,
    // .sys.
    kAcquire = 8,
    kRelease = 16,
    kScopeBlock = 32,
    kScopeCluster = 64,
    // ldmatrix, stmatrix: .trans
    kTransposed = 128,
    // cp.async.bulk.wait_group.read; cp.async.mbarrier.arrive.noinc; bar.sync without .aligned (barrier.sync)
    kRead = 256,
    kNoIncrement = 256,
    kUnaligned = 256,
    // wgmma
    kARegisters = 1024,
    kATransposed = 2048,
    kBTransposed = 4096,
    kNegateA = 8192,
    kNegateB = 16384,
};

// One instruction. Operands: pool[first .. first + count), `written` registers that it writes first among them.
// predicate: offset of the predicate register, -1 for none; negated: 1 for @!p. target: of bra, the number of a record.
// size, vec: of memory, bytes of an element, elements. line: of the PTX, below 2^24.
struct Record {
    int32_t op, first, count, written;
    int32_t predicate, negated, target;
    uint32_t size, vec, flags, line, padding;
    int64_t imm, imm2;
};

// size: 4 or 8 bytes a lane; a predicate is one mask, size 0 (value: all 32 lanes' bits).
struct Constant {
    uint32_t offset, size;
    uint64_t value;
};

// A grid of a stream. cluster: blocks, 1 1 1 for none. parameters: as ld.param addresses them.
// early: may start as soon as every block of the grid before it has executed griddepcontrol.launch_dependents or is
// done; otherwise when the one before it has completed. cooperative: all blocks must be resident at once.
struct Grid {
    const struct Program* program;
    uint32_t blocks[3], cluster[3];
    uint32_t warps, shared_bytes;
    const uint8_t* parameters;
    uint64_t parameter_bytes;
    uint32_t early, cooperative;
};

// Bytes [low, high) of global memory that kernels may touch. They may not overlap; order is free.
struct Range {
    uint64_t low, high;
};

enum AsyncMode : uint32_t { kAtWait = 0, kAtOnce = 1, kAtRandom = 2 };

// check: bounds, alignment, unwritten and unwaited memory, warp synchronisation. race: orders of accesses (with check).
// asynchronous: when copies and wgmma happen. seed: 0 runs warps in turn. resident: blocks at a time, of all grids.
// quantum: most instructions of a warp's turn. budget: most instructions of a run.
struct Settings {
    uint32_t check, race, asynchronous, resident;
    uint64_t seed, quantum, budget;
};

enum Status : int32_t { kFinished = 0, kFault = 1, kBudget = 2, kDeadlock = 3 };

// executed: instructions of warps; matrix_products: of 16 x 8 x k.
struct Totals {
    uint64_t executed, matrix_products;
};

// What was found. kind: a number for machine_kind_name. line, grid: of the access that was executed second, grid
// counted from 0 in the run; other_line, other_grid: of the first one, or 0, -1. count: how often. Each (kind, line,
// other_line, grid, other_grid) is one report, at most 1000 of a run; text: of the first, for humans, without PTX
// lines' meaning.
struct Report {
    int32_t kind, grid, other_grid;
    uint32_t line, other_line, padding;
    uint64_t count;
    char text[232];
};

// A tensor map of TMA, 128 bytes at a multiple of 64, in place of the driver's (which is opaque). Dimension 0 is the
// innermost. type: TensorMapType. strides: bytes from one index to the next, of dimensions 1 to 4. box, element_strides
// as cuTensorMapEncodeTiled has them. swizzle: 0 none, 1: 32, 2: 64, 3: 128 bytes. Interleaving is none.
// fill_nan: what lies outside is NaN rather than 0. magic: kTensorMapMagic.
struct TensorMap {
    uint64_t address;
    uint64_t strides[4];
    uint32_t sizes[5];
    uint16_t box[5], element_strides[5];
    uint32_t magic;
    uint8_t dimensions, type, swizzle, fill_nan;
    uint8_t padding[40];
};
static_assert(sizeof(TensorMap) == 128);
constexpr uint32_t kTensorMapMagic = 0x70616d74;
enum TensorMapType : uint8_t { kU8, kU16, kU32, kS32, kU64, kS64, kF16, kF32, kF64, kBF16 };

extern "C" {
// The number of an op, -1 if there is none of that name.
int32_t machine_op(const char* name);

// Copies everything. register_bytes: of one warp.
Program* program_new(const Record* records, int32_t count, const int32_t* pool, int32_t pool_count,
                     uint32_t register_bytes, const Constant* constants, int32_t constant_count);
void program_free(Program* program);

struct Machine* machine_new();
void machine_free(Machine* machine);

// Runs grids one behind the other as a stream does. A fault, with its text, is the last of the reports.
Status machine_run(Machine* machine, const Grid* grids, int32_t grid_count, const Range* ranges, int32_t range_count,
                   const Settings* settings, Totals* totals);
// Of the last run.
int32_t machine_report_count(const Machine* machine);
const Report* machine_reports(const Machine* machine);
// "global-race" and so on; null behind the last.
const char* machine_kind_name(int32_t kind);
}

}  // namespace ptx

// Ops. d: written first. p: predicate registers. T stands for each type in braces. PTX modifiers that change no result
// here (rounding to nearest where it is the only one, .approx, .full, cache operators and hints, .uni, .nc, .aligned,
// .weak, .noftz) are left out of names. Approximate functions are computed in float64 and rounded once.
//
// Moves
//   mov.{32 64 pred} d, a              selp.{32 64} d, a, b, p
//   pack d, a...   unpack d..., a      size: bytes of the whole; parts are equal, lowest first; d may be -1 in unpack
//   param d                            ld.param: imm: offset in the parameters, size, kSigned, kWide
//   param.address d                    64 bits; imm: offset in the parameters; for tensor maps among them
//   special d                          imm: Special below; kWide for 64 bits
//   nop                                prefetch, discard, applypriority, ...
//   nanosleep                          gives its turn away
// Predicates and branches
//   not.pred and.pred or.pred xor.pred d, p[, p]
//   bra (target)    ret    trap        ret: exit too
// Integers. B: {16 32 64}, I: {s16 u16 s32 u32 s64 u64}
//   add.B sub.B mul.lo.B and.B or.B xor.B d, a, b      not.B neg.B d, a      mad.lo.B d, a, b, c
//   add.16x2 d, a, b                                   two halves of 32 bits
//   shl.B d, a, b  shr.I d, a, b                       b: 32 bits; shifts are clamped
//   mul.hi.I div.I rem.I min.I max.I d, a, b           abs.{s16 s32 s64} d, a
//   mul.wide.{s16 u16 s32 u32} d, a, b                 mad.wide.{s16 u16 s32 u32} d, a, b, c   mad.hi.{s32 u32}
//   bfe.{s32 u32 s64 u64} d, a, b, c                   bfi.{32 64} d, a, b, c, n
//   popc clz brev bfind.{32 64; bfind: s32 u32 s64 u64} d, a     (popc.32, clz.32, ...: d of 32 bits but in brev.64)
//   prmt.b32 d, a, b, c     shf.{l r}.{wrap clamp}.b32 d, a, b, c     dp4a.{s32 u32}.{s32 u32} d, a, b, c
//   lop3.b32 d, a, b, c                                imm: the table
// Comparisons to a predicate. b types count as u
//   setp.{eq ne lt le gt ge}.I p, a, b
//   setp.{eq ne lt le gt ge equ neu ltu leu gtu geu num nan}[.ftz].{f16 bf16 f32 f64} p, a, b     (.ftz: f32)
// Floats. F: {f32 f64 f16 bf16 f16x2 bf16x2}
//   add.F sub.F mul.F d, a, b     fma.F d, a, b, c     neg.F abs.F d, a     min.F max.F min.NaN.F max.NaN.F d, a, b
//   div sqrt rcp .{f32 f64}; rsqrt ex2 lg2 sin cos tanh .f32; ex2 tanh .{f16 bf16 f16x2 bf16x2}; copysign.{f32 f64}
//   any of them for f32 with .ftz: add.ftz.f32, max.NaN.ftz.f32    fma.relu.{f16 bf16 f16x2 bf16x2}
//   add.f32x2 sub.f32x2 mul.f32x2 fma.f32x2            64-bit registers
//   add.f32.T sub.f32.T d, a, c   fma.f32.T d, a, b, c T: {f16 bf16}, the type of a and b
// Conversions: the PTX name as it is written, .ftz too (cvt.rn.bf16x2.f32, cvt.rzi.s32.f32, cvt.rmi.ftz.f32.f32,
// cvt.sat.s8.s32, cvt.rn.satfinite.e4m3x2.f32, cvt.rna.tf32.f32, ...); two-source forms d, a, b with a in the upper
// half.
//   A destination narrower than its register is extended by its type; 64-bit types need 64-bit registers, others not.
// Exchange in a warp. mask: register with the member mask
//   shfl d, a, b, c, mask[, p]         imm: 0 up, 1 down, 2 bfly, 3 idx.  written: 1; p is written too
//   vote.ballot d, p, mask   vote.{all any uni} p, p, mask     match.any.{32 64} d, a, mask     activemask d
//   redux.{add and or xor}.32 redux.{min max}.{s32 u32} d, a, mask     elect d, p, mask (written 2; d may be -1)
//   bar.warp.sync mask
// Barriers of a block. n: threads, -1 for all
//   bar.sync id, n   bar.arrive id, n   bar.red.{popc and or} d, id, n, p      (d: predicate but for popc)
// Memory: imm: offset of the address
//   ld.global d..., address    st.global v..., address    ld.shared, st.shared: the same; address of 32 bits
//   atom.{global shared}.O.T [d,] address, a[, b]      d if written is 1. size: of T. O: add min max inc dec and or xor
//     exch cas load store (load: no a; ld.acquire, ld.relaxed, ld.volatile). vec: elements, with vec d, a each.
//     T: b32 b64 (and or xor exch cas load store, load store also b8 b16 and cas b16), u32 s32 u64 s64 (add min max,
//     u32 inc dec), f32 f64 f16 bf16 f16x2 bf16x2 (add; 16-bit ones min max)
//   fence                              kAcquire, kRelease, scope: fence.acq_rel has both; fence.sc, membar too
//   fence.proxy.async                  imm: 1 shared, 2 global, 3 both
//   ldmatrix.m8n8.b16 d..., address    stmatrix.m8n8.b16 v..., address   vec: matrices; kTransposed
//   cp.async dst, src, bytes, p        size 4 8 16; imm, imm2: offsets of dst and src; bytes, p (ignore-src): or -1
//   cp.async.commit_group   cp.async.wait_group (imm)   cp.async.wait_all   cp.async.mbarrier.arrive address
// Tensor cores: operands as PTX has them: D, A, B, C
//   mma.SHAPE.D.A.B.C                  mma.m16n8k16.f32.bf16.bf16.f32, ...; .satfinite at the end for s32
//   wgmma.D.A.B d..., A, B, p          imm: n. A: 4 registers (kARegisters) or a descriptor; p: scale-d, -1: true
//   wgmma.fence   wgmma.commit_group   wgmma.wait_group (imm)
// mbarrier: address: 32 bits, imm: its offset; state: 64 bits or -1
//   mbarrier.init address, n   mbarrier.inval address   mbarrier.arrive[_drop] state, address, n (or -1: 1)
//   mbarrier.arrive[_drop].expect_tx state, address, bytes   mbarrier.expect_tx, mbarrier.complete_tx address, bytes
//   mbarrier.{test_wait try_wait} p, address, state   mbarrier.{test_wait try_wait}.parity p, address, parity
//   mbarrier.pending_count d, state
//   arrive: kRelease and wait: kAcquire unless .relaxed
// Bulk copies (TMA). mask: .multicast::cluster, or -1. vec: coordinates. kCluster where dst, mbar are shared::cluster
//   cp.async.bulk.shared.global dst, src, bytes, mbar, mask
//   cp.async.bulk.shared.shared dst, src, bytes, mbar
//   cp.async.bulk.global.shared dst, src, bytes
//   cp.async.bulk.tensor.shared.global dst, map, mbar, mask, c0, ...
//   cp.async.bulk.tensor.global.shared map, src, c0, ...
//   cp.reduce.async.bulk.tensor.{add min max and or xor} map, src, c0, ...
//   cp.async.bulk.commit_group   cp.async.bulk.wait_group (imm; kRead)
// Clusters and grids
//   mapa d, address, rank   getctarank d, address   barrier.cluster.arrive   barrier.cluster.wait
//   setmaxnreg (imm)   griddepcontrol.wait   griddepcontrol.launch_dependents
namespace ptx {
enum Special : int64_t {
    kTidX,
    kTidY,
    kTidZ,
    kNtidX,
    kNtidY,
    kNtidZ,
    kCtaidX,
    kCtaidY,
    kCtaidZ,
    kNctaidX,
    kNctaidY,
    kNctaidZ,
    kLaneid,
    kWarpid,
    kNwarpid,
    kClusterCtarank,
    kClusterNctarank,
    kClusterCtaidX,
    kClusterCtaidY,
    kClusterCtaidZ,
    kClusterNctaidX,
    kClusterNctaidY,
    kClusterNctaidZ,
    kClusteridX,
    kClusteridY,
    kClusteridZ,
    kNclusteridX,
    kNclusteridY,
    kNclusteridZ,
    kIsExplicitCluster,
    kLanemaskEq,
    kLanemaskLt,
    kLanemaskLe,
    kLanemaskGt,
    kLanemaskGe,
    kClock,
    kSmid,
    kGridid
};
}  // namespace ptx
