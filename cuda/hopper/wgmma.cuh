// Matrix products of a warpgroup (128 threads) on the tensor cores: wgmma, asynchronous.
//
// The left operand has 64 rows, 16 a warp. Of a product with kColumns columns a thread holds
// d[kColumns / 8][4]: of the rows lane / 4 (d[i][0] and d[i][1]) and lane / 4 + 8 (d[i][2] and
// d[i][3]) of its warp, the columns 8 i + 2 (lane % 4) and the one after.
//
// Operands in shared memory are tiles of lines of 128 bytes that TMA has swizzled; a row longer
// than a line goes on in the next tile. Two products that accumulate into the same registers may be
// issued one after the other; registers may be read after `wait_for_products`.
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh::hopper {

__device__ inline void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// No read of these registers moves above this line.
template <int kCount>
__device__ void hold(float (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+f"(registers[i / 4][i % 4])::"memory");
}

// Gives registers of this warpgroup back to the block, or takes some.
template <bool kMore, int kRegisters>
__device__ void set_registers() {
  if constexpr (kMore)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Two numbers as one register of a left operand.
__device__ inline unsigned pack(float low, float high, bfloat16) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline unsigned pack(float low, float high, float16) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ inline float2 unpack(unsigned word, bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ inline float2 unpack(unsigned word, float16) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// The products of two pairs.
__device__ inline unsigned multiply_pairs(unsigned left, unsigned right, bfloat16) {
  unsigned word;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(left), "r"(right));
  return word;
}

// Where an operand is in shared memory, as wgmma takes it. Adding n moves it by 16 n bytes.
using Descriptor = unsigned long long;

// Of an operand whose lines lie along the summed dimension, as both have in S = Q K^T: 8 lines
// (1024 bytes) make a swizzled group. 16 elements of the summed dimension are 32 bytes, so that the
// operand of the next step is at + 2.
__device__ inline Descriptor rows_descriptor(unsigned address) {
  return Descriptor((address & 0x3ffff) >> 4) | Descriptor(1) << 16 | Descriptor(64) << 32 |
         Descriptor(1) << 62;
}
// Of a right operand whose lines follow each other along the summed dimension, as V has in O = P V,
// and which the instruction transposes. 16 lines are 2048 bytes: the next step is at + 128.
// `tile_bytes` lie between one tile of 64 columns of the result and the next.
__device__ inline Descriptor columns_descriptor(unsigned address, unsigned tile_bytes) {
  return Descriptor((address & 0x3ffff) >> 4) | Descriptor(tile_bytes >> 4) << 16 |
         Descriptor(64) << 32 | Descriptor(1) << 62;
}

// One step of a product, over 16 elements of the summed dimension.
template <int kColumns, typename Element>
struct Wgmma;

// The operands of the assembly are numbered: kColumns / 2 accumulators %0.., then those from
// `count` on, whose numbers are the arguments `after_0` to `after_4` (a macro cannot add).
// clang-format off
#define CUNEIGH_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CUNEIGH_REGISTERS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CUNEIGH_REGISTERS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CUNEIGH_REGISTERS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUNEIGH_REGISTERS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define CUNEIGH_REGISTERS_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CUNEIGH_REGISTERS_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define CUNEIGH_REGISTERS_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CUNEIGH_ACCUMULATORS(i) "+f"(d[(i + 0) / 4][0]), "+f"(d[(i + 1) / 4][1]), "+f"(d[(i + 2) / 4][2]), "+f"(d[(i + 3) / 4][3]), "+f"(d[(i + 4) / 4][0]), "+f"(d[(i + 5) / 4][1]), "+f"(d[(i + 6) / 4][2]), "+f"(d[(i + 7) / 4][3]), "+f"(d[(i + 8) / 4][0]), "+f"(d[(i + 9) / 4][1]), "+f"(d[(i + 10) / 4][2]), "+f"(d[(i + 11) / 4][3]), "+f"(d[(i + 12) / 4][0]), "+f"(d[(i + 13) / 4][1]), "+f"(d[(i + 14) / 4][2]), "+f"(d[(i + 15) / 4][3])
#define CUNEIGH_REGISTERS_OF_16 CUNEIGH_REGISTERS_0
#define CUNEIGH_ACCUMULATORS_OF_16 CUNEIGH_ACCUMULATORS(0)
#define CUNEIGH_REGISTERS_OF_32 CUNEIGH_REGISTERS_0 ", " CUNEIGH_REGISTERS_1
#define CUNEIGH_ACCUMULATORS_OF_32 CUNEIGH_ACCUMULATORS(0), CUNEIGH_ACCUMULATORS(16)
#define CUNEIGH_REGISTERS_OF_48 CUNEIGH_REGISTERS_0 ", " CUNEIGH_REGISTERS_1 ", " CUNEIGH_REGISTERS_2
#define CUNEIGH_ACCUMULATORS_OF_48 CUNEIGH_ACCUMULATORS(0), CUNEIGH_ACCUMULATORS(16), CUNEIGH_ACCUMULATORS(32)
#define CUNEIGH_REGISTERS_OF_64 CUNEIGH_REGISTERS_0 ", " CUNEIGH_REGISTERS_1 ", " CUNEIGH_REGISTERS_2 ", " CUNEIGH_REGISTERS_3
#define CUNEIGH_ACCUMULATORS_OF_64 CUNEIGH_ACCUMULATORS(0), CUNEIGH_ACCUMULATORS(16), CUNEIGH_ACCUMULATORS(32), CUNEIGH_ACCUMULATORS(48)
#define CUNEIGH_REGISTERS_OF_96 CUNEIGH_REGISTERS_0 ", " CUNEIGH_REGISTERS_1 ", " CUNEIGH_REGISTERS_2 ", " CUNEIGH_REGISTERS_3 ", " CUNEIGH_REGISTERS_4 ", " CUNEIGH_REGISTERS_5
#define CUNEIGH_ACCUMULATORS_OF_96 CUNEIGH_ACCUMULATORS(0), CUNEIGH_ACCUMULATORS(16), CUNEIGH_ACCUMULATORS(32), CUNEIGH_ACCUMULATORS(48), CUNEIGH_ACCUMULATORS(64), CUNEIGH_ACCUMULATORS(80)
#define CUNEIGH_REGISTERS_OF_128 CUNEIGH_REGISTERS_0 ", " CUNEIGH_REGISTERS_1 ", " CUNEIGH_REGISTERS_2 ", " CUNEIGH_REGISTERS_3 ", " CUNEIGH_REGISTERS_4 ", " CUNEIGH_REGISTERS_5 ", " CUNEIGH_REGISTERS_6 ", " CUNEIGH_REGISTERS_7
#define CUNEIGH_ACCUMULATORS_OF_128 CUNEIGH_ACCUMULATORS(0), CUNEIGH_ACCUMULATORS(16), CUNEIGH_ACCUMULATORS(32), CUNEIGH_ACCUMULATORS(48), CUNEIGH_ACCUMULATORS(64), CUNEIGH_ACCUMULATORS(80), CUNEIGH_ACCUMULATORS(96), CUNEIGH_ACCUMULATORS(112)
#define CUNEIGH_WGMMA(kColumns, count, after_0, after_1, after_2, after_3, after_4, Type, type)        \
  template <>                                                                                          \
  struct Wgmma<kColumns, Type> {                                                                       \
    /* d = left right^T, or d += it if kAdd: [64, 16] [kColumns, 16]^T in shared memory */             \
    template <bool kAdd>                                                                               \
    __device__ static void shared(float (&d)[kColumns / 8][4], Descriptor left, Descriptor right) {              \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #after_2 ", 0; "                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type              \
                   " {" CUNEIGH_REGISTERS_OF_##count "}, %" #after_0 ", %" #after_1                    \
                   ", p, 1, 1, 0, 0; }"                                                                \
                   : CUNEIGH_ACCUMULATORS_OF_##count : "l"(left), "l"(right), "n"(kAdd));              \
    }                                                                                                  \
    /* d = left right, or d += it if kAdd: [64, 16] [16, kColumns] in shared memory */                 \
    template <bool kAdd>                                                                               \
    __device__ static void shared_columns(float (&d)[kColumns / 8][4], Descriptor left,                \
                                          Descriptor right) {                                          \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #after_2 ", 0; "                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type              \
                   " {" CUNEIGH_REGISTERS_OF_##count "}, %" #after_0 ", %" #after_1                    \
                   ", p, 1, 1, 0, 1; }"                                                                \
                   : CUNEIGH_ACCUMULATORS_OF_##count : "l"(left), "l"(right), "n"(kAdd));              \
    }                                                                                                  \
    /* d += left right: [64, 16] in registers, [16, kColumns] in shared memory */                      \
    __device__ static void registers(float (&d)[kColumns / 8][4], const unsigned (&left)[4],           \
                                     Descriptor right) {                                               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type              \
                   " {" CUNEIGH_REGISTERS_OF_##count "}, {%" #after_0 ", %" #after_1 ", %" #after_2    \
                   ", %" #after_3 "}, %" #after_4 ", 1, 1, 1, 1;"                                      \
                   : CUNEIGH_ACCUMULATORS_OF_##count                                                   \
                   : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));              \
    }                                                                                                  \
  };
CUNEIGH_WGMMA(32, 16, 16, 17, 18, 19, 20, float16, "f16")
CUNEIGH_WGMMA(32, 16, 16, 17, 18, 19, 20, bfloat16, "bf16")
CUNEIGH_WGMMA(64, 32, 32, 33, 34, 35, 36, float16, "f16")
CUNEIGH_WGMMA(64, 32, 32, 33, 34, 35, 36, bfloat16, "bf16")
CUNEIGH_WGMMA(96, 48, 48, 49, 50, 51, 52, float16, "f16")
CUNEIGH_WGMMA(96, 48, 48, 49, 50, 51, 52, bfloat16, "bf16")
CUNEIGH_WGMMA(128, 64, 64, 65, 66, 67, 68, float16, "f16")
CUNEIGH_WGMMA(128, 64, 64, 65, 66, 67, 68, bfloat16, "bf16")
CUNEIGH_WGMMA(192, 96, 96, 97, 98, 99, 100, float16, "f16")
CUNEIGH_WGMMA(192, 96, 96, 97, 98, 99, 100, bfloat16, "bf16")
CUNEIGH_WGMMA(256, 128, 128, 129, 130, 131, 132, float16, "f16")
CUNEIGH_WGMMA(256, 128, 128, 129, 130, 131, 132, bfloat16, "bf16")
// clang-format on

}  // namespace cuneigh::hopper
