// Dropout whose mask is a function of global indices: Philox4x32-10 (Salmon et al., 2011).
#include "element.cuh"

__device__ __forceinline__ void philox(u64 counter, u32 key0, u32 key1, u32 words[4]) {
  u32 c0 = (u32)counter, c1 = (u32)(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u64 p0 = (u64)0xd2511f53u * c0, p1 = (u64)0xcd9e8d57u * c2;
    const u32 n0 = (u32)(p1 >> 32) ^ c1 ^ key0, n2 = (u32)(p0 >> 32) ^ c3 ^ key1;
    c1 = (u32)p1;
    c3 = (u32)p0;
    c0 = n0;
    c2 = n2;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Element (row, col) uses the u32 at index (first + row * width + col) of the random stream: four
// per counter.
template <int N, class T>
__device__ __forceinline__ void dropout(i64 rows, i64 cols, u64 first, u64 width, u32 key0, u32 key1, u32 threshold, Acc<T> scale,
    const T* x, i64 sx, T* y, i64 sy) {
  each<N>(rows, cols, [&](i64 row, i64 col) {
    const auto in = load<N>(x + row * sx + col);
    Pack<T, N> out;
    u32 words[4];
#pragma unroll
    for (int k = 0; k < N; k++) {
      const u64 index = first + (u64)row * width + (u64)(col + k);
      if (k == 0 || index % 4 == 0) philox(index / 4, key0, key1, words);
      const u32 word = index & 2 ? (index & 1 ? words[3] : words[2]) : (index & 1 ? words[1] : words[0]);
      out.at[k] = narrow<T>(word >= threshold ? widen(in.at[k]) * scale : (Acc<T>)0);
    }
    store(y + row * sy + col, out);
  });
}

#define DROPOUT(T, name) \
  extern "C" __global__ void dropout_##name(i64 packed, i64 rows, i64 cols, i64 first, i64 width, i64 key0, i64 key1, \
      i64 threshold, double scale, const T* x, i64 sx, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, (dropout<N>(rows, cols, (u64)first, (u64)width, (u32)key0, (u32)key1, (u32)threshold, \
      (Acc<T>)scale, x, sx, y, sy))) \
  }
EACH_ELEMENT(DROPOUT)
