/* Tokens to codes, and products of rows of floats with what is stored as codes: coded_library.py compiles this.
 *
 * A tile of tokens is decoded into the nearest cache, head by head, and used by all rows of the head.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define TILE 16 /* tokens; a multiple of four */
#define LINE 64 /* bytes of a line of the processor's caches */

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias)); /* of as many floats */

/* Codes [rows,tokens,·] and scales [rows,tokens,·] (bf16): of a token n_heads · head numbers, packed as by
 * blocks/kernels/quantise.py, of which the first `width` of each head are used, in groups of these sizes. */
struct coded {
    uint8_t *codes;
    uint16_t *scales;
    const int64_t *sizes;
    int64_t rows, tokens;
    int64_t code_row, code_token, scale_row, scale_token; /* strides */
    int64_t bits, n_heads, head, width, used, groups;     /* groups of a head, and those that are used */
};

INLINE float of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounded to the nearest, of two to the even one. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return isnan(x) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE int64_t round_up(int64_t width) { return (width + WIDE - 1) / WIDE * WIDE; }

INLINE bytes load(const uint8_t *p) { return *(const bytes *)p; }

/* Compilers do not find the instruction for it in a loop. */
INLINE lanes widened(bytes b) {
#if LANES == 16
    return (lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)b));
#elif defined(__AVX2__)
    int64_t whole;
    memcpy(&whole, &b, sizeof whole);
    return (lanes)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(whole)));
#else
    lanes wide;
    for (int i = 0; i < LANES; i++) wide[i] = (float)b[i];
    return wide;
#endif
}

/* Length of the runs of bytes that hold the codes of a token of so many numbers. */
INLINE int64_t run_of(int bits, int64_t all) { return bits == 8 ? all : bits == 6 ? (all + 3) / 4 : (all + 1) / 2; }

/* n numbers of a token from the `from`th on. The first numbers are in the low bits of the bytes, the last in the high
 * bits, at 6 bits in those of three bytes. */
INLINE void decode(const uint8_t *c, int bits, int64_t all, int64_t from, int64_t n, float scale, float *out) {
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
    const float zero = -(float)(1 << (bits - 1)) * scale;
    const int64_t run = run_of(bits, all);
    const int64_t lows = bits == 6 ? 3 * run : run, left = from < lows ? lows - from : 0;
    const int64_t low = n < left ? n : left;
    int64_t i = 0;
    c += from;
    for (; i + LANES <= low; i += LANES) at(out + i) = widened(load(c + i) & mask) * scale + zero;
    for (; i < low; i++) out[i] = (float)(c[i] & mask) * scale + zero;
    c -= lows;
    if (bits == 4) {
        for (; i + LANES <= n; i += LANES) at(out + i) = widened(load(c + i) >> 4) * scale + zero;
        for (; i < n; i++) out[i] = (float)(c[i] >> 4) * scale + zero;
    }
    if (bits == 6) {
        const uint8_t *d = c + run, *e = d + run;
        for (; i + LANES <= n; i += LANES) {
            bytes high = load(c + i) >> 6 | (load(d + i) >> 4 & 12) | (load(e + i) >> 2 & 48);
            at(out + i) = widened(high) * scale + zero;
        }
        for (; i < n; i++) out[i] = (float)(c[i] >> 6 | (d[i] >> 4 & 12) | (e[i] >> 2 & 48)) * scale + zero;
    }
}

/* A head's numbers of n tokens, [n,padded]; what is beyond its width stays as it is. */
INLINE void decode_tile(const struct coded *k, int bits, int64_t row, int64_t head, int64_t token, int64_t n,
                        int64_t padded, float *out) {
    const uint8_t *codes = k->codes + row * k->code_row + token * k->code_token;
    const uint16_t *scales = k->scales + row * k->scale_row + token * k->scale_token + head * k->groups;
    for (int64_t t = 0; t < n; t++, codes += k->code_token, scales += k->scale_token, out += padded)
        for (int64_t g = 0, at = 0; g < k->used; at += k->sizes[g++])
            decode(codes, bits, k->n_heads * k->head, head * k->head + at, k->sizes[g], of_bf16(scales[g]), out + at);
}

/* Asks memory for the tile after the next: heads are read in turn, which the processor does not foresee. */
INLINE void fetch(const struct coded *k, int64_t row, int64_t token) {
    const uint8_t *codes = k->codes + row * k->code_row + (token + 2 * TILE) * k->code_token;
    for (int64_t i = 0; i < TILE * k->code_token; i += LINE) __builtin_prefetch(codes + i);
}

INLINE void scores(const struct coded *k, int bits, int64_t row, int64_t first, int64_t n, const float *q, int64_t m,
                   float *out) {
    const int64_t padded = round_up(k->width);
    float x[TILE * padded], found[TILE];
    memset(x, 0, sizeof x);
    fetch(k, row, first);
    for (int64_t head = 0; head < k->n_heads; head++) {
        decode_tile(k, bits, row, head, first, n, padded, x);
        for (int64_t i = 0; i < m; i++) {
            const int64_t own = (row * k->n_heads + head) * m + i;
            for (int64_t t = 0; t < n; t += 4)
                dots(q + own * padded, 0, 1, padded, x + t * padded, padded, 4, found + t, 0);
            memcpy(out + own * k->tokens + first, found, n * sizeof(float));
        }
    }
}

