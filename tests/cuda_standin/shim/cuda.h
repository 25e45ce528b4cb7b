// CUDA kernels as C++ for the host: a block runs on one host thread, and each of its threads is a
// fiber.
//
// A fiber runs until it reaches a barrier or a shuffle; the last fiber to arrive releases the
// others. So a missing barrier is visible: other threads have not written yet, and unwritten shared
// memory is NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <mutex>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#include <vector>

// The ranges that a kernel reads and writes in the allocations of its pointers: see kernel.rs.
namespace standin {

struct Span {
  uintptr_t begin, end;  // of the allocation, with the space around it
  struct { uintptr_t from, to; } seen[2];  // read, and written
};
struct Spans {
  Span* first;
  size_t count;
};
static thread_local Spans spans = {};

// The range of all device memory: see memory.rs.
constexpr uintptr_t DEVICE = (uintptr_t)32 << 40, DEVICE_SIZE = (uintptr_t)48 << 40;

__attribute__((no_sanitize("thread"))) static inline void note(const void* at, size_t size, bool write) {
  const uintptr_t from = (uintptr_t)at;
  if (from - DEVICE >= DEVICE_SIZE) return;
  for (Span *span = spans.first, *end = span + spans.count; span != end; span++) {
    if (from < span->begin || from >= span->end) continue;
    auto& seen = span->seen[write];
    if (from < seen.from) seen.from = from;
    if (from + size > seen.to) seen.to = from + size;
    return;
  }
}

}  // namespace standin

// The compiler calls these before reads and writes of memory that other threads may access.
#define NOTED __attribute__((no_sanitize("thread"), visibility("hidden"))) void
#define NOTE(size) \
  NOTED __tsan_read##size(void* at) { standin::note(at, size, false); } \
  NOTED __tsan_write##size(void* at) { standin::note(at, size, true); } \
  NOTED __tsan_unaligned_read##size(void* at) { standin::note(at, size, false); } \
  NOTED __tsan_unaligned_write##size(void* at) { standin::note(at, size, true); }
extern "C" {
NOTE(1) NOTE(2) NOTE(4) NOTE(8) NOTE(16)
NOTED __tsan_read_range(void* at, unsigned long size) { standin::note(at, size, false); }
NOTED __tsan_write_range(void* at, unsigned long size) { standin::note(at, size, true); }
NOTED __tsan_vptr_update(void**, void*) {}
NOTED __tsan_init() {}
}

#define SHARDWISE_STANDIN
#define __global__ STANDIN_KERNEL
#define __device__
#define __host__
#define __forceinline__ inline
// NVRTC's stand-in parses and removes them.
#define __launch_bounds__(...) STANDIN_BOUNDS(__VA_ARGS__)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __constant__ static const
// One copy per host thread; all of a module's are filled with NaN before a block begins.
#define __shared__ static thread_local

struct uint3 { unsigned x, y, z; };

namespace standin {

enum State : unsigned char { READY, AT_BARRIER, AT_WARP, DONE };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  void* stack;  // where it resumes
  State state;
  unsigned lane, warp;
  uint3 place;
  std::vector<Copy> copies;  // not awaited yet
};

struct Warp {
  unsigned wanted, arrived, live;
  unsigned turn[32];
  alignas(8) unsigned char slot[2][32][24];
};

struct Block {
  void* host;  // where the host thread resumes
  Fiber* current;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* dynamic;
  uint3 place, size, grid;
  unsigned live, arrived;
  bool vote;
  void (*body)(void**);
  void** arguments;
};

inline Block*& own() {
  static thread_local Block* block = nullptr;
  return block;
}

