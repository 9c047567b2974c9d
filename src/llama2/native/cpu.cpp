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
#if defined(_MSC_VER)
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(_M_ARM64)
#include <windows.h>
#endif

namespace {

#if defined(_M_X64) || defined(__x86_64__)
// The processor is asked itself: not every compiler's runtime library answers __builtin_cpu_supports.
bool bit(unsigned leaf, int part, int index, unsigned subleaf = 0) {
    unsigned r[4] = {};
#if defined(_MSC_VER)
    __cpuid(reinterpret_cast<int*>(r), 0);
    if (r[0] < leaf) return false;
    __cpuidex(reinterpret_cast<int*>(r), static_cast<int>(leaf), static_cast<int>(subleaf));
#else
    if (!__get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3])) return false;
#endif
    return (r[part] >> index) & 1;
}

// Whether the system saves these registers when it changes threads.
bool saved_by_system(unsigned long long mask) {
    if (!bit(1, 2, 27)) return false;
#if defined(_MSC_VER)
    return (_xgetbv(0) & mask) == mask;
#else
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (((static_cast<unsigned long long>(high) << 32) | low) & mask) == mask;
#endif
}
#endif

// Best first; "plain" always last.
std::vector<std::string> supported() {
    std::vector<std::string> names;
#if defined(_M_X64) || defined(__x86_64__)
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
