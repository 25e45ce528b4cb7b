// Element-wise kernels: activations, gates, sums, products, bias, copies and conversions. Also sums
// over rows and over columns.
#include "element.cuh"

// ---- activations, numbered as in kernels/pointwise ----

template <class A> __device__ __forceinline__ A sigmoid(A x) { return (A)1 / ((A)1 + exp_of(-x)); }
template <class A> __device__ __forceinline__ A normal_cdf(A x) {
  return (A)0.5 * ((A)1 + erf_of(x * (A)0.70710678118654752440));
}
template <class A> __device__ __forceinline__ A gelu_inner(A x) {
  return (A)0.79788456080286535588 * (x + (A)0.044715 * x * x * x);
}

template <class A> struct Relu {
  static __device__ __forceinline__ A f(A x) { return max_nan(x, (A)0); }
  // A NaN lets the gradient through. Selects, so that an infinite dy gives 0 where x <= 0.
  static __device__ __forceinline__ A df(A x, A dy) { return x <= 0 ? (A)0 : dy; }
};
template <class A> struct Silu {
  static __device__ __forceinline__ A f(A x) { return x * sigmoid(x); }
  static __device__ __forceinline__ A df(A x, A dy) {
    const A s = sigmoid(x);
    return dy * (s * ((A)1 + x * ((A)1 - s)));
  }
};
template <class A> struct GeluErf {
  static __device__ __forceinline__ A f(A x) { return x * normal_cdf(x); }
  static __device__ __forceinline__ A df(A x, A dy) {
    return dy * (normal_cdf(x) + x * (A)0.39894228040143267794 * exp_of((A)-0.5 * x * x));
  }
};
template <class A> struct GeluTanh {
  static __device__ __forceinline__ A f(A x) { return (A)0.5 * x * ((A)1 + tanh_of(gelu_inner(x))); }
  static __device__ __forceinline__ A df(A x, A dy) {
    const A t = tanh_of(gelu_inner(x));
    // tanh' comes first: where x * x overflows, tanh' is 0 and the product stays 0.
    const A bump = ((A)1 - t * t) * x;
    const A slope = bump + bump * x * x * (A)(3 * 0.044715);
    return dy * ((A)0.5 * ((A)1 + t + (A)0.79788456080286535588 * slope));
  }
};

// Runs `body` with F the activation of this number.
#define WITH_ACTIVATION(number, A, body) \
  switch (number) { \
    case 0: { typedef Relu<A> F; body; break; } \
    case 1: { typedef Silu<A> F; body; break; } \
    case 2: { typedef GeluErf<A> F; body; break; } \
    default: { typedef GeluTanh<A> F; body; break; } \
  }

#define ACTIVATE(T, name) \
  extern "C" __global__ void activate_##name(i64 packed, i64 rows, i64 cols, i64 kind, const T* x, i64 sx, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, WITH_ACTIVATION(kind, Acc<T>, \
      (map<N>(rows, cols, x, sx, y, sy, [](T x) { return narrow<T>(F::f(widen(x))); })))) \
  } \
  extern "C" __global__ void activate_backward_##name(i64 packed, i64 rows, i64 cols, i64 kind, const T* x, i64 sx, \
      const T* dy, i64 sdy, T* dx, i64 sdx) { \
    WITH_PACKS(packed, Width<T>::value, WITH_ACTIVATION(kind, Acc<T>, \
      (map<N>(rows, cols, x, sx, dy, sdy, dx, sdx, [](T x, T dy) { return narrow<T>(F::df(widen(x), widen(dy))); })))) \
  } \
  extern "C" __global__ void gate_##name(i64 packed, i64 rows, i64 cols, i64 kind, const T* gate, i64 sg, const T* up, i64 su, \
      T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, WITH_ACTIVATION(kind, Acc<T>, \
      (map<N>(rows, cols, gate, sg, up, su, y, sy, [](T g, T u) { return narrow<T>(F::f(widen(g)) * widen(u)); })))) \
  } \
  extern "C" __global__ void gate_backward_##name(i64 packed, i64 rows, i64 cols, i64 kind, const T* gate, i64 sg, \
      const T* up, i64 su, const T* dy, i64 sdy, T* d, i64 sd) { \
    WITH_PACKS(packed, Width<T>::value, WITH_ACTIVATION(kind, Acc<T>, (gate_backward<F, N>(rows, cols, gate, sg, up, su, dy, sdy, d, sd)))) \
  }