// Saves the callee-saved registers and continues on another stack.
extern "C" void standin_switch(void** from, void* to);
asm(R"(
.text
.local standin_switch
.type standin_switch, @function
standin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// Releases the fibers of a barrier or a warp at which all have arrived.
inline void release(Block& block, Warp& warp, unsigned number) {
  if (block.arrived && block.arrived == block.live) {
    for (Fiber& fiber : block.fibers)
      if (fiber.state == AT_BARRIER) fiber.state = READY;
    block.arrived = 0;
  }
  if (warp.arrived && warp.arrived == (warp.wanted & warp.live)) {
    for (unsigned left = warp.arrived; left; left &= left - 1) block.fibers[number * 32 + __builtin_ctz(left)].state = READY;
    warp.arrived = 0;
  }
}

// Switches to the next fiber that can run; returns when it is this one's turn again.
inline void next() {
  Block& block = *own();
  Fiber *me = block.current, *begin = block.fibers.data(), *end = begin + block.fibers.size(), *other = me;
  do {
    if (++other == end) other = begin;
    if (other->state == READY) {
      if (other == me) return;
      block.current = other;
      standin_switch(&me->stack, other->stack);
      return;
    }
  } while (other != me);
  if (block.live == 0) {
    standin_switch(&me->stack, block.host);
    return;
  }
  fprintf(stderr, "cuda stand-in: threads of block %u, %u wait for each other: a barrier or shuffle that not all reach\n",
          block.place.x, block.place.y);
  abort();
}

inline void barrier() {
  Block& block = *own();
  Fiber& me = *block.current;
  me.state = AT_BARRIER;
  block.arrived++;
  release(block, block.warps[me.warp], me.warp);
  if (me.state != READY) next();
}

inline void meet(unsigned mask) {
  Block& block = *own();
  Fiber& me = *block.current;
  Warp& warp = block.warps[me.warp];
  warp.wanted = mask;
  warp.arrived |= 1u << me.lane;
  me.state = AT_WARP;
  release(block, warp, me.warp);
  if (me.state != READY) next();
}

// The values that the lanes of a warp exchange.
template <class T> struct Shown {
  Warp& warp;
  unsigned turn;
  T of(unsigned lane) const {
    T value;
    memcpy(&value, warp.slot[turn][lane & 31], sizeof(T));
    return value;
  }
};

// Two alternating sets of slots, so that one synchronization is enough.
template <class T> inline Shown<T> show(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= sizeof(Warp::slot[0][0]) && std::is_trivially_copyable_v<T>, "");
  Block& block = *own();
  Warp& warp = block.warps[block.current->warp];
  const unsigned lane = block.current->lane, turn = warp.turn[lane]++ & 1;
  memcpy(warp.slot[turn][lane], &value, sizeof(T));
  meet(mask);
  return {warp, turn};
}

inline unsigned ballot(unsigned mask, bool vote) {
  const auto shown = show(mask, vote);
  unsigned votes = 0;
  for (unsigned other = 0; other < 32; other++)
    if (mask >> other & 1 && shown.warp.live >> other & 1 && shown.of(other)) votes |= 1u << other;
  return votes;
}

// Whether `vote` is true on any thread of the block.
inline bool barrier_or(bool vote) {
  Block& block = *own();
  block.vote = block.vote || vote;
  barrier();
  const bool any = block.vote;
  barrier();
  block.vote = false;
  return any;
}

inline void aligned(const void* at, const char* what) {
  if ((uintptr_t)at % 16 == 0) return;
  fprintf(stderr, "cuda stand-in: %s at %p, which is no multiple of 16\n", what, at);
  abort();
}

// Performs the copies as late as allowed: when they are awaited.
inline void await_copies() {
  for (const Copy& copy : own()->current->copies) memcpy(copy.to, copy.from, 16);
  own()->current->copies.clear();
}

inline void begin() {
  Block& block = *own();
  block.body(block.arguments);
  Fiber& me = *block.current;
  Warp& warp = block.warps[me.warp];
  me.state = DONE;
  block.live--;
  warp.live &= ~(1u << me.lane);
  release(block, warp, me.warp);
  next();
  abort();
}

