// Products with quantized weights, with the bits of the CPU's kernels (src/kernels/quantized).
//
// Weights are in panels of 16 rows, as panel.rs describes them. Integer sums are exact, and each
// operation on floats rounds once: this file is compiled without contraction, and calls fmaf where
// the CPU does.
#include "element.cuh"

#define NO_ROW 0xffffffffu

constexpr int ROWS = 16, CHUNK = 32, QUADS = CHUNK / 4;

// ---- weights ----

// A matrix on the device. Chunks and columns count from the first of the first block that a row
// has, so that their numbers have 32 bits.
struct Weights {
  // The numbers of `Layout`.
  int bits, offset, minimum, factors, span, wide, zeros, is_float;
  // The first chunk that a row has, and how many chunks and blocks it has.
  int first_chunk;
  i64 chunks, blocks;
  const u32* codes;
  const u8* scales;
  // The groups of the columns from `ordered` on, if they are not consecutive columns, or null.
  const u32* order;
  i64 ordered;

  __device__ __forceinline__ int lines() const { return bits == 8 ? 8 : bits; }
  __device__ __forceinline__ int d_bytes() const { return wide ? 4 * ROWS : 2 * ROWS; }
  __device__ __forceinline__ int numbers() const { return d_bytes() + ROWS * (2 * minimum + zeros); }
  __device__ __forceinline__ int chunk_factors() const { return factors == 0 ? 0 : ROWS * (factors + minimum); }
  __device__ __forceinline__ int block_bytes() const { return numbers() + span * chunk_factors(); }
};

#define WEIGHTS \
  i64 bits, i64 offset, i64 minimum, i64 factors, i64 span, i64 wide, i64 zeros, i64 is_float, i64 first_chunk, i64 chunks, \
      i64 blocks, const u32* codes, const u8* scales, const u32* order, i64 ordered
#define THE_WEIGHTS \
  Weights { (int)bits, (int)offset, (int)minimum, (int)factors, (int)span, (int)wide, (int)zeros, (int)is_float, (int)first_chunk, \
      chunks, blocks, codes, scales, order, ordered }

// The lines of codes of a chunk: 16 words each.
__device__ __forceinline__ const u32* lines_of(const Weights& w, i64 panel, u32 chunk) {
  return w.codes + (panel * w.chunks + chunk - w.first_chunk) * w.lines() * ROWS;
}

// The codes of columns 4 quad .. 4 quad + 4 of a row of a panel, the first of them in the low bits.
__device__ __forceinline__ u32 quad_of(const Weights& w, const u32* lines, int row, int quad) {
  if (w.bits == 8) return lines[quad * ROWS + row];
  u32 codes = lines[quad % 4 * ROWS + row] >> (quad / 4 * 4) & 0x0f0f0f0f;
  for (int bit = 4; bit < w.bits; bit++) {
    const u32 plane = lines[bit * ROWS + 2 * quad + row / 8] >> (4 * (row % 8)) & 15;
    // The factor moves bit i of the four bits to bit 8 i.
    codes |= (plane * 0x00204081 & 0x01010101) << bit;
  }
  return codes;
}

// The number of a code in e4m3: 4 bits of exponent with bias 7, and 3 bits of fraction. No code is
// NaN.
__device__ __forceinline__ float e4m3(u32 code) {
  const u32 size = code & 0x7f;
  // A subnormal code f is 2^-6 f / 8, and `normal` is 2^-7 (1 + f / 8).
  const float normal = float_of((size << 20) + (120u << 23));
  const float number = size < 8 ? 2.0f * normal - 0.015625f : normal;
  return float_of(bits_of(number) | (code & 0x80) << 24);
}

// The scales of a chunk of a row. Weight i is d · factor · (code - offset) + minimum, where factor
// is that of the half of the chunk.
struct Scales {
  float d, minimum;
  int factor[2], offset;
};

// `number` is that of the block, and `of_block` that of the chunk in the block.
__device__ __forceinline__ Scales scales_of(const Weights& w, i64 panel, u32 number, u32 of_block, int row) {
  const u8* block = w.scales + (panel * w.blocks + number) * w.block_bytes();
  const f16* halves = (const f16*)block;
  const u8* factors = block + w.numbers() + of_block * w.chunk_factors() + row;
  Scales scales = {w.wide ? ((const float*)block)[row] : widen(halves[row]), 0, {1, 1}, w.offset};
  if (w.zeros) scales.offset = block[w.d_bytes() + row];
  if (w.factors) {
    scales.factor[0] = (signed char)factors[0];
    scales.factor[1] = (signed char)factors[(w.factors - 1) * ROWS];
  }
  if (w.minimum) {
    scales.minimum = widen(halves[ROWS + row]);
    if (w.factors) scales.minimum = -(scales.minimum * (float)factors[w.factors * ROWS]);
  }
  return scales;
}

