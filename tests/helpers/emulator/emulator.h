// Runs a kernel on the host: every thread is a fiber (fibers.h), and blocks run one after another
// or in turns.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "fibers.h"
#undef __device__
#undef __global__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#undef __grid_constant__
#define __device__
#define __global__ inline
#define __host__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __builtin_assume(x) ((void)0)

namespace emulator {
// Gathers the values of the lanes in `mask`; read(lane) gives them.
template <typename T, typename Use>
auto collective(unsigned mask, const T& value, Use use) {
  static_assert(sizeof(T) <= 64);
  int me = state.current, warp = me / 32, lane = me % 32;
  auto& slot = state.warps[warp].slots[mask];
  auto mine = ++slot.count[lane];
  memcpy(slot.value[mine % 2][lane], &value, sizeof(T));
  const auto all_came = [&] {
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1 && warp * 32 + l < state.threads && slot.count[l] < mine) return false;
    return true;
  };
  wait_until(all_came, __FILE__, __LINE__);
  return use([&](int l) {
    T v;
    memcpy(&v, slot.value[mine % 2][l], sizeof(T));
    return v;
  });
}
// Ends a fiber.
inline void leave() {
  fiber().is_done = true;
  const int next = next_thread();
  if (next < 0) {
    bool is_done = true;
    for (int t = 0; t < state.threads; ++t)
      if (!state.fibers[t].is_done) is_done = false, state.current = t;
    if (is_done ? other_blocks.empty() : stuck_in_a_row++ >= other_blocks.size()) {
      if (!is_done) fail_stuck();
      setcontext(&main_context);
    }
    if (is_done) stuck_in_a_row = 0;
    setcontext(next_block(!is_done));
  }
  stuck_in_a_row = 0;
  state.current = next;
  setcontext(&state.fibers[next].context);
}
inline void entry() {
  state.body(state.data);
  leave();
}
inline char* low_memory(size_t size) {
  return (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT,
                     -1, 0);
}
constexpr int kMostSideBySide = 16;
// Makes a block the current one, with the memory of number `place`.
inline void begin_block(int place, Dim block, Dim grid, int threads, void (*body)(void*),
                        void* data) {
  // At a multiple of 256 KB, within which operands of wgmma have their addresses
  static char* memory =
      (char*)((size_t)low_memory((kMostSideBySide + 1) << 18) + 0x3ffff & ~size_t(0x3ffff));
  static char* of_place[kMostSideBySide];
  char* smem = memory + (size_t(place) << 18);
  if (!of_place[place]) of_place[place] = (char*)malloc(size_t(1024) * (1 << 18));
  char* stacks = of_place[place];
  memset(smem, 0xff, 1 << 18);
  state.threads = threads;
  state.block = block;
  state.grid = grid;
  state.smem = smem;
  state.body = body;
  state.data = data;
  state.fibers.assign(threads, Fiber());
  state.warps.assign((threads + 31) / 32, Warp());
  state.copies.clear();
  for (int t = 0; t < threads; ++t) {
    ucontext_t& context = state.fibers[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + size_t(t) * (1 << 18);
    context.uc_stack.ss_size = 1 << 18;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  state.current = 0;
}
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  kernel(*reinterpret_cast<std::remove_const_t<A>*>(parameters[I])...);
}
// The blocks of a cluster run twice, one after another: the first time up to where they wait for
// what others write to their shared memory, the second time with that.
struct Cluster {
  struct Write {
    size_t offset;
    std::vector<char> bytes;
  };
  unsigned size = 1;
  bool is_first = false;
  std::vector<Write> writes[16];
};
inline Cluster cluster;
inline void cluster_arrive() {}
inline void cluster_wait() { sync_threads(); }
inline void cluster_sync() {
  sync_threads();
  if (cluster.is_first) leave();
  if (state.current == 0)
    for (const auto& write : cluster.writes[state.block.x % cluster.size])
      memcpy(state.smem + write.offset, write.bytes.data(), write.bytes.size());
  sync_threads();
}
template <typename T>
void put(int block, const T* here, T value) {
  const char* bytes = (const char*)&value;
  if (cluster.is_first)
    cluster.writes[block].push_back(
        {size_t((const char*)here - state.smem), {bytes, bytes + sizeof(T)}});
}
// Whether blocks go on in turns, whenever one counts something in global memory: else one after
// another, unless one waits for others.
inline bool side_by_side;
// Returns what went wrong; null if nothing did.
template <typename... A>
const char* launch(void (*kernel)(A...), unsigned gx, unsigned gy, int threads, void** parameters,
                   unsigned cluster_size, int slow_begin, int slow_end, bool in_turns) {
  struct Data {
    void (*kernel)(A...);
    void** p;
  } data{kernel, parameters};
  auto begin = [&](int place, unsigned x, unsigned y) {
    begin_block(
        place, {x, y, 0}, {gx, gy, 1}, threads,
        [](void* d) {
          auto* of = (Data*)d;
          call(of->kernel, of->p, std::index_sequence_for<A...>());
        },
        &data);
    state.slow_begin = slow_begin, state.slow_end = slow_end;
    state.switches = 0;
  };
  auto run = [] { swapcontext(&main_context, &state.fibers[0].context); };
  cluster.size = cluster_size;
  state.error[0] = 0;
  other_blocks.clear();
  stuck_in_a_row = 0;
  side_by_side = in_turns && cluster_size == 1 && gx * gy <= kMostSideBySide;
  if (side_by_side) {
    for (int place = gx * gy; place-- > 0;) {
      begin(place, place % gx, place / gx);
      if (place) other_blocks.push_front(std::move(state)), state = State();
    }
    run();
    return state.error[0] ? state.error : nullptr;
  }
  for (unsigned y = 0; y < gy; ++y)
    for (unsigned first = 0; first < gx; first += cluster_size)
      for (int turn = cluster_size > 1 ? 0 : 1; turn < 2; ++turn) {
        cluster.is_first = turn == 0;
        if (cluster.is_first)
          for (auto& writes : cluster.writes) writes.clear();
        for (unsigned x = first; x < first + cluster_size && !state.error[0]; ++x) {
          begin(0, x, y);
          run();
        }
      }
  return state.error[0] ? state.error : nullptr;
}
// A half product of tensor cores, and matrices that lanes load together
template <typename E>
float number(unsigned word, int i) {
  unsigned short h = word >> 16 * i;
  E e;
  memcpy(&e, &h, 2);
  return float(e);
}
template <typename E>
void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct In {
    unsigned a[4], b[2];
  } in = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  int lane = state.current % 32;
  collective(~0u, in, [&](auto read) {
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + (i / 2) * 8, col = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        In of_a = read(row % 8 * 4 + k % 8 / 2), of_b = read(col * 4 + k % 8 / 2);
        sum += number<E>(of_a.a[row / 8 + k / 8 * 2], k % 2) * number<E>(of_b.b[k / 8], k % 2);
      }
      d[i] += sum;
    }
    return 0;
  });
}
inline void ldmatrix(unsigned (&m)[4], unsigned address, bool trans) {
  int lane = state.current % 32;
  collective(~0u, address, [&](auto read) {
    for (int i = 0; i < 4; ++i) {
      unsigned short pair[2];
      for (int j = 0; j < 2; ++j) {
        int row = lane / 4, col = lane % 4 * 2 + j;
        if (trans) std::swap(row, col);
        memcpy(&pair[j], (char*)(uintptr_t)read(i * 8 + row) + 2 * col, 2);
      }
      m[i] = pair[0] | unsigned(pair[1]) << 16;
    }
    return 0;
  });
}
inline void ldmatrix_x4(unsigned (&m)[4], unsigned address) { ldmatrix(m, address, false); }
inline void ldmatrix_x4_trans(unsigned (&m)[4], unsigned address) { ldmatrix(m, address, true); }
template <typename E>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, E) {
  mma<E>(d, a, b0, b1);
}
template <typename E>
void mma_m16n8k16_zero(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, E) {
  d[0] = d[1] = d[2] = d[3] = 0;
  mma<E>(d, a, b0, b1);
}
}  // namespace emulator

