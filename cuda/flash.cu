// Scaled dot-product attention on tensor cores, forward and backward, of bf16 and f16 (Dao, 2023: FlashAttention-2).
//
// A block is 4 warps of 16 queries each; a tile of keys and values at a time lies in shared memory, and in the forward comes there while
// the products with the others are made. For the gradient of keys and values the roles are exchanged. Scores, weights and sums are
// f32; what is multiplied next is rounded to the element. tiles as in attention.cu. Every row of a matrix begins at 16 bytes, and
// heads have a multiple of 8 features.
//
// A product cannot leave out what a mask hides: weights of 0 do. Rows of padding are 0 in shared memory; where a causal mask hides
// some rows of a tile from some of the others, and a number of it is infinite or NaN, products are made one by one.
#include "mma.cuh"

constexpr int WARPS = 4, TILE = 16 * WARPS;
constexpr u32 ALL = 0xffffffffu;
// Powers of 2: scores come with log2 e in them.
constexpr float LOG2_E = 1.4426950408889634f;

// Features in a row of shared memory: 16 bytes more, so that eight rows lie in different banks.
template <int D> constexpr int ROW = D + 8;

// to <- N rows of a matrix, in 16 bytes each of which this thread copies some; 0 beyond the rows and features that there are, and
// in rows of padding.
template <int D, int N = TILE, class T>
__device__ __forceinline__ void stage(T* to, i64 count, i64 dim, const T* from, i64 stride, const u8* valid = nullptr) {
#pragma unroll 4
  for (int at = threadIdx.y * 32 + threadIdx.x; at < N * (D / 8); at += WARPS * 32) {
    const int row = at / (D / 8), col = at % (D / 8) * 8;
    T* place = to + row * ROW<D> + col;
    if (row < count && col < dim && (!valid || valid[row])) copy_async(place, from + row * stride + col);
    else *reinterpret_cast<Pack<u32, 4>*>(place) = Pack<u32, 4>{};
  }
}

// Whether what this thread has copied is finite.
template <int D, int N = TILE, class T> __device__ __forceinline__ bool is_finite(const T* staged) {
  bool finite = true;
#pragma unroll 1
  for (int at = threadIdx.y * 32 + threadIdx.x; at < N * (D / 8); at += WARPS * 32) {
    const auto some = load<8>(staged + at / (D / 8) * ROW<D> + at % (D / 8) * 8);
#pragma unroll
    for (int k = 0; k < 8; k++) finite = finite && widen(some.at[k]) - widen(some.at[k]) == 0;
  }
  return finite;
}

// to += own others', of 16 rows and N.
template <int D, int N, class T>
__device__ __forceinline__ void scores(float (&to)[N / 8][4], i64 dim, const T* own, const T* others) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    if (d >= dim) break;
    u32 a[4], b[4];
    load_matrices(a, own + (lane % 16) * ROW<D> + d + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      load_matrices(b, others + (n + lane % 8 + lane / 16 * 8) * ROW<D> + d + lane / 8 % 2 * 8);
      mma<T>(to[n / 8], a, b[0], b[1]);
      mma<T>(to[n / 8 + 1], a, b[2], b[3]);
    }
  }
}

// sum += weight rows, of 16 x N weights.
template <int D, int N, class T>
__device__ __forceinline__ void add_rows(float (&sum)[D / 8][4], const float (&weight)[N / 8][4], i64 dim, const T* rows) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int n = 0; n < N; n += 16) {
    const auto &left = weight[n / 8], &right = weight[n / 8 + 1];
    const u32 a[4] = {pair<T>(left[0], left[1]), pair<T>(left[2], left[3]), pair<T>(right[0], right[1]), pair<T>(right[2], right[3])};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      if (d >= dim) break;
      u32 b[4];
      load_transposed(b, rows + (n + lane % 16) * ROW<D> + d + lane / 16 * 8);
      mma<T>(sum[d / 8], a, b[0], b[1]);
      mma<T>(sum[d / 8 + 1], a, b[2], b[3]);
    }
  }
}

