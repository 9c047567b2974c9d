// Floats to blocks: scales, and where the format has them minima, that leave the least squared error.
//
// Of a group with weights x, which count w, a format keeps whole numbers q and writes d·q − m. The error is
//
//     E = Σ w (x − (d·q − m))².
//
// For given q the best d and m solve two linear equations; for given d and m the best q is the nearest one. A grid of
// first guesses, then the two in turn, find d and m of each group. K formats keep them as whole numbers of few bits,
// times D and M of the block. These are chosen among their neighbours so that E is least. Then D and M are solved for,
// with the whole numbers as they are, and the whole numbers are chosen once more.
//
// Sixteen groups are worked on at a time, each in a lane of its own, and nothing is fused. So every sum has one order,
// and the bytes are the same on every instruction set and any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "formats.h"
#include "pool.h"
#include "simd.h"

namespace llama2 {

constexpr int kGroups = 16;  // of a batch: two blocks of K formats with groups of 32, one with groups of 16

// What a format can write.
struct Range {
    float low, high;              // of q, before Fields' offset is added
    bool has_min;                 // or m is zero
    float scale_low, scale_high;  // of a group's whole numbers in K formats
};

inline Range range_of(Format format) {
    switch (format) {
        case Format::Q4_0: return {-8, 7, false, 0, 0};
        case Format::Q5_0: return {-16, 15, false, 0, 0};
        case Format::Q4_1: return {0, 15, true, 0, 0};
        case Format::Q5_1: return {0, 31, true, 0, 0};
        case Format::Q2_K: return {0, 3, true, 0, 15};
        case Format::Q3_K: return {-4, 3, false, -32, 31};
        case Format::Q4_K: return {0, 15, true, 0, 63};
        case Format::Q5_K: return {0, 31, true, 0, 63};
        case Format::Q6_K: return {-32, 31, false, -128, 127};
        default: throw std::invalid_argument("not a format whose scales are searched for");
    }
}

// Groups side by side, lane by lane: weight i of group g at [i][g]. m is subtracted.
struct Batch {
    alignas(64) float x[32][kGroups], w[32][kGroups];
    alignas(64) float d[kGroups], m[kGroups];              // of each group
    alignas(64) float scale[kGroups], minimum[kGroups];    // K formats: whole numbers
    alignas(64) float super[kGroups], super_min[kGroups];  // and what they are multiplied with, of the group's block
    alignas(64) float qq[kGroups], qx[kGroups], q1[kGroups], x1[kGroups], w1[kGroups];  // sums weighted with w
    int8_t q[kGroups][32];
};

namespace search {

using namespace simd;

// First guesses put the largest weight so many steps inside and outside the end of the range.
constexpr int kSteps = 7, kTurns = 2;
constexpr float kStep = 0.2f;

// kLanes groups of a batch.
struct Lanes {
    const float *x, *w;
    int size;
    const Range& range;
    F nearest(int i, F inverse, F offset) const {
        return min(set(range.high), max(set(range.low), round(add(mul(load(x + i * kGroups), inverse), offset))));
    }
};

inline F magnitude(F x) { return max(x, sub(zero(), x)); }

// y / x, but zero where x is.
inline F quotient(F y, F x) { return where_less(zero(), magnitude(x), div(y, x), zero()); }

struct Sums {
    F q1 = zero(), qq = zero(), qx = zero();
};

LLAMA2_INLINE Sums sums(const Lanes& t, F inverse, F offset) {
    Sums s;
    for (int i = 0; i < t.size; ++i) {
        const F q = t.nearest(i, inverse, offset), wq = mul(load(t.w + i * kGroups), q);
        s.q1 = add(s.q1, wq);
        s.qq = add(s.qq, mul(wq, q));
        s.qx = add(s.qx, mul(wq, load(t.x + i * kGroups)));
    }
    return s;
}

LLAMA2_INLINE F error(const Lanes& t, F scale, F minimum) {
    const F inverse = quotient(set(1), scale), offset = mul(minimum, inverse);
    F sum = zero();
    for (int i = 0; i < t.size; ++i) {
        const F q = t.nearest(i, inverse, offset);
        const F off = sub(sub(mul(scale, q), minimum), load(t.x + i * kGroups));
        sum = add(sum, mul(load(t.w + i * kGroups), mul(off, off)));
    }
    return sum;
}

// The best scale so far, the best minimum, and how much of Σ w x² they explain.
struct Best {
    F d = zero(), m = zero(), explained = set(-1);
    void consider(F new_d, F new_m, F new_explained) {
        d = where_less(explained, new_explained, new_d, d);
        m = where_less(explained, new_explained, new_m, m);
        explained = where_less(explained, new_explained, new_explained, explained);
    }
};

// Solves for d alone: Σ w q² d = Σ w q x.
LLAMA2_INLINE void solve(Best& best, const Sums& s) {
    const F d = div(s.qx, s.qq);
    best.consider(d, zero(), mul(d, s.qx));
}

// Solves for d and m; a negative m becomes zero unless the format can write one.
LLAMA2_INLINE void solve(Best& best, const Sums& s, F x1, F w1, bool signed_min) {
    const F square = mul(w1, s.qq), determinant = sub(square, mul(s.q1, s.q1));
    const F d = div(sub(mul(w1, s.qx), mul(x1, s.q1)), determinant);
    const F m = div(sub(mul(s.q1, s.qx), mul(s.qq, x1)), determinant);
    const F explained = sub(mul(d, s.qx), mul(m, x1)), never = set(-2);
    const F solvable = where_less(mul(square, set(1e-5f)), determinant, explained, never);
    best.consider(d, m, signed_min ? solvable : where_less(m, zero(), never, solvable));
    if (!signed_min) solve(best, s);
}

// Scale of groups without minimum. The largest weight may come to lie at, inside or beyond either end of the range.
LLAMA2_INLINE void fit(const Lanes& t, float* d) {
    F least = zero(), most = zero();
    for (int i = 0; i < t.size; ++i) {
        least = min(least, load(t.x + i * kGroups));
        most = max(most, load(t.x + i * kGroups));
    }
    const F inverse = quotient(set(1), where_less(most, sub(zero(), least), least, most));
    const float half = -t.range.low;
    Best best;
    for (int step = -kSteps; step <= kSteps; ++step)
        solve(best, sums(t, mul(set(-half + float(step) * kStep), inverse), zero()));
    for (int step = -kSteps; step <= kSteps; ++step)
        solve(best, sums(t, mul(set(half - 0.5f + float(step) * kStep), inverse), zero()));
    for (int turn = 0; turn < kTurns; ++turn) solve(best, sums(t, div(set(1), best.d), zero()));
    store(d, best.d);
}

// Scale and minimum.
LLAMA2_INLINE void fit(const Lanes& t, bool signed_min, float* d, float* m, float* x_sum, float* w_sum) {
    F least = load(t.x), most = least, x1 = zero(), w1 = zero();
    for (int i = 0; i < t.size; ++i) {
        const F x = load(t.x + i * kGroups), w = load(t.w + i * kGroups);
        least = min(least, x), most = max(most, x);
        x1 = add(x1, mul(w, x)), w1 = add(w1, w);
    }
    if (!signed_min) least = min(least, zero());
    const F inverse = quotient(set(1), sub(most, least));
    Best best;
    best.m = sub(zero(), least);
    for (int step = -kSteps; step <= kSteps; ++step) {
        const F scale = mul(set(t.range.high + float(step) * kStep), inverse);
        solve(best, sums(t, scale, sub(zero(), mul(least, scale))), x1, w1, signed_min);
    }
    for (int turn = 0; turn < kTurns; ++turn) {
        const F scale = div(set(1), best.d);
        solve(best, sums(t, scale, mul(best.m, scale)), x1, w1, signed_min);
    }
    store(d, best.d), store(m, best.m), store(x_sum, x1), store(w_sum, w1);
}

// The whole numbers of K formats: those next to d / super and m / super_min that leave the least error.
LLAMA2_INLINE void choose(const Lanes& t, Batch& b, int l) {
    const Range& range = t.range;
    const F super = load(b.super + l), super_min = load(b.super_min + l);
    const auto whole = [&](F value, F unit) {
        return min(set(range.scale_high), max(set(range.scale_low), round(quotient(value, unit))));
    };
    const F first = whole(load(b.d + l), super);
    const F first_min = range.has_min ? whole(load(b.m + l), super_min) : zero();
    F scale = first, minimum = first_min, least = error(t, mul(super, first), mul(super_min, first_min));
    for (int i = -1; i <= 1; ++i)
        for (int j = range.has_min ? -1 : 0; j <= (range.has_min ? 1 : 0); ++j) {
            if (i == 0 && j == 0) continue;
            const F s = min(set(range.scale_high), max(set(range.scale_low), add(first, set(float(i)))));
            const F n = min(set(range.scale_high), max(zero(), add(first_min, set(float(j)))));
            const F e = error(t, mul(super, s), mul(super_min, n));
            scale = where_less(e, least, s, scale);
            minimum = where_less(e, least, n, minimum);
            least = where_less(e, least, e, least);
        }
    store(b.scale + l, scale), store(b.minimum + l, minimum);
    store(b.d + l, mul(super, scale)), store(b.m + l, mul(super_min, minimum));
}

LLAMA2_INLINE void sum_up(const Lanes& t, Batch& b, int l) {
    const F inverse = quotient(set(1), load(b.d + l));
    const Sums s = sums(t, inverse, mul(load(b.m + l), inverse));
    store(b.qq + l, s.qq), store(b.qx + l, s.qx), store(b.q1 + l, s.q1);
}

LLAMA2_INLINE void write_q(const Lanes& t, Batch& b, int l) {
    const F inverse = quotient(set(1), load(b.d + l)), offset = mul(load(b.m + l), inverse);
    for (int i = 0; i < t.size; ++i) {
        int32_t lanes[kLanes];
        store_int(lanes, to_int(sub(t.nearest(i, inverse, offset), set(t.range.low))));
        for (int k = 0; k < kLanes; ++k) b.q[l + k][i] = int8_t(lanes[k]);
    }
}

}  // namespace search

// Whole rows of one format, one after the other.
class Quantizer {
public:
    explicit Quantizer(Format format) : f_(info(format)), range_(range_of(format)) {}

