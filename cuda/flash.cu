// Scaled dot-product attention on tensor cores, forward and backward, of bf16 and f16 (Dao, 2023:
// FlashAttention-2).
//
// A block is 4 warps. In the forward a warp has 32 queries, so that fragments of keys and values
// from shared memory are used twice; in the backward a warp has 16 queries or keys. The next tile
// loads into shared memory while the current one is multiplied. Scores, weights and sums are f32;
// the factors of the next product are rounded to the element. tiles: as in attention.cu. Every row
// of a matrix is aligned to 16 bytes, and the width of heads is a multiple of 8.
//
// A product cannot skip masked elements, so their weights are 0. Rows of padding are 0 in shared
// memory. Where a causal mask applies within a tile and a number of it is infinite or NaN, products
// are computed one by one.
//
// Most tiles are not masked. Only for the others are masks computed, one bit per score.
#include "mma.cuh"

constexpr int WARPS = 4, TILE = 16 * WARPS;
constexpr u32 ALL = 0xffffffffu;
// Scores are exponents of 2: the scale includes log2 e.
constexpr float LOG2_E = 1.4426950408889634f;

// Rows in shared memory are D elements, in packs of 8. Pack p of row r is stored at pack p ^ r % 8,
// so that eight rows of a column of packs are in different banks.
template <int D> __device__ __forceinline__ int place_of(int row, int col) { return row * D + (col ^ row % 8 * 8); }

// The address from which this lane loads 16 x 16 elements: by `load_matrices` as the left operand
// or the transposed right operand of a product, or by `load_transposed` as the right operand. The
// address `rows` rows further, a multiple of 8, is 2 D rows bytes further.
template <int D, class T> __device__ __forceinline__ Address lane_of(const T* tile) {
  return shared_address(tile + place_of<D>(threadIdx.x % 16, threadIdx.x / 16 * 8));
}
template <int D, class T> __device__ __forceinline__ Address lane_of_transposed(const T* tile) {
  return shared_address(tile + place_of<D>(threadIdx.x % 8 + threadIdx.x / 16 * 8, threadIdx.x / 8 % 2 * 8));
}

// The address `d` features further, a multiple of 16.
__device__ __forceinline__ Address features_on(Address lane, int d) { return (lane ^ 2 * (d % 64)) + 2 * (d / 64 * 64); }

// The first of the packs that this thread copies.
template <int D, class T> __device__ __forceinline__ const T* thread_part(const T* rows, i64 stride) {
  const int thread = threadIdx.y * 32 + threadIdx.x;
  return rows + thread / (D / 8) * stride + thread % (D / 8) * 8;
}

// to <- N rows of a matrix; 0 beyond its rows and features, and in rows of padding. `part` is this
// thread's share of them, and is advanced to the rows that follow.
template <int D, int N = TILE, class T>
__device__ __forceinline__ void stage_part(T* to, int count, int dim, const T*& part, i64 stride, const u8* valid = nullptr) {
  constexpr int ROWS = WARPS * 32 / (D / 8);
  const int thread = threadIdx.y * 32 + threadIdx.x, row = thread / (D / 8), col = thread % (D / 8) * 8;
  const Address place = shared_address(to + place_of<D>(row, col));
  if (count >= N && !valid) {
#pragma unroll
    for (int at = 0; at < N; at += ROWS, part += ROWS * stride) copy_async(place + at * D * sizeof(T), part, col < dim);
  } else {
#pragma unroll 1
    for (int at = 0; at < N; at += ROWS, part += ROWS * stride)
      copy_async(place + at * D * sizeof(T), part, row + at < count && col < dim && (!valid || valid[row + at]));
  }
}
template <int D, int N = TILE, class T>
__device__ __forceinline__ void stage(T* to, int count, int dim, const T* from, i64 stride) {
  const T* part = thread_part<D>(from, stride);
  stage_part<D, N>(to, count, dim, part, stride);
}

// Whether one of two packed 16-bit elements is infinite or NaN: its exponent is all ones, and
// adding one carries into the sign.
template <class T> struct Exponent;
template <> struct Exponent<bf16> { static constexpr u32 ONES = 0x7f807f80u, ONE = 0x00800080u; };
template <> struct Exponent<f16> { static constexpr u32 ONES = 0x7c007c00u, ONE = 0x04000400u; };