// The same one by one, without what sees(col, half) does not see. The weights pass through 16 rows of `stride` elements of this
// warp's shared memory.
template <int D, int N, class T, class Sees>
__device__ __forceinline__ void add_rows_apart(float (&sum)[D / 8][4], const float (&weight)[N / 8][4], T* weights, int stride,
    i64 here, const T* rows, Sees sees) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) weights[(g + e / 2 * 8) * stride + 8 * n + 2 * t + e % 2] = narrow<T>(weight[n][e]);
  __syncwarp();
#pragma unroll 1
  for (int col = 0; col < here; col++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (!sees(col, half)) continue;
      const float by = widen(weights[(g + half * 8) * stride + col]);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const auto some = load<2>(rows + col * ROW<D> + 8 * n + 2 * t);
        sum[n][2 * half] += by * widen(some.at[0]);
        sum[n][2 * half + 1] += by * widen(some.at[1]);
      }
    }
}

// to <- `count` rows of by sum, or 0 in a half that is not kept, by way of 16 rows of this warp's shared memory.
template <int D, class T>
__device__ __forceinline__ void give_rows(T* to, i64 stride, i64 count, i64 dim, const float (&sum)[D / 8][4], const float (&by)[2],
    const bool (&kept)[2], T* own) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const u32 both = kept[half] ? pair<T>(sum[n][2 * half] * by[half], sum[n][2 * half + 1] * by[half]) : 0;
      *reinterpret_cast<u32*>(own + (g + 8 * half) * ROW<D> + 8 * n + 2 * t) = both;
    }
  __syncwarp();
  for (int at = lane; at < 16 * (D / 8); at += 32) {
    const int row = at / (D / 8), col = at % (D / 8) * 8;
    if (row < count && col < dim) store(to + row * stride + col, load<8>(own + row * ROW<D> + col));
  }
}

