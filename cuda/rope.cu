// Rotary position embedding. A thread turns one pair of every head of a row: sine and cosine are computed once for all heads.
#include "element.cuh"

// Cosine and sine of an angle, in units of pi, of which whole turns are taken off exactly: without the tables in local memory
// that cos and sin bring for large angles.
__device__ __forceinline__ void turn(double angle, double& cosine, double& sine) {
  const double per_pi = 0.31830988618379067154, rest_of_it = -1.9678676675182486e-17;
  const double half_turns = angle * per_pi;
  const double rest = fma(angle, per_pi, -half_turns) + angle * rest_of_it;
  const double left = (half_turns - 2 * rint(0.5 * half_turns)) + rest;
  cosine = cospi(left);
  sine = sinpi(left);
}

#define ROPE(T, name) \
  extern "C" __global__ void rope_##name(i64 rows, i64 pairs, i64 heads, i64 head_dim, i64 interleaved, double magnitude, \
      double direction, const double* frequencies, const u32* positions, T* x, i64 sx) { \
    typedef Acc<T> A; \
    each<1>(rows, pairs, [&](i64 row, i64 at) { \
      double cosine, sine; \
      turn((double)positions[row] * frequencies[at], cosine, sine); \
      const A c = (A)(magnitude * cosine), s = (A)(magnitude * direction * sine); \
      const i64 first = interleaved ? 2 * at : at, second = interleaved ? first + 1 : at + pairs; \
      for (i64 head = 0; head < heads; head++) { \
        T* turned = x + row * sx + head * head_dim; \
        const A a = widen(turned[first]), b = widen(turned[second]); \
        turned[first] = narrow<T>(a * c - b * s); \
        turned[second] = narrow<T>(b * c + a * s); \
      } \
    }); \
  }
EACH_ELEMENT(ROPE)
