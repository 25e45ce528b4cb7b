// Losses of rows: cross entropy over all classes or a range of them, and squared error.
#include "element.cuh"

#define LOSS(T, name) \
  extern "C" __global__ void row_max_##name(i64 packed, i64 rows, i64 cols, const T* x, i64 sx, Acc<T>* most) { \
    typedef Acc<T> A; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    A largest = -infinity<A>(); \
    each_of_row(packed, cols, x + row * sx, [&](A x, i64) { largest = max_nan(largest, x); }); \
    largest = row_max(largest); \
    if (threadIdx.x == 0) most[row] = largest; \
  } \
  /* columns[row]: the column of the row's target, negative if it is elsewhere or ignored. */ \
  extern "C" __global__ void exp_sums_##name(i64 packed, i64 rows, i64 cols, i64 smoothed, const i64* columns, const T* x, i64 sx, \
      const Acc<T>* most, Acc<T>* sums) { \
    typedef Acc<T> A; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    const T* in = x + row * sx; \
    const A m = most[row]; \
    A exps = 0, all = 0; \
    each_of_row(packed, cols, in, [&](A x, i64) { \
      const A value = x - m; \
      exps += exp_of(value); \
      if (smoothed) all += value; \
    }); \
    exps = row_sum(exps); \
    if (smoothed) all = row_sum(all); \
    if (threadIdx.x == 0) { \
      sums[3 * row] = exps; \
      sums[3 * row + 1] = columns[row] < 0 ? (A)0 : widen(in[columns[row]]) - m; \
      sums[3 * row + 2] = all; \
    } \
  } \
  extern "C" __global__ void cross_entropy_backward_##name(i64 packed, i64 rows, i64 cols, double on, double off, double z, \
      double scale, const i64* columns, const u8* ignored, const T* x, i64 sx, const Acc<T>* most, \
      const Acc<T>* logs, T* dx, i64 sdx) { \
    typedef Acc<T> A; \
    constexpr int N = Width<T>::value; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    /* Subtracted separately: their sum is rounded at the size of the logits' common offset. */ \
    const A m = most[row], log_sum = logs[row], weight = (A)1 + (A)(2 * z) * (m + log_sum), by = (A)scale; \
    const i64 target = columns[row]; \
    const bool counts = !ignored[row]; \
    for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) { \
      const auto in = take<N>(packed, x + row * sx, i, cols); \
      Pack<T, N> out; \
      _Pragma("unroll") for (int k = 0; k < N; k++) { \
        A d = 0; \
        if (counts) { \
          const A p = exp_of((widen(in.at[k]) - m) - log_sum) * weight; \
          d = by * (i + k == target ? p - (A)off - (A)on : p - (A)off); \
        } \
        out.at[k] = narrow<T>(d); \
      } \
      give(packed, dx + row * sdx, i, cols, out); \
    } \
  } \
  extern "C" __global__ void squared_error_##name(i64 packed, i64 rows, i64 cols, const T* x, i64 sx, const T* y, i64 sy, \
      Acc<T>* sums) { \
    typedef Acc<T> A; \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    A sum = 0; \
    each_of_row(packed, cols, x + row * sx, y + row * sy, [&](A x, A y, i64) { sum += (x - y) * (x - y); }); \
    sum = row_sum(sum); \
    if (threadIdx.x == 0) sums[row] = sum; \
  } \
  extern "C" __global__ void squared_error_backward_##name(i64 packed, i64 rows, i64 cols, double scale, const T* x, i64 sx, \
      const T* y, i64 sy, T* dx, i64 sdx) { \
    const Acc<T> by = (Acc<T>)(2 * scale); \
    WITH_PACKS(packed, Width<T>::value, \
      (map<N>(rows, cols, x, sx, y, sy, dx, sdx, [by](T x, T y) { return narrow<T>(by * (widen(x) - widen(y))); }))) \
  }
EACH_ELEMENT(LOSS)

// One thread per row: the losses from the maxima and the sums over all classes.
#define CROSS_ENTROPY(A, name) \
  extern "C" __global__ void cross_entropy_##name(i64 rows, double on, double off, double z, const u8* ignored, const A* most, \
      const A* sums, A* losses, A* logs) { \
    each<1>(1, rows, [&](i64, i64 row) { \
      const A log_sum = log_of(sums[3 * row]), whole = most[row] + log_sum; \
      logs[row] = log_sum; \
      losses[row] = ignored[row] ? (A)0 \
        : log_sum - (A)on * sums[3 * row + 1] - (A)off * sums[3 * row + 2] + (A)z * whole * whole; \
    }); \
  }
EACH_ACC(CROSS_ENTROPY)