// The four lanes that share a row.
__device__ __forceinline__ float row_total(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ __forceinline__ float row_most(float x) {
  x = max_nan(x, __shfl_xor_sync(ALL, x, 1));
  return max_nan(x, __shfl_xor_sync(ALL, x, 2));
}

// What 16 queries see of a tile of keys: query `first + 8 half + lane / 4` sees those of its columns behind `low` up to `high`.
struct Sight {
  i64 here, high, low;
  const u8* valid;
  bool some, all;

  // Queries from place `first` on; `here` keys from place `base` on.
  __device__ __forceinline__ Sight(i64 first, i64 base, i64 here, i64 causal, i64 window, const u8* valid)
      : here(here), high(TILE), low(-TILE), valid(valid), some(true), all(here == TILE && !valid) {
    if (!causal) return;
    const i64 own = first - base + threadIdx.x / 4, last = base + TILE - 1;
    high = own;
    low = own - window;
    some = base <= first + 15 && last + window > first;
    all = all && last <= first && base + window > first + 15;
  }
  __device__ __forceinline__ bool operator()(int col, int half) const {
    return col < here && col <= high + 8 * half && col > low + 8 * half && (!valid || valid[col]);
  }
};

template <int D, class T>
__device__ __forceinline__ void forward(i64 heads, i64 dim, i64 row_step, i64 col_step, i64 causal, i64 window, double scale,
    const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, T* out,
    i64 so, float* lse) {
  DYNAMIC_SHARED(T, shared);
  T *queries = shared, *keys = queries + TILE * ROW<D>, *values = keys + TILE * ROW<D>;
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], key_row = tile[3] + kv * row_step, key_count = tile[4];
  k += key_row * sk + kv * col_step;
  v += key_row * sv + kv * col_step;
  if (valid) valid += key_row;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  // This warp's queries; its rows in shared memory are its own.
  const i64 mine = 16 * (i64)threadIdx.y;
  T* own = queries + mine * ROW<D>;
  const float by = (float)scale * LOG2_E;
  float most[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {0, 0}, sum[D / 8][4] = {};
  bool any[2] = {false, false};

  const i64 begin = causal && place + 1 > window ? place + 1 - window : 0;
  const i64 end = causal && place + count < key_count ? place + count : key_count;
  const auto rows_from = [&](i64 base) { return end - base < TILE ? end - base : (i64)TILE; };
  stage<D>(queries, count, dim, q + first * sq + head * dim, sq);
  if (begin < end) stage<D>(keys, rows_from(begin), dim, k + begin * sk, sk);
  for (i64 base = begin; base < end; base += TILE) {
    const i64 here = rows_from(base), next = base + TILE;
    const u8* flags = valid ? valid + base : nullptr;
    const Sight sees(place + mine, base, here, causal, window, flags);
    const bool some = mine < count && sees.some;
    await_copies();
    __syncthreads();
    stage<D>(values, here, dim, v + base * sv, sv, flags);
    float weight[TILE / 8][4] = {};
    if (some) scores<D, TILE>(weight, dim, own, keys);
    await_copies();
    // Whether the causal mask hides any of these values from a query of the block.
    const bool hides = causal && (base + here - 1 > place || base + window < place + count);
    bool apart = false;
    if (hides) apart = __syncthreads_or(!is_finite<D>(values));
    else __syncthreads();
    // With the products apart, the place of the keys is needed once more.
    if (next < end && !apart) stage<D>(keys, rows_from(next), dim, k + next * sk, sk);

    if (some) {
      float largest[2] = {most[0], most[1]};
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const bool seen = sees.all || sees(8 * n + 2 * t + e % 2, e / 2);
          weight[n][e] = seen ? weight[n][e] * by : -infinity<float>();
          any[e / 2] = any[e / 2] || seen;
          largest[e / 2] = max_nan(largest[e / 2], weight[n][e]);
        }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        largest[half] = row_most(largest[half]);
        const float shrink = most[half] == largest[half] ? 1.0f : exp2f(most[half] - largest[half]);
        most[half] = largest[half];
        total[half] *= shrink;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
          sum[n][2 * half] *= shrink;
          sum[n][2 * half + 1] *= shrink;
        }
      }
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          // Nothing but -infinity so far: weights of 0 for now.
          weight[n][e] = most[e / 2] == -infinity<float>() ? 0.0f : exp2f(weight[n][e] - most[e / 2]);
          total[e / 2] += weight[n][e];
        }
      if (apart) add_rows_apart<D, TILE>(sum, weight, keys + mine * ROW<D>, ROW<D>, here, values, sees);
      else add_rows<D, TILE>(sum, weight, dim, values);
    }
    if (apart) {
      __syncthreads();
      if (next < end) stage<D>(keys, rows_from(next), dim, k + next * sk, sk);
    }
  }
  // Where there were no keys, the queries have come all the same.
  await_copies();
  __syncthreads();
  float shrink[2];
  bool seen[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i64 row = mine + g + 8 * half;
    seen[half] = row_most(any[half] ? 1.0f : 0.0f) > 0;
    const float all = row_total(total[half]);
    // Of nothing but -infinity, 0 / 0.
    shrink[half] = 1.0f / all;
    if (lse && t == 0 && row < count) {
      const bool lost = most[half] == -infinity<float>();
      const float nan = infinity<float>() - infinity<float>();
      lse[(first + row) * heads + head] = !seen[half] ? infinity<float>() : lost ? nan : most[half] / LOG2_E + log_of(all);
    }
  }
  give_rows<D>(out + (first + mine) * so + head * dim, so, count - mine, dim, sum, shrink, seen, own);
}

