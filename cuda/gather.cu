// Gather of rows by index, and its transpose.
#include "element.cuh"

#define NO_ROW 0xffffffffu

#define GATHER(T, name) \
  extern "C" __global__ void gather_##name(i64 packed, i64 rows, i64 cols, const T* table, i64 st, const u32* ids, T* y, i64 sy) { \
    WITH_PACKS(packed, Width<T>::value, (each<N>(rows, cols, [&](i64 row, i64 col) { \
      const u32 id = ids[row]; \
      Pack<T, N> some; \
      for (int k = 0; k < N; k++) some.at[k] = narrow<T>((Acc<T>)0); \
      if (id != NO_ROW) some = load<N>(table + (i64)id * st + col); \
      store(y + row * sy + col, some); \
    }))) \
  } \
  /* The rows that go to targets[t] are order[begins[t]] to order[begins[t + 1] - 1]: one thread adds them, in order. */ \
  extern "C" __global__ void scatter_add_##name(i64 packed, i64 targets, i64 cols, const u32* target, const u32* begins, const u32* order, \
      const T* dy, i64 sdy, Acc<T>* table, i64 st) { \
    WITH_PACKS(packed, (Width<T, Acc<T>>::value), (each<N>(targets, cols, [&](i64 at, i64 col) { \
      Acc<T>* to = table + (i64)target[at] * st + col; \
      auto sum = load<N>(to); \
      for (u32 row = begins[at]; row < begins[at + 1]; row++) { \
        const auto term = load<N>(dy + (i64)order[row] * sdy + col); \
        _Pragma("unroll") for (int k = 0; k < N; k++) sum.at[k] += widen(term.at[k]); \
      } \
      store(to, sum); \
    }))) \
  }
EACH_ELEMENT(GATHER)
