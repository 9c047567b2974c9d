// Weights repacked for the instruction set: panels of kLanes rows, one lane a row.
//
// A panel (P = kLanes rows) is one stream of records, so that a product with one token reads memory straight on. A
// record is a block of 256 columns in K formats, and one group in the others. It holds:
//     d, dmin    P half precision numbers (Scales::super*)
//     scales     for each group P half precision numbers (Scales::half*) or bytes (Scales::super*)
//     minima     likewise, where the format has them
//     weights    for each group byte vectors of P lanes × 4 bytes
//
// Of a group's byte vectors, number j holds these columns:
//     8 bits            4j…4j+3, plus kByteBias
//     4 bits            8j…8j+3 in the low halves and 8j+4…8j+7 in the high halves
//     5 and 6 bits      the low four like that; then one vector with the rest, columns 4j…4j+3 at bit j or 2j
//
// A panel ends at a 64-byte boundary. Rows past the end of the matrix are zero.
#pragma once

#include <vector>

#include "formats.h"
#include "simd.h"

namespace llama2 {

// Where the parts of a record are, in bytes from its start, and how many groups it has.
struct Record {
    int groups, dmin, scales, minima, weights, group_bytes, bytes;

    constexpr explicit Record(const FormatInfo& f) {
        const bool super = f.scales == Scales::super || f.scales == Scales::super_min;
        const bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
        groups = f.block / f.group;
        dmin = super ? 2 * simd::kLanes : 0;
        scales = dmin * (has_min ? 2 : 1);
        minima = scales + groups * simd::kLanes * (super ? 1 : 2);
        weights = has_min ? 2 * minima - scales : minima;
        group_bytes = f.group * simd::kLanes * f.bits / 8;
        bytes = weights + groups * group_bytes;
    }
};

inline int64_t panel_bytes(Format format, int64_t columns) {
    return (columns / info(format).block * Record(info(format)).bytes + 63) / 64 * 64;
}

inline int64_t panels(int64_t rows) { return (rows + simd::kLanes - 1) / simd::kLanes; }

inline int64_t packed_bytes(Format format, int64_t rows, int64_t columns) {
    row_bytes(format, columns);  // refuses columns that do not divide
    return panels(rows) * panel_bytes(format, columns);
}

// `out` has packed_bytes(…) bytes, zeroed by this function.
inline void pack(Format format, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
    const auto& f = info(format);
    const Record record(f);
    const int64_t panel = panel_bytes(format, columns), stride = row_bytes(format, columns);
    const int vector = 4 * simd::kLanes;
    const bool super = f.scales == Scales::super || f.scales == Scales::super_min;
    const bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
    const auto put_u16 = [](uint8_t* p, int64_t i, uint16_t x) { std::memcpy(p + 2 * i, &x, 2); };
    Fields fields;
    for (int64_t first = 0; first < rows; first += simd::kLanes, out += panel) {
        std::memset(out, 0, size_t(panel));
        for (int lane = 0; lane < simd::kLanes && first + lane < rows; ++lane) {
            const uint8_t* row = data + (first + lane) * stride;
            uint8_t* at = out;
            for (int64_t block = 0; block < columns / f.block; ++block, at += record.bytes) {
                unpack(f.format, row + block * f.bytes, fields);
                for (int i = 0; i < f.block; ++i) {
                    const int column = i % f.group, quad = column / 4;
                    uint8_t* group = at + record.weights + i / f.group * record.group_bytes + lane * 4 + column % 4;
                    const auto q = uint8_t(fields.q[i]);
                    if (f.bits == 8) {
                        group[quad * vector] = uint8_t(q + simd::kByteBias);
                    } else {
                        group[quad / 2 * vector] |= uint8_t((q & 15) << quad % 2 * 4);
                        if (f.bits > 4) group[f.group / 8 * vector] |= uint8_t(q >> 4 << quad * (f.bits - 4));
                    }
                }
                if (super) {
                    put_u16(at, lane, fields.d);
                    if (has_min) put_u16(at + record.dmin, lane, fields.m);
                    for (int g = 0; g < record.groups; ++g) {
                        at[record.scales + g * simd::kLanes + lane] = uint8_t(fields.scale[g]);
                        if (has_min) at[record.minima + g * simd::kLanes + lane] = fields.minimum[g];
                    }
                } else {
                    put_u16(at + record.scales, lane, fields.d);
                    if (has_min) put_u16(at + record.minima, lane, fields.m);
                }
            }
        }
    }
}

// One row of packed weights to floats: the same as dequantize_row gives of its stored form.
inline void dequantize_packed_row(Format format, const uint8_t* data, int64_t row, int64_t columns, float* out) {
    const auto& f = info(format);
    const Record record(f);
    const int vector = 4 * simd::kLanes, lane = int(row % simd::kLanes);
    const bool super = f.scales == Scales::super || f.scales == Scales::super_min;
    const uint8_t* at = data + row / simd::kLanes * panel_bytes(format, columns);
    Fields fields{};
    for (int64_t block = 0; block < columns / f.block; ++block, at += record.bytes, out += f.block) {
        for (int i = 0; i < f.block; ++i) {
            const int column = i % f.group, quad = column / 4;
            const uint8_t* group = at + record.weights + i / f.group * record.group_bytes + lane * 4 + column % 4;
            if (f.bits == 8) {
                fields.q[i] = int8_t(group[quad * vector] - simd::kByteBias);
            } else {
                int q = (group[quad / 2 * vector] >> quad % 2 * 4) & 15;
                if (f.bits > 4)
                    q |= ((group[f.group / 8 * vector] >> quad * (f.bits - 4)) & ((1 << (f.bits - 4)) - 1)) << 4;
                fields.q[i] = int8_t(q);
            }
        }
        fields.d = load_u16(at + (super ? 0 : record.scales) + 2 * lane);
        fields.m = load_u16(at + (super ? record.dmin : record.minima) + 2 * lane);
        for (int g = 0; super && g < record.groups; ++g) {
            fields.scale[g] = int8_t(at[record.scales + g * simd::kLanes + lane]);
            fields.minimum[g] = at[record.minima + g * simd::kLanes + lane];
        }
        dequantize(f, fields, out);
    }
}

}  // namespace llama2