INLINE void average(const struct coded *k, int bits, int64_t row, int64_t first, int64_t n, const float *w, int64_t m,
                    float *y) {
    const int64_t padded = round_up(k->width);
    float x[TILE * padded];
    memset(x, 0, sizeof x);
    fetch(k, row, first);
    for (int64_t head = 0; head < k->n_heads; head++) {
        decode_tile(k, bits, row, head, first, n, padded, x);
        for (int64_t i = 0; i < m; i++) {
            const int64_t own = (row * k->n_heads + head) * m + i;
            add(w + own * k->tokens + first, 0, 1, padded, x, padded, n, y + own * padded, 0);
        }
    }
}

/* q [rows,n_heads,m,padded] → out [rows,n_heads,m,tokens] */
INLINE void all_scores(const struct coded *k, int bits, const float *q, int64_t m, float *out, int threads) {
    const int64_t tiles = (k->tokens + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < k->rows * tiles; at++) {
        const int64_t first = at % tiles * TILE;
        scores(k, bits, at / tiles, first, least(TILE, k->tokens - first), q, m, out);
    }
}

/* w [rows,n_heads,m,tokens] → y [parts,rows,n_heads,m,padded], zero at first: the sums over a part of the tokens. */
INLINE void all_averages(const struct coded *k, int bits, const float *w, int64_t m, float *y, int64_t parts,
                         int threads) {
    const int64_t padded = round_up(k->width), size = k->rows * k->n_heads * m * padded;
    const int64_t tiles = (k->tokens + TILE - 1) / TILE, together = (tiles + parts - 1) / parts * TILE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < k->rows * parts; at++) {
        const int64_t part = at % parts, end = least(k->tokens, (part + 1) * together);
        for (int64_t first = part * together; first < end; first += TILE)
            average(k, bits, at / parts, first, least(TILE, end - first), w, m, y + part * size);
    }
}

/* Code for each number of bits, which is a constant in it. */
void coded_scores(const struct coded *k, const float *q, int64_t m, float *out, int threads) {
    if (k->bits == 8) all_scores(k, 8, q, m, out, threads);
    if (k->bits == 6) all_scores(k, 6, q, m, out, threads);
    if (k->bits == 4) all_scores(k, 4, q, m, out, threads);
}

void coded_averages(const struct coded *k, const float *w, int64_t m, float *y, int64_t parts, int threads) {
    if (k->bits == 8) all_averages(k, 8, w, m, y, parts, threads);
    if (k->bits == 6) all_averages(k, 6, w, m, y, parts, threads);
    if (k->bits == 4) all_averages(k, 4, w, m, y, parts, threads);
}

/* Codes of a group of n numbers; returns its scale. The magnitudes of floats have the order of their bits. */
INLINE uint16_t quantise(const float *x, int64_t n, int bits, uint8_t *codes) {
    const int32_t top = (1 << (bits - 1)) - 1;
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t own;
        memcpy(&own, x + i, 4);
        own &= 0x7fffffff;
        largest = own > largest ? own : largest;
    }
    float most;
    memcpy(&most, &largest, 4);
    const uint16_t scale = to_bf16(most / (float)top);
    const float rounded = of_bf16(scale), by = rounded < FLT_MIN ? FLT_MIN : rounded;
    for (int64_t i = 0; i < n; i++) {
        const float level = rintf(x[i] / by), above = level > (float)-top ? level : (float)-top;
        codes[i] = (uint8_t)((int32_t)(above < (float)top ? above : (float)top) + top + 1);
    }
    return scale;
}

/* Puts n codes of a token, from the `from`th on, where `decode` reads them. */
INLINE void encode(const uint8_t *codes, int bits, int64_t all, int64_t from, int64_t n, uint8_t *out) {
    const int64_t run = run_of(bits, all), lows = bits == 6 ? 3 * run : run, left = from < lows ? lows - from : 0;
    const int64_t low = n < left ? n : left;
    memcpy(out + from, codes, low);
    uint8_t *c = out + from - lows, *d = c + run, *e = d + run;
    for (int64_t i = low; i < n; i++) {
        if (bits == 4) c[i] |= codes[i] << 4;
        if (bits == 6) c[i] |= codes[i] << 6, d[i] |= codes[i] >> 2 << 6, e[i] |= codes[i] >> 4 << 6;
    }
}

/* x [n_heads · head] → codes and scales of a token. */
INLINE void store(const struct coded *k, int bits, const float *x, uint8_t *out, uint16_t *scales) {
    const int64_t all = k->n_heads * k->head;
    uint8_t codes[k->head];
    memset(out, 0, (bits == 6 ? 3 : 1) * run_of(bits, all));
    for (int64_t head = 0, from = 0; head < k->n_heads; head++)
        for (int64_t g = 0; g < k->groups; from += k->sizes[g++]) {
            *scales++ = quantise(x + from, k->sizes[g], bits, codes);
            encode(codes, bits, all, from, k->sizes[g], out);
        }
}

/* x [rows,tokens,n_heads · head] */
INLINE void store_all(const struct coded *k, int bits, const float *x, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < k->rows * k->tokens; at++) {
        const int64_t row = at / k->tokens, token = at % k->tokens;
        store(k, bits, x + at * k->n_heads * k->head, k->codes + row * k->code_row + token * k->code_token,
              k->scales + row * k->scale_row + token * k->scale_token);
    }
}

void coded_store(const struct coded *k, const float *x, int threads) {
    if (k->bits == 8) store_all(k, 8, x, threads);
    if (k->bits == 6) store_all(k, 6, x, threads);
    if (k->bits == 4) store_all(k, 4, x, threads);
}
