// Pillow's bicubic resize of 8-bit images, as tables: which input samples make an output sample, and how much of each.
//
// Pillow stretches the kernel by the scale when it shrinks an image, normalises the weights in double, rounds them to
// 22 fractional bits, and rounds and clips the sum to 8 bits after each of its two passes (columns, then rows).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "xr0/rows.h"

namespace xr0 {

class Axis {
  public:
    Axis(int32_t in, int32_t out) : in_(in), outputs_(round_up(out, kOutputStep)) {
        const double scale = static_cast<double>(in) / out;
        const double stretch = std::max(scale, 1.0);
        const double support = 2.0 * stretch;
        std::vector<int32_t> count(static_cast<std::size_t>(out));
        first_.resize(static_cast<std::size_t>(outputs_));
        for (int32_t i = 0; i < out; ++i) {
            const double center = (i + 0.5) * scale;
            first_[i] = std::max(static_cast<int32_t>(center - support + 0.5), 0);
            count[i] = std::min(static_cast<int32_t>(center + support + 0.5), in) - first_[i];
        }
        taps_ = round_up(*std::max_element(count.begin(), count.end()), kTapStep);
        weights_.resize(static_cast<std::size_t>(outputs_) * taps_);
        std::vector<double> window(static_cast<std::size_t>(taps_));
        for (int32_t i = 0; i < out; ++i) {
            const double center = (i + 0.5) * scale;
            double sum = 0.0;
            for (int32_t tap = 0; tap < count[i]; ++tap) {
                window[tap] = bicubic((tap + first_[i] - center + 0.5) * (1.0 / stretch));
                sum += window[tap];
            }
            for (int32_t tap = 0; tap < count[i]; ++tap) {
                const double fixed = window[tap] / sum * (1 << kFractionBits);
                weights_[static_cast<std::size_t>(i) * taps_ + tap] =
                    static_cast<int32_t>(fixed < 0.0 ? fixed - 0.5 : fixed + 0.5);
            }
        }
        split();
    }

    AxisView view() const {
        return {in_, outputs_, taps_, first_.data(), weights_.data(), digits_.data(), parts_.data()};
    }

  private:
    static int32_t round_up(int32_t value, int32_t step) { return (value + step - 1) / step * step; }

    static double bicubic(double x) {
        constexpr double a = -0.5;
        x = std::fabs(x);
        if (x < 1.0) {
            return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
        }
        return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
    }

    // The same weights in the number formats of the vector instructions. Sums are exact modulo 2^32 in either form.
    void split() {
        digits_.resize(weights_.size() / kTapStep * kParts);
        parts_.resize(digits_.size());
        for (std::size_t i = 0; i < weights_.size(); ++i) {
            const std::size_t group = i / kTapStep * kParts;
            const std::size_t tap = i % kTapStep;
            int32_t rest = weights_[i];
            for (std::size_t digit = 0; digit < kParts; ++digit) {
                const auto low = static_cast<int8_t>(rest & 0xff);
                put(low, digits_[group + digit], tap);
                rest = (rest - low) / 256;
            }
            const auto low = static_cast<int16_t>(weights_[i] & 0xffff);
            put(low, parts_[group + tap % 2], tap / 2);
            put(static_cast<int8_t>((weights_[i] - low) / 65536), parts_[group + 2], tap);
        }
    }

    // Number `at` of those that share the word.
    template <typename T>
    static void put(T value, int32_t& word, std::size_t at) {
        std::memcpy(reinterpret_cast<char*>(&word) + at * sizeof value, &value, sizeof value);
    }

    int32_t in_;
    int32_t outputs_;
    int32_t taps_ = 0;
    std::vector<int32_t> first_;
    std::vector<int32_t> weights_;
    std::vector<int32_t> digits_;
    std::vector<int32_t> parts_;
};

}  // namespace xr0
