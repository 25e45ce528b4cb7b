// Decoding: appends the keys and values of new tokens to a KV cache, and computes attention of few
// queries per sequence to it.
//
// For each slot and key/value head the cache holds the vectors of `capacity` positions in
// consecutive rows.
#include "element.cuh"

// keys, values <- rows of k and v: one block per run of rows and key/value head.
//
// runs: 3 numbers per run: its first row, the number of rows, and the cache row of the first for
// the first key/value head. The rows of consecutive heads are `capacity` apart.
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

// ---- attention of few queries ----
//
// The time is that of reading the cache. So a block takes a span of the positions of one sequence
// and key/value head, and up to TOGETHER queries of that head: keys and values are read once for
// them. Each span gives its largest score and its sums of weights and of weighted values. A second
// kernel combines the spans in order (Flash-Decoding). Spans depend only on the sequence's length,
// so the bits of a sequence do not depend on the rest of the batch or on how heads are sharded.
//
// LANES lanes of a warp share a key, with PER packs of its features each. Several such groups of
// lanes in a warp process different keys, each with its own sums. Scores are exponents of 2.
//
// table: kv_heads + 1 numbers, where each key/value head's list of query heads begins; the lists; 8
// numbers per sequence: the row of its first query, the number of queries, the position of the
// first, the cache row of position 0 for the first key/value head, the first visible position, one
// past the last, the length of a span, and the number of the first partial result, or -1 if there
// is one span; then one number per span: SPANS * (the sequence's index among these) + (the span's
// index in the sequence).

constexpr u32 ALL = 0xffffffffu;
constexpr int WARPS = 8, SPANS = 64;

// Queries per block, for heads of at most D features.
template <class T, int D> constexpr int TOGETHER = (sizeof(T) == 8 ? 2 : 4) / (sizeof(T) > 2 && D > 128 ? 2 : 1);
// Keys that a lane loads at a time, with PER packs of each.
template <class T, int PER> constexpr int AHEAD = sizeof(T) < 8 && PER == 1 ? 2 : 1;

__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float exp2_of(float x) {
#ifdef SHARDWISE_STANDIN
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double fma_of(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float fma_of(float a, float b, float c) { return fmaf(a, b, c); }

// The score to subtract from others. 0 if all are -infinity so far, which gives weights of 0.
template <class A> __device__ __forceinline__ A base_of(A most) { return most == -infinity<A>() ? (A)0 : most; }

// 16 bytes of a row. 16-bit elements stay packed in pairs until they are used.
template <class T> struct Part {
  Pack<T, 16 / sizeof(T)> pack;
  __device__ __forceinline__ Acc<T> at(int n) const { return widen(pack.at[n]); }
  __device__ __forceinline__ void set(int n, T x) { pack.at[n] = x; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < (int)(16 / sizeof(T)); n++) pack.at[n] = 0;
  }
};
template <class T> struct PartOfHalves {
  Pack<u32, 4> pack;
  __device__ __forceinline__ T get(int n) const {
    T x;
    x.bits = (u16)(n % 2 ? pack.at[n / 2] >> 16 : pack.at[n / 2]);
    return x;
  }
  __device__ __forceinline__ void set(int n, T x) { pack.at[n / 2] |= (u32)x.bits << (n % 2 * 16); }
  __device__ __forceinline__ void clear() { pack.at[0] = pack.at[1] = pack.at[2] = pack.at[3] = 0; }
};
template <> struct Part<bf16> : PartOfHalves<bf16> {
  __device__ __forceinline__ float at(int n) const {
    return float_of(n % 2 ? pack.at[n / 2] & 0xffff0000u : pack.at[n / 2] << 16);
  }
};
template <> struct Part<f16> : PartOfHalves<f16> {
  __device__ __forceinline__ float at(int n) const { return widen(get(n)); }
};

// The elements of a row from column i on, 0 beyond its end.
template <bool PACKED, class T> __device__ __forceinline__ Part<T> part(const T* row, i64 i, i64 cols) {
  constexpr int N = 16 / sizeof(T);
  Part<T> some;
  some.clear();
  if (PACKED) {
    if (i < cols) some.pack = *reinterpret_cast<const decltype(some.pack)*>(row + i);
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) if (i + n < cols) some.set(n, row[i + n]);
  }
  return some;
}

// The state of a group of lanes for each query: the largest score, the sums of weights and of
// weighted values, and the query's position, relative to the begin of the span.
template <int R, int F, class A> struct Seen {
  A sum[R][F], most[R], total[R];
  int place[R];
};

// The scores of keys of which each lane of a group has loaded some features.
template <int LANES, int N, int U, int PER, int R, class T, class A>
__device__ __forceinline__ void scores(A (&score)[U][R], const Pack<A, 16 / sizeof(A)>* queries, const Part<T> (&keys)[U][PER]) {
  constexpr int W = 16 / sizeof(A);
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int r = 0; r < R; r++) score[u][r] = 0;
#pragma unroll
  for (int p = 0; p < PER; p++)
