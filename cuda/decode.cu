// Decoding: keys and values of new tokens go into a cache, and few queries a sequence attend to it.
//
// The cache holds, for each slot and key/value head, the vectors of `capacity` positions one below the other.
#include "element.cuh"

// keys, values <- rows of k and v: a block a run of rows and key/value head.
//
// runs: 3 numbers a run: its first row, how many there are, and the row of the cache where the first goes for the
// first key/value head; those of the other heads are `capacity` rows apart.
template <int N, class T>
__device__ __forceinline__ void append(i64 dim, i64 capacity, const i64* runs, const T* k, i64 sk, const T* v, i64 sv,
    T* keys, i64 skeys, T* values, i64 svalues) {
  const i64 *run = runs + 3 * (i64)blockIdx.x, kv = blockIdx.y;
  const i64 first = run[0], to = run[2] + kv * capacity;
  const u32 packs = (u32)(dim / N), each = (u32)run[1] * packs;
  for (u32 at = threadIdx.x; at < 2 * each; at += blockDim.x) {
    const bool second = at >= each;
    const u32 place = second ? at - each : at, row = place / packs, column = (place - row * packs) * N;
    const i64 from = kv * dim + column;
    if (second) store(values + (to + row) * svalues + column, load<N>(v + (first + row) * sv + from));
    else store(keys + (to + row) * skeys + column, load<N>(k + (first + row) * sk + from));
  }
}

#define DECODE(T, name) \
  extern "C" __global__ void append_##name(i64 packed, i64 dim, i64 capacity, const i64* runs, const T* k, i64 sk, const T* v, \
      i64 sv, T* keys, i64 skeys, T* values, i64 svalues) { \
    WITH_PACKS(packed, Width<T>::value, (append<N>(dim, capacity, runs, k, sk, v, sv, keys, skeys, values, svalues))) \
  }
EACH_ELEMENT(DECODE)
