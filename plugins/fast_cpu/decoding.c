/* What a decoding step computes beside its matrices: attention of a few queries to a cache, a norm.
 * decoding.py compiles this.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#define TILE 64 /* keys whose scores are kept; a multiple of WIDE */

typedef int32_t integers __attribute__((vector_size(4 * LANES), may_alias));

/* exp(x) of x ≤ 0, within 2 units of the last digit: 2ⁿ exp(r), |r| ≤ ln 2 / 2, by a polynomial. 0 below -87. */
INLINE lanes exponential(lanes x) {
    const lanes lowest = (lanes){0} - 87.0f, magic = (lanes){0} + 12582912.0f; /* adding 1.5 · 2²³ rounds */
    const integers below = x < lowest;
    const lanes held = (lanes)(((integers)lowest & below) | ((integers)x & ~below));
    const lanes n = (held * 1.44269504f + magic) - magic;
    const lanes r = (held - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const integers power = (__builtin_convertvector(n, integers) + 127) << 23;
    return (lanes)((integers)(p * (lanes)power) & ~below);
}

/* q [B,T,N,H], k [B,S,K,H], v [B,S,K,V], the numbers of a head of a token side by side; bias [B,N,T,S] or NULL →
 * y [B,T,N,V]. A thread reads `part` keys at a time, whatever the threads, so that a result does not depend on them;
 * `parts` is room for V + 2 numbers of each query, head and part. */
struct asked {
    const float *q, *k, *v, *bias;
    float *y, *parts;
    int64_t B, T, N, K, S, H, V, part;
    int64_t q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head; /* strides */
    int64_t bias_row, bias_head, bias_token;
    float scale;
};

/* The queries of a head of keys, G T of them: query i is token i % T of head i / T. */
INLINE int64_t queries(const struct asked *g) { return g->N / g->K * g->T; }

/* What is summed of a query: [V] values, each exp(score − largest) as heavy, the largest score, and the weights. */
struct sums {
    float *y, largest, total;
};

/* The weights of n scores, which they become; whether any key is seen. */
INLINE int weigh(struct sums *of, float *w, int64_t n, int64_t V) {
    float top = of->largest;
    lanes all = {0};
    int64_t t = 0;
    for (; t < n; t++) top = w[t] > top ? w[t] : top;
    if (top == -INFINITY) { /* all of them are hidden, or none is a number */
        for (t = 0; t < n; t++) of->total += isnan(w[t]) ? w[t] : 0;
        for (t = 0; t < n; t++) w[t] = 0;
        return 0;
    }
    for (; t % LANES; t++) w[t] = -INFINITY;
    for (int64_t u = 0; u < t; u += LANES) all += at(w + u) = exponential(at(w + u) - top);
    const float keep = of->largest == top ? 1 : expf(of->largest - top);
    if (keep != 1)
        for (int64_t j = 0; j < V; j += LANES) at(of->y + j) *= keep;
    of->total = of->total * keep + sum(all);
    of->largest = top;
    return 1;
}

/* One or two queries of a head on n keys. */
INLINE void on_tile(const struct asked *g, const float *q, int rows, const float *k, const float *v, int64_t n,
                    const float *const *bias, struct sums *of) {
    float w[2 * TILE];
    int64_t t = 0;
    int seen = 0;
    for (; t + 4 <= n; t += 4) dots(q, g->H, rows, g->H, k + t * g->k_token, g->k_token, 4, w + t, TILE);
    for (; t < n; t++) dots(q, g->H, rows, g->H, k + t * g->k_token, g->k_token, 1, w + t, TILE);
    for (int r = 0; r < rows; r++) {
        if (g->bias)
            for (t = 0; t < n; t++) w[r * TILE + t] += bias[r][t];
        seen |= weigh(of + r, w + r * TILE, n, g->V);
    }
    if (seen) add(w, TILE, rows, g->V, v, g->v_token, n, of->y, g->V);
}

/* The queries of a row and head on the keys from `first` to `end`: [m,V] sums of values, m largest scores, m weights. */
INLINE void on_part(const struct asked *g, int64_t row, int64_t head, int64_t first, int64_t end, float *out) {
    const int64_t m = queries(g), G = g->N / g->K, H = g->H, V = g->V;
    const float *k = g->k + row * g->k_row + head * g->k_head, *v = g->v + row * g->v_row + head * g->v_head;
    const float *bias[m];
    float q[m * H];
    struct sums of[m];
    memset(out, 0, m * V * sizeof(float));
    for (int64_t i = 0; i < m; i++) {
        const int64_t own = head * G + i / g->T, token = i % g->T;
        const float *from = g->q + row * g->q_row + token * g->q_token + own * g->q_head;
        for (int64_t j = 0; j < H; j += LANES) at(q + i * H + j) = at(from + j) * g->scale;
        if (g->bias) bias[i] = g->bias + row * g->bias_row + own * g->bias_head + token * g->bias_token;
        of[i] = (struct sums){out + i * V, -INFINITY, 0};
    }
    for (int64_t s = first; s < end; s += TILE)
        for (int64_t i = 0; i < m;) {
            const int64_t n = least(TILE, end - s), seen = g->S - g->T + 1 - s; /* by the first of the tokens */
            const int rows = i + 1 < m && n <= seen ? 2 : 1;
            const float *const here[2] = {g->bias ? bias[i] + s : 0, g->bias && rows == 2 ? bias[i + 1] + s : 0};
            const float *k_here = k + s * g->k_token, *v_here = v + s * g->v_token;
            if (rows == 2) on_tile(g, q + i * H, 2, k_here, v_here, n, here, of + i);
            else on_tile(g, q + i * H, 1, k_here, v_here, least(n, seen + i % g->T), here, of + i);
            i += rows;
        }
    for (int64_t i = 0; i < m; i++) out[m * V + i] = of[i].largest, out[m * V + m + i] = of[i].total;
}

/* The parts of a query together. */
INLINE void together(const float *parts, int64_t n, int64_t size, int64_t m, int64_t i, int64_t V, float *y) {
    float top = -INFINITY, total = 0;
    for (int64_t p = 0; p < n; p++) top = fmaxf(top, parts[p * size + m * V + i]);
    memset(y, 0, V * sizeof(float));
    for (int64_t p = 0; p < n; p++) {
        const float *own = parts + p * size;
        const float by = expf(own[m * V + i] - top);
        total += by * own[m * V + m + i];
        for (int64_t j = 0; j < V; j += LANES) at(y + j) += by * at(own + i * V + j);
    }
    for (int64_t j = 0; j < V; j += LANES) at(y + j) /= total;
}

void attend(const struct asked *g, int threads) {
    const int64_t m = queries(g), G = g->N / g->K, V = g->V, n = (g->S + g->part - 1) / g->part, size = m * (V + 2);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < g->B * g->K * n; p++) {
            const int64_t head = p / n % g->K, first = p % n * g->part;
            on_part(g, p / n / g->K, head, first, least(g->S, first + g->part), g->parts + p * size);
        }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < g->B * g->K * m; p++) {
            const int64_t i = p % m, row = p / m / g->K, head = p / m % g->K * G + i / g->T;
            together(g->parts + p / m * n * size, n, size, m, i, V, g->y + ((row * g->T + i % g->T) * g->N + head) * V);
        }
    }
}

/* x [rows,D] → y = x / sqrt(mean(x²) + eps) · weight */
void normalise(const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t D) {
    for (int64_t r = 0; r < rows; r++, x += D, y += D) {
        float square;
        dots(x, 0, 1, D, x, 0, 1, &square, 0);
        const float by = 1 / sqrtf(square / (float)D + eps);
        for (int64_t j = 0; j < D; j += LANES) at(y + j) = at(x + j) * by * at(weight + j);
    }
}