__device__ __forceinline__ Scales scales_of(const Weights& w, i64 panel, u32 chunk, int row) {
  const u32 number = chunk / (u32)w.span;
  return scales_of(w, panel, number, chunk - number * (u32)w.span, row);
}

// y[i] <- the columns first .. first + cols of row ids[i], or 0 where ids[i] is NO_ROW.
template <class T>
__device__ __forceinline__ void dequantize(const Weights& w, i64 rows, i64 cols, i64 first, const u32* ids, T* y, i64 sy) {
  each<1>(rows, cols, [&](i64 at, i64 col) {
    const u32 id = ids[at];
    float value = 0;
    if (id != NO_ROW) {
      const u32 panel = id / ROWS, chunk = (u32)((first + col) / CHUNK);
      const int row = id % ROWS, column = (first + col) % CHUNK;
      const Scales scales =
          w.order ? scales_of(w, panel, w.order[first + col - w.ordered], 0, row) : scales_of(w, panel, chunk, row);
      const u32 codes = quad_of(w, lines_of(w, panel, chunk), row, column / 4);
      const int code = codes >> (8 * (column % 4)) & 255;
      const float scale = scales.d * (float)(column < CHUNK / 2 ? scales.factor[0] : scales.factor[1]);
      value = scale * (w.is_float ? e4m3(code) : (float)(code - scales.offset));
      if (w.minimum) value += scales.minimum;
    }
    y[at * sy + col] = narrow<T>((Acc<T>)value);
  });
}

// ---- activations ----

// A chunk of a row of activations: number i is d · codes[i]. See rows.rs.
struct alignas(16) XChunk {
  u32 codes[QUADS];
  float d;
  // The sums of the codes of both halves.
  int sums[2];
  int unused;
};