#pragma unroll
    for (int h = 0; h < N / W; h++) {
      Pack<A, W> query[R];
#pragma unroll
      for (int r = 0; r < R; r++) query[r] = queries[((r * PER + p) * (N / W) + h) * LANES];
#pragma unroll
      for (int u = 0; u < U; u++)
#pragma unroll
        for (int w = 0; w < W; w++) {
          const A key = keys[u][p].at(h * W + w);
#pragma unroll
          for (int r = 0; r < R; r++) score[u][r] = fma_of(query[r].at[w], key, score[u][r]);
        }
    }
#pragma unroll
  for (int o = LANES / 2; o; o >>= 1)
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int r = 0; r < R; r++) score[u][r] += __shfl_xor_sync(ALL, score[u][r], o);
}

// Adds the values of the keys first, first + step, ... of a group of lanes. A query attends to the
// keys in the window that ends at its position; with ALL_SEEN to every key. Data loaded for a key
// from `end` on belongs to no key.
template <bool ALL_SEEN, int N, int U, int PER, int R, class T, class A>
__device__ __forceinline__ void add(Seen<R, N * PER, A>& at, A (&score)[U][R], const Part<T> (&values)[U][PER], int first,
    int step, int end, int window) {
  // One bit per key and query.
  u32 hidden = 0;
  if (!ALL_SEEN) {
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int r = 0; r < R; r++) {
        const int key = first + u * step;
        if (key < end && key <= at.place[r] && key + window > at.place[r]) continue;
        hidden |= 1u << (u * R + r);
        score[u][r] = -infinity<A>();
      }
  }
  A largest[R];
  bool moved = false;
#pragma unroll
  for (int r = 0; r < R; r++) {
    largest[r] = at.most[r];
#pragma unroll
    for (int u = 0; u < U; u++) largest[r] = max_nan(largest[r], score[u][r]);
    moved = moved || !(largest[r] == at.most[r]);
  }
  if (__ballot_sync(ALL, moved)) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      const A shrink = largest[r] == at.most[r] ? (A)1 : exp2_of(at.most[r] - largest[r]);
      at.most[r] = largest[r];
      at.total[r] *= shrink;
#pragma unroll
      for (int f = 0; f < N * PER; f++) at.sum[r][f] *= shrink;
    }
  }
#pragma unroll
  for (int u = 0; u < U; u++) {
    A weight[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      weight[r] = exp2_of(score[u][r] - base_of(largest[r]));
      at.total[r] += weight[r];
    }
#pragma unroll
    for (int p = 0; p < PER; p++)
#pragma unroll
      for (int n = 0; n < N; n++) {
        const A value = values[u][p].at(n);
#pragma unroll
        for (int r = 0; r < R; r++) {
          const A more = fma_of(weight[r], value, at.sum[r][p * N + n]);
          // Masked values are not multiplied, so NaN and infinity there have no effect.
          at.sum[r][p * N + n] = hidden >> (u * R + r) & 1 ? at.sum[r][p * N + n] : more;
        }
      }
  }
}