    // `importance` is of each column, or null where all are alike.
    void rows(const float* x, int64_t count, int64_t columns, const float* importance, uint8_t* out) {
        const int64_t groups = count * columns / f_.group;
        for (int64_t first = 0; first < groups; first += kGroups) {
            const int some = int(std::min<int64_t>(kGroups, groups - first));
            gather(x + first * f_.group, some, importance, first * f_.group % columns, columns);
            fit();
            if (f_.block == 256) fit_blocks();
            else round_to_half();
            over_lanes([&](const search::Lanes& t, int l) { search::write_q(t, batch_, l); });
            out = write(some, out);
        }
    }

private:
    template <class Body> void over_lanes(Body&& body) {
        for (int l = 0; l < kGroups; l += simd::kLanes)
            body(search::Lanes{batch_.x[0] + l, batch_.w[0] + l, f_.group, range_}, l);
    }

    // Groups that are missing at the end are zeros. Large weights count more, √(1 + x² / mean x²) times. So the error
    // of a group grows a little, and that of the model's predictions falls (measured, as llama.cpp's authors found
    // too).
    void gather(const float* x, int count, const float* importance, int64_t column, int64_t columns) {
        for (int g = 0; g < kGroups; ++g, x += f_.group) {
            float squares = 0;
            for (int i = 0; g < count && i < f_.group; ++i) squares += x[i] * x[i];
            const float inverse = squares > 0 ? float(f_.group) / squares : 0;
            for (int i = 0; i < f_.group; ++i) {
                const float value = g < count ? x[i] : 0;
                batch_.x[i][g] = value;
                batch_.w[i][g] = std::sqrt(1 + value * value * inverse) * (importance ? importance[column + i] : 1);
            }
            if ((column += f_.group) == columns) column = 0;
        }
    }

