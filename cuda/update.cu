// Steps of SGD and AdamW, element by element, in the accumulator; sums of squares.
#include "element.cuh"

// w <- f(i, w), from the master weight where there is one.
template <class T, class F> __device__ __forceinline__ void each_weight(i64 len, T* weight, Acc<T>* master, F f) {
  each<1>(1, len, [&](i64, i64 at) {
    const Acc<T> w = f(at, master ? master[at] : widen(weight[at]));
    if (master) master[at] = w;
    weight[at] = narrow<T>(w);
  });
}

#define UPDATE(T, name) \
  extern "C" __global__ void sgd_##name(i64 len, double lr, double momentum, double decay, double scale, i64 nesterov, \
      const Acc<T>* grad, T* weight, Acc<T>* master, Acc<T>* velocity) { \
    typedef Acc<T> A; \
    const A rate = (A)lr, keep = (A)momentum, shrink = (A)decay, by = (A)scale; \
    each_weight(len, weight, master, [&](i64 at, A w) { \
      const A g = by * grad[at] + shrink * w; \
      if (!velocity) return w - rate * g; \
      const A v = keep * velocity[at] + g; \
      velocity[at] = v; \
      return w - rate * (nesterov ? g + keep * v : v); \
    }); \
  } \
  extern "C" __global__ void adamw_##name(i64 len, double beta1, double rest1, double beta2, double rest2, double eps, \
      double size, double root, double keep, double scale, const Acc<T>* grad, T* weight, Acc<T>* master, Acc<T>* first, \
      Acc<T>* second) { \
    typedef Acc<T> A; \
    const A b1 = (A)beta1, r1 = (A)rest1, b2 = (A)beta2, r2 = (A)rest2; \
    each_weight(len, weight, master, [&](i64 at, A w) { \
      const A g = (A)scale * grad[at]; \
      const A m = b1 * first[at] + r1 * g, v = b2 * second[at] + r2 * (g * g); \
      first[at] = m; \
      second[at] = v; \
      return (A)keep * w - (A)size * m / (sqrt_of(v) * (A)root + (A)eps); \
    }); \
  } \
  extern "C" __global__ void square_sums_##name(i64 rows, i64 cols, const T* x, i64 sx, double* sums) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    double sum = 0; \
    for (i64 i = threadIdx.x; i < cols; i += blockDim.x) { \
      const double value = (double)widen(x[row * sx + i]); \
      sum += value * value; \
    } \
    sum = row_sum(sum); \
    if (threadIdx.x == 0) sums[row] = sum; \
  }
EACH_ELEMENT(UPDATE)
