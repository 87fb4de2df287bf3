// Barriers in shared memory, and boxes that TMA loads.
#pragma once

namespace emulator {
// `tensor_map` of tests/helpers/emulated.py packs what a map says.
struct alignas(64) TensorMap {
  const char* array;
  unsigned long long strides[4];  // bytes, of all axes but the innermost
  unsigned dims[5];
  unsigned short box[5];
  unsigned char steps[5], swizzle;
  char padding[128 - 8 - 32 - 20 - 10 - 6];
};
// A phase is complete when all threads have arrived, and all bytes have come that they expect.
// Whoever arrives lets others go on: what it does afterwards may come late.
struct Barrier {
  unsigned short threads, missing;
  int bytes : 31;
  unsigned phase : 1;

  void init(unsigned single, unsigned warps = 0) {
    threads = missing = single + warps;
    bytes = phase = 0;
  }
  void arrive(unsigned count = 1) {
    if (count > missing) fail("more threads arrive at a barrier than it waits for");
    missing -= count;
    complete(0);
    yield();
  }
  void arrive_as_warp() {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      arrive();
    else
      yield();
  }
  void arrive_and_expect(unsigned more) {
    bytes += more;
    arrive();
  }
  void complete(unsigned come) {
    bytes -= come;
    if (missing > 0 || bytes != 0) return;
    missing = threads;
    ++phase;
  }
  void wait(unsigned parity, const char* file = __builtin_FILE(),
            int line = __builtin_LINE()) const {
    wait_until([&] { return phase != parity; }, file, line);
  }
};
static_assert(sizeof(Barrier) == 8);
inline void fence_barrier_init() {}
inline void fence_shared() {}
inline void prefetch_map(const TensorMap&) {}

struct Box {
  unsigned target;
  TensorMap map;
  Barrier* full;
  int bytes, first[5];
};
inline void copy(const Box& box) {
  const TensorMap& map = box.map;
  const int* c = box.first;
  const int line = 2 * map.box[0], mask = map.swizzle / 16 - 1;
  int x[5];
  unsigned offset = 0;
  for (x[4] = 0; x[4] < map.box[4]; x[4] += map.steps[4])
    for (x[3] = 0; x[3] < map.box[3]; x[3] += map.steps[3])
      for (x[2] = 0; x[2] < map.box[2]; x[2] += map.steps[2])
        for (x[1] = 0; x[1] < map.box[1]; x[1] += map.steps[1])
          for (x[0] = 0; x[0] < line / 2; x[0] += 8, offset += 16) {
            bool inside = true;
            const char* source = map.array + 2 * (c[0] + x[0]);
            for (int i = 0; i < 5; ++i) {
              inside &= c[i] + x[i] >= 0 && c[i] + x[i] < int(map.dims[i]);
              if (i > 0) source += (c[i] + x[i]) * (long long)map.strides[i - 1];
            }
            unsigned address = box.target + offset;
            address ^= (address >> 7 & mask) << 4;
            if (inside)
              memcpy((void*)(size_t)address, source, 16);
            else
              memset((void*)(size_t)address, 0, 16);
          }
  box.full->complete(box.bytes);
}
// TMA is done with it when others have gone on, or late.
inline void load_box(unsigned target, const TensorMap& map, Barrier& full, const int (&c)[5]) {
  int bytes = 2;
  for (int i = 0; i < 5; ++i) bytes *= (map.box[i] + map.steps[i] - 1) / map.steps[i];
  Box box = {target, map, &full, bytes};
  memcpy(box.first, c, sizeof(c));
  state.copies.push_back([box] { copy(box); });
}
}  // namespace emulator
