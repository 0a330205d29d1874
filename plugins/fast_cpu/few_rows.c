/* Products of a few rows with a matrix, or with those of experts: few_rows.py compiles this.
 *
 * A few rows of the matrix are read from memory once, and multiplied with two of x at a time. Each result is summed in
 * one order, however many rows there are. So many sums as registers hold: with fewer, two rows wait longer for memory.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* Products of m rows x with TOGETHER rows of a matrix, of which w is the first: y[r,i], y's rows n apart. */
INLINE void all_products(const float *x, int64_t m, const float *w, int64_t k, float *y, int64_t n) {
    int64_t r = 0;
    for (; r + 2 <= m; r += 2) products(x + r * k, 2, w, k, y + r * n, n);
    if (r < m) products(x + r * k, 1, w, k, y + r * n, n);
}

/* x [m,k], w [n,k] → y [m,n]; k is a multiple of WIDE, n of TOGETHER. */
void few_rows(const float *x, int64_t m, const float *w, int64_t n, int64_t k, float *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += TOGETHER) all_products(x, m, w + i * k, k, y + i, n);
}

/* The experts of few tokens: y[t] = Σ weight · down (silu(gate x) ⊙ up x) over the experts that token t has chosen.
 *
 * x, y [T,D], experts and weights [T,k], an expert from E on is none; gate_up [E,2F,D], gate first, down [E,D,F].
 * `room` is for T k (2D + 3F) numbers. */
void few_experts(const float *x, const int64_t *experts, const float *weights, const float *gate_up, const float *down,
                 float *room, float *y, int64_t T, int64_t k, int64_t E, int64_t D, int64_t F, int threads) {
    int64_t pairs[T * k], first[T * k + 1], n = 0, groups = 0; /* sorted by expert; those of an expert are a group */
    for (int64_t p = 0; p < T * k; p++) {
        int64_t i = n;
        if (experts[p] >= E) continue;
        for (; i > 0 && experts[pairs[i - 1]] > experts[p]; i--) pairs[i] = pairs[i - 1];
        pairs[i] = p, n++;
    }
    for (int64_t i = 0; i < n; i++)
        if (!i || experts[pairs[i]] != experts[pairs[i - 1]]) first[groups++] = i;
    first[groups] = n;
    float *rows = room, *halves = rows + n * D, *hidden = halves + n * 2 * F, *answers = hidden + n * F;
    for (int64_t i = 0; i < n; i++) memcpy(rows + i * D, x + pairs[i] / k * D, D * sizeof(float));
    const int64_t wide = 2 * F / TOGETHER, narrow = D / TOGETHER;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < groups * wide; at++) {
            const int64_t i = first[at / wide], m = first[at / wide + 1] - i, j = at % wide * TOGETHER;
            const float *own = gate_up + (experts[pairs[i]] * 2 * F + j) * D;
            all_products(rows + i * D, m, own, D, halves + i * 2 * F + j, 2 * F);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < F; j++) {
                const float gate = halves[i * 2 * F + j], up = halves[i * 2 * F + F + j];
                hidden[i * F + j] = gate / (1 + expf(-gate)) * up * weights[pairs[i]];
            }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < groups * narrow; at++) {
            const int64_t i = first[at / narrow], m = first[at / narrow + 1] - i, j = at % narrow * TOGETHER;
            all_products(hidden + i * F, m, down + (experts[pairs[i]] * D + j) * F, F, answers + i * D + j, D);
        }
    }
    memset(y, 0, T * D * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < D; j += LANES) at(y + pairs[i] / k * D + j) += at(answers + i * D + j);
}