// dgate in the left half of d, dup in the right.
template <class F, int N, class T>
__device__ __forceinline__ void gate_backward(i64 rows, i64 cols, const T* gate, i64 sg, const T* up, i64 su, const T* dy,
    i64 sdy, T* d, i64 sd) {
  each<N>(rows, cols, [&](i64 r, i64 c) {
    const auto g = load<N>(gate + r * sg + c);
    const auto u = load<N>(up + r * su + c);
    const auto e = load<N>(dy + r * sdy + c);
    Pack<T, N> dgate, dup;
#pragma unroll
    for (int i = 0; i < N; i++) {
      dgate.at[i] = narrow<T>(F::df(widen(g.at[i]), widen(e.at[i]) * widen(u.at[i])));
      dup.at[i] = narrow<T>(widen(e.at[i]) * F::f(widen(g.at[i])));
    }
    store(d + r * sd + c, dgate);
    store(d + r * sd + cols + c, dup);
  });
}
EACH_ELEMENT(ACTIVATE)

// ---- sums ----

#define SUMS(T, name) \
  extern "C" __global__ void add_##name(i64 packed, i64 rows, i64 cols, const T* a, i64 sa, const T* b, i64 sb, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, \
      (map<N>(rows, cols, a, sa, b, sb, y, sy, [](T a, T b) { return narrow<T>(widen(a) + widen(b)); }))) \
  } \
  extern "C" __global__ void mul_##name(i64 packed, i64 rows, i64 cols, const T* a, i64 sa, const T* b, i64 sb, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, \
      (map<N>(rows, cols, a, sa, b, sb, y, sy, [](T a, T b) { return narrow<T>(widen(a) * widen(b)); }))) \
  } \
  extern "C" __global__ void scale_rows_##name(i64 packed, i64 rows, i64 cols, const T* s, const T* x, i64 sx, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, (each<N>(rows, cols, [&](i64 r, i64 c) { \
      const Acc<T> by = widen(s[r]); \
      const auto in = load<N>(x + r * sx + c); \
      Pack<T, N> out; \
      for (int i = 0; i < N; i++) out.at[i] = narrow<T>(by * widen(in.at[i])); \
      store(y + r * sy + c, out); \
    }))) \
  } \
  extern "C" __global__ void dot_rows_##name(i64 packed, i64 rows, i64 cols, const T* a, i64 sa, const T* b, i64 sb, T* s) { \
    const i64 row = own_row(); \
    if (row >= rows) return; \
    Acc<T> sum = 0; \
    each_of_row(packed, cols, a + row * sa, b + row * sb, [&](Acc<T> x, Acc<T> y, i64) { sum += x * y; }); \
    sum = row_sum(sum); \
    if (threadIdx.x == 0) s[row] = narrow<T>(sum); \
  } \
  extern "C" __global__ void add_bias_##name(i64 packed, i64 rows, i64 cols, const T* bias, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, \
      (map<N>(rows, cols, y, sy, bias, 0, y, sy, [](T y, T b) { return narrow<T>(widen(y) + widen(b)); }))) \
  } \
  extern "C" __global__ void scale_##name(i64 packed, i64 rows, i64 cols, double alpha, T* y, i64 sy) { \
    const Acc<T> by = (Acc<T>)alpha; \
    WITH_PACKS(packed, Width<T>::value, (map<N>(rows, cols, y, sy, y, sy, [by](T y) { return narrow<T>(by * widen(y)); }))) \
  } \
  extern "C" __global__ void fill_##name(i64 packed, i64 rows, i64 cols, double value, T* y, i64 sy) { \
    const T what = Convert<T>::of(value); \
    WITH_PACKS(packed, Width<T>::value, (each<N>(rows, cols, [&](i64 r, i64 c) { \
      Pack<T, N> out; \
      for (int i = 0; i < N; i++) out.at[i] = what; \
      store(y + r * sy + c, out); \
    }))) \
  }
EACH_ELEMENT(SUMS)

// y <- y + x, in the accumulator.
#define ACCUMULATE(X, xname, Y, yname) \
  extern "C" __global__ void accumulate_##xname##_##yname(i64 packed, i64 rows, i64 cols, const X* x, i64 sx, Y* y, i64 sy) { \
    WITH_PACKS(packed, (Width<X, Y>::value), \
      (map<N>(rows, cols, x, sx, y, sy, y, sy, [](X x, Y y) { return narrow<Y>(widen(y) + widen(x)); }))) \
  }
#define ACCUMULATE_HALVES(Y, yname) ACCUMULATE(float, f32, Y, yname) ACCUMULATE(bf16, bf16, Y, yname) ACCUMULATE(f16, f16, Y, yname)
ACCUMULATE(double, f64, double, f64)
ACCUMULATE_HALVES(float, f32)
ACCUMULATE_HALVES(bf16, bf16)
ACCUMULATE_HALVES(f16, f16)

