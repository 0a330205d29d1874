/* Products of a few rows with a matrix: few_rows.py compiles this.
 *
 * A few rows of the matrix are read from memory once, and multiplied with two of x at a time. Each result is summed in
 * one order, however many rows there are. So many sums as registers hold: with fewer, two rows wait longer for memory.
 */
#include <stdint.h>

#include "lanes.h"

#if defined(__AVX512F__)
#define TOGETHER 8 /* rows of the matrix */
#else
#define TOGETHER 4
#endif

INLINE void products(const float *x, int rows, const float *w, int64_t k, float *y, int64_t n) {
    lanes sums[2][TOGETHER] = {0};
    for (int64_t j = 0; j < k; j += LANES)
        for (int i = 0; i < TOGETHER; i++) {
            const lanes own = at(w + i * k + j);
            __builtin_prefetch(w + (TOGETHER + i) * k + j);
            for (int r = 0; r < rows; r++) sums[r][i] += at(x + r * k + j) * own;
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < TOGETHER; i++) y[r * n + i] = sum(sums[r][i]);
}

/* x [m,k], w [n,k] → y [m,n]; k is a multiple of LANES, n of TOGETHER. */
void few_rows(const float *x, int64_t m, const float *w, int64_t n, int64_t k, float *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += TOGETHER) {
        int64_t r = 0;
        for (; r + 2 <= m; r += 2) products(x + r * k, 2, w + i * k, k, y + r * n + i, n);
        if (r < m) products(x + r * k, 1, w + i * k, k, y + r * n + i, n);
    }
}

/* Whether it computes with several threads. */
int few_rows_in_parallel(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