// This module's thread-local memory, which is its shared memory and `own`.
struct Local {
  unsigned char* start;
  size_t size;
};
inline int find_local(dl_phdr_info* info, size_t, void* result) {
  const uintptr_t here = (uintptr_t)&find_local;
  bool mine = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz) mine = true;
    if (part.p_type == PT_TLS) size = part.p_memsz;
  }
  if (!mine) return 0;
  *(Local*)result = {(unsigned char*)info->dlpi_tls_data, info->dlpi_tls_data ? size : 0};
  return 1;
}

constexpr size_t STACK = 64 << 10;

// Stacks for the threads of a block. A launch borrows some, as host threads start and end often.
struct Stacks {
  char* start = nullptr;
  size_t count = 0;
  char* get(size_t wanted) {
    if (wanted > count) {
      if (start) munmap(start, STACK * count);
      start = (char*)mmap(nullptr, STACK * wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      count = wanted;
    }
    return start;
  }
  static std::mutex lock;
  static std::vector<Stacks*> unused;
  static Stacks* take() {
    std::lock_guard<std::mutex> guard(lock);
    if (unused.empty()) return new Stacks;
    Stacks* stacks = unused.back();
    unused.pop_back();
    return stacks;
  }
  static void give(Stacks* stacks) {
    std::lock_guard<std::mutex> guard(lock);
    unused.push_back(stacks);
  }
};
inline std::mutex Stacks::lock;
inline std::vector<Stacks*> Stacks::unused;

inline void launch(void (*body)(void**), void** arguments, const unsigned* grid, const unsigned* size, unsigned shared, Spans touched) {
  Stacks* kept = Stacks::take();
  const unsigned threads = size[0] * size[1] * size[2];
  char* stacks = kept->get(threads);
  Block block{};
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.size = {size[0], size[1], size[2]};
  block.grid = {grid[0], grid[1], grid[2]};
  block.body = body;
  block.arguments = arguments;
  std::vector<unsigned long long> dynamic(shared / 8 + 32);
  block.dynamic = (unsigned char*)(((uintptr_t)dynamic.data() + 255) & ~(uintptr_t)255);
  own() = &block;
  Local local{};
  dl_iterate_phdr(find_local, &local);
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        block.place = {x, y, z};
        memset(block.dynamic, 0xff, shared);
        if (local.start) memset(local.start, 0xff, local.size);
        own() = &block;
        spans = touched;
        for (unsigned i = 0; i < threads; i++) {
          Fiber& fiber = block.fibers[i];
          fiber.state = READY;
          fiber.lane = i & 31;
          fiber.warp = i >> 5;
          fiber.place = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
          fiber.copies.clear();
          void** top = (void**)(stacks + STACK * (i + 1));
          *--top = nullptr;
          *--top = (void*)begin;
          fiber.stack = top - 6;
        }
        for (size_t w = 0; w < block.warps.size(); w++) {
          Warp& warp = block.warps[w];
          warp = Warp{};
          const unsigned left = threads - w * 32;
          warp.live = left >= 32 ? ~0u : (1u << left) - 1;
        }
        block.live = threads;
        block.arrived = 0;
        block.current = block.fibers.data();
        standin_switch(&block.host, block.current->stack);
      }
  own() = nullptr;
  spans = {};
  Stacks::give(kept);
}

constexpr unsigned first(unsigned threads, ...) { return threads; }

template <auto Kernel> struct Thunk;
template <class... A, void (*Kernel)(A...)> struct Thunk<Kernel> {
  template <size_t... I> static void call(void** p, std::index_sequence<I...>) { Kernel(*(std::remove_cv_t<A>*)p[I]...); }
  static void body(void** p) { call(p, std::index_sequence_for<A...>{}); }
  static constexpr unsigned kind(bool pointer, bool constant) { return pointer ? (constant ? 1u : 2u) << 16 : 0; }
  static constexpr unsigned signature[] = {
      sizeof...(A),
      (unsigned)sizeof(A) | kind(std::is_pointer_v<A>, std::is_const_v<std::remove_pointer_t<A>>)...};
};

}  // namespace standin