template <int D, bool PACKED, class T>
__device__ void decode(i64 heads, i64 dim, i64 kv_heads, i64 sequences, i64 chunks, i64 capacity, i64 window, double scale,
    const i64* table, const T* q, i64 sq, const T* k, i64 sk, const T* v, i64 sv, T* out, i64 so, Acc<T>* sums, Acc<T>* stats) {
  typedef Acc<T> A;
  constexpr int W = 16 / sizeof(A), N = Width<T>::value, PACKS = D / N;
  constexpr int LANES = PACKS < 32 ? PACKS : 32, PER = PACKS / LANES, F = N * PER;
  constexpr int R = TOGETHER<T, D>, U = AHEAD<T, PER>, SIDE = 32 / LANES;
  const i64 kv = blockIdx.y;
  const int chunk = blockIdx.x % (u32)chunks;
  const i64 *list = table + kv_heads + 1, *all = list + heads, span = all[8 * sequences + blockIdx.x / (u32)chunks];
  const i64* sequence = all + 8 * (span / SPANS);
  const int sharing = (int)(table[kv + 1] - table[kv]), rows = (int)sequence[1], count = rows * sharing;
  const i64 first = sequence[0], place = sequence[2], key_row = sequence[3] + kv * capacity;
  const i64 begin = sequence[4] + span % SPANS * sequence[6];
  // Relative to the span. Positions in a span, and distances in a window that hides something, are
  // far below FAR.
  const int end = (int)(begin + sequence[6] < sequence[5] ? sequence[6] : sequence[5] - begin);
  const i64 partial = sequence[7] < 0 ? -1 : sequence[7] + span % SPANS * rows * heads;
  list += table[kv];
  if (chunk * R >= count) return;
  const int lane = threadIdx.x, warp = threadIdx.y, own = lane % LANES, side = lane / LANES;
  // The queries, by the features that each lane of a group takes, and the state of every warp.
  DYNAMIC_SHARED(A, shared);
  A *queries = shared, *all_sums = queries + R * D, *all_stats = all_sums + WARPS * R * D;
  Seen<R, F, A> at;
  // The range of positions that the queries attend to.
  constexpr int FAR = 1 << 30;
  const int near = (int)(window < FAR ? window : FAR);
  int from = 0, to = end;
#pragma unroll
  for (int r = 0; r < R; r++) {
    // Surplus queries repeat the last one.
    const i64 row = place - begin + (chunk * R + r < count ? chunk * R + r : count - 1) / sharing;
    at.place[r] = (int)(row < FAR - 1 ? row : FAR - 1);
    if (at.place[r] + 1 < to) to = at.place[r] + 1;
    if (at.place[r] + 1 - near > from) from = at.place[r] + 1 - near;
    at.most[r] = -infinity<A>();
    at.total[r] = 0;
#pragma unroll
    for (int f = 0; f < F; f++) at.sum[r][f] = 0;
  }
  for (int here = warp * 32 + lane; here < R * D; here += WARPS * 32) {
    const int r = here / D, d = here % D, p = d / (N * LANES), n = d % N;
    const int query = chunk * R + r < count ? chunk * R + r : count - 1, row = query / sharing;
    const T x = q[(first + row) * sq + list[query - row * sharing] * dim + (d < dim ? d : 0)];
    const int goes = (((r * PER + p) * (N / W) + n / W) * LANES + d / N % LANES) * W + n % W;
    queries[goes] = d < dim ? widen(x) * (A)(scale * 1.4426950408889634) : (A)0;
  }
  __syncthreads();
  constexpr int TILE = U * SIDE;
  const auto* own_queries = reinterpret_cast<const Pack<A, W>*>(queries) + own;
  k += (key_row + begin) * sk;
  v += (key_row + begin) * sv;
  const auto load = [&](Part<T> (&to)[U][PER], const T* from, i64 stride, int tile) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int key = tile + u * SIDE + side;
      const T* row = from + (key < end ? key : end - 1) * stride;
#pragma unroll
      for (int p = 0; p < PER; p++) to[u][p] = part<PACKED>(row, (p * LANES + own) * N, dim);
    }
  };
  // The next tile loads while this one is computed.
  Part<T> keys[U][PER], values[U][PER];
  load(keys, k, sk, warp * TILE);
  load(values, v, sv, warp * TILE);
  for (int tile = warp * TILE; tile < end; tile += WARPS * TILE) {
    // Reads the queries again for every tile: keeping all in registers would halve the number of
    // warps.
    __syncwarp();
    A score[U][R];
    scores<LANES, N>(score, own_queries, keys);
    load(keys, k, sk, tile + WARPS * TILE);
    const bool all = tile >= from && tile + TILE <= to;
    if (all) add<true, N>(at, score, values, tile + side, SIDE, end, near);
    else add<false, N>(at, score, values, tile + side, SIDE, end, near);
    load(values, v, sv, tile + WARPS * TILE);
  }
  // Combines the groups of a warp, then the warps.
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) {
      const A other = __shfl_xor_sync(ALL, at.most[r], o), most = max_nan(at.most[r], other), base = base_of(most);
      const A mine = exp2_of(at.most[r] - base), theirs = exp2_of(other - base);
      at.most[r] = most;
      at.total[r] = fma_of(at.total[r], mine, theirs * __shfl_xor_sync(ALL, at.total[r], o));
#pragma unroll
      for (int f = 0; f < F; f++) at.sum[r][f] = fma_of(at.sum[r][f], mine, theirs * __shfl_xor_sync(ALL, at.sum[r][f], o));
    }
    if (side == 0) {
#pragma unroll
      for (int f = 0; f < F; f++) all_sums[(warp * R + r) * D + (f / N * LANES + own) * N + f % N] = at.sum[r][f];
      if (own == 0) {
        all_stats[2 * (warp * R + r)] = at.most[r];
        all_stats[2 * (warp * R + r) + 1] = at.total[r];
      }
    }
  }
  __syncthreads();
  for (int place = warp * 32 + lane; place < R * D; place += WARPS * 32) {
    const int r = place / D, d = place % D;
    const int query = chunk * R + r;
    if (query >= count || d >= dim) continue;
    A most = -infinity<A>(), total = 0, sum = 0;
    for (int w = 0; w < WARPS; w++) most = max_nan(most, all_stats[2 * (w * R + r)]);
    for (int w = 0; w < WARPS; w++) {
      const A by = exp2_of(all_stats[2 * (w * R + r)] - base_of(most));
      total = fma_of(all_stats[2 * (w * R + r) + 1], by, total);
      sum = fma_of(all_sums[(w * R + r) * D + d], by, sum);
    }
    const int row = query / sharing;
    const i64 head = list[query - row * sharing];
    if (partial < 0) {
      // 0 / 0 if all scores are -infinity. A query attends to itself, so to one key at least.
      out[(first + row) * so + head * dim + d] = narrow<T>(sum * ((A)1 / total));
      continue;
    }
    const i64 number = partial + row * heads + head;
    sums[number * dim + d] = sum;
    if (d == 0) {
      stats[2 * number] = most;
      stats[2 * number + 1] = total;
    }
  }
}

