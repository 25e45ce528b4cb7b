// LayerNorm and RMSNorm. One warp per row where rows are short, else one block per row. The
// variance takes a second pass over the row.
#include "element.cuh"

template <class T>
__device__ __forceinline__ void normalize(bool packed, i64 cols, bool centers, Acc<T> eps, const T* x, const T* gamma,
    const T* beta, T* y, Acc<T>* stats) {
  typedef Acc<T> A;
  constexpr int N = Width<T>::value;
  const A count = (A)cols;
  A sum = 0, mean = 0;
  if (centers) {
    each_of_row(packed, cols, x, [&](A x, i64) { sum += x; });
    mean = row_sum(sum) / count;
    sum = 0;
  }
  each_of_row(packed, cols, x, [&](A x, i64) { sum += (x - mean) * (x - mean); });
  const A scale = (A)1 / sqrt_of(row_sum(sum) / count + eps);
  if (threadIdx.x == 0) {
    stats[0] = mean;
    stats[1] = scale;
  }
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = take<N>(packed, x, i, cols);
    const auto g = take<N>(packed, gamma, i, cols);
    Pack<T, N> out, b;
    if (beta) b = take<N>(packed, beta, i, cols);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A scaled = (widen(in.at[k]) - mean) * scale * widen(g.at[k]);
      out.at[k] = narrow<T>(beta ? scaled + widen(b.at[k]) : scaled);
    }
    give(packed, y, i, cols, out);
  }
}

template <class T>
__device__ __forceinline__ void normalize_backward(bool packed, i64 cols, bool centers, const T* x, const T* gamma,
    const Acc<T>* stats, const T* dy, T* dx) {
  typedef Acc<T> A;
  constexpr int N = Width<T>::value;
  const A count = (A)cols, mean = stats[0], scale = stats[1];
  A sum_g = 0, sum_gx = 0;
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = take<N>(packed, x, i, cols);
    const auto d = take<N>(packed, dy, i, cols);
    const auto w = take<N>(packed, gamma, i, cols);
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (i + k >= cols) continue;
      const A g = widen(d.at[k]) * widen(w.at[k]);
      sum_g += g;
      sum_gx += g * ((widen(in.at[k]) - mean) * scale);
    }
  }
  const A mean_g = centers ? row_sum(sum_g) / count : (A)0;
  const A mean_gx = row_sum(sum_gx) / count;
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = take<N>(packed, x, i, cols);
    const auto d = take<N>(packed, dy, i, cols);
    const auto w = take<N>(packed, gamma, i, cols);
    Pack<T, N> out;
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A unit = (widen(in.at[k]) - mean) * scale;
      out.at[k] = narrow<T>(scale * (widen(d.at[k]) * widen(w.at[k]) - mean_g - unit * mean_gx));
    }
    give(packed, dx, i, cols, out);
  }
}

template <int N, class T>
__device__ __forceinline__ void normalize_columns(i64 rows, i64 cols, i64 run, const T* x, i64 sx, const Acc<T>* stats,
    const T* dy, i64 sdy, Acc<T>* dgamma, Acc<T>* dbeta) {
  const i64 col = own_columns<N>();
  Acc<T> sum_g[N] = {}, sum_b[N] = {};
  if (col < cols) each_of_run(rows, run, [&](i64 row) {
    const auto in = load<N>(x + row * sx + col);
    const auto d = load<N>(dy + row * sdy + col);
#pragma unroll
    for (int k = 0; k < N; k++) {
      sum_g[k] += widen(d.at[k]) * ((widen(in.at[k]) - stats[2 * row]) * stats[2 * row + 1]);
      sum_b[k] += widen(d.at[k]);
    }
  });
  store_run(cols, sum_g, dgamma);
  if (dbeta) store_run(cols, sum_b, dbeta);
}

#define NORM(T, name) \
  extern "C" __global__ void normalize_##name(i64 packed, i64 rows, i64 cols, i64 centers, double eps, const T* x, i64 sx, \
      const T* gamma, const T* beta, T* y, i64 sy, Acc<T>* stats) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    normalize(packed, cols, centers, (Acc<T>)eps, x + row * sx, gamma, beta, y + row * sy, stats + 2 * row); \
  } \
  extern "C" __global__ void normalize_backward_##name(i64 packed, i64 rows, i64 cols, i64 centers, const T* x, i64 sx, \
      const T* gamma, const Acc<T>* stats, const T* dy, i64 sdy, T* dx, i64 sdx) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    normalize_backward(packed, cols, centers, x + row * sx, gamma, stats + 2 * row, dy + row * sdy, dx + row * sdx); \
  } \
  /* Gradients of gamma and beta over runs of rows; pointwise.cu's column_sums sums them. */ \
  extern "C" __global__ void normalize_columns_##name(i64 packed, i64 rows, i64 cols, i64 run, const T* x, i64 sx, \
      const Acc<T>* stats, const T* dy, i64 sdy, Acc<T>* dgamma, Acc<T>* dbeta) { \
    WITH_PACKS(packed, Width<T>::value, (normalize_columns<N>(rows, cols, run, x, sx, stats, dy, sdy, dgamma, dbeta))) \
  }
EACH_ELEMENT(NORM)