// dq: dS = P (dO V' - delta), dQ = scale dS K.
template <int D, class T>
__device__ __forceinline__ void backward_queries(i64 heads, i64 dim, i64 causal, i64 window, double scale, const i64* tiles,
    const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, const float* lse,
    const float* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) {
  DYNAMIC_SHARED(T, shared);
  T *queries = shared, *douts = queries + TILE * ROW<D>, *keys = douts + TILE * ROW<D>, *values = keys + TILE * ROW<D>;
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], key_row = tile[3], key_count = tile[4];
  k += key_row * sk + kv * dim;
  v += key_row * sv + kv * dim;
  if (valid) valid += key_row;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const i64 mine = 16 * (i64)threadIdx.y;
  const float by = (float)scale * LOG2_E;
  float log_sum[2], own_delta[2], sum[D / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i64 row = mine + g + 8 * half, at = (first + row) * heads + head;
    log_sum[half] = row < count ? lse[at] * LOG2_E : 0.0f;
    own_delta[half] = row < count ? delta[at] : 0.0f;
  }
  const i64 begin = causal && place + 1 > window ? place + 1 - window : 0;
  const i64 end = causal && place + count < key_count ? place + count : key_count;
  stage<D>(queries, count, dim, q + first * sq + head * dim, sq);
  stage<D>(douts, count, dim, dout + first * sdo + head * dim, sdo);
  for (i64 base = begin; base < end; base += TILE) {
    const i64 here = end - base < TILE ? end - base : (i64)TILE;
    const u8* flags = valid ? valid + base : nullptr;
    const Sight sees(place + mine, base, here, causal, window, flags);
    const bool some = mine < count && sees.some;
    __syncthreads();
    stage<D>(keys, here, dim, k + base * sk, sk, flags);
    stage<D>(values, here, dim, v + base * sv, sv, flags);
    await_copies();
    const bool hides = causal && (base + here - 1 > place || base + window < place + count);
    bool apart = false;
    if (hides) apart = __syncthreads_or(!is_finite<D>(keys));
    else __syncthreads();
    float weight[TILE / 8][4] = {}, slope[TILE / 8][4] = {};
    if (some) {
      scores<D, TILE>(weight, dim, queries + mine * ROW<D>, keys);
      scores<D, TILE>(slope, dim, douts + mine * ROW<D>, values);
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const bool seen = sees.all || sees(8 * n + 2 * t + e % 2, e / 2);
          slope[n][e] = seen ? exp2f(weight[n][e] * by - log_sum[e / 2]) * (slope[n][e] - own_delta[e / 2]) : 0.0f;
        }
      if (!apart) add_rows<D, TILE>(sum, slope, dim, keys);
    }
    if (apart) {
      // The place of the values, which nobody needs any more.
      __syncthreads();
      if (some) add_rows_apart<D, TILE>(sum, slope, values + mine * ROW<D>, ROW<D>, here, keys, sees);
    }
  }
  await_copies();
  __syncthreads();
  const float factor[2] = {(float)scale, (float)scale};
  const bool kept[2] = {true, true};
  give_rows<D>(dqkv + (first + mine) * sd + head * dim, sd, count - mine, dim, sum, factor, kept, queries + mine * ROW<D>);
}

// dk and dv of the keys in the places of a tile's queries: dV = P' dO, dK = scale dS' Q, over the query heads of a kv head. A warp owns
// 16 keys; so many queries at a time lie in shared memory that the sums of both stay in registers.
constexpr int QUERIES = 32;

