// GGUF's number formats: how a block of a row is stored, and what its numbers mean.
//
// A quantized block becomes Fields: whole numbers q and the scales they are multiplied with. Within a group (32 or 16
// columns) the value is
//     plain kinds      d · (q − offset) [+ m]
//     K kinds          (d · scale) · (q − offset) [− dmin · minimum]
// checkpoint/quantization.py holds the same definitions in NumPy; tests compare the two bit by bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "half.h"

namespace llama2 {

enum class Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL };

enum class Scales {
    none,       // not quantized
    half,       // d in half precision for each group
    half_min,   // d and m
    super,      // a whole number for each group, d for 256 columns
    super_min,  // two whole numbers for each group, d and dmin for 256 columns
};

struct FormatInfo {
    const char* name;
    Format format;
    int block;   // columns
    int bytes;   // of a block
    int bits;    // of q when packed: 4, 5, 6 or 8; 0 for floats
    int group;   // columns that share a scale
    int offset;  // subtracted from a q of fewer bits; an 8-bit q is signed already
    Scales scales;
};

inline constexpr FormatInfo kFormats[] = {
    {"F32", Format::F32, 1, 4, 0, 0, 0, Scales::none},
    {"F16", Format::F16, 1, 2, 0, 0, 0, Scales::none},
    {"BF16", Format::BF16, 1, 2, 0, 0, 0, Scales::none},
    {"Q4_0", Format::Q4_0, 32, 18, 4, 32, 8, Scales::half},
    {"Q4_1", Format::Q4_1, 32, 20, 4, 32, 0, Scales::half_min},
    {"Q5_0", Format::Q5_0, 32, 22, 5, 32, 16, Scales::half},
    {"Q5_1", Format::Q5_1, 32, 24, 5, 32, 0, Scales::half_min},
    {"Q8_0", Format::Q8_0, 32, 34, 8, 32, 0, Scales::half},
    {"Q2_K", Format::Q2_K, 256, 84, 4, 16, 0, Scales::super_min},
    {"Q3_K", Format::Q3_K, 256, 110, 4, 16, 4, Scales::super},
    {"Q4_K", Format::Q4_K, 256, 144, 4, 32, 0, Scales::super_min},
    {"Q5_K", Format::Q5_K, 256, 176, 5, 32, 0, Scales::super_min},
    {"Q6_K", Format::Q6_K, 256, 210, 6, 16, 32, Scales::super},
    {"IQ4_NL", Format::IQ4_NL, 32, 18, 8, 32, 0, Scales::half},  // q is looked up, and packed as Q8_0's
};

