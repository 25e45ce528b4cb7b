// Scaled dot-product attention by tiles, forward and backward, in memory linear in the sequence
// length (Dao, 2023: FlashAttention-2).
//
// A block is 4 warps of 4 queries each, or of 2 for large heads. Shared memory holds 32 keys and
// values at a time. A lane computes the score of one key, and owns the features lane, lane + 32,
// ... of the result. For the gradients of keys and values the roles are exchanged: a warp owns
// keys, and a lane a query. Masked values are never multiplied, so NaN and infinity there have no
// effect.
//
// tiles: 5 numbers per tile: the row of its first query, the number of queries, the position of the
// first query among the keys, the row of the first key, and the number of keys. Key j of key/value
// head g is at row tiles[3] + g * row_step + j, column g * col_step: heads are side by side in rows
// of tokens, or one below the other in a cache.
#include "element.cuh"

constexpr int WARPS = 4, KEYS = 32;
// The queries, or keys, of a warp, by the features of a lane: as many as fit the registers.
template <int L> constexpr int OWN = L == 8 ? 2 : 4;
constexpr u32 ALL = 0xffffffffu;

template <class A> __device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(ALL, x, o);
  return x;
}
template <class A> __device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = max_nan(x, __shfl_xor_sync(ALL, x, o));
  return x;
}

// to[count][dim + 1] <- rows of a matrix, widened. All threads of the block take part.
template <class T> __device__ __forceinline__ void stage(Acc<T>* to, i64 count, i64 dim, const T* from, i64 stride) {
  for (i64 at = threadIdx.y * 32 + threadIdx.x; at < count * dim; at += WARPS * 32) {
    const i64 row = at / dim, d = at - row * dim;
    to[row * (dim + 1) + d] = widen(from[row * stride + d]);
  }
}

// The dot product of two vectors in shared memory.
template <class A> __device__ __forceinline__ A dot(i64 dim, const A* a, const A* b) {
  A sum = 0;
  for (i64 d = 0; d < dim; d++) sum += a[d] * b[d];
  return sum;
}

// sum[l] += factor of lane j * row j, over the lanes j whose bit is set in `bits`.
template <int L, class A> __device__ __forceinline__ void add_rows(A (&sum)[L], u32 bits, A factor, i64 dim, const A* rows) {
  while (bits) {
    const int j = __ffs(bits) - 1;
    bits &= bits - 1;
    const A by = __shfl_sync(ALL, factor, j);
#pragma unroll
    for (int l = 0; l < L; l++) {
      const i64 d = threadIdx.x + 32 * l;
      if (d < dim) sum[l] += by * rows[j * (dim + 1) + d];
    }
  }
}

// Whether the query at this position attends to the key at that one, ignoring padding.
__device__ __forceinline__ bool sees(i64 query, i64 key, i64 causal, i64 window) {
  return !causal || (key <= query && key + window > query);
}

template <int L, class T>
__device__ void forward(i64 heads, i64 dim, i64 row_step, i64 col_step, i64 causal, i64 window, double scale, const i64* tiles,
    const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, T* out, i64 so,
    Acc<T>* lse) {
  typedef Acc<T> A;
  constexpr int EACH = OWN<L>;
  DYNAMIC_SHARED(A, shared);
  A *queries = shared, *keys = queries + WARPS * EACH * (dim + 1), *values = keys + KEYS * (dim + 1);
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], key_row = tile[3] + kv * row_step, key_count = tile[4];
  const i64 lane = threadIdx.x, mine = (i64)threadIdx.y * EACH;
  stage(queries, count, dim, q + first * sq + head * dim, sq);
  A most[EACH], total[EACH], sum[EACH][L];
  bool any[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    most[i] = -infinity<A>();
    total[i] = 0;
    any[i] = false;
#pragma unroll
    for (int l = 0; l < L; l++) sum[i][l] = 0;
  }
  const i64 begin = causal && place + 1 > window ? place + 1 - window : 0;
  const i64 end = causal && place + count < key_count ? place + count : key_count;
  for (i64 base = begin; base < end; base += KEYS) {
    const i64 here = end - base < KEYS ? end - base : KEYS;
    __syncthreads();
    stage(keys, here, dim, k + (key_row + base) * sk + kv * col_step, sk);
    stage(values, here, dim, v + (key_row + base) * sv + kv * col_step, sv);
    __syncthreads();
    const bool there = lane < here && (!valid || valid[key_row + base + lane]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (mine + i >= count) continue;
      const bool seen = there && sees(place + mine + i, base + lane, causal, window);
      const u32 bits = __ballot_sync(ALL, seen);
      if (!bits) continue;
      any[i] = true;
      const A score = seen ? (A)scale * dot(dim, queries + (mine + i) * (dim + 1), keys + lane * (dim + 1)) : -infinity<A>();
      const A largest = max_nan(most[i], warp_max(score));
      // Only -infinity so far: use weights of 0 for now.
      const bool lost = largest == -infinity<A>();
      const A weight = seen && !lost ? exp_of(score - largest) : (A)0;
      const A shrink = most[i] == largest ? (A)1 : exp_of(most[i] - largest);
      most[i] = largest;
      total[i] = total[i] * shrink + warp_sum(weight);
#pragma unroll
      for (int l = 0; l < L; l++) sum[i][l] *= shrink;
      if (!lost) add_rows(sum[i], bits, weight, dim, values);
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (mine + i >= count) continue;
    const i64 row = first + mine + i;
    // 0 / 0 if all scores are -infinity.
    const A by = any[i] ? (A)1 / total[i] : (A)0;
#pragma unroll
    for (int l = 0; l < L; l++) {
      const i64 d = lane + 32 * l;
      if (d < dim) out[row * so + head * dim + d] = narrow<T>(any[i] ? sum[i][l] * by : (A)0);
    }
    if (lse && lane == 0) {
      const bool lost = most[i] == -infinity<A>();
      lse[row * heads + head] = !any[i] ? infinity<A>() : lost ? infinity<A>() - infinity<A>() : most[i] + log_of(total[i]);
    }
  }
}