// Whether the elements that this thread has copied are finite.
template <int D, int N = TILE, class T> __device__ __forceinline__ bool is_finite(const T* staged) {
  constexpr int ROWS = WARPS * 32 / (D / 8);
  const int thread = threadIdx.y * 32 + threadIdx.x;
  const T* mine = staged + place_of<D>(thread / (D / 8), thread % (D / 8) * 8);
  u32 carries = 0;
#pragma unroll
  for (int at = 0; at < N; at += ROWS) {
    const auto some = load<4>(reinterpret_cast<const u32*>(mine + at * D));
#pragma unroll
    for (int k = 0; k < 4; k++) carries |= (some.at[k] & Exponent<T>::ONES) + Exponent<T>::ONE;
  }
  return !(carries & 0x80008000u);
}

// to += own others', for 16 M rows and N. `own` and `others` are addresses of this lane.
template <int D, int M, int N, class T>
__device__ __forceinline__ void scores(float (&to)[M][N / 8][4], Address own, Address others) {
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    u32 a[M][4], b[4];
#pragma unroll
    for (int m = 0; m < M; m++) load_matrices(a[m], features_on(own, d) + 32 * m * D);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      load_matrices(b, features_on(others, d) + 2 * n * D);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(to[m][n / 8], a[m], b[0], b[1]);
        mma<T>(to[m][n / 8 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sum += weight rows, for 16 M x N weights. `rows` is an address of this lane.
template <int D, int M, int N, class T>
__device__ __forceinline__ void add_rows(float (&sum)[M][D / 8][4], const float (&weight)[M][N / 8][4], Address rows) {
#pragma unroll
  for (int n = 0; n < N; n += 16) {
    u32 a[M][4], b[4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const auto& part = weight[m][n / 8 + k / 2];
        a[m][k] = pair<T>(part[k % 2 * 2], part[k % 2 * 2 + 1]);
      }
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      load_transposed(b, features_on(rows, d) + 2 * n * D);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(sum[m][d / 8], a[m], b[0], b[1]);
        mma<T>(sum[m][d / 8 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The masks of rows g and g + 8 over N columns, one bit per column.
template <int N> struct Seen {
  u32 bits[2][N / 32];

  static __device__ __forceinline__ u32 below(int col) { return col <= 0 ? 0 : col >= 32 ? ALL : (1u << col) - 1; }
  // Row `half` attends to the columns `from` up to before `to` that are in `there`.
  __device__ __forceinline__ void span(int half, int from, int to, const u32 (&there)[N / 32]) {
#pragma unroll
    for (int word = 0; word < N / 32; word++)
      bits[half][word] = below(to - 32 * word) & ~below(from - 32 * word) & there[word];
  }
  // Element e of fragment n of this lane's scores.
  __device__ __forceinline__ bool part(int n, int e) const {
    return (bits[e / 2][n / 4] >> 2 * (threadIdx.x % 4)) >> (8 * (n % 4) + e % 2) & 1;
  }
  __device__ __forceinline__ bool any(int half) const { return (bits[half][0] | bits[half][N / 32 - 1]) != 0; }
  // For a column that is not known at compile time.
  __device__ __forceinline__ bool column(int col, int half) const {
    const u32 word = col < 32 ? bits[half][0] : bits[half][N / 32 - 1];
    return word >> col % 32 & 1;
  }
};

// sum += weight rows, one by one, skipping masked elements. The weights pass through 16 x N
// elements of this warp's shared memory.
template <int D, int N, class T>
__device__ __forceinline__ void add_rows_apart(float (&sum)[D / 8][4], const float (&weight)[N / 8][4], T* weights, int here,
    const T* rows, const Seen<N>& seen) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) weights[(g + e / 2 * 8) * N + 8 * n + 2 * t + e % 2] = narrow<T>(weight[n][e]);
  __syncwarp();
#pragma unroll 1
  for (int col = 0; col < here; col++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (!seen.column(col, half)) continue;
      const float by = widen(weights[(g + half * 8) * N + col]);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const auto some = load<2>(rows + place_of<D>(col, 8 * n) + 2 * t);
        sum[n][2 * half] += by * widen(some.at[0]);
        sum[n][2 * half + 1] += by * widen(some.at[1]);
      }
    }
  __syncwarp();
}

// to <- `count` rows of by sum, or 0 in a half that is not kept, through 16 rows of this warp's
// shared memory.
template <int D, class T>
__device__ __forceinline__ void give_rows(T* to, i64 stride, int count, int dim, const float (&sum)[D / 8][4], const float (&by)[2],
    const bool (&kept)[2], T* own) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const u32 both = kept[half] ? pair<T>(sum[n][2 * half] * by[half], sum[n][2 * half + 1] * by[half]) : 0;
      *reinterpret_cast<u32*>(own + place_of<D>(g + 8 * half, 8 * n) + 2 * t) = both;
    }
  __syncwarp();
#pragma unroll 1
  for (int at = lane; at < 16 * (D / 8); at += 32) {
    const int row = at / (D / 8), col = at % (D / 8) * 8;
    if (row < count && col < dim) store(to + row * stride + col, load<8>(own + place_of<D>(row, col)));
  }
}

// Reduces over the four lanes that share a row.
__device__ __forceinline__ float row_total(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ __forceinline__ float row_most(float x) {
  x = largest_of(x, __shfl_xor_sync(ALL, x, 1));
  return largest_of(x, __shfl_xor_sync(ALL, x, 2));
}

// Longer than any sequence, and sums with it fit 32 bits.
__device__ __forceinline__ int reach(i64 window) { return window < 1 << 30 ? (int)window : 1 << 30; }

// The masks of a warp's N queries over KEYS keys, of which `here` exist. The first query is `ahead`
// positions after the first key.
template <int N, int KEYS = TILE> struct Sight {
  int ahead, window;
  bool causal, some, all;
  // The keys that exist and are not padding.
  u32 there[KEYS / 32];

  __device__ __forceinline__ Sight(int ahead, int here, bool causal, int window, const u8* valid)
      : ahead(ahead), window(window), causal(causal), some(here > 0), all(true) {
#pragma unroll
    for (int word = 0; word < KEYS / 32; word++) {
      there[word] = ALL;
      if (here >= KEYS && !valid) continue;
      const int col = 32 * word + threadIdx.x;
      there[word] = __ballot_sync(ALL, col < here && (!valid || valid[col]));
      all = all && there[word] == ALL;
    }
    if (!causal) return;
    some = some && ahead + N - 1 >= 0 && ahead - window < KEYS - 1;
    all = all && ahead >= KEYS - 1 && ahead + N - 1 < window;
  }
  // For queries `row` and `row` + 8 of the warp.
  __device__ __forceinline__ Seen<KEYS> operator()(int row) const {
    Seen<KEYS> seen;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int own = ahead + row + 8 * half;
      seen.span(half, causal ? own - window + 1 : 0, causal ? own + 1 : KEYS, there);
    }
    return seen;
  }
};

// The rows of a block, and of a warp, in the forward.
constexpr int PARTS = 2, OWN = 16 * PARTS;

template <int D, class T>
__device__ __forceinline__ void forward(i64 heads, i64 dim, i64 row_step, i64 col_step, i64 causal, i64 farthest, double scale,
    const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, T* out,
    i64 so, float* lse) {
  DYNAMIC_SHARED(T, shared);
  // The keys per tile, such that scores and sums stay in registers.
  constexpr int STEP = D <= 64 ? 64 : 32;
  // Two tiles each of keys and values.
  T *queries = shared, *keys = queries + WARPS * OWN * D, *values = keys + 2 * TILE * D;
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  // The last tiles of a causal sequence have the most keys, so they start first.
  const i64* tile = tiles + 5 * (i64)(gridDim.x - 1 - blockIdx.x);
  const i64 first = tile[0], key_row = tile[3] + kv * row_step;
  const int count = tile[1], place = tile[2], key_count = tile[4], window = reach(farthest);
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  // This warp's queries. Only this warp uses its rows in shared memory.
  const int mine = OWN * threadIdx.y;
  T* own = queries + mine * D;
  const float by = (float)scale * LOG2_E;
  // For each row: the largest score, as an exponent of 2; the sum of the weights and of the
  // weighted values; and a bit, whether it has had a visible key.
  float most[PARTS][2], total[PARTS][2] = {}, sum[PARTS][D / 8][4] = {};
  u32 any = 0;
#pragma unroll
  for (int m = 0; m < PARTS; m++) most[m][0] = most[m][1] = -infinity<float>();
  // Larger scores are scaled before they are compared: omitting that rounding would make the
  // differences too inaccurate.
  constexpr float LARGE = 1 << 16;
  bool large = false;

  const int begin = causal && place + 1 > window ? place + 1 - window : 0;
  const int end = causal && place + count < key_count ? place + count : key_count;
  const T* k_part = thread_part<D>(k + (key_row + begin) * sk + kv * col_step, sk);
  const T* v_part = thread_part<D>(v + (key_row + begin) * sv + kv * col_step, sv);
  // Of the tiles to come; and the offset of the block's first query from the first key of the tile.
  int left = end - begin, ahead = place - begin;
  const u8* flags = valid ? valid + key_row + begin : nullptr;
  const auto fetch = [&](int buffer, int here, const u8* flags) {
    stage_part<D>(keys + buffer * TILE * D, here, (int)dim, k_part, sk);
    stage_part<D>(values + buffer * TILE * D, here, (int)dim, v_part, sv, flags);
  };
  stage<D, WARPS * OWN>(queries, count, (int)dim, q + first * sq + head * dim, sq);
  if (left > 0) fetch(0, left, flags);
  for (int buffer = 0; left > 0; buffer ^= 1, left -= TILE, ahead -= TILE) {
    const int here = left < TILE ? left : TILE;
    T *some_keys = keys + buffer * TILE * D, *some_values = values + buffer * TILE * D;
    // Whether the causal mask hides any of these values from a query of the block.
    const bool hides = causal && (here > ahead + 1 || window < ahead + count);
    await_copies();
    bool apart = false;
    if (hides) apart = __syncthreads_or(!is_finite<D>(some_values));
    else __syncthreads();
    // The separate products need the buffer of the next tile first.
    if (left > TILE && !apart) fetch(buffer ^ 1, left - TILE, flags ? flags + TILE : nullptr);
#pragma unroll 1
    for (int at = 0; at < TILE; at += STEP) {
      const Sight<OWN, STEP> sees(ahead + mine - at, here - at, causal, window, flags ? flags + at : nullptr);
      if (mine >= count || !sees.some) continue;
      float weight[PARTS][STEP / 8][4] = {};
      scores<D, PARTS, STEP, T>(weight, lane_of<D>(own), lane_of_transposed<D>(some_keys + at * D));
      float largest[PARTS][2], factor = 1;
      const bool plain = sees.all && by > 0 && !large;
      if (plain) {
        factor = by;
#pragma unroll
        for (int m = 0; m < PARTS; m++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float x = weight[m][0][2 * half];
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) x = largest_of(largest_of(x, weight[m][n][2 * half]), weight[m][n][2 * half + 1]);
            largest[m][half] = largest_of(most[m][half], row_most(x) * by);
          }
        any = ALL;
      } else {
#pragma unroll
        for (int m = 0; m < PARTS; m++) {
          const Seen<STEP> seen = sees(16 * m + g);
          largest[m][0] = largest[m][1] = -infinity<float>();
#pragma unroll
          for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const float scaled = weight[m][n][e] * by;
              weight[m][n][e] = seen.part(n, e) ? scaled : -infinity<float>();
              largest[m][e / 2] = largest_of(largest[m][e / 2], weight[m][n][e]);
            }
#pragma unroll
          for (int half = 0; half < 2; half++) {
            largest[m][half] = largest_of(most[m][half], row_most(largest[m][half]));
            any |= (u32)seen.any(half) << (2 * m + half);
          }
        }
      }
      bool moved = false;
#pragma unroll
      for (int m = 0; m < PARTS; m++) moved = moved || largest[m][0] != most[m][0] || largest[m][1] != most[m][1];
      // Only -infinity so far: use weights of 0 for now.
      const auto from = [](float most) { return most == -infinity<float>() ? 0.0f : most; };
      if (__ballot_sync(ALL, moved)) {
        bool now_large = false;
#pragma unroll
        for (int m = 0; m < PARTS; m++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float shrink = exp2_of(most[m][half] - from(largest[m][half]));
            most[m][half] = largest[m][half];
            now_large = now_large || most[m][half] > LARGE || most[m][half] < -LARGE;
            total[m][half] *= shrink;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
              sum[m][n][2 * half] *= shrink;
              sum[m][n][2 * half + 1] *= shrink;
            }
          }
        large = __ballot_sync(ALL, now_large);
        if (large && plain) {
          factor = 1;
#pragma unroll
          for (int m = 0; m < PARTS; m++)
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) weight[m][n][e] *= by;
        }
      }
#pragma unroll
      for (int m = 0; m < PARTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float offset = from(most[m][half]);
#pragma unroll
          for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
              weight[m][n][e] = exp2_of(weight[m][n][e] * factor - offset);
              total[m][half] += weight[m][n][e];
            }
        }
      if (apart && !sees.all) {
        T* weights = keys + (buffer ^ 1) * TILE * D + 16 * threadIdx.y * STEP;
#pragma unroll
        for (int m = 0; m < PARTS; m++)
          add_rows_apart<D, STEP>(sum[m], weight[m], weights, here - at < STEP ? here - at : STEP, some_values + at * D, sees(16 * m + g));
      } else add_rows<D, PARTS, STEP, T>(sum, weight, lane_of<D>(some_values + at * D));
    }
    if (apart) {
      __syncthreads();
      if (left > TILE) fetch(buffer ^ 1, left - TILE, flags ? flags + TILE : nullptr);
    }
    if (flags) flags += TILE;
  }
  // Without any keys the copy of the queries still has to complete.
  await_copies();
  __syncthreads();
  // Read again, as registers are scarce in the loop.
  const i64 out_row = tiles[5 * (i64)(gridDim.x - 1 - blockIdx.x)];