    void fit() {
        over_lanes([&](const search::Lanes& t, int l) {
            if (range_.has_min)
                search::fit(t, f_.block != 256, batch_.d + l, batch_.m + l, batch_.x1 + l, batch_.w1 + l);
            else {
                search::fit(t, batch_.d + l);
                simd::store(batch_.m + l, simd::zero());
            }
        });
    }

    void round_to_half() {
        for (int g = 0; g < kGroups; ++g) {
            batch_.d[g] = f16_to_f32(f32_to_f16(batch_.d[g]));
            batch_.m[g] = f16_to_f32(f32_to_f16(batch_.m[g]));
        }
    }

    void set_super(int first, int count, float d, float m) {
        d = f16_to_f32(f32_to_f16(d)), m = f16_to_f32(f32_to_f16(m));
        for (int g = first; g < first + count; ++g) batch_.super[g] = d, batch_.super_min[g] = m;
    }

    void fit_blocks() {
        const int each = 256 / f_.group;
        Batch& b = batch_;
        for (int first = 0; first < kGroups; first += each) {
            float d = 0, m = 0;
            for (int g = first; g < first + each; ++g) {
                if (std::fabs(b.d[g]) > std::fabs(d)) d = b.d[g];
                m = std::max(m, b.m[g]);
            }
            set_super(first, each, range_.has_min ? d / range_.scale_high : d / range_.scale_low,
                      m / range_.scale_high);
        }
        for (int pass = 0; pass < 2; ++pass) {
            over_lanes([&](const search::Lanes& t, int l) {
                search::choose(t, b, l);
                search::sum_up(t, b, l);
            });
            for (int first = 0; first < kGroups; first += each) solve_block(first, each);
        }
        for (int g = 0; g < kGroups; ++g) b.d[g] = b.super[g] * b.scale[g], b.m[g] = b.super_min[g] * b.minimum[g];
    }