// dq, from the weights e^(score - lse): dS = P (dO V' - delta), dQ = scale dS K.
template <int L, class T>
__device__ void backward_queries(i64 heads, i64 dim, i64 causal, i64 window, double scale, const i64* tiles,
    const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, const Acc<T>* lse,
    const Acc<T>* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) {
  typedef Acc<T> A;
  constexpr int EACH = OWN<L>;
  DYNAMIC_SHARED(A, shared);
  const i64 own = WARPS * EACH * (dim + 1);
  A *queries = shared, *douts = queries + own, *keys = douts + own, *values = keys + KEYS * (dim + 1);
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], key_row = tile[3], key_count = tile[4];
  const i64 lane = threadIdx.x, mine = (i64)threadIdx.y * EACH;
  stage(queries, count, dim, q + first * sq + head * dim, sq);
  stage(douts, count, dim, dout + first * sdo + head * dim, sdo);
  A sum[EACH][L];
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int l = 0; l < L; l++) sum[i][l] = 0;
  const i64 begin = causal && place + 1 > window ? place + 1 - window : 0;
  const i64 end = causal && place + count < key_count ? place + count : key_count;
  for (i64 base = begin; base < end; base += KEYS) {
    const i64 here = end - base < KEYS ? end - base : KEYS;
    __syncthreads();
    stage(keys, here, dim, k + (key_row + base) * sk + kv * dim, sk);
    stage(values, here, dim, v + (key_row + base) * sv + kv * dim, sv);
    __syncthreads();
    const bool there = lane < here && (!valid || valid[key_row + base + lane]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (mine + i >= count) continue;
      const bool seen = there && sees(place + mine + i, base + lane, causal, window);
      const u32 bits = __ballot_sync(ALL, seen);
      if (!bits) continue;
      const i64 at = (first + mine + i) * heads + head;
      A slope = 0;
      if (seen) {
        const A score = (A)scale * dot(dim, queries + (mine + i) * (dim + 1), keys + lane * (dim + 1));
        slope = exp_of(score - lse[at]) * (dot(dim, douts + (mine + i) * (dim + 1), values + lane * (dim + 1)) - delta[at]);
      }
      add_rows(sum[i], bits, slope, dim, keys);
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (mine + i >= count) continue;
#pragma unroll
    for (int l = 0; l < L; l++) {
      const i64 d = lane + 32 * l;
      if (d < dim) dqkv[(first + mine + i) * sd + head * dim + d] = narrow<T>((A)scale * sum[i][l]);
    }
  }
}

