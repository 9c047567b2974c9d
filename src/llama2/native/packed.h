// Weights repacked for the instruction set: panels of kLanes rows, one lane a row.
//
// A panel holds, each part from a 64-byte boundary (P = kLanes, K = columns, G = columns a group):
//     d, dmin   K/256 × P half precision numbers (Scales::super*)
//     scales    K/G × P half precision numbers (Scales::half*) or bytes (Scales::super*)
//     minima    likewise, where the format has them
//     weights   K/G groups; in a group, byte vectors of P lanes × 4 bytes
//                 8 bits: vector j holds columns 4j…4j+3, plus kByteBias
//                 4 bits: vector j holds columns 8j…8j+3 in the low halves and 8j+4…8j+7 in the high halves
//                 5 and 6 bits: the low four like that; then one vector with the rest, columns 4j…4j+3 at bit j or 2j
// Rows past the end of the matrix are zero.
#pragma once

#include <vector>

#include "formats.h"
#include "simd.h"

namespace llama2 {

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Panel {
    int64_t d = 0, dmin = 0, scales = 0, minima = 0, weights = 0, bytes = 0;  // offsets of the parts, and the whole

    Panel() = default;
    Panel(Format format, int64_t columns) {
        const auto& f = info(format);
        const bool super = f.scales == Scales::super || f.scales == Scales::super_min;
        const bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
        const int64_t scale_part = align64(columns / f.group * simd::kLanes * (super ? 1 : 2));
        const int64_t d_part = super ? align64(columns / 256 * simd::kLanes * 2) : 0;
        dmin = d + d_part;
        scales = dmin + (has_min ? d_part : 0);
        minima = scales + scale_part;
        weights = minima + (has_min ? scale_part : 0);
        bytes = weights + align64(columns * simd::kLanes * f.bits / 8);
    }
};

inline int64_t panels(int64_t rows) { return (rows + simd::kLanes - 1) / simd::kLanes; }

inline int64_t packed_bytes(Format format, int64_t rows, int64_t columns) {
    row_bytes(format, columns);  // refuses columns that do not divide
    return panels(rows) * Panel(format, columns).bytes;
}

// `out` has packed_bytes(…) bytes, zeroed by this function.
inline void pack(Format format, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
    const auto& f = info(format);
    const Panel panel(format, columns);
    const int64_t stride = row_bytes(format, columns);
    const int groups_per_block = f.block / f.group;
    const int vector = 4 * simd::kLanes, group_bytes = f.group * simd::kLanes * f.bits / 8;
    const bool super = f.scales == Scales::super || f.scales == Scales::super_min;
    const bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
    const auto put_u16 = [](uint8_t* p, int64_t i, uint16_t x) { std::memcpy(p + 2 * i, &x, 2); };
    Fields fields;
    for (int64_t first = 0; first < rows; first += simd::kLanes, out += panel.bytes) {
        std::memset(out, 0, size_t(panel.bytes));
        for (int lane = 0; lane < simd::kLanes && first + lane < rows; ++lane) {
            const uint8_t* row = data + (first + lane) * stride;
            for (int64_t block = 0; block < columns / f.block; ++block) {
                unpack(f.format, row + block * f.bytes, fields);
                for (int i = 0; i < f.block; ++i) {
                    const int64_t group = block * groups_per_block + i / f.group;
                    const int column = i % f.group, quad = column / 4, byte = lane * 4 + column % 4;
                    uint8_t* at = out + panel.weights + group * group_bytes + byte;
                    const auto q = uint8_t(fields.q[i]);
                    if (f.bits == 8) {
                        at[quad * vector] = uint8_t(q + simd::kByteBias);
                    } else {
                        at[quad / 2 * vector] |= uint8_t((q & 15) << quad % 2 * 4);
                        if (f.bits > 4) at[f.group / 8 * vector] |= uint8_t(q >> 4 << quad * (f.bits - 4));
                    }
                }
                for (int g = 0; g < groups_per_block; ++g) {
                    const int64_t at = (block * groups_per_block + g) * simd::kLanes + lane;
                    if (super) {
                        out[panel.scales + at] = uint8_t(fields.scale[g]);
                        if (has_min) out[panel.minima + at] = fields.minimum[g];
                    } else {
                        put_u16(out + panel.scales, at, fields.d);
                        if (has_min) put_u16(out + panel.minima, at, fields.m);
                    }
                }
                if (super) {
                    put_u16(out + panel.d, block * simd::kLanes + lane, fields.d);
                    if (has_min) put_u16(out + panel.dmin, block * simd::kLanes + lane, fields.m);
                }
            }
        }
    }
}

}  // namespace llama2
