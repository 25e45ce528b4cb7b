// Tensor cores: products of small matrices of a warp, and how their fragments are loaded into
// registers. For compute capability 8.0.
//
// d += a b, of 16 x 16 and 16 x 8 elements. With g = lane / 4 and t = lane % 4 a lane holds
//   of a, row-major: rows g, g + 8, g, g + 8 of columns 2t, 2t, 2t + 8, 2t + 8, each with the next
//   column;
//   of b: rows 2t and 2t + 8 of column g, each with the next row;
//   of d: row g of columns 2t and 2t + 1, and row g + 8 of the same.
#include "element.cuh"

#ifdef SHARDWISE_STANDIN

template <class T> __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  __standin_mma(d, a, b0, b1, [](u16 bits) { T x; x.bits = bits; return widen(x); });
}
template <class T> __device__ __forceinline__ u32 pair(float low, float high) {
  return narrow<T>(low).bits | (u32)narrow<T>(high).bits << 16;
}
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ float largest_of(float a, float b) { return max_nan(a, b); }

typedef u64 Address;
__device__ __forceinline__ Address shared_address(const void* at) { return (Address)at; }
__device__ __forceinline__ void load_matrices(u32 (&r)[4], Address row) { __standin_load_matrices(r, (const void*)row, false); }
__device__ __forceinline__ void load_transposed(u32 (&r)[4], Address row) { __standin_load_matrices(r, (const void*)row, true); }
__device__ __forceinline__ void copy_async(Address to, const void* from, bool there) {
  alignas(16) static constexpr u32 zeros[4] = {};
  __standin_copy_async((void*)to, there ? from : zeros);
}
__device__ __forceinline__ void await_copies() { __standin_await_copies(); }

#else

template <class T> __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<bf16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<f16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers, each rounded to nearest, the first in the lower half.
template <class T> __device__ __forceinline__ u32 pair(float low, float high);
template <> __device__ __forceinline__ u32 pair<bf16>(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <> __device__ __forceinline__ u32 pair<f16>(float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 2^x to two units in the last place; 0 where the result is subnormal.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The maximum, NaN where either is NaN.
__device__ __forceinline__ float largest_of(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// An address in shared memory, in bytes.
typedef u32 Address;
__device__ __forceinline__ Address shared_address(const void* at) {
  u32 address;
  asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(at));
  return address;
}

// Four matrices of 8 x 8 elements in shared memory: lane l gives the address of the 16 bytes of row
// l % 8 of matrix l / 8, and gets row g, columns 2t and 2t + 1 of each matrix.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// The same for the transposed matrices: rows 2t and 2t + 1, column g.
__device__ __forceinline__ void load_transposed(u32 (&r)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// Copies 16 bytes to shared memory, or zeros where `from` does not exist, which is then not read.
// Visible to this thread after `await_copies`, and to others after a barrier behind that.
__device__ __forceinline__ void copy_async(Address to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

#endif