#pragma unroll
  for (int m = 0; m < PARTS; m++) {
    float shrink[2];
    bool kept[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = mine + 16 * m + g + 8 * half;
      const float all = row_total(total[m][half]);
      kept[half] = any >> (2 * m + half) & 1;
      // 0 / 0 if all scores are -infinity.
      shrink[half] = 1.0f / all;
      if (lse && t == 0 && row < count) {
        const bool lost = most[m][half] == -infinity<float>();
        const float nan = infinity<float>() - infinity<float>();
        lse[(out_row + row) * heads + head] = !kept[half] ? infinity<float>() : lost ? nan : most[m][half] / LOG2_E + log_of(all);
      }
    }
    const int row = mine + 16 * m;
    give_rows<D>(out + (out_row + row) * so + head * dim, so, count - row, (int)dim, sum[m], shrink, kept, own + 16 * m * D);
  }
}

// dq: dS = P (dO V' - delta), dQ = scale dS K.
template <int D, class T>
__device__ __forceinline__ void backward_queries(i64 heads, i64 dim, i64 causal, i64 farthest, double scale, const i64* tiles,
    const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, const float* lse,
    const float* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) {
  DYNAMIC_SHARED(T, shared);
  // Two tiles each of keys and values.
  T *queries = shared, *douts = queries + TILE * D, *keys = douts + TILE * D, *values = keys + 2 * TILE * D;
  const i64 head = blockIdx.y, kv = kv_of_query[head];
  const i64* tile = tiles + 5 * (i64)(gridDim.x - 1 - blockIdx.x);
  const i64 first = tile[0], key_row = tile[3];
  const int count = tile[1], place = tile[2], key_count = tile[4], window = reach(farthest);
  if (valid) valid += key_row;
  const int g = threadIdx.x / 4;
  const int mine = 16 * threadIdx.y;
  const float by = (float)scale * LOG2_E;
  float log_sum[2], own_delta[2], sum[1][D / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i64 row = mine + g + 8 * half, at = (first + row) * heads + head;
    log_sum[half] = row < count ? lse[at] * LOG2_E : 0.0f;
    own_delta[half] = row < count ? delta[at] : 0.0f;
  }
  const int begin = causal && place + 1 > window ? place + 1 - window : 0;
  const int end = causal && place + count < key_count ? place + count : key_count;
  const auto rows_from = [&](int base) { return end - base < TILE ? end - base : TILE; };
  const T *k_part = thread_part<D>(k + (key_row + begin) * sk + kv * dim, sk), *v_part = thread_part<D>(v + (key_row + begin) * sv + kv * dim, sv);
  const auto fetch = [&](int base, int buffer) {
    const u8* flags = valid ? valid + base : nullptr;
    stage_part<D>(keys + buffer * TILE * D, rows_from(base), (int)dim, k_part, sk, flags);
    stage_part<D>(values + buffer * TILE * D, rows_from(base), (int)dim, v_part, sv, flags);
  };
  stage<D>(queries, count, (int)dim, q + first * sq + head * dim, sq);
  stage<D>(douts, count, (int)dim, dout + first * sdo + head * dim, sdo);
  if (begin < end) fetch(begin, 0);
  int buffer = 0;
  for (int base = begin; base < end; base += TILE, buffer ^= 1) {
    const int here = rows_from(base);
    T *some_keys = keys + buffer * TILE * D, *some_values = values + buffer * TILE * D;
    const bool hides = causal && (base + here - 1 > place || base + window < place + count);
    await_copies();
    bool apart = false;
    if (hides) apart = __syncthreads_or(!is_finite<D>(some_keys));
    else __syncthreads();
    const int next = base + TILE;
    // The separate products need the buffer of the next tile first.
    if (next < end && !apart) fetch(next, buffer ^ 1);
    const Sight<16> sees(place + mine - base, here, causal, window, valid ? valid + base : nullptr);
    const bool some = mine < count && sees.some;
    if (some) {
      float weight[1][TILE / 8][4] = {}, slope[1][TILE / 8][4] = {};
      scores<D, 1, TILE, T>(weight, lane_of<D>(queries + mine * D), lane_of_transposed<D>(some_keys));
      scores<D, 1, TILE, T>(slope, lane_of<D>(douts + mine * D), lane_of_transposed<D>(some_values));
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          slope[0][n][e] = exp2_of(weight[0][n][e] * by - log_sum[e / 2]) * (slope[0][n][e] - own_delta[e / 2]);
      if (!sees.all) {
        const Seen<TILE> seen = sees(g);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) if (!seen.part(n, e)) slope[0][n][e] = 0;
      }
      if (apart && !sees.all)
        add_rows_apart<D, TILE>(sum[0], slope[0], keys + (buffer ^ 1) * TILE * D + mine * TILE, here, some_keys, sees(g));
      else add_rows<D, 1, TILE, T>(sum, slope, lane_of<D>(some_keys));
    }
    if (apart) {
      __syncthreads();
      if (next < end) fetch(next, buffer ^ 1);
    }
  }
  await_copies();
  __syncthreads();
  const float factor[2] = {(float)scale, (float)scale};
  const bool kept[2] = {true, true};
  give_rows<D>(dqkv + (first + mine) * sd + head * dim, sd, count - mine, (int)dim, sum[0], factor, kept, queries + mine * D);
}