#define threadIdx (standin::own()->current->place)
#define blockIdx (standin::own()->place)
#define blockDim (standin::own()->size)
#define gridDim (standin::own()->grid)

static inline unsigned char* __standin_dynamic_shared() { return standin::own()->dynamic; }
static inline void __syncthreads() { standin::barrier(); }
static inline void __syncwarp(unsigned mask = ~0u) { standin::meet(mask); }
template <class T> static inline T __shfl_sync(unsigned mask, T value, int from) { return standin::show(mask, value).of(from); }
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int by) {
  return standin::show(mask, value).of(standin::own()->current->lane ^ by);
}
static inline unsigned __ballot_sync(unsigned mask, int vote) { return standin::ballot(mask, vote); }
static inline int __syncthreads_or(int vote) { return standin::barrier_or(vote); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
// The sum of c and the products of four bytes each, which wraps.
static inline int __dp4a(int a, int b, int c) {
  unsigned sum = c;
  for (int i = 0; i < 32; i += 8) sum += (signed char)(a >> i) * (signed char)(b >> i);
  return sum;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
static inline double sinpi(double x) { return sin(M_PI * x); }
static inline double cospi(double x) { return cos(M_PI * x); }

// f16 by integer arithmetic: exact, to nearest, ties to even.
static inline float __float_from_half_bits(unsigned short half) {
  const unsigned sign = (unsigned)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float size = ldexpf((float)fraction, -24);
  return sign ? -size : size;
}
static inline unsigned short __half_bits_from_float(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x47800000) return sign | 0x7c00;
  if (size < 0x38800000) return sign | (unsigned short)rintf(ldexpf(__uint_as_float(size), 24));
  const unsigned rounded = size + 0xfff + (size >> 13 & 1) - 0x38000000;
  return sign | (unsigned short)(rounded >> 13);
}

// ---- tensor cores and their loads, as cuda/mma.cuh describes them ----

// mma.m16n8k16: a lane provides its fragment of a and b, and computes its fragment of d in f32.
template <class Widen>
static inline void __standin_mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Widen widen) {
  struct Parts { unsigned a[4], b[2]; };
  const auto shown = standin::show(~0u, Parts{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = standin::own()->current->lane / 4, t = standin::own()->current->lane % 4;
  const auto dot = [&](unsigned x, unsigned y) { return widen(x & 0xffff) * widen(y & 0xffff) + widen(x >> 16) * widen(y >> 16); };
  for (unsigned quarter = 0; quarter < 4; quarter++) {
    const Parts rows = shown.of(4 * g + quarter);
    for (unsigned col = 0; col < 2; col++) {
      const Parts cols = shown.of(4 * (2 * t + col) + quarter);
      for (unsigned half = 0; half < 2; half++)
        d[2 * half + col] += dot(rows.a[half], cols.b[0]) + dot(rows.a[half + 2], cols.b[1]);
    }
  }
}

// ldmatrix.x4.
static inline void __standin_load_matrices(unsigned (&r)[4], const void* row, bool transposed) {
  standin::aligned(row, "ldmatrix");
  const auto shown = standin::show(~0u, (const unsigned short*)row);
  const unsigned g = standin::own()->current->lane / 4, t = standin::own()->current->lane % 4;
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    const auto at = [&](unsigned row, unsigned col) -> unsigned { return shown.of(8 * matrix + row)[col]; };
    r[matrix] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
  // No lane writes before all have read.
  standin::meet(~0u);
}

// cp.async.
static inline void __standin_copy_async(void* to, const void* from) {
  standin::aligned(to, "cp.async");
  standin::aligned(from, "cp.async");
  standin::own()->current->copies.push_back({to, from});
}
static inline void __standin_await_copies() { standin::await_copies(); }