// Quantizes rows of x whose first column is column `skipped` of the first chunk: a warp for each
// chunk, a thread for each column.
template <class T>
__device__ __forceinline__ void quantize_rows(i64 tokens, i64 chunks, i64 skipped, i64 cols, const T* x, i64 sx, XChunk* out) {
  const i64 at = own_row();
  if (at >= tokens * chunks) return;
  const i64 token = at / chunks, column = (at - token * chunks) * CHUNK + threadIdx.x - skipped;
  const float own = column >= 0 && column < cols ? widen(x[token * sx + column]) : 0.0f;
  // The bits of absolute values are ordered as the values are, and those of NaN are the largest.
  const u32 largest = row_reduce(bits_of(own) & 0x7fffffffu, [](u32 a, u32 b) { return a > b ? a : b; });
  const float d = float_of(largest) / 127.0f, inverse = 1.0f / d;
  const auto is_finite = [](float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; };
  // Numbers that are too small to be divided by count as 0.
  const bool known = is_finite(d) && is_finite(inverse);
  // Added to a number below 2^22, this rounds the number to an integer, which is then in the low
  // bits.
  const int code = known ? (signed char)bits_of(own * inverse + (float)(3 << 22)) : 0;
  int sum = code;
#pragma unroll
  for (int o = 8; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  XChunk* chunk = out + at;
  ((u8*)chunk->codes)[threadIdx.x] = (u8)code;
  if (threadIdx.x % 16 == 0) chunk->sums[threadIdx.x / 16] = sum;
  if (threadIdx.x == 0) chunk->d = known ? d : is_finite(d) ? 0.0f : float_of(0x7fc00000);
}

// Widens rows of x to chunks of 32 numbers, as quantize_rows.
template <class T>
__device__ __forceinline__ void widen_rows(i64 tokens, i64 chunks, i64 skipped, i64 cols, const T* x, i64 sx, float* out) {
  each<1>(tokens, chunks * CHUNK, [&](i64 token, i64 at) {
    const i64 column = at - skipped;
    out[token * chunks * CHUNK + at] = column >= 0 && column < cols ? widen(x[token * sx + column]) : 0.0f;
  });
}

// ---- products ----

// The chunks that a block multiplies at a time, and its tokens.
constexpr int LANES = 16, TOKENS = 16;

// y <- x w^T for a panel and up to 16 tokens. Each thread multiplies one row by one of 16 chunks,
// for all tokens, in integers. With FP8 weights, x has chunks of 32 floats, and the columns of a
// chunk are added in ascending order. Then each thread adds the terms of one row and one token in ascending
// order of the chunks, so that a sum does not depend on anything else.
template <class C>
__device__ __forceinline__ void quantized_product(const Weights& w, i64 tokens, i64 rows, i64 first, i64 count, const XChunk* x,
    C* y, i64 sy) {
  // Two sets in turn, so that one barrier is enough.
  __shared__ float dots[2][LANES][TOKENS][ROWS];
  __shared__ float scale[2][LANES][ROWS], minimum[2][LANES][ROWS];
  __shared__ float d[2][LANES][TOKENS], of_x[2][LANES][TOKENS];
  const int row = threadIdx.x, lane = threadIdx.y;
  const i64 tiles = (tokens + TOKENS - 1) / TOKENS, panel = blockIdx.x / tiles, token = (blockIdx.x - panel * tiles) * TOKENS;
  const int own_tokens = (int)(tokens - token < TOKENS ? tokens - token : TOKENS);
  float sum = 0;
  int set = 0;
  for (i64 start = 0; start < count; start += LANES, set ^= 1) {
    const i64 at = start + lane;
    if (at < count) {
      const u32 chunk = (u32)(first + at);
      const u32* lines = lines_of(w, panel, chunk);
      u32 codes[QUADS];
#pragma unroll
      for (int quad = 0; quad < QUADS; quad++) {
        codes[quad] = quad_of(w, lines, row, quad);
        // A signed byte: the code - 128.
        if (w.bits == 8 && !w.is_float) codes[quad] ^= 0x80808080u;
      }
      const Scales scales = scales_of(w, panel, chunk, row);
      const int left = scales.factor[0], right = scales.factor[1];
      const int offset = (w.bits == 8 ? 128 : 0) - scales.offset;
      scale[set][lane][row] = w.factors < 2 ? scales.d * (float)left : scales.d;
      minimum[set][lane][row] = scales.minimum;
      for (int t = 0; w.is_float && t < own_tokens; t++) {
        const float* own = (const float*)x + ((token + t) * count + at) * CHUNK;
        float dot = 0;
#pragma unroll
        for (int column = 0; column < CHUNK; column++) {
          dot = fmaf(e4m3(codes[column / 4] >> (8 * (column % 4)) & 255), own[column], dot);
        }
        dots[set][lane][t][row] = dot;
      }
      for (int t = 0; !w.is_float && t < own_tokens; t++) {
        const XChunk* own = x + (token + t) * count + at;
        const auto low = load<4>(own->codes), high = load<4>(own->codes + 4);
        int halves[2] = {offset * own->sums[0], offset * own->sums[1]};
#pragma unroll
        for (int quad = 0; quad < 4; quad++) {
          halves[0] = __dp4a((int)codes[quad], (int)low.at[quad], halves[0]);
          halves[1] = __dp4a((int)codes[quad + 4], (int)high.at[quad], halves[1]);
        }
        const int dot = w.factors < 2 ? halves[0] + halves[1] : halves[0] * left + halves[1] * right;
        dots[set][lane][t][row] = (float)dot;
      }
      if (w.is_float) {
        d[set][lane][row] = 1;
      } else if (row < own_tokens) {
        const XChunk* own = x + (token + row) * count + at;
        d[set][lane][row] = own->d;
        of_x[set][lane][row] = own->d * (float)(own->sums[0] + own->sums[1]);
      }
    }
    __syncthreads();
    if (lane < own_tokens) {
      const int end = (int)(count - start < LANES ? count - start : LANES);
      for (int k = 0; k < end; k++) {
        sum = fmaf(scale[set][k][row] * d[set][k][lane], dots[set][k][lane][row], sum);
        if (w.minimum) sum = fmaf(minimum[set][k][row], of_x[set][k][lane], sum);
      }
    }
  }
  const i64 column = panel * ROWS + row;
  if (lane < own_tokens && column < rows) y[(token + lane) * sy + column] = narrow<C>((Acc<C>)sum);
}

#define QUANTIZED(T, name) \
  extern "C" __global__ void dequantize_##name(WEIGHTS, i64 rows, i64 cols, i64 first, const u32* ids, T* y, i64 sy) { \
    dequantize(THE_WEIGHTS, rows, cols, first, ids, y, sy); \
  } \
  extern "C" __global__ void quantized_product_##name(WEIGHTS, i64 tokens, i64 rows, i64 first, i64 count, const XChunk* x, T* y, \
      i64 sy) { \
    quantized_product(THE_WEIGHTS, tokens, rows, first, count, x, y, sy); \
  }
EACH_ELEMENT(QUANTIZED)

// 8 bits, or f32, would lose the precision of f64.
#define QUANTIZE_ROWS(T, name) \
  extern "C" __global__ void widen_rows_##name(i64 tokens, i64 chunks, i64 skipped, i64 cols, const T* x, i64 sx, float* out) { \
    widen_rows(tokens, chunks, skipped, cols, x, sx, out); \
  } \
  extern "C" __global__ void quantize_rows_##name(i64 tokens, i64 chunks, i64 skipped, i64 cols, const T* x, i64 sx, XChunk* out) { \
    quantize_rows(tokens, chunks, skipped, cols, x, sx, out); \
  }
QUANTIZE_ROWS(float, f32)
QUANTIZE_ROWS(bf16, bf16)
QUANTIZE_ROWS(f16, f16)
