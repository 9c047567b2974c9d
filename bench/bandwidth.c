// Bytes a second that threads read from memory: an opinion on `llama2 bench`'s limit that shares nothing with it.
//
//     cc -O3 -march=native -fopenmp bandwidth.c -o bandwidth && ./bandwidth THREADS SECONDS
//
// 512 MiB in huge pages where the system has them. Each thread first writes a contiguous part, then adds it up again
// and again until the time is over.
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int main(int count, char** words) {
    const int threads = count == 3 ? atoi(words[1]) : 0;
    const double seconds = count == 3 ? atof(words[2]) : 0;
    if (threads < 1 || seconds <= 0) {
        fprintf(stderr, "usage: %s THREADS SECONDS\n", words[0]);
        return 2;
    }
    const size_t huge = (size_t)2 << 20, bytes = (size_t)512 << 20;
    char* reserved = mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) {
        perror("512 MiB of memory");
        return 1;
    }
    uint64_t* memory = (uint64_t*)(((uintptr_t)reserved + huge - 1) / huge * huge);
    madvise(memory, bytes, MADV_HUGEPAGE);

    const size_t part = bytes / sizeof *memory / (size_t)threads;
    uint64_t total = 0, passes = 0;
    double start = 0, elapsed = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        uint64_t* mine = memory + (size_t)omp_get_thread_num() * part;
        memset(mine, 1, part * sizeof *mine);
#pragma omp barrier
#pragma omp single
        start = omp_get_wtime();
        while (elapsed < seconds) {
            uint64_t sum = 0;
            for (size_t i = 0; i < part; ++i) sum += mine[i];
            total += sum;
            __asm__ volatile("" : : : "memory");  // the next pass reads again
#pragma omp barrier
#pragma omp single
            {
                ++passes;
                elapsed = omp_get_wtime() - start;
            }
        }
    }
    const uint64_t words_read = passes * part * (uint64_t)threads;
    if (total != words_read * 0x0101010101010101u) {
        fprintf(stderr, "%s: the sum of what was read is wrong\n", words[0]);
        return 1;
    }
    printf("%.6g\n", (double)words_read * sizeof *memory / elapsed);
    return 0;
}
