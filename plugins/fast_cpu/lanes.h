/* Vectors of GCC and Clang, of as many floats as a register of the processor holds: of longer ones, compilers keep
 * parts in memory. Rows of numbers come in multiples of WIDE everywhere, so that Python need not know the processor. */
#ifndef LANES
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define WIDE 16
#define at(p) (*(anywhere *)(p)) /* LANES floats in memory */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), may_alias));
typedef lanes anywhere __attribute__((aligned(4)));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

INLINE float sum(lanes a) {
#if LANES == 16
    const eight b = ((eight *)&a)[0] + ((eight *)&a)[1];
#else
    const lanes b = a;
#endif
#if LANES >= 8
    const four c = ((four *)&b)[0] + ((four *)&b)[1];
#else
    const four c = b;
#endif
    return (c[0] + c[1]) + (c[2] + c[3]);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Products of one or two rows, `next` apart, with a few tokens, each `token` numbers after the one before; results
 * are as far apart as `out_next`. The order of a sum does not depend on how many are computed together. */
INLINE void dots(const float *q, int64_t next, int rows, int64_t width, const float *x, int64_t token, int n,
                 float *out, int64_t out_next) {
    lanes sums[2][4] = {0};
    for (int64_t j = 0; j < width; j += LANES)
        for (int t = 0; t < n; t++) {
            const lanes own = at(x + t * token + j);
            for (int r = 0; r < rows; r++) sums[r][t] += at(q + r * next + j) * own;
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < n; t++) out[r * out_next + t] = sum(sums[r][t]);
}

/* Adds to one or two rows of y what they weigh n tokens with, some vectors at a time. */
INLINE void add_some(const float *w, int64_t w_next, int rows, int vectors, const float *x, int64_t token, int64_t n,
                     float *y, int64_t next) {
    lanes sums[2][4] = {0};
    for (int64_t t = 0; t < n; t++)
        for (int i = 0; i < vectors; i++) {
            const lanes own = at(x + t * token + i * LANES);
            for (int r = 0; r < rows; r++) sums[r][i] += w[r * w_next + t] * own;
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < vectors; i++) at(y + r * next + i * LANES) += sums[r][i];
}

INLINE void add(const float *w, int64_t w_next, int rows, int64_t width, const float *x, int64_t token, int64_t n,
                float *y, int64_t next) {
    int64_t j = 0;
    for (; j + 4 * LANES <= width; j += 4 * LANES) add_some(w, w_next, rows, 4, x + j, token, n, y + j, next);
    for (; j < width; j += LANES) add_some(w, w_next, rows, 1, x + j, token, n, y + j, next);
}

/* Whether a library computes with several threads. */
int in_parallel(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

#endif
