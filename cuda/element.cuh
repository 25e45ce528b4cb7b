// Shared by all kernels: elements, packs of 16 bytes, sums over the threads of a row, loops.
//
// No header is included: NVRTC finds none on a user's machine. Every kernel has the element in its
// name (add_bf16). Its arguments are pointers, long long and double, of 8 bytes each. A matrix is a
// pointer and a row stride in elements. SHARDWISE_STANDIN is defined where tests run the same
// source on a CPU.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

#define EACH_ELEMENT(K) K(double, f64) K(float, f32) K(bf16, bf16) K(f16, f16)
#define EACH_ACC(K) K(double, f64) K(float, f32)

// ---- elements and the accumulator in which sums over them are kept ----

template <class T> struct AccOf { typedef float type; };
template <> struct AccOf<double> { typedef double type; };
template <class T> using Acc = typename AccOf<T>::type;

__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return float_of((u32)x.bits << 16); }
__device__ __forceinline__ float widen(f16 x) {
#ifdef SHARDWISE_STANDIN
  return __float_from_half_bits(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

template <class T> struct Narrow;
template <> struct Narrow<double> { static __device__ __forceinline__ double of(double x) { return x; } };
template <> struct Narrow<float> { static __device__ __forceinline__ float of(float x) { return x; } };
template <> struct Narrow<bf16> {
  static __device__ __forceinline__ bf16 of(float x) {
    bf16 y;
#ifdef SHARDWISE_STANDIN
    const u32 bits = bits_of(x);
    // Rounds to nearest, ties to even; a NaN stays NaN.
    y.bits = x != x ? (u16)((bits >> 16) | 0x40) : (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
  }
};
template <> struct Narrow<f16> {
  static __device__ __forceinline__ f16 of(float x) {
    f16 y;
#ifdef SHARDWISE_STANDIN
    y.bits = __half_bits_from_float(x);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
  }
};
// Rounds a number of the accumulator to T, to nearest.
template <class T> __device__ __forceinline__ T narrow(Acc<T> x) { return Narrow<T>::of(x); }

// Rounds x to a float towards 0 and sets the last bit if it was inexact (round to odd): rounding
// that to fewer bits then rounds x once.
__device__ __forceinline__ float round_to_odd(double x) {
  const float near = (float)x;
  if (x != x || (double)near == x) return near;
  const u32 bits = bits_of(near);
  const bool beyond = (near < 0 ? -(double)near : (double)near) > (x < 0 ? -x : x);
  return float_of((beyond ? bits - 1 : bits) | 1);
}

// Converts between any two elements, rounding once.
template <class To> struct Convert {
  template <class From> static __device__ __forceinline__ To of(From x) { return narrow<To>(widen(x)); }
  static __device__ __forceinline__ To of(double x) { return narrow<To>(round_to_odd(x)); }
};
template <> struct Convert<double> {
  template <class From> static __device__ __forceinline__ double of(From x) { return (double)widen(x); }
};
template <> struct Convert<float> {
  template <class From> static __device__ __forceinline__ float of(From x) { return (float)widen(x); }
};

template <class A> __device__ __forceinline__ A infinity() { return (A)float_of(0x7f800000); }

template <class A> __device__ __forceinline__ A max_nan(A a, A b) { return a > b || a != a ? a : b; }
template <class A> __device__ __forceinline__ A min_nan(A a, A b) { return a < b || a != a ? a : b; }

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float sqrt_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double sqrt_of(double x) { return sqrt(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }

// ---- packs: what one thread loads and stores at a time ----

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <int N, class T> __device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T> __device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// The number of elements per pack: 16 bytes of the larger of two element types.
template <class T, class Y = T> struct Width { static constexpr int value = 16 / (sizeof(T) > sizeof(Y) ? sizeof(T) : sizeof(Y)); };

// The N elements of a row from column i on, or those that exist: one load where rows are aligned,
// else one by one. The order of summation does not depend on that.
template <int N, class T> __device__ __forceinline__ Pack<T, N> take(bool packed, const T* row, i64 i, i64 cols) {
  if (packed) return load<N>(row + i);
  Pack<T, N> some;
#pragma unroll
  for (int k = 0; k < N; k++) if (i + k < cols) some.at[k] = row[i + k];
  return some;
}
template <int N, class T> __device__ __forceinline__ void give(bool packed, T* row, i64 i, i64 cols, const Pack<T, N>& some) {
  if (packed) return store(row + i, some);
#pragma unroll
  for (int k = 0; k < N; k++) if (i + k < cols) row[i + k] = some.at[k];
}

// f(x_i, i) for the elements of a row, shared among the threads of the row.
template <class T, class F> __device__ __forceinline__ void each_of_row(bool packed, i64 cols, const T* row, F f) {
  constexpr int N = Width<T>::value;
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto in = take<N>(packed, row, i, cols);
#pragma unroll
    for (int k = 0; k < N; k++) if (i + k < cols) f(widen(in.at[k]), i + k);
  }
}
// The same for two rows.
template <class T, class F>
__device__ __forceinline__ void each_of_row(bool packed, i64 cols, const T* row, const T* other, F f) {
  constexpr int N = Width<T>::value;
  for (i64 i = (i64)threadIdx.x * N; i < cols; i += (i64)blockDim.x * N) {
    const auto left = take<N>(packed, row, i, cols);
    const auto right = take<N>(packed, other, i, cols);
#pragma unroll
    for (int k = 0; k < N; k++) if (i + k < cols) f(widen(left.at[k]), widen(right.at[k]), i + k);
  }
}

// Runs `body` with N elements at a time: 16 bytes where rows are aligned to that, else one element.
#define WITH_PACKS(packed, width, body) \
  if (packed) { constexpr int N = width; body; } else { constexpr int N = 1; body; }

// f(row, column) for every N-th column of every row, shared among the threads of the grid.
template <int N, class F> __device__ __forceinline__ void each(i64 rows, i64 cols, F f) {
  const i64 packs = cols / N, total = rows * packs, step = (i64)gridDim.x * blockDim.x;
  for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += step) {
    const i64 row = rows == 1 ? 0 : at / packs;
    f(row, (at - row * packs) * N);
  }
}

// y <- f(x), in the accumulator.
template <int N, class X, class Y, class F>
__device__ __forceinline__ void map(i64 rows, i64 cols, const X* x, i64 sx, Y* y, i64 sy, F f) {
  each<N>(rows, cols, [&](i64 r, i64 c) {
    const auto in = load<N>(x + r * sx + c);
    Pack<Y, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.at[i] = f(in.at[i]);
    store(y + r * sy + c, out);
  });
}

// y <- f(a, b), in the accumulator.
template <int N, class A, class B, class Y, class F>
__device__ __forceinline__ void map(i64 rows, i64 cols, const A* a, i64 sa, const B* b, i64 sb, Y* y, i64 sy, F f) {
  each<N>(rows, cols, [&](i64 r, i64 c) {
    const auto left = load<N>(a + r * sa + c);
    const auto right = load<N>(b + r * sb + c);
    Pack<Y, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.at[i] = f(left.at[i], right.at[i]);
    store(y + r * sy + c, out);
  });
}

// ---- sums over the threads of a row: blockDim.x, a multiple of 32; one row per threadIdx.y ----

template <class A> __device__ __forceinline__ A plus(A a, A b) { return a + b; }

// Every thread gets the same bits: the operands of an exchange only differ in their order.
template <class A, class Op> __device__ __forceinline__ A row_reduce(A value, Op op) {
#pragma unroll
  for (int o = 16; o; o >>= 1) value = op(value, __shfl_xor_sync(0xffffffffu, value, o));
  if (blockDim.x > 32) {
    __shared__ A part[32];
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = value;
    __syncthreads();
    value = part[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) value = op(value, part[warp]);
  }
  return value;
}
template <class A> __device__ __forceinline__ A row_sum(A value) {
  return row_reduce(value, [](A a, A b) { return a + b; });
}
template <class A> __device__ __forceinline__ A row_max(A value) {
  return row_reduce(value, [](A a, A b) { return max_nan(a, b); });
}

// The row of this thread. Either all threads of a row are in range or none.
__device__ __forceinline__ i64 own_row() { return (i64)blockIdx.x * blockDim.y + threadIdx.y; }

// ---- sums of columns: blocks of 32 x 8 threads sum runs of rows; column_sums in pointwise.cu sums
// the runs, in a fixed order ----

// The first of the N columns of this thread.
template <int N> __device__ __forceinline__ i64 own_columns() { return ((i64)blockIdx.x * 32 + threadIdx.x) * N; }

// f(row) for the rows of this thread: every eighth row of the block's run.
template <class F> __device__ __forceinline__ void each_of_run(i64 rows, i64 run, F f) {
  const i64 end = rows < ((i64)blockIdx.y + 1) * run ? rows : ((i64)blockIdx.y + 1) * run;
  for (i64 row = (i64)blockIdx.y * run + threadIdx.y; row < end; row += 8) f(row);
}

// runs[blockIdx.y][col + k] <- the sums of the eight threads of a column. All threads of the block
// must call this.
template <int N, class A> __device__ __forceinline__ void store_run(i64 cols, const A (&sum)[N], A* runs) {
  __shared__ A part[8][N][32];
  const i64 col = own_columns<N>();
#pragma unroll
  for (int k = 0; k < N; k++) part[threadIdx.y][k][threadIdx.x] = sum[k];
  __syncthreads();
  if (threadIdx.y == 0 && col < cols) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      A all = part[0][k][threadIdx.x];
      for (int y = 1; y < 8; y++) all += part[y][k][threadIdx.x];
      runs[(i64)blockIdx.y * cols + col + k] = all;
    }
  }
  __syncthreads();
}

// ---- dynamic shared memory, whose size the launch gives ----

#ifdef SHARDWISE_STANDIN
#define DYNAMIC_SHARED(T, name) T* name = (T*)__standin_dynamic_shared()
#else
#define DYNAMIC_SHARED(T, name) \
  extern __shared__ __align__(256) unsigned char name##_bytes[]; \
  T* name = (T*)name##_bytes
#endif