// out <- the combined results of the spans: one block per row, at blockIdx.x, and head, at
// blockIdx.y.
//
// table: from index `at` on 4 numbers per row: the row, the number of its first partial result for
// the first head, the number of spans, at most SPANS, and the distance between the partial results
// of two spans.
constexpr int PARTS = 4;
template <class T>
__device__ void combine(i64 dim, i64 at, const i64* table, const Acc<T>* sums, const Acc<T>* stats, T* out, i64 so) {
  typedef Acc<T> A;
  constexpr int L = 8;
  __shared__ A weights[SPANS], parts[PARTS][32 * L];
  const i64 *row = table + at + 4 * (i64)blockIdx.x, head = blockIdx.y, first = row[1] + head, spans = row[2], step = row[3];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const auto most_of = [&](i64 span) { return span < spans ? stats[2 * (first + span * step)] : -infinity<A>(); };
  const A here[2] = {most_of(lane), most_of(lane + 32)};
  A most = max_nan(here[0], here[1]), total = 0;
#pragma unroll
  for (int o = 16; o; o >>= 1) most = max_nan(most, __shfl_xor_sync(ALL, most, o));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const i64 span = lane + 32 * i;
    if (span >= spans) continue;
    const A by = exp2_of(here[i] - base_of(most));
    total = fma_of(stats[2 * (first + span * step) + 1], by, total);
    if (warp == 0) weights[span] = by;
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(ALL, total, o);
  __syncthreads();
  A sum[L];
#pragma unroll
  for (int l = 0; l < L; l++) sum[l] = 0;
#pragma unroll 4
  for (i64 span = warp; span < spans; span += PARTS) {
    const A* from = sums + (first + span * step) * dim;
#pragma unroll
    for (int l = 0; l < L; l++)
      if (lane + 32 * l < dim) sum[l] = fma_of(from[lane + 32 * l], weights[span], sum[l]);
  }
#pragma unroll
  for (int l = 0; l < L; l++) parts[warp][lane + 32 * l] = sum[l];
  __syncthreads();
  const A by = (A)1 / total;
  for (i64 d = warp * 32 + lane; d < dim; d += PARTS * 32) {
    A all = parts[0][d];
    for (int part = 1; part < PARTS; part++) all += parts[part][d];
    out[row[0] * so + head * dim + d] = narrow<T>(all * by);
  }
}

#define DECODE_FOR(T, name, D) \
  extern "C" __global__ void __launch_bounds__(256, 2) decode_##D##_##name(i64 packed, i64 heads, i64 dim, i64 kv_heads, \
      i64 sequences, i64 chunks, i64 capacity, i64 window, double scale, const i64* table, const T* q, i64 sq, const T* k, \
      i64 sk, const T* v, i64 sv, T* out, i64 so, Acc<T>* sums, Acc<T>* stats) { \
    if (packed) \
      decode<D, true>(heads, dim, kv_heads, sequences, chunks, capacity, window, scale, table, q, sq, k, sk, v, sv, out, so, \
          sums, stats); \
    else \
      decode<D, false>(heads, dim, kv_heads, sequences, chunks, capacity, window, scale, table, q, sq, k, sk, v, sv, out, so, \
          sums, stats); \
  }
#define DECODE(T, name) \
  DECODE_FOR(T, name, 64) DECODE_FOR(T, name, 128) DECODE_FOR(T, name, 256) \
  extern "C" __global__ void combine_##name(i64 dim, i64 at, const i64* table, const Acc<T>* sums, const Acc<T>* stats, T* out, \
      i64 so) { \
    combine<T>(dim, at, table, sums, stats, out, so); \
  } \
  extern "C" __global__ void append_##name(i64 packed, i64 dim, i64 capacity, const i64* runs, const T* k, i64 sk, const T* v, \
      i64 sv, T* keys, i64 skeys, T* values, i64 svalues) { \
    WITH_PACKS(packed, Width<T>::value, (append<N>(dim, capacity, runs, k, sk, v, sv, keys, skeys, values, svalues))) \
  }
EACH_ELEMENT(DECODE)
