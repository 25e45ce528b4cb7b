// Row softmax with causal and padding masks. What a mask hides has no influence.
#include "element.cuh"

#define SOFTMAX(T, name) \
  extern "C" __global__ void softmax_##name(i64 packed, i64 rows, i64 cols, i64 offset, const u8* valid, const T* x, i64 sx, T* y, \
      i64 sy) { \
    typedef Acc<T> A; \
    constexpr int N = Width<T>::value; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    const T* in = x + row * sx; \
    /* Without a causal mask the offset is negative. */ \
    const i64 visible = offset < 0 || offset + row + 1 > cols ? cols : offset + row + 1; \
    const auto seen = [&](i64 i) { return i < visible && (!valid || valid[i]); }; \
    A most = -infinity<A>(); \
    each_of_row(packed, cols, in, [&](A x, i64 i) { if (seen(i)) most = max_nan(most, x); }); \
    most = row_max(most); \
    A sum = 0; \
    each_of_row(packed, cols, in, [&](A x, i64 i) { if (seen(i)) sum += exp_of(x - most); }); \
    const A scale = (A)1 / row_sum(sum); \
    for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) { \
      const auto some = take<N>(packed, in, i, cols); \
      Pack<T, N> out; \
      _Pragma("unroll") for (int k = 0; k < N; k++) \
        out.at[k] = narrow<T>(seen(i + k) ? exp_of(widen(some.at[k]) - most) * scale : (A)0); \
      give(packed, y + row * sy, i, cols, out); \
    } \
  } \
  extern "C" __global__ void softmax_backward_##name(i64 packed, i64 rows, i64 cols, const T* y, i64 sy, const T* dy, i64 sdy, T* dx, \
      i64 sdx) { \
    typedef Acc<T> A; \
    constexpr int N = Width<T>::value; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    A sum = 0; \
    each_of_row(packed, cols, y + row * sy, dy + row * sdy, [&](A y, A dy, i64) { sum += y * dy; }); \
    sum = row_sum(sum); \
    for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) { \
      const auto left = take<N>(packed, y + row * sy, i, cols); \
      const auto right = take<N>(packed, dy + row * sdy, i, cols); \
      Pack<T, N> out; \
      _Pragma("unroll") for (int k = 0; k < N; k++) out.at[k] = narrow<T>(widen(left.at[k]) * (widen(right.at[k]) - sum)); \
      give(packed, dx + row * sdx, i, cols, out); \
    } \
  }
EACH_ELEMENT(SOFTMAX)
