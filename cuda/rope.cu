// Rotary position embedding. A thread rotates the same pairs of several heads of a row, so that
// sine and cosine are computed once for them.
#include "element.cuh"

// Cosine and sine of an angle in units of pi, after exact removal of whole turns: avoids the tables
// in local memory that cos and sin need for large angles.
__device__ __forceinline__ void turn(double angle, double& cosine, double& sine) {
  const double per_pi = 0.31830988618379067154, rest_of_it = -1.9678676675182486e-17;
  const double half_turns = angle * per_pi;
  const double rest = fma(angle, per_pi, -half_turns) + angle * rest_of_it;
  const double left = (half_turns - 2 * rint(0.5 * half_turns)) + rest;
  cosine = cospi(left);
  sine = sinpi(left);
}

// N pairs at a time, of every `parts`-th head. Their features are in two packs: the first and the
// second features, or, if interleaved, two adjacent packs.
template <int N, class T>
__device__ __forceinline__ void rope(i64 rows, i64 parts, i64 pairs, i64 heads, i64 head_dim, bool interleaved, double magnitude,
    double direction, const double* frequencies, const u32* positions, T* x, i64 sx) {
  typedef Acc<T> A;
  each<N>(rows * parts, pairs, [&](i64 line, i64 at) {
    const i64 row = line / parts;
    A c[N], s[N];
#pragma unroll
    for (int k = 0; k < N; k++) {
      double cosine, sine;
      turn((double)positions[row] * frequencies[at + k], cosine, sine);
      c[k] = (A)(magnitude * cosine);
      s[k] = (A)(magnitude * direction * sine);
    }
    const i64 first = interleaved ? 2 * at : at, second = interleaved ? first + N : at + pairs;
    for (i64 head = line - row * parts; head < heads; head += parts) {
      T* turned = x + row * sx + head * head_dim;
      Pack<T, N> packs[2] = {load<N>(turned + first), load<N>(turned + second)};
      const auto pair = [&](int k, T& left, T& right) {
        const A a = widen(left), b = widen(right);
        left = narrow<T>(a * c[k] - b * s[k]);
        right = narrow<T>(b * c[k] + a * s[k]);
      };
#pragma unroll
      for (int k = 0; k < N; k++) {
        const int i = 2 * k, j = 2 * k + 1;
        if (interleaved) pair(k, packs[i / N].at[i % N], packs[j / N].at[j % N]);
        else pair(k, packs[0].at[k], packs[1].at[k]);
      }
      store(turned + first, packs[0]);
      store(turned + second, packs[1]);
    }
  });
}

#define ROPE(T, name) \
  extern "C" __global__ void rope_##name(i64 packed, i64 rows, i64 parts, i64 pairs, i64 heads, i64 head_dim, i64 interleaved, \
      double magnitude, double direction, const double* frequencies, const u32* positions, T* x, i64 sx) { \
    WITH_PACKS(packed, Width<T>::value, \
      (rope<N>(rows, parts, pairs, heads, head_dim, interleaved, magnitude, direction, frequencies, positions, x, sx))) \
  }
EACH_ELEMENT(ROPE)