#define threadIdx emulator::thread_index()
#define blockIdx emulator::state.block
#define gridDim emulator::state.grid
#define blockDim (emulator::Dim{unsigned(emulator::state.threads), 1, 1})
#define __syncthreads emulator::sync_threads
inline bool __syncthreads_or(bool v) {
  static bool votes[1024];
  votes[emulator::state.current] = v;
  emulator::sync_threads();
  bool any = false;
  for (int t = 0; t < emulator::state.threads; ++t)
    any |= votes[t] && !emulator::state.fibers[t].is_done;
  emulator::sync_threads();
  return any;
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::collective(mask, 0, [](auto) { return 0; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int d) {
  return emulator::collective(mask, v, [&](auto r) { return r(emulator::state.current % 32 ^ d); });
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int l) {
  return emulator::collective(mask, v, [&](auto r) { return r(l); });
}
inline unsigned __ballot_sync(unsigned mask, bool v) {
  return emulator::collective(mask, v, [&](auto r) {
    unsigned b = 0;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1 && r(l)) b |= 1u << l;
    return b;
  });
}
inline bool __any_sync(unsigned mask, bool v) { return __ballot_sync(mask, v); }
inline float __expf(float x) { return std::exp(x); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline double __longlong_as_double(long long u) {
  double x;
  memcpy(&x, &u, 8);
  return x;
}
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
inline void* __cvta_shared_to_generic(size_t p) { return (void*)p; }
inline bool __isGlobal(const void*) { return true; }
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 2147483648.0f ? 2147483647 : x <= -2147483648.0f ? -2147483648 : (int)rint(x);
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline unsigned atomicMax(unsigned* p, unsigned other) {
  return std::exchange(*p, std::max(*p, other));
}
inline unsigned atomicAdd(unsigned* p, unsigned more) {
  if (emulator::side_by_side) emulator::yield_to_blocks();
  return std::exchange(*p, *p + more);
}

#include "hopper.h"
