/* The linear recurrence over a few tokens: few_tokens.py compiles this.
 *
 * The state of a head stays in the nearest cache: a tile of its columns is read twice and written once for each token.
 */
#include <stdint.h>

#include "lanes.h"

/* A token of a head: decay [channels], k and q [K], v [V], state from [K,V] → state to [K,V], y [V].
 *
 * beta: the delta rule, v ← beta (v − what is read at k); NULL for none.
 * erase, at [K]: what is read at erase is taken away at `at`; `at` NULL: at k; erase NULL: nothing is. */
INLINE void token(const float *q, const float *k, const float *v, const float *decay, int64_t every, const float *beta,
                  const float *erase, const float *at_key, const float *from, float *to, float *y, int64_t K,
                  int64_t V) {
    const float *reads = beta ? k : erase;
    for (int64_t j = 0; j < V; j += LANES) {
        lanes added = at(v + j), seen = {0}, out = {0};
        if (reads) {
            for (int64_t i = 0; i < K; i++) seen += (reads[i] * decay[i * every]) * at(from + i * V + j);
            if (!at_key) added -= seen;
            if (beta) added *= *beta;
        }
        for (int64_t i = 0; i < K; i++) {
            lanes s = decay[i * every] * at(from + i * V + j) + k[i] * added;
            if (at_key) s -= at_key[i] * seen;
            at(to + i * V + j) = s;
            out += q[i] * s;
        }
        at(y + j) = out;
    }
}

/* q, k [B,T,N,K], v, y [B,T,N,V], decay (a factor) [B,T,N,1|K], beta [B,T,N] or NULL, erase, at_key [B,T,N,K] or NULL,
 * state [B,N,K,V] → states [B,T,N,K,V] after each token. V is a multiple of WIDE. */
void few_tokens(const float *q, const float *k, const float *v, const float *decay, const float *beta,
                const float *erase, const float *at_key, const float *state, float *states, float *y, int64_t B,
                int64_t T, int64_t N, int64_t K, int64_t V, int64_t channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t head = 0; head < B * N; head++) {
        const float *from = state + head * K * V;
        for (int64_t t = 0; t < T; t++) {
            int64_t at_token = (head / N * T + t) * N + head % N;
            float *to = states + at_token * K * V;
            token(q + at_token * K, k + at_token * K, v + at_token * V, decay + at_token * channels, channels > 1,
                  beta ? beta + at_token : 0, erase ? erase + at_token * K : 0, at_key ? at_key + at_token * K : 0,
                  from, to, y + at_token * V, K, V);
            from = to;
        }
    }
}