    // D and M of a block, for the whole numbers that it has: Σ w (x − D·scale·q + M·minimum)² is least.
    void solve_block(int first, int each) {
        const Batch& b = batch_;
        double dd = 0, dm = 0, mm = 0, dx = 0, mx = 0;
        for (int g = first; g < first + each; ++g) {
            const double s = b.scale[g], n = b.minimum[g];
            dd += s * s * b.qq[g], dx += s * b.qx[g];
            if (range_.has_min) dm += s * n * b.q1[g], mm += n * n * b.w1[g], mx += n * b.x1[g];
        }
        const double determinant = dd * mm - dm * dm;
        if (determinant > 1e-6 * dd * mm) {
            const double d = (dx * mm - mx * dm) / determinant, m = (dx * dm - mx * dd) / determinant;
            if (d > 0 && m > 0) set_super(first, each, float(d), float(m));
        } else if (dd > 0 && !(mm > 0)) {
            set_super(first, each, float(dx / dd), 0);
        }
    }

    uint8_t* write(int count, uint8_t* out) {
        const int each = f_.block / f_.group;
        Batch& b = batch_;
        for (int first = 0; first < count; first += each, out += f_.bytes) {
            for (int g = 0; g < each; ++g) {
                std::memcpy(fields_.q + g * f_.group, b.q[first + g], size_t(f_.group));
                fields_.scale[g] = int8_t(b.scale[first + g]), fields_.minimum[g] = uint8_t(b.minimum[first + g]);
            }
            const bool k = f_.block == 256;
            fields_.d = f32_to_f16(k ? b.super[first] : b.d[first]);
            fields_.m = f32_to_f16(k ? b.super_min[first] : -b.m[first]);  // Q4_1 and Q5_1 add it
            store(f_.format, fields_, out);
        }
        return out;
    }

