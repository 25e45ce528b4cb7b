// Scaled dot-product attention on tensor cores, forward, of bf16 and f16 (Dao, 2023: FlashAttention-2).
//
// A block is 4 warps of 16 queries each; 64 keys and values at a time lie in shared memory, and come there while the products with
// the others are made. Scores, weights and sums are f32; weights are rounded to the element for their product with the values.
// tiles as in attention.cu. Every row of q, k, v and out begins at 16 bytes, and heads have a multiple of 8 features.
//
// A product cannot leave out what a mask hides: weights of 0 do. Values of padding are 0 in shared memory; where a causal mask hides
// some of the values from some queries, and one of those is infinite or NaN, products are made one by one.
#include "mma.cuh"

constexpr int WARPS = 4, QUERIES = 16 * WARPS, KEYS = 64;
constexpr u32 ALL = 0xffffffffu;

// Features in a row of shared memory: 16 bytes more, so that eight rows lie in different banks.
template <int D> constexpr int ROW = D + 8;

// to <- rows of a matrix, in 16 bytes each of which this thread copies some; 0 beyond the rows and features that there are, and in
// rows of padding.
template <int D, class T>
__device__ __forceinline__ void stage(T* to, i64 count, i64 dim, const T* from, i64 stride, const u8* valid) {
#pragma unroll 4
  for (int at = threadIdx.y * 32 + threadIdx.x; at < 64 * (D / 8); at += WARPS * 32) {
    const int row = at / (D / 8), col = at % (D / 8) * 8;
    T* place = to + row * ROW<D> + col;
    if (row < count && col < dim && (!valid || valid[row])) copy_async(place, from + row * stride + col);
    else *reinterpret_cast<Pack<u32, 4>*>(place) = Pack<u32, 4>{};
  }
}

