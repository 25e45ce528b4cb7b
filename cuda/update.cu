// Steps of SGD and AdamW, element by element, in the accumulator; sums of squares.
#include "element.cuh"

// w <- f(i, w), from the master weight where there is one; N at a time.
template <int N, class T, class F> __device__ __forceinline__ void each_weight(i64 len, T* weight, Acc<T>* master, F f) {
  each<N>(1, len, [&](i64, i64 at) {
    auto w = load<N>(weight + at);
    Pack<Acc<T>, N> whole;
    if (master) whole = load<N>(master + at);
#pragma unroll
    for (int k = 0; k < N; k++) whole.at[k] = master ? whole.at[k] : widen(w.at[k]);
    f(at, whole);
    if (master) store(master + at, whole);
#pragma unroll
    for (int k = 0; k < N; k++) w.at[k] = narrow<T>(whole.at[k]);
    store(weight + at, w);
  });
}

template <int N, class T>
__device__ __forceinline__ void sgd(i64 len, Acc<T> rate, Acc<T> keep, Acc<T> shrink, Acc<T> by, bool nesterov, const Acc<T>* grad,
    T* weight, Acc<T>* master, Acc<T>* velocity) {
  typedef Acc<T> A;
  each_weight<N>(len, weight, master, [&](i64 at, Pack<A, N>& w) {
    const auto grads = load<N>(grad + at);
    Pack<A, N> v;
    if (velocity) v = load<N>(velocity + at);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A g = by * grads.at[k] + shrink * w.at[k];
      if (velocity) v.at[k] = keep * v.at[k] + g;
      w.at[k] = w.at[k] - rate * (!velocity ? g : nesterov ? g + keep * v.at[k] : v.at[k]);
    }
    if (velocity) store(velocity + at, v);
  });
}

template <class A> struct AdamW { A beta1, rest1, beta2, rest2, eps, size, root, keep, scale; };

template <int N, class T>
__device__ __forceinline__ void adamw(i64 len, AdamW<Acc<T>> by, const Acc<T>* grad, T* weight, Acc<T>* master, Acc<T>* first,
    Acc<T>* second) {
  typedef Acc<T> A;
  each_weight<N>(len, weight, master, [&](i64 at, Pack<A, N>& w) {
    const auto grads = load<N>(grad + at);
    auto m = load<N>(first + at), v = load<N>(second + at);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A g = by.scale * grads.at[k];
      m.at[k] = by.beta1 * m.at[k] + by.rest1 * g;
      v.at[k] = by.beta2 * v.at[k] + by.rest2 * (g * g);
      w.at[k] = by.keep * w.at[k] - by.size * m.at[k] / (sqrt_of(v.at[k]) * by.root + by.eps);
    }
    store(first + at, m);
    store(second + at, v);
  });
}

#define UPDATE(T, name) \
  extern "C" __global__ void sgd_##name(i64 packed, i64 rows, i64 len, double lr, double momentum, double decay, double scale, \
      i64 nesterov, const Acc<T>* grad, T* weight, Acc<T>* master, Acc<T>* velocity) { \
    typedef Acc<T> A; \
    WITH_PACKS(packed, (Width<T, A>::value), \
      (sgd<N>(rows * len, (A)lr, (A)momentum, (A)decay, (A)scale, nesterov, grad, weight, master, velocity))) \
  } \
  extern "C" __global__ void adamw_##name(i64 packed, i64 rows, i64 len, double beta1, double rest1, double beta2, double rest2, \
      double eps, double size, double root, double keep, double scale, const Acc<T>* grad, T* weight, Acc<T>* master, \
      Acc<T>* first, Acc<T>* second) { \
    typedef Acc<T> A; \
    const AdamW<A> by = {(A)beta1, (A)rest1, (A)beta2, (A)rest2, (A)eps, (A)size, (A)root, (A)keep, (A)scale}; \
    WITH_PACKS(packed, (Width<T, A>::value), (adamw<N>(rows * len, by, grad, weight, master, first, second))) \
  } \
  extern "C" __global__ void square_sums_##name(i64 packed, i64 rows, i64 cols, const T* x, i64 sx, double* sums) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    double sum = 0; \
    each_of_row(packed, cols, x + row * sx, [&](Acc<T> x, i64) { sum += (double)x * (double)x; }); \
    sum = row_sum(sum); \
    if (threadIdx.x == 0) sums[row] = sum; \
  }
EACH_ELEMENT(UPDATE)