// What the sixteen codes of IQ4_NL stand for.
inline constexpr int8_t kCodes[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline const FormatInfo& info(Format format) { return kFormats[size_t(format)]; }

inline Format format_named(const std::string& name) {
    for (const auto& f : kFormats)
        if (name == f.name) return f.format;
    throw std::invalid_argument("unknown number format " + name);
}

inline int64_t row_bytes(Format format, int64_t columns) {
    const auto& f = info(format);
    if (columns % f.block)
        throw std::invalid_argument(std::to_string(columns) + " columns do not divide into blocks of " + f.name);
    return columns / f.block * f.bytes;
}

struct Fields {
    int8_t q[256];
    uint16_t d, m;     // half precision; m is also K's dmin
    int8_t scale[16];  // K kinds, one a group
    uint8_t minimum[16];
};

inline uint16_t load_u16(const uint8_t* p) {
    uint16_t x;
    std::memcpy(&x, p, 2);
    return x;
}

inline void store_u16(uint8_t* p, uint16_t x) { std::memcpy(p, &x, 2); }

inline void unpack_nibbles(const uint8_t* p, int8_t* q) {
    for (int j = 0; j < 16; ++j) q[j] = int8_t(p[j] & 15), q[j + 16] = int8_t(p[j] >> 4);
}

inline void unpack_fifth_bits(const uint8_t* p, int8_t* q) {
    for (int j = 0; j < 32; ++j) q[j] = int8_t(q[j] | ((p[j / 8] >> (j % 8)) & 1) << 4);
}

// Q2_K and Q3_K: the low two bits of every weight.
inline void unpack_two_bits(const uint8_t* p, int8_t* q) {
    for (int half = 0; half < 2; ++half)
        for (int quarter = 0; quarter < 4; ++quarter)
            for (int l = 0; l < 32; ++l)
                q[half * 128 + quarter * 32 + l] = int8_t((p[half * 32 + l] >> quarter * 2) & 3);
}

// Q3_K and Q5_K: one more bit of every weight.
inline void unpack_high_bits(const uint8_t* p, int at, int8_t* q) {
    for (int k = 0; k < 8; ++k)
        for (int l = 0; l < 32; ++l) q[32 * k + l] = int8_t(q[32 * k + l] | ((p[l] >> k) & 1) << at);
}

// Q4_K and Q5_K: eight 6-bit scales and minima in 12 bytes.
inline void unpack_six_bits(const uint8_t* p, Fields& f) {
    for (int j = 0; j < 4; ++j) {
        f.scale[j] = int8_t(p[j] & 63);
        f.minimum[j] = p[j + 4] & 63;
        f.scale[j + 4] = int8_t((p[j + 8] & 15) | (p[j] >> 6) << 4);
        f.minimum[j + 4] = uint8_t((p[j + 8] >> 4) | (p[j + 4] >> 6) << 4);
    }
}

inline void unpack(Format format, const uint8_t* p, Fields& f) {
    switch (format) {
        case Format::Q4_0:
            f.d = load_u16(p);
            unpack_nibbles(p + 2, f.q);
            return;
        case Format::IQ4_NL:
            f.d = load_u16(p);
            unpack_nibbles(p + 2, f.q);
            for (int j = 0; j < 32; ++j) f.q[j] = kCodes[f.q[j]];
            return;
        case Format::Q4_1:
            f.d = load_u16(p), f.m = load_u16(p + 2);
            unpack_nibbles(p + 4, f.q);
            return;
        case Format::Q5_0:
            f.d = load_u16(p);
            unpack_nibbles(p + 6, f.q), unpack_fifth_bits(p + 2, f.q);
            return;
        case Format::Q5_1:
            f.d = load_u16(p), f.m = load_u16(p + 2);
            unpack_nibbles(p + 8, f.q), unpack_fifth_bits(p + 4, f.q);
            return;
        case Format::Q8_0:
            f.d = load_u16(p);
            std::memcpy(f.q, p + 2, 32);
            return;
        case Format::Q2_K:
            f.d = load_u16(p + 80), f.m = load_u16(p + 82);
            for (int g = 0; g < 16; ++g) f.scale[g] = int8_t(p[g] & 15), f.minimum[g] = p[g] >> 4;
            unpack_two_bits(p + 16, f.q);
            return;
        case Format::Q3_K: {
            const uint8_t* s = p + 96;
            f.d = load_u16(p + 108);
            for (int g = 0; g < 16; ++g) {
                const int four = g < 8 ? s[g] & 15 : s[g - 8] >> 4, two = (s[8 + g % 4] >> (g / 4 * 2)) & 3;
                f.scale[g] = int8_t((four | two << 4) - 32);
            }
            unpack_two_bits(p + 32, f.q);
            unpack_high_bits(p, 2, f.q);
            return;
        }
        case Format::Q4_K:
        case Format::Q5_K: {
            const uint8_t* low = p + (format == Format::Q5_K ? 48 : 16);
            f.d = load_u16(p), f.m = load_u16(p + 2);
            unpack_six_bits(p + 4, f);
            for (int k = 0; k < 4; ++k)
                for (int l = 0; l < 32; ++l) {
                    f.q[64 * k + l] = int8_t(low[32 * k + l] & 15);
                    f.q[64 * k + 32 + l] = int8_t(low[32 * k + l] >> 4);
                }
            if (format == Format::Q5_K) unpack_high_bits(p + 16, 4, f.q);
            return;
        }
        case Format::Q6_K:
            f.d = load_u16(p + 208);
            std::memcpy(f.scale, p + 192, 16);
            for (int half = 0; half < 2; ++half)
                for (int quarter = 0; quarter < 4; ++quarter)
                    for (int l = 0; l < 32; ++l) {
                        const int four = (p[half * 64 + quarter % 2 * 32 + l] >> quarter / 2 * 4) & 15;
                        const int two = (p[128 + half * 32 + l] >> quarter * 2) & 3;
                        f.q[half * 128 + quarter * 32 + l] = int8_t(four | two << 4);
                    }
            return;
        default: throw std::invalid_argument("not a quantized format");
    }
}

inline void pack_two_bits(const int8_t* q, uint8_t* p) {
    for (int half = 0; half < 2; ++half, q += 128, p += 32)
        for (int l = 0; l < 32; ++l)
            p[l] = uint8_t((q[l] & 3) | (q[l + 32] & 3) << 2 | (q[l + 64] & 3) << 4 | (q[l + 96] & 3) << 6);
}

inline void pack_nibbles(const int8_t* q, uint8_t* p) {
    for (int j = 0; j < 16; ++j) p[j] = uint8_t((q[j] & 15) | q[j + 16] << 4);
}

inline void pack_fifth_bits(const int8_t* q, uint8_t* p) {
    for (int j = 0; j < 4; ++j) {
        p[j] = 0;
        for (int k = 0; k < 8; ++k) p[j] = uint8_t(p[j] | (q[8 * j + k] >> 4) << k);
    }
}

inline void pack_high_bits(const int8_t* q, int at, uint8_t* p) {
    for (int l = 0; l < 32; ++l) {
        int bits = 0;
        for (int k = 0; k < 8; ++k) bits |= q[32 * k + l] >> at << k;
        p[l] = uint8_t(bits);
    }
}

inline void pack_six_bits(const Fields& f, uint8_t* p) {
    for (int j = 0; j < 4; ++j) {
        p[j] = uint8_t(f.scale[j] | f.scale[j + 4] >> 4 << 6);
        p[j + 4] = uint8_t(f.minimum[j] | f.minimum[j + 4] >> 4 << 6);
        p[j + 8] = uint8_t((f.scale[j + 4] & 15) | f.minimum[j + 4] << 4);
    }
}

// What `unpack` reads.
inline void store(Format format, const Fields& f, uint8_t* p) {
    const int8_t* q = f.q;
    switch (format) {
        case Format::Q4_0:
            store_u16(p, f.d);
            pack_nibbles(q, p + 2);
            return;
        case Format::Q4_1:
            store_u16(p, f.d), store_u16(p + 2, f.m);
            pack_nibbles(q, p + 4);
            return;
        case Format::Q5_0:
            store_u16(p, f.d);
            pack_nibbles(q, p + 6), pack_fifth_bits(q, p + 2);
            return;
        case Format::Q5_1:
            store_u16(p, f.d), store_u16(p + 2, f.m);
            pack_nibbles(q, p + 8), pack_fifth_bits(q, p + 4);
            return;
        case Format::Q8_0:
            store_u16(p, f.d);
            std::memcpy(p + 2, q, 32);
            return;
        case Format::Q2_K:
            store_u16(p + 80, f.d), store_u16(p + 82, f.m);
            for (int g = 0; g < 16; ++g) p[g] = uint8_t(f.scale[g] | f.minimum[g] << 4);
            pack_two_bits(q, p + 16);
            return;
        case Format::Q3_K:
            store_u16(p + 108, f.d);
            for (int g = 0; g < 8; ++g)
                p[96 + g] = uint8_t(((f.scale[g] + 32) & 15) | ((f.scale[g + 8] + 32) & 15) << 4);
            for (int j = 0; j < 4; ++j) {
                p[104 + j] = 0;
                for (int k = 0; k < 4; ++k) p[104 + j] = uint8_t(p[104 + j] | (f.scale[4 * k + j] + 32) >> 4 << 2 * k);
            }
            pack_high_bits(q, 2, p);
            pack_two_bits(q, p + 32);
            return;
        case Format::Q4_K:
        case Format::Q5_K:
            store_u16(p, f.d), store_u16(p + 2, f.m);
            pack_six_bits(f, p + 4);
            if (format == Format::Q5_K) pack_high_bits(q, 4, p + 16);
            p += format == Format::Q5_K ? 48 : 16;
            for (int k = 0; k < 4; ++k)
                for (int l = 0; l < 32; ++l) p[32 * k + l] = uint8_t((q[64 * k + l] & 15) | q[64 * k + 32 + l] << 4);
            return;
        case Format::Q6_K:
            store_u16(p + 208, f.d);
            std::memcpy(p + 192, f.scale, 16);
            for (int half = 0; half < 2; ++half, q += 128)
                for (int l = 0; l < 32; ++l) {
                    const int a = q[l], b = q[l + 32], c = q[l + 64], d = q[l + 96];
                    p[half * 64 + l] = uint8_t((a & 15) | c << 4);
                    p[half * 64 + 32 + l] = uint8_t((b & 15) | d << 4);
                    p[128 + half * 32 + l] = uint8_t(a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6);
                }
            return;
        default: throw std::invalid_argument("not a quantized format");
    }
}

// The values that a block's fields stand for. out: (block)
inline void dequantize(const FormatInfo& f, const Fields& fields, float* out) {
    const bool super = f.scales == Scales::super || f.scales == Scales::super_min;
    const bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
    const float d = f16_to_f32(fields.d), m = has_min ? f16_to_f32(fields.m) : 0;
    for (int g = 0; g < f.block / f.group; ++g) {
        const float scale = super ? d * float(fields.scale[g]) : d;
        const float added = super ? -(m * float(fields.minimum[g])) : m;
        const int8_t* q = fields.q + g * f.group;
        float* y = out + g * f.group;
        if (has_min)
            for (int i = 0; i < f.group; ++i) y[i] = scale * float(q[i]) + added;
        else
            for (int i = 0; i < f.group; ++i) y[i] = scale * float(q[i] - f.offset);
    }
}

// One stored row to floats.
inline void dequantize_row(Format format, const uint8_t* row, int64_t columns, float* out) {
    if (format == Format::F32) {
        std::memcpy(out, row, size_t(columns) * 4);
        return;
    }
    if (format == Format::F16 || format == Format::BF16) {
        for (int64_t i = 0; i < columns; ++i) {
            const uint16_t h = load_u16(row + 2 * i);
            out[i] = format == Format::F16 ? f16_to_f32(h) : bf16_to_f32(h);
        }
        return;
    }
    const auto& f = info(format);
    Fields fields;
    for (int64_t start = 0; start < columns; start += f.block, row += f.bytes, out += f.block) {
        unpack(format, row, fields);
        dequantize(f, fields, out);
    }
}

}  // namespace llama2