// Whether what this thread has copied is finite.
template <int D, class T> __device__ __forceinline__ bool is_finite(const T* staged) {
  bool finite = true;
#pragma unroll 1
  for (int at = threadIdx.y * 32 + threadIdx.x; at < 64 * (D / 8); at += WARPS * 32) {
    const auto some = load<8>(staged + at / (D / 8) * ROW<D> + at % (D / 8) * 8);
#pragma unroll
    for (int k = 0; k < 8; k++) finite = finite && widen(some.at[k]) - widen(some.at[k]) == 0;
  }
  return finite;
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

template <int D, class T>
__device__ __forceinline__ void flash(i64 heads, i64 dim, i64 row_step, i64 col_step, i64 causal, i64 window, double scale,
    const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, T* out,
    i64 so, float* lse) {
  DYNAMIC_SHARED(T, shared);
  T *queries = shared, *keys = queries + QUERIES * ROW<D>, *values = keys + KEYS * ROW<D>;
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  const i64 first = tile[0], count = tile[1], place = tile[2], key_row = tile[3] + kv * row_step, key_count = tile[4];
  k += key_row * sk + kv * col_step;
  v += key_row * sv + kv * col_step;
  if (valid) valid += key_row;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  // This warp's queries; its rows in shared memory are its own.
  const i64 mine = 16 * (i64)threadIdx.y;
  T* own = queries + mine * ROW<D>;
  // Powers of 2: scores come with log2 e in them.
  const float by = (float)(scale * 1.4426950408889634);
  float most[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {0, 0}, sum[D / 8][4] = {};
  bool any[2] = {false, false};

  const i64 begin = causal && place + 1 > window ? place + 1 - window : 0;
  const i64 end = causal && place + count < key_count ? place + count : key_count;
  const auto rows_from = [&](i64 base) { return end - base < KEYS ? end - base : (i64)KEYS; };
  stage<D>(queries, count, dim, q + first * sq + head * dim, sq, (const u8*)nullptr);
  if (begin < end) stage<D>(keys, rows_from(begin), dim, k + begin * sk, sk, (const u8*)nullptr);
  for (i64 base = begin; base < end; base += KEYS) {
    const i64 here = rows_from(base), next = base + KEYS;
    // Of the keys of this tile, query `mine + g` sees those behind `low` up to `high`, and query `mine + g + 8` 8 more or less.
    const i64 high = causal ? place + mine + g - base : (i64)KEYS, low = causal ? place + mine + g - base - window : -(i64)KEYS;
    const bool some = mine < count && (!causal || (base <= place + mine + 15 && next - 1 + window > place + mine));
    const bool all = here == KEYS && !valid && (!causal || (next - 1 <= place + mine && base + window > place + mine + 15));
    const auto sees = [&](int col, int half) {
      return col < here && col <= high + 8 * half && col > low + 8 * half && (!valid || valid[base + col]);
    };
    await_copies();
    __syncthreads();
    stage<D>(values, here, dim, v + base * sv, sv, valid ? valid + base : valid);

    float weight[KEYS / 8][4] = {};
    if (some) {
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        if (d >= dim) break;
        u32 a[4], b[4];
        load_matrices(a, own + (lane % 16) * ROW<D> + d + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < KEYS; n += 16) {
          load_matrices(b, keys + (n + lane % 8 + lane / 16 * 8) * ROW<D> + d + lane / 8 % 2 * 8);
          mma<T>(weight[n / 8], a, b[0], b[1]);
          mma<T>(weight[n / 8 + 1], a, b[2], b[3]);
        }
      }
    }
    await_copies();
    // Whether the causal mask hides any of these values from a query of the block.
    const bool hides = causal && (base + here - 1 > place || base + window < place + count);
    bool apart = false;
    if (hides) apart = __syncthreads_or(!is_finite<D>(values));
    else __syncthreads();
    // With the products apart, the place of the keys is needed once more.
    if (next < end && !apart) stage<D>(keys, rows_from(next), dim, k + next * sk, sk, (const u8*)nullptr);

    if (some) {
      float largest[2] = {most[0], most[1]};
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const bool seen = all || sees(8 * n + 2 * t + e % 2, e / 2);
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
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          // Nothing but -infinity so far: weights of 0 for now.
          weight[n][e] = most[e / 2] == -infinity<float>() ? 0.0f : exp2f(weight[n][e] - most[e / 2]);
          total[e / 2] += weight[n][e];
        }
      if (!apart) {
#pragma unroll
        for (int n = 0; n < KEYS; n += 16) {
          const auto &left = weight[n / 8], &right = weight[n / 8 + 1];
          const u32 a[4] = {pair<T>(left[0], left[1]), pair<T>(left[2], left[3]), pair<T>(right[0], right[1]), pair<T>(right[2], right[3])};
#pragma unroll
          for (int d = 0; d < D; d += 16) {
            if (d >= dim) break;
            u32 b[4];
            load_transposed(b, values + (n + lane % 16) * ROW<D> + d + lane / 16 * 8);
            mma<T>(sum[d / 8], a, b[0], b[1]);
            mma<T>(sum[d / 8 + 1], a, b[2], b[3]);
          }
        }
      } else {
        T* weights = keys + mine * ROW<D>;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) weights[(g + e / 2 * 8) * ROW<D> + 8 * n + 2 * t + e % 2] = narrow<T>(weight[n][e]);
        __syncwarp();
#pragma unroll 1
        for (int col = 0; col < here; col++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            if (!sees(col, half)) continue;
            const float w = widen(weights[(g + half * 8) * ROW<D> + col]);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
              const auto some = load<2>(values + col * ROW<D> + 8 * n + 2 * t);
              sum[n][2 * half] += w * widen(some.at[0]);
              sum[n][2 * half + 1] += w * widen(some.at[1]);
            }
          }
      }
    }
    if (apart) {
      __syncthreads();
      if (next < end) stage<D>(keys, rows_from(next), dim, k + next * sk, sk, (const u8*)nullptr);
    }
  }
  // Where there were no keys, the queries have come all the same.
  await_copies();
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i64 row = mine + g + 8 * half;
    const bool seen = row_most(any[half] ? 1.0f : 0.0f) > 0;
    const float all = row_total(total[half]);
    // Of nothing but -infinity, 0 / 0.
    const float shrink = 1.0f / all;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const u32 both = seen ? pair<T>(sum[n][2 * half] * shrink, sum[n][2 * half + 1] * shrink) : 0;
      *reinterpret_cast<u32*>(own + (g + 8 * half) * ROW<D> + 8 * n + 2 * t) = both;
    }
    if (lse && t == 0 && row < count) {
      const bool lost = most[half] == -infinity<float>();
      const float nan = infinity<float>() - infinity<float>();
      lse[(first + row) * heads + head] =
          !seen ? infinity<float>() : lost ? nan : most[half] * 0.6931471805599453f + log_of(all);
    }
  }
  __syncwarp();
  for (int at = lane; at < 16 * (D / 8); at += 32) {
    const int row = at / (D / 8), col = at % (D / 8) * 8;
    if (mine + row < count && col < dim)
      store(out + (first + mine + row) * so + head * dim + col, load<8>(own + row * ROW<D> + col));
  }
}

// A kernel for heads of at most 64 and 128 features.
#define FLASH_FOR(T, name, D) \
  extern "C" __global__ void __launch_bounds__(128, 2) flash_##D##_##name(i64 heads, i64 dim, i64 row_step, i64 col_step, \
      i64 causal, i64 window, double scale, const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, \
      const T* k, i64 sk, const T* v, i64 sv, T* out, i64 so, float* lse) { \
    flash<D>(heads, dim, row_step, col_step, causal, window, scale, tiles, kv_of_query, valid, q, sq, k, sk, v, sv, out, so, lse); \
  }
#define FLASH(T, name) FLASH_FOR(T, name, 64) FLASH_FOR(T, name, 128)
FLASH(bf16, bf16)
FLASH(f16, f16)