// dk and dv of the keys at the positions of a tile's queries: dV = P' dO, dK = scale dS' Q, summed
// over the query heads of a key/value head.
template <int L, class T>
__device__ void backward_keys(i64 heads, i64 kv_heads, i64 dim, i64 causal, i64 window, double scale, const i64* tiles,
    const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, const Acc<T>* lse,
    const Acc<T>* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) {
  typedef Acc<T> A;
  constexpr int EACH = OWN<L>;
  DYNAMIC_SHARED(A, shared);
  const i64 own = WARPS * EACH * (dim + 1);
  A *keys = shared, *values = keys + own, *queries = values + own, *douts = queries + KEYS * (dim + 1);
  const i64 kv = blockIdx.y;
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], start = tile[3], len = tile[4];
  const i64 lane = threadIdx.x, mine = (i64)threadIdx.y * EACH;
  stage(keys, count, dim, k + first * sk + kv * dim, sk);
  stage(values, count, dim, v + first * sv + kv * dim, sv);
  A dk[EACH][L], dv[EACH][L];
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int l = 0; l < L; l++) dk[i][l] = dv[i][l] = 0;
  const i64 begin = causal ? place : 0;
  // The window may be the largest integer, so avoid overflow.
  const i64 end = causal && window < len && place + count - 1 + window < len ? place + count - 1 + window : len;
  for (i64 head = 0; head < heads; head++) {
    if (kv_of_query[head] != kv) continue;
    for (i64 base = begin; base < end; base += KEYS) {
      const i64 here = end - base < KEYS ? end - base : KEYS;
      __syncthreads();
      stage(queries, here, dim, q + (start + base) * sq + head * dim, sq);
      stage(douts, here, dim, dout + (start + base) * sdo + head * dim, sdo);
      __syncthreads();
      const i64 at = (start + base + lane) * heads + head;
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        if (mine + i >= count || (valid && !valid[first + mine + i])) continue;
        const bool seen = lane < here && sees(base + lane, place + mine + i, causal, window);
        const u32 bits = __ballot_sync(ALL, seen);
        if (!bits) continue;
        A weight = 0, slope = 0;
        if (seen) {
          const A score = (A)scale * dot(dim, queries + lane * (dim + 1), keys + (mine + i) * (dim + 1));
          weight = exp_of(score - lse[at]);
          slope = weight * (dot(dim, douts + lane * (dim + 1), values + (mine + i) * (dim + 1)) - delta[at]);
        }
        add_rows(dv[i], bits, weight, dim, douts);
        add_rows(dk[i], bits, slope, dim, queries);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (mine + i >= count) continue;
    T* row = dqkv + (first + mine + i) * sd;
#pragma unroll
    for (int l = 0; l < L; l++) {
      const i64 d = lane + 32 * l;
      if (d < dim) {
        row[(heads + kv) * dim + d] = narrow<T>((A)scale * dk[i][l]);
        row[(heads + kv_heads + kv) * dim + d] = narrow<T>(dv[i][l]);
      }
    }
  }
}

// A kernel for heads of at most 64, 128 and 256 features.
#define ATTENTION_FOR(T, name, L, dims) \
  extern "C" __global__ void __launch_bounds__(128, 2) attention_##dims##_##name(i64 heads, i64 dim, i64 row_step, i64 col_step, \
      i64 causal, i64 window, double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, \
      const T* k, i64 sk, const T* v, i64 sv, T* out, i64 so, Acc<T>* lse) { \
    forward<L>(heads, dim, row_step, col_step, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, out, so, lse); \
  } \
  extern "C" __global__ void __launch_bounds__(128, 2) attention_backward_queries_##dims##_##name(i64 heads, i64 dim, i64 causal, \
      i64 window, double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, \
      i64 sk, const T* v, i64 sv, const Acc<T>* lse, const Acc<T>* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) { \
    backward_queries<L>(heads, dim, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, lse, delta, dout, sdo, \
      dqkv, sd); \
  } \
  extern "C" __global__ void __launch_bounds__(128, 2) attention_backward_keys_##dims##_##name(i64 heads, i64 kv_heads, i64 dim, \
      i64 causal, i64 window, double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, \
      const T* k, i64 sk, const T* v, i64 sv, const Acc<T>* lse, const Acc<T>* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) { \
    backward_keys<L>(heads, kv_heads, dim, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, lse, delta, \
      dout, sdo, dqkv, sd); \
  }
#define ATTENTION(T, name) \
  ATTENTION_FOR(T, name, 2, 64) ATTENTION_FOR(T, name, 4, 128) ATTENTION_FOR(T, name, 8, 256) \
  /* delta <- rowsum(dO o O), one warp per head of a row. */ \
  extern "C" __global__ void attention_delta_##name(i64 packed, i64 rows, i64 heads, i64 dim, const T* out, i64 so, const T* dout, \
      i64 sdo, Acc<T>* delta) { \
    typedef Acc<T> A; \
    const i64 at = own_row(); \
    if (at >= rows * heads) return; \
    const i64 row = at / heads, head = at - row * heads; \
    A sum = 0; \
    each_of_row(packed, dim, out + row * so + head * dim, dout + row * sdo + head * dim, [&](A y, A dy, i64) { sum += y * dy; }); \
    sum = warp_sum(sum); \
    if (threadIdx.x == 0) delta[at] = sum; \
  }
EACH_ELEMENT(ATTENTION)
