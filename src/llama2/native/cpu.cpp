// Which of the built instruction sets this processor runs. Compiled for the oldest one, so that it can always be asked.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(_M_X64)
#include <intrin.h>
#endif
#if defined(_M_ARM64)
#include <windows.h>
#endif

namespace {

#if defined(_M_X64)
bool bit(int leaf, int part, int index, int subleaf = 0) {
    int r[4];
    __cpuidex(r, leaf, subleaf);
    return (r[part] >> index) & 1;
}
bool saved_by_system(unsigned long long mask) { return bit(1, 2, 27) && (_xgetbv(0) & mask) == mask; }
#endif

// Best first; "plain" always last.
std::vector<std::string> supported() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
        if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
        names.push_back("avx512_vnni");
    }
    if (avx2) names.push_back("avx2");
#elif defined(_M_X64)
    const bool avx2 = saved_by_system(6) && bit(1, 2, 12) && bit(1, 2, 29) && bit(7, 1, 5);
    if (avx2 && saved_by_system(0xe6) && bit(7, 1, 16) && bit(7, 1, 17) && bit(7, 1, 30) && bit(7, 1, 31) &&
        bit(7, 2, 11)) {
        if (bit(7, 0, 5, 1)) names.push_back("avx512_bf16");
        names.push_back("avx512_vnni");
    }
    if (avx2) names.push_back("avx2");
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & (1ul << 20)) names.push_back("neon_dotprod");  // HWCAP_ASIMDDP
#elif defined(__aarch64__) && defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    if (!sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) && value)
        names.push_back("neon_dotprod");
#elif defined(_M_ARM64)
    if (IsProcessorFeaturePresent(43)) names.push_back("neon_dotprod");  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#endif
    names.push_back("plain");
    return names;
}

}  // namespace

NB_MODULE(_cpu, m) { m.def("supported", &supported); }
