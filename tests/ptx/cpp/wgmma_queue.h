// wgmma instructions that were issued and not waited for.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace ptx {

struct WgmmaQueue {
    // The part of one warp. a, b: descriptors; element_bytes: of a factor.
    struct Product {
        const Instruction* instruction = nullptr;
        void (*multiply)(Warp& warp, const Product& product) = nullptr;
        int element_bytes = 0;
        uint64_t a = 0, b = 0;
        bool accumulate = false, done = false;
        Issue issued;
    };
    std::vector<Product> products;
    // Numbers of products at which groups end.
    std::vector<size_t> groups;
    // Of each 64 bytes of the register file that wgmma uses: written since the last wgmma.fence.
    std::vector<uint8_t> unfenced;

    void reset(size_t places) {
        products.clear();
        groups.clear();
        unfenced.assign(places, 1);
    }
};

}  // namespace ptx