// dk and dv of the keys at the positions of a tile's queries: dV = P' dO, dK = scale dS' Q, summed
// over the query heads of a key/value head. A warp owns 16 keys. The number of queries in shared
// memory is such that both sums stay in registers.
constexpr int QUERIES = 32;

template <int D, class T>
__device__ __forceinline__ void backward_keys(i64 heads, i64 kv_heads, i64 dim, i64 causal, i64 farthest, double scale,
    const i64* tiles, const i64* kv_of_query, const u8* valid, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv,
    const float* lse, const float* delta, const T* dout, i64 sdo, T* dqkv, i64 sd) {
  DYNAMIC_SHARED(T, shared);
  // Two tiles each of queries and their gradients, and of the numbers per query.
  T *keys = shared, *values = keys + TILE * D, *queries = values + TILE * D, *douts = queries + 2 * QUERIES * D;
  T* weights = douts + 2 * QUERIES * D;
  // For each tile, the log-sum-exps as exponents of 2, and then the deltas.
  float* numbers = reinterpret_cast<float*>(weights + TILE * QUERIES);
  const i64 kv = blockIdx.y;
  const i64* tile = tiles + 5 * (i64)blockIdx.x;
  // A causal mask hides the queries before the keys. Positions count from the first key.
  const int count = tile[1], hidden = causal ? tile[2] : 0, window = reach(farthest);
  const i64 first = tile[0], start = tile[3] + hidden;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4, thread = threadIdx.y * 32 + threadIdx.x;
  const int mine = 16 * threadIdx.y;
  T *own_keys = keys + mine * D, *own_values = values + mine * D, *own_weights = weights + mine * QUERIES;
  const float by = (float)scale * LOG2_E;
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  stage<D>(keys, count, (int)dim, k + first * sk + kv * dim, sk);
  stage<D>(values, count, (int)dim, v + first * sv + kv * dim, sv);
  int end = tile[4] - hidden;
  if (causal && count - 1 + window < end) end = count - 1 + window;
  const auto rows_from = [&](int base) { return end - base < QUERIES ? end - base : QUERIES; };
  const auto next_head = [&](int head) {
    do head++;
    while (head < heads && kv_of_query[head] != kv);
    return head;
  };
  // The first two warps each load one of these arrays. The next tile's numbers load while products
  // are computed.
  const bool second = threadIdx.y == 1;
  float next_number = 0;
  const auto fetch = [&](int head, int base, int buffer) {
    const int here = rows_from(base);
    stage<D, QUERIES>(queries + buffer * QUERIES * D, here, (int)dim, q + (start + base) * sq + head * dim, sq);
    stage<D, QUERIES>(douts + buffer * QUERIES * D, here, (int)dim, dout + (start + base) * sdo + head * dim, sdo);
    if (threadIdx.y < 2 && threadIdx.x < here)
      next_number = (second ? delta : lse)[(start + base + threadIdx.x) * heads + head];
  };
  const auto keep = [&](int buffer) {
    if (threadIdx.y < 2) numbers[2 * buffer * QUERIES + thread] = second ? next_number : next_number * LOG2_E;
  };
  int head = end > 0 ? next_head(-1) : (int)heads, base = 0;
  if (head < heads) {
    fetch(head, base, 0);
    keep(0);
  }
  int buffer = 0;
  while (head < heads) {
    const int here = rows_from(base);
    const T *some_queries = queries + buffer * QUERIES * D, *some_douts = douts + buffer * QUERIES * D;
    const bool hides = causal && (base < count - 1 || base + here > window);
    await_copies();
    bool apart = false;
    if (hides) apart = __syncthreads_or(!is_finite<D, QUERIES>(some_queries) || !is_finite<D, QUERIES>(some_douts));
    else __syncthreads();
    const bool again = base + QUERIES < end;
    const int next_base = again ? base + QUERIES : 0;
    head = again ? head : next_head(head);
    if (head < heads) fetch(head, next_base, buffer ^ 1);
    // Key `mine + g + 8 half` is visible to the queries of its columns from `low + 8 half` on,
    // `window` of them.
    const int ahead = mine - base;
    const bool some = mine < count && (!causal || (here - 1 >= ahead && 0 < ahead + 15 + window));
    const bool all = here == QUERIES && (!causal || (ahead + 15 <= 0 && here - 1 < ahead + window));
    if (some) {
      float weight[1][QUERIES / 8][4] = {}, slope[1][QUERIES / 8][4] = {};
      scores<D, 1, QUERIES, T>(weight, lane_of<D>(own_keys), lane_of_transposed<D>(some_queries));
      scores<D, 1, QUERIES, T>(slope, lane_of<D>(own_values), lane_of_transposed<D>(some_douts));
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++) {
        const float* of_columns = numbers + 2 * buffer * QUERIES + 8 * n + 2 * t;
        const auto log_sum = load<2>(of_columns), own_delta = load<2>(of_columns + QUERIES);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          weight[0][n][e] = exp2_of(weight[0][n][e] * by - log_sum.at[e % 2]);
          slope[0][n][e] = weight[0][n][e] * (slope[0][n][e] - own_delta.at[e % 2]);
        }
      }
      Seen<QUERIES> seen;
      if (!all) {
        const u32 there[1] = {Seen<QUERIES>::below(here)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int low = ahead + g + 8 * half;
          seen.span(half, causal ? low : 0, causal ? low + window : QUERIES, there);
        }
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) if (!seen.part(n, e)) weight[0][n][e] = slope[0][n][e] = 0;
      }
      if (apart && !all) {
        add_rows_apart<D, QUERIES>(dv[0], weight[0], own_weights, here, some_douts, seen);
        add_rows_apart<D, QUERIES>(dk[0], slope[0], own_weights, here, some_queries, seen);
      } else {
        add_rows<D, 1, QUERIES, T>(dv, weight, lane_of<D>(some_douts));
        add_rows<D, 1, QUERIES, T>(dk, slope, lane_of<D>(some_queries));
      }
    }
    base = next_base;
    buffer ^= 1;
    if (head < heads) keep(buffer);
  }
  await_copies();
  __syncthreads();
  const i64 out_row = tiles[5 * (i64)blockIdx.x];
  const float factor[2] = {(float)scale, (float)scale}, one[2] = {1, 1};
  bool kept[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = mine + g + 8 * half;
    // No query attends to padding.
    kept[half] = row < count && (!valid || valid[out_row + row]);
  }
  T* rows = dqkv + (out_row + mine) * sd;
  give_rows<D>(rows + (heads + kv) * dim, sd, count - mine, (int)dim, dk[0], factor, kept, own_keys);
  give_rows<D>(rows + (heads + kv_heads + kv) * dim, sd, count - mine, (int)dim, dv[0], one, kept, own_values);
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
