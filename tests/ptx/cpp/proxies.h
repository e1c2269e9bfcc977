// Shared memory read by the async proxy: wgmma and bulk copies.
#pragma once

#include "machine.h"
#include "races.h"

namespace ptx {

// What one instruction reads asynchronously, from its issue until it is waited for.
class AsyncRead {
  public:
    AsyncRead(Warp& warp, const Instruction& instruction);

    // At the issue. False: the bytes are out of bounds.
    bool issue(Block& block, uint32_t offset, uint32_t bytes);
    // When it has been waited for.
    void finish(Block& block, uint32_t offset, uint32_t bytes, const Issue& issued, Kind overwritten);

  private:
    // Calls function(stamp) for what was written since.
    template <class F>
    void for_writes_from(uint32_t offset, uint32_t bytes, Stamp floor, F function) const;
    void check_proxy(Stamp written);
    bool has_passed(Agent agent, uint32_t clock) const;

    Warp& warp_;
    const Instruction& instruction_;
    Touch touch_;
    Stamp checked_ = 0;
};

}  // namespace ptx
