#include "number_formats.h"

#include <algorithm>

namespace ptx {

float SmallFormat::largest() const {
    const int exponents = (1 << exponent) - 1 - (infinities ? 1 : 0);
    // Without infinities, NaN takes the highest mantissa alone.
    const int mantissas = (1 << mantissa) - 1 - (!infinities && nan ? 1 : 0);
    return std::ldexp(1.0f + std::ldexp(static_cast<float>(mantissas), -mantissa), exponents - bias);
}

float SmallFormat::decode(uint32_t code) const {
    const uint32_t fraction = code & ((1u << mantissa) - 1);
    const uint32_t raised = code >> mantissa & ((1u << exponent) - 1);
    const uint32_t highest = (1u << exponent) - 1;
    const float sign = code >> (exponent + mantissa) & 1 ? -1.0f : 1.0f;
    if (infinities && raised == highest) {
        return fraction ? bits_of<float>(kCanonicalNan) : sign * bits_of<float>(kInfinity);
    }
    if (nan && !infinities && raised == highest && fraction == (1u << mantissa) - 1) {
        return bits_of<float>(kCanonicalNan);
    }
    const float scaled = std::ldexp(static_cast<float>(fraction), -mantissa);
    return sign * (raised ? std::ldexp(1.0f + scaled, static_cast<int>(raised) - bias) : std::ldexp(scaled, 1 - bias));
}

uint32_t SmallFormat::encode(float value) const {
    const uint32_t sign = std::signbit(value) ? 1u << (exponent + mantissa) : 0;
    if (value != value) {
        // Formats without a NaN have their largest value in its place.
        return (1u << (exponent + mantissa)) - 1;
    }
    const float magnitude = std::min(std::fabs(value), largest());
    int power = 0;
    std::frexp(magnitude, &power);
    const int step = std::max(power - 1, 1 - bias) - mantissa;
    const float rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, -step)), step);
    if (rounded == 0) {
        return sign;
    }
    std::frexp(rounded, &power);
    const int raised = std::max(power - 1, 1 - bias);
    const auto units = static_cast<uint32_t>(std::ldexp(rounded, mantissa - raised));
    // The leading one counts as one more exponent; subnormal values have none.
    return sign | ((static_cast<uint32_t>(raised + bias - 1) << mantissa) + units);
}

}  // namespace ptx
