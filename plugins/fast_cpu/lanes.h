/* Vectors of GCC and Clang, which become whatever the processor has. */
#ifndef LANES
#define LANES 16
#define at(p) (*(lanes *)(p)) /* LANES floats, anywhere */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

INLINE float sum(lanes a) {
    eight b = ((eight *)&a)[0] + ((eight *)&a)[1];
    four c = ((four *)&b)[0] + ((four *)&b)[1];
    return (c[0] + c[1]) + (c[2] + c[3]);
}

#endif