// ---- copies and conversions ----

#define COPY(X, xname, Y, yname) \
  extern "C" __global__ void copy_##xname##_##yname(i64 packed, i64 rows, i64 cols, const X* x, i64 sx, Y* y, i64 sy) { \
    WITH_PACKS(packed, (Width<X, Y>::value), (map<N>(rows, cols, x, sx, y, sy, [](X x) { return Convert<Y>::of(x); }))) \
  }
#define SAME(T, name) \
  extern "C" __global__ void copy_##name##_##name(i64 packed, i64 rows, i64 cols, const T* x, i64 sx, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, (map<N>(rows, cols, x, sx, y, sy, [](T x) { return x; }))) \
  } \
  extern "C" __global__ void copy_strided_##name(i64 rows, i64 cols, const T* x, i64 sx, i64 cx, T* y, i64 sy, i64 cy) { \
    each<1>(rows, cols, [&](i64 r, i64 c) { y[r * sy + c * cy] = x[r * sx + c * cx]; }); \
  }
EACH_ELEMENT(SAME)
COPY(double, f64, float, f32) COPY(double, f64, bf16, bf16) COPY(double, f64, f16, f16)
COPY(float, f32, double, f64) COPY(float, f32, bf16, bf16) COPY(float, f32, f16, f16)
COPY(bf16, bf16, double, f64) COPY(bf16, bf16, float, f32) COPY(bf16, bf16, f16, f16)
COPY(f16, f16, double, f64) COPY(f16, f16, float, f32) COPY(f16, f16, bf16, bf16)

// ---- sums of columns ----

template <int N, class T> __device__ __forceinline__ void column_runs(i64 rows, i64 cols, i64 run, const T* x, i64 sx, Acc<T>* runs) {
  const i64 col = own_columns<N>();
  Acc<T> sum[N] = {};
  if (col < cols) each_of_run(rows, run, [&](i64 row) {
    const auto some = load<N>(x + row * sx + col);
#pragma unroll
    for (int k = 0; k < N; k++) sum[k] += widen(some.at[k]);
  });
  store_run(cols, sum, runs);
}

#define COLUMNS(T, name) \
  extern "C" __global__ void column_runs_##name(i64 packed, i64 rows, i64 cols, i64 run, const T* x, i64 sx, Acc<T>* runs) { \
    WITH_PACKS(packed, Width<T>::value, (column_runs<N>(rows, cols, run, x, sx, runs))) \
  }
EACH_ELEMENT(COLUMNS)

// to <- terms that lie `step` apart, reduced in order, in the accumulator, rounded once.
template <int N, class T, class Op>
__device__ __forceinline__ void combine(i64 count, i64 len, i64 step, const T* terms, T* to, Op op) {
  each<N>(1, len, [&](i64, i64 at) {
    Pack<Acc<T>, N> all;
    auto term = load<N>(terms + at);
#pragma unroll
    for (int k = 0; k < N; k++) all.at[k] = widen(term.at[k]);
    for (i64 i = 1; i < count; i++) {
      term = load<N>(terms + i * step + at);
#pragma unroll
      for (int k = 0; k < N; k++) all.at[k] = op(all.at[k], widen(term.at[k]));
    }
#pragma unroll
    for (int k = 0; k < N; k++) term.at[k] = narrow<T>(all.at[k]);
    store(to + at, term);
  });
}

#define COLUMN_SUMS(A, name) \
  extern "C" __global__ void column_sums_##name(i64 packed, i64 runs, i64 cols, const A* from, A* sums) { \
    WITH_PACKS(packed, Width<A>::value, (combine<N>(runs, cols, cols, from, sums, [](A a, A b) { return a + b; }))) \
  }
EACH_ACC(COLUMN_SUMS)

// to <- the consecutive terms of all ranks, reduced in rank order: sum (0), maximum (1) or minimum
// (2).
#define REDUCE(T, name) \
  extern "C" __global__ void reduce_##name(i64 packed, i64 ranks, i64 len, i64 op, const T* terms, T* to) { \
    typedef Acc<T> A; \
    WITH_PACKS(packed, Width<T>::value, (combine<N>(ranks, len, len, terms, to, [op](A a, A b) { \
      return op == 0 ? a + b : op == 1 ? max_nan(a, b) : min_nan(a, b); \
    }))) \
  }
EACH_ELEMENT(REDUCE)
