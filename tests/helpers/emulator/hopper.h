// What kernels of cuda/hopper have beside boxes: products of warpgroups, and bulk additions.
#pragma once
#include "tma.h"

namespace emulator {
// Counters by which blocks wait for each other. Whoever loads one again, as it was, waits for more.
inline unsigned load_acquire(const unsigned* counter, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
  auto& [last, value] = fiber().loaded;
  if (last == counter) wait_until([&] { return *counter != value; }, file, line);
  last = counter;
  return value = *counter;
}
inline void add_release(unsigned* counter, unsigned value) { *counter += value; }
inline void fence_global() {}

inline void add_bulk(int4* target, unsigned source, unsigned bytes) {
  begin([=] {
    for (unsigned i = 0; i < bytes / 4; ++i)
      ((unsigned*)target)[i] += ((const unsigned*)(size_t)source)[i];
  });
}
inline void commit_bulk() { commit_group(); }
template <int kPending>
void wait_until_read() {
  wait_for_groups(kPending);
}
inline void wait_until_written() { wait_for_groups(0); }

inline void fence_registers() {}
inline void commit_products() { commit_group(); }
template <int kPending>
void wait_for_products() {
  wait_for_groups(kPending);
}
template <int kCount>
void hold(float (&)[kCount][4]) {}
template <bool kMore, int kRegisters>
void set_registers() {}

template <typename E>
unsigned pack(float low, float high, E) {
  const E pair[2] = {E(low), E(high)};
  unsigned word;
  memcpy(&word, pair, 4);
  return word;
}
template <typename E>
float2 unpack(unsigned word, E) {
  return {number<E>(word, 0), number<E>(word, 1)};
}
template <typename E>
unsigned multiply_pairs(unsigned left, unsigned right, E) {
  const float2 a = unpack(left, E()), b = unpack(right, E());
  return pack(a.x * b.x, a.y * b.y, E());
}

// An operand in swizzled lines of 128 bytes, as its descriptor says.
template <typename E>
struct Lines {
  unsigned first, leading, stride;

  explicit Lines(unsigned long long descriptor)
      : first((unsigned)(size_t)state.smem + (descriptor & 0x3fff) * 16),
        leading((descriptor >> 16 & 0x3fff) * 16),
        stride((descriptor >> 32 & 0x3fff) * 16) {}
  static float at(unsigned address) {
    E element;
    memcpy(&element, (void*)(size_t)(address ^ (address >> 7 & 7) << 4), 2);
    return float(element);
  }
  // Of an operand whose lines lie along the summed dimension, and of one whose lines follow it
  float along(int line, int k) const {
    return at(first + line / 8 * stride + line % 8 * 128 + 2 * k);
  }
  float across(int k, int column) const {
    return at(first + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
};
// This thread's part of d = left right, or of d += it: left(row, k), of the warpgroup's 64 rows,
// and right(k, column).
template <typename Left, typename Right>
void multiply(float (*d)[4], int columns, bool add, Left left, Right right) {
  const int thread = state.current % 128, lane = thread % 32;
  float rows[2][16], column[16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) rows[half][k] = left(thread / 32 * 16 + lane / 4 + 8 * half, k);
  for (int i = 0; i < columns / 4; ++i) {
    for (int k = 0; k < 16; ++k) column[k] = right(k, i / 2 * 8 + lane % 4 * 2 + i % 2);
    for (int half = 0; half < 2; ++half) {
      float& sum = d[i / 2][2 * half + i % 2];
      if (!add) sum = 0;
      for (int k = 0; k < 16; ++k) sum += rows[half][k] * column[k];
    }
  }
}
template <int kColumns, typename E>
struct Wgmma {
  using Descriptor = unsigned long long;
  using Sums = float[kColumns / 8][4];

  template <bool kAdd>
  static void shared(Sums& d, Descriptor left, Descriptor right) {
    begin([&d, l = Lines<E>(left), r = Lines<E>(right)] {
      multiply(
          d, kColumns, kAdd, [=](int row, int k) { return l.along(row, k); },
          [=](int k, int column) { return r.along(column, k); });
    });
  }
  template <bool kAdd>
  static void shared_columns(Sums& d, Descriptor left, Descriptor right) {
    begin([&d, l = Lines<E>(left), r = Lines<E>(right)] {
      multiply(
          d, kColumns, kAdd, [=](int row, int k) { return l.along(row, k); },
          [=](int k, int column) { return r.across(k, column); });
    });
  }
  static void registers(Sums& d, const unsigned (&left)[4], Descriptor right) {
    struct Words {
      unsigned of[4];
    };
    struct Rows {
      float half[2][16];
    } rows;
    const int lane = threadIdx.x % 32;
    collective(~0u, Words{left[0], left[1], left[2], left[3]}, [&](auto read) {
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          rows.half[half][k] =
              number<E>(read(lane / 4 * 4 + k % 8 / 2).of[half + k / 8 * 2], k % 2);
      return 0;
    });
    begin([&d, rows, r = Lines<E>(right)] {
      multiply(
          d, kColumns, true, [&](int row, int k) { return rows.half[row / 8 % 2][k]; },
          [=](int k, int column) { return r.across(k, column); });
    });
  }
};
// Four 8x8 matrices, each of whose rows, or columns, goes where another lane says.
template <bool kTransposed>
void stmatrix_x4(unsigned address, const unsigned (&matrix)[4]) {
  struct Words {
    unsigned of[4];
  };
  const int lane = threadIdx.x % 32, line = lane % 8;
  collective(~0u, Words{matrix[0], matrix[1], matrix[2], matrix[3]}, [&](auto read) {
    for (int i = 0; i < 8; ++i) {
      const int row = kTransposed ? i : line, column = kTransposed ? line : i;
      const unsigned short half = read(4 * row + column / 2).of[lane / 8] >> 16 * (column % 2);
      memcpy((char*)(size_t)address + 2 * i, &half, 2);
    }
    return 0;
  });
}
}  // namespace emulator
