// LayerNorm and RMSNorm. A warp a row where rows are short, else a block a row; the variance in a second pass over the row.
#include "element.cuh"

template <int N, class T>
__device__ __forceinline__ void normalize(i64 cols, bool centers, Acc<T> eps, const T* x, const T* gamma, const T* beta, T* y,
    Acc<T>* stats) {
  typedef Acc<T> A;
  const A count = (A)cols;
  const A mean = centers ? sum_over<N>(cols, x, [](A x, i64) { return x; }) / count : (A)0;
  const A square = sum_over<N>(cols, x, [mean](A x, i64) { return (x - mean) * (x - mean); }) / count;
  const A scale = (A)1 / sqrt_of(square + eps);
  if (threadIdx.x == 0) {
    stats[0] = mean;
    stats[1] = scale;
  }
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = load<N>(x + i);
    const auto g = load<N>(gamma + i);
    Pack<T, N> out, b;
    if (beta) b = load<N>(beta + i);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A scaled = (widen(in.at[k]) - mean) * scale * widen(g.at[k]);
      out.at[k] = narrow<T>(beta ? scaled + widen(b.at[k]) : scaled);
    }
    store(y + i, out);
  }
}

template <int N, class T>
__device__ __forceinline__ void normalize_backward(i64 cols, bool centers, const T* x, const T* gamma, const Acc<T>* stats,
    const T* dy, T* dx) {
  typedef Acc<T> A;
  const A count = (A)cols, mean = stats[0], scale = stats[1];
  A sum_g = 0, sum_gx = 0;
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = load<N>(x + i);
    const auto d = load<N>(dy + i);
    const auto w = load<N>(gamma + i);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A g = widen(d.at[k]) * widen(w.at[k]);
      sum_g += g;
      sum_gx += g * ((widen(in.at[k]) - mean) * scale);
    }
  }
  const A mean_g = centers ? row_sum(sum_g) / count : (A)0;
  const A mean_gx = row_sum(sum_gx) / count;
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = load<N>(x + i);
    const auto d = load<N>(dy + i);
    const auto w = load<N>(gamma + i);
    Pack<T, N> out;
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A unit = (widen(in.at[k]) - mean) * scale;
      out.at[k] = narrow<T>(scale * (widen(d.at[k]) * widen(w.at[k]) - mean_g - unit * mean_gx));
    }
    store(dx + i, out);
  }
}

#define NORM(T, name) \
  extern "C" __global__ void normalize_##name(i64 packed, i64 rows, i64 cols, i64 centers, double eps, const T* x, i64 sx, \
      const T* gamma, const T* beta, T* y, i64 sy, Acc<T>* stats) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    if (packed) normalize<Width<T>::value>(cols, centers, (Acc<T>)eps, x + row * sx, gamma, beta, y + row * sy, stats + 2 * row); \
    else normalize<1>(cols, centers, (Acc<T>)eps, x + row * sx, gamma, beta, y + row * sy, stats + 2 * row); \
  } \
  extern "C" __global__ void normalize_backward_##name(i64 packed, i64 rows, i64 cols, i64 centers, const T* x, i64 sx, \
      const T* gamma, const Acc<T>* stats, const T* dy, i64 sdy, T* dx, i64 sdx) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    if (packed) normalize_backward<Width<T>::value>(cols, centers, x + row * sx, gamma, stats + 2 * row, dy + row * sdy, dx + row * sdx); \
    else normalize_backward<1>(cols, centers, x + row * sx, gamma, stats + 2 * row, dy + row * sdy, dx + row * sdx); \
  } \
  /* Runs of rows of the gradients of gamma and beta; pointwise.cu's column_sums adds the runs. */ \
  extern "C" __global__ void normalize_columns_##name(i64 rows, i64 cols, i64 run, const T* x, i64 sx, const Acc<T>* stats, \
      const T* dy, i64 sdy, Acc<T>* dgamma, Acc<T>* dbeta) { \
    typedef Acc<T> A; \
    __shared__ A part[2][8][32]; \
    const i64 col = (i64)blockIdx.x * 32 + threadIdx.x; \
    const i64 end = rows < ((i64)blockIdx.y + 1) * run ? rows : ((i64)blockIdx.y + 1) * run; \
    A sum_g = 0, sum_b = 0; \
    if (col < cols) for (i64 row = (i64)blockIdx.y * run + threadIdx.y; row < end; row += 8) { \
      const A d = widen(dy[row * sdy + col]); \
      sum_g += d * ((widen(x[row * sx + col]) - stats[2 * row]) * stats[2 * row + 1]); \
      sum_b += d; \
    } \
    part[0][threadIdx.y][threadIdx.x] = sum_g; \
    part[1][threadIdx.y][threadIdx.x] = sum_b; \
    __syncthreads(); \
    if (threadIdx.y == 0 && col < cols) { \
      for (int k = 1; k < 8; k++) { \
        sum_g += part[0][k][threadIdx.x]; \
        sum_b += part[1][k][threadIdx.x]; \
      } \
      dgamma[(i64)blockIdx.y * cols + col] = sum_g; \
      if (dbeta) dbeta[(i64)blockIdx.y * cols + col] = sum_b; \
    } \
  }
EACH_ELEMENT(NORM)