    const FormatInfo& f_;
    Range range_;
    Batch batch_ = {};
    Fields fields_ = {};
};

// Formats of 32 weights as ggml rounds them: the weight of largest magnitude, or the least and the largest, are kept.
inline void write_rounded(const FormatInfo& f, const float* x, int64_t count, uint8_t* out) {
    const float top = f.offset ? float(2 * f.offset - 1) : float((1 << f.bits) - 1);
    Fields fields;
    for (int64_t start = 0; start < count; start += 32, x += 32, out += f.bytes) {
        float least = x[0], most = x[0], largest = 0;
        for (int i = 0; i < 32; ++i) {
            least = std::min(least, x[i]), most = std::max(most, x[i]);
            if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
        }
        float d = (most - least) / top, shift = 0.5f;
        if (f.offset) d = largest / float(-f.offset), least = 0, shift = float(f.offset) + 0.5f;
        if (f.bits == 8) d = std::fabs(largest) / 127;
        const float inverse = d != 0 ? 1 / d : 0;
        for (int i = 0; i < 32; ++i) {
            if (f.bits == 8) {
                const float scaled = x[i] * inverse, whole = std::trunc(scaled);
                fields.q[i] = int8_t(whole + std::trunc(2 * (scaled - whole)));  // halves away from zero
            } else fields.q[i] = int8_t(std::min(top, std::max(0.0f, (x[i] - least) * inverse + shift)));
        }
        fields.d = f32_to_f16(d), fields.m = f32_to_f16(least);
        store(f.format, fields, out);
    }
}

inline void write_halves(Format format, const float* x, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i)
        store_u16(out + 2 * i, format == Format::F16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]));
}

// Squares of what was lost, and of what there was.
struct Loss {
    double lost = 0, total = 0;
};

inline Loss loss_of(const float* x, const float* y, int64_t count) {
    constexpr int parts = 8;
    double lost[parts] = {}, total[parts] = {};
    for (int64_t start = 0; start < count; start += parts)
        for (int k = 0; k < parts && start + k < count; ++k) {
            const double a = x[start + k], b = y[start + k];
            lost[k] += (a - b) * (a - b), total[k] += a * a;
        }
    Loss sum;
    for (int k = 0; k < parts; ++k) sum.lost += lost[k], sum.total += total[k];
    return sum;
}

// Rows from one format to another; `out` has rows · row_bytes(target, columns) bytes. `importance` is of each column;
// if it is null, all are alike, and formats of 32 weights are rounded without a search. What is lost is found by
// reading back what was written.
inline Loss quantize(Format source, const uint8_t* data, int64_t rows, int64_t columns, Format target,
                     const float* importance, uint8_t* out, int threads) {
    if (target == Format::IQ4_NL) throw std::invalid_argument("IQ4_NL is read, and not written");
    const int64_t each = std::max<int64_t>(1, 8192 / columns), items = (rows + each - 1) / each;
    const int64_t from = row_bytes(source, columns), to = row_bytes(target, columns);
    struct RowScratch {
        Buffer<float> x, y;
    };
    std::vector<RowScratch> scratch(static_cast<size_t>(threads));
    std::vector<Loss> losses(static_cast<size_t>(items));
    Pool pool(threads);
    pool.run(items, [&](int64_t item, int thread) {
        const int64_t first = item * each, count = std::min(each, rows - first), values = count * columns;
        float* x = scratch[size_t(thread)].x.reserve(each * columns);
        float* y = scratch[size_t(thread)].y.reserve(each * columns);
        uint8_t* written = out + first * to;
        for (int64_t r = 0; r < count; ++r) dequantize_row(source, data + (first + r) * from, columns, x + r * columns);
        if (target == Format::F32) std::memcpy(written, x, size_t(values) * 4);
        else if (info(target).bits == 0) write_halves(target, x, values, written);
        else if (target == Format::Q8_0 || (!importance && info(target).block == 32))
            write_rounded(info(target), x, values, written);
        else Quantizer(target).rows(x, count, columns, importance, written);
        for (int64_t r = 0; r < count; ++r) dequantize_row(target, written + r * to, columns, y + r * columns);
        losses[size_t(item)] = loss_of(x, y, values);
    });
    Loss sum;
    for (const Loss& loss : losses) sum.lost += loss.lost, sum.total += loss.total;
    return sum;
}

}  // namespace llama2
