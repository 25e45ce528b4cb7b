// Row softmax with causal and padding masks. What a mask hides is not read.
#include "element.cuh"

#define SOFTMAX(T, name) \
  extern "C" __global__ void softmax_##name(i64 rows, i64 cols, i64 offset, const u8* valid, const T* x, i64 sx, T* y, i64 sy) { \
    typedef Acc<T> A; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    const T* in = x + row * sx; \
    T* out = y + row * sy; \
    /* Without a causal mask the offset is negative. */ \
    const i64 visible = offset < 0 || offset + row + 1 > cols ? cols : offset + row + 1; \
    A most = -infinity<A>(); \
    for (i64 i = threadIdx.x; i < visible; i += blockDim.x) if (!valid || valid[i]) most = max_nan(most, widen(in[i])); \
    most = row_max(most); \
    A sum = 0; \
    for (i64 i = threadIdx.x; i < visible; i += blockDim.x) if (!valid || valid[i]) sum += exp_of(widen(in[i]) - most); \
    const A scale = (A)1 / row_sum(sum); \
    for (i64 i = threadIdx.x; i < cols; i += blockDim.x) { \
      const bool seen = i < visible && (!valid || valid[i]); \
      out[i] = narrow<T>(seen ? exp_of(widen(in[i]) - most) * scale : (A)0); \
    } \
  } \
  extern "C" __global__ void softmax_backward_##name(i64 rows, i64 cols, const T* y, i64 sy, const T* dy, i64 sdy, T* dx, i64 sdx) { \
    typedef Acc<T> A; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    A sum = 0; \
    for (i64 i = threadIdx.x; i < cols; i += blockDim.x) sum += widen(y[row * sy + i]) * widen(dy[row * sdy + i]); \
    sum = row_sum(sum); \
    for (i64 i = threadIdx.x; i < cols; i += blockDim.x) \
      dx[row * sdx + i] = narrow<T>(widen(y[row * sy + i]) * (widen(dy[row * sdy + i]) - sum)); \
  }
EACH_ELEMENT(SOFTMAX)