template <int D, class T>
__device__ __forceinline__ void backward_keys(i64 heads, i64 kv_heads, i64 dim, i64 causal, i64 window, double scale,
    const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv,
    const float* lse, const float* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) {
  DYNAMIC_SHARED(T, shared);
  T *keys = shared, *values = keys + TILE * ROW<D>, *queries = values + TILE * ROW<D>, *douts = queries + QUERIES * ROW<D>;
  T* weights = douts + QUERIES * ROW<D>;
  float *log_sums = reinterpret_cast<float*>(weights + TILE * ROW<QUERIES>), *deltas = log_sums + QUERIES;
  const i64 kv = blockIdx.y;
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], start = tile[3], len = tile[4];
  const int g = threadIdx.x / 4, t = threadIdx.x % 4, thread = threadIdx.y * 32 + threadIdx.x;
  const i64 mine = 16 * (i64)threadIdx.y;
  T *own_keys = keys + mine * ROW<D>, *own_values = values + mine * ROW<D>, *own_weights = weights + mine * ROW<QUERIES>;
  const float by = (float)scale * LOG2_E;
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  stage<D>(keys, count, dim, k + first * sk + kv * dim, sk);
  stage<D>(values, count, dim, v + first * sv + kv * dim, sv);
  const i64 begin = causal ? place : 0;
  // The window may be as large as a number can be.
  const i64 end = causal && window < len && place + count - 1 + window < len ? place + count - 1 + window : len;
  for (i64 head = 0; head < heads; head++) {
    if (kv_of_query[head] != kv) continue;
    for (i64 base = begin; base < end; base += QUERIES) {
      const i64 here = end - base < QUERIES ? end - base : (i64)QUERIES, last = base + here - 1;
      // Key `mine + g + 8 half` is seen by the queries of its columns from `low` up to those before `high`.
      const i64 low = causal ? place + mine + g - base : -(i64)TILE, high = causal ? low + window : (i64)TILE;
      const auto sees = [&](int col, int half) { return col < here && col >= low + 8 * half && col < high + 8 * half; };
      const bool some = mine < count && (!causal || (last >= place + mine && base < place + mine + 15 + window));
      const bool all = here == QUERIES && (!causal || (base >= place + mine + 15 && last < place + mine + window));
      __syncthreads();
      stage<D, QUERIES>(queries, here, dim, q + (start + base) * sq + head * dim, sq);
      stage<D, QUERIES>(douts, here, dim, dout + (start + base) * sdo + head * dim, sdo);
      if (thread < here) {
        log_sums[thread] = lse[(start + base + thread) * heads + head] * LOG2_E;
        deltas[thread] = delta[(start + base + thread) * heads + head];
      }
      await_copies();
      const bool hides = causal && (base < place + count - 1 || last >= place + window);
      bool apart = false;
      if (hides) apart = __syncthreads_or(!is_finite<D, QUERIES>(queries) || !is_finite<D, QUERIES>(douts));
      else __syncthreads();
      if (!some) continue;
      float weight[QUERIES / 8][4] = {}, slope[QUERIES / 8][4] = {};
      scores<D, QUERIES>(weight, dim, own_keys, queries);
      scores<D, QUERIES>(slope, dim, own_values, douts);
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int col = 8 * n + 2 * t + e % 2;
          const bool seen = all || sees(col, e / 2);
          weight[n][e] = seen ? exp2f(weight[n][e] * by - log_sums[col]) : 0.0f;
          slope[n][e] = seen ? weight[n][e] * (slope[n][e] - deltas[col]) : 0.0f;
        }
      if (apart) {
        add_rows_apart<D, QUERIES>(dv, weight, own_weights, ROW<QUERIES>, here, douts, sees);
        add_rows_apart<D, QUERIES>(dk, slope, own_weights, ROW<QUERIES>, here, queries, sees);
      } else {
        add_rows<D, QUERIES>(dv, weight, dim, douts);
        add_rows<D, QUERIES>(dk, slope, dim, queries);
      }
    }
  }
  await_copies();
  __syncthreads();
  const float factor[2] = {(float)scale, (float)scale}, one[2] = {1, 1};
  bool kept[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i64 row = mine + g + 8 * half;
    // Nobody sees padding.
    kept[half] = row < count && (!valid || valid[first + row]);
  }
  T* rows = dqkv + (first + mine) * sd;
  give_rows<D>(rows + (heads + kv) * dim, sd, count - mine, dim, dk, factor, kept, own_keys);
  give_rows<D>(rows + (heads + kv_heads + kv) * dim, sd, count - mine, dim, dv, one, kept, own_values);
}

// Kernels for heads of at most 64 and 128 features.
#define FLASH_FOR(T, name, D) \
  extern "C" __global__ void __launch_bounds__(128, 2) flash_##D##_##name(i64 heads, i64 dim, i64 row_step, i64 col_step, \
      i64 causal, i64 window, double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, \
      const T* k, i64 sk, const T* v, i64 sv, T* out, i64 so, float* lse) { \
    forward<D>(heads, dim, row_step, col_step, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, out, so, lse); \
  } \
  extern "C" __global__ void __launch_bounds__(128, 2) flash_backward_queries_##D##_##name(i64 heads, i64 dim, i64 causal, i64 window, \
      double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, \
      i64 sv, const float* lse, const float* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) { \
    backward_queries<D>(heads, dim, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, lse, delta, dout, sdo, \
      dqkv, sd); \
  } \
  extern "C" __global__ void __launch_bounds__(128, 2) flash_backward_keys_##D##_##name(i64 heads, i64 kv_heads, i64 dim, i64 causal, \
      i64 window, double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, \
      const T* v, i64 sv, const float* lse, const float* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) { \
    backward_keys<D>(heads, kv_heads, dim, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, lse, delta, dout, \
      sdo, dqkv, sd); \
  }
#define FLASH(T, name) FLASH_FOR(T, name, 64) FLASH_FOR(T, name, 128)
FLASH(bf16, bf16)
FLASH(f16, f16)
