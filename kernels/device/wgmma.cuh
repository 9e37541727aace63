// wgmma, bf16 to fp32, on sm_90a: m64nNk16 for N = 8, 16, ... 256 with A in shared memory or in
// registers, its fences and groups, and setmaxnreg.
//
// Inline PTX numbers its operands: the N/2 accumulators are %0, %1, ... and what follows starts at
// %(N/2), another number for each N. So the lists below grow by four accumulators a line, and the
// table at the end gives each N the numbers of its seven other operands. Accumulators are "+f": an
// instruction still in flight writes them until wgmma_wait, and nothing may touch them before.
#pragma once
#include "language.cuh"

#if DEVICE_HAS_SM90A

template <int Registers>
DEVICE void setmaxnreg_inc() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(Registers) : "memory");
}
template <int Registers>
DEVICE void setmaxnreg_dec() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(Registers) : "memory");
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Groups>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(Groups) : "memory");
}

// ---------------------------------------------------------------- the accumulators' names in PTX
#define WGMMA_NAMES_8 "%0, %1, %2, %3"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %4, %5, %6, %7"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %8, %9, %10, %11"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %12, %13, %14, %15"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %16, %17, %18, %19"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %20, %21, %22, %23"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %24, %25, %26, %27"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %28, %29, %30, %31"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %32, %33, %34, %35"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %36, %37, %38, %39"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %40, %41, %42, %43"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %44, %45, %46, %47"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %48, %49, %50, %51"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %52, %53, %54, %55"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %56, %57, %58, %59"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %60, %61, %62, %63"
#define WGMMA_NAMES_136 WGMMA_NAMES_128 ", %64, %65, %66, %67"
#define WGMMA_NAMES_144 WGMMA_NAMES_136 ", %68, %69, %70, %71"
#define WGMMA_NAMES_152 WGMMA_NAMES_144 ", %72, %73, %74, %75"
#define WGMMA_NAMES_160 WGMMA_NAMES_152 ", %76, %77, %78, %79"
#define WGMMA_NAMES_168 WGMMA_NAMES_160 ", %80, %81, %82, %83"
#define WGMMA_NAMES_176 WGMMA_NAMES_168 ", %84, %85, %86, %87"
#define WGMMA_NAMES_184 WGMMA_NAMES_176 ", %88, %89, %90, %91"
#define WGMMA_NAMES_192 WGMMA_NAMES_184 ", %92, %93, %94, %95"
#define WGMMA_NAMES_200 WGMMA_NAMES_192 ", %96, %97, %98, %99"
#define WGMMA_NAMES_208 WGMMA_NAMES_200 ", %100, %101, %102, %103"
#define WGMMA_NAMES_216 WGMMA_NAMES_208 ", %104, %105, %106, %107"
#define WGMMA_NAMES_224 WGMMA_NAMES_216 ", %108, %109, %110, %111"
#define WGMMA_NAMES_232 WGMMA_NAMES_224 ", %112, %113, %114, %115"
#define WGMMA_NAMES_240 WGMMA_NAMES_232 ", %116, %117, %118, %119"
#define WGMMA_NAMES_248 WGMMA_NAMES_240 ", %120, %121, %122, %123"
#define WGMMA_NAMES_256 WGMMA_NAMES_248 ", %124, %125, %126, %127"

// ---------------------------------------------------------------- the accumulators as operands
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D_8 WGMMA_FOUR(0)
#define WGMMA_D_16 WGMMA_D_8, WGMMA_FOUR(4)
#define WGMMA_D_24 WGMMA_D_16, WGMMA_FOUR(8)
#define WGMMA_D_32 WGMMA_D_24, WGMMA_FOUR(12)
#define WGMMA_D_40 WGMMA_D_32, WGMMA_FOUR(16)
#define WGMMA_D_48 WGMMA_D_40, WGMMA_FOUR(20)
#define WGMMA_D_56 WGMMA_D_48, WGMMA_FOUR(24)
#define WGMMA_D_64 WGMMA_D_56, WGMMA_FOUR(28)
#define WGMMA_D_72 WGMMA_D_64, WGMMA_FOUR(32)
#define WGMMA_D_80 WGMMA_D_72, WGMMA_FOUR(36)
#define WGMMA_D_88 WGMMA_D_80, WGMMA_FOUR(40)
#define WGMMA_D_96 WGMMA_D_88, WGMMA_FOUR(44)
#define WGMMA_D_104 WGMMA_D_96, WGMMA_FOUR(48)
#define WGMMA_D_112 WGMMA_D_104, WGMMA_FOUR(52)
#define WGMMA_D_120 WGMMA_D_112, WGMMA_FOUR(56)
#define WGMMA_D_128 WGMMA_D_120, WGMMA_FOUR(60)
#define WGMMA_D_136 WGMMA_D_128, WGMMA_FOUR(64)
#define WGMMA_D_144 WGMMA_D_136, WGMMA_FOUR(68)
#define WGMMA_D_152 WGMMA_D_144, WGMMA_FOUR(72)
#define WGMMA_D_160 WGMMA_D_152, WGMMA_FOUR(76)
#define WGMMA_D_168 WGMMA_D_160, WGMMA_FOUR(80)
#define WGMMA_D_176 WGMMA_D_168, WGMMA_FOUR(84)
#define WGMMA_D_184 WGMMA_D_176, WGMMA_FOUR(88)
#define WGMMA_D_192 WGMMA_D_184, WGMMA_FOUR(92)
#define WGMMA_D_200 WGMMA_D_192, WGMMA_FOUR(96)
#define WGMMA_D_208 WGMMA_D_200, WGMMA_FOUR(100)
#define WGMMA_D_216 WGMMA_D_208, WGMMA_FOUR(104)
#define WGMMA_D_224 WGMMA_D_216, WGMMA_FOUR(108)
#define WGMMA_D_232 WGMMA_D_224, WGMMA_FOUR(112)
#define WGMMA_D_240 WGMMA_D_232, WGMMA_FOUR(116)
#define WGMMA_D_248 WGMMA_D_240, WGMMA_FOUR(120)
#define WGMMA_D_256 WGMMA_D_248, WGMMA_FOUR(124)

// ---------------------------------------------------------------- one N
// Overloads by the number of accumulators. Scales of A and B are 1; scale_d = 0 overwrites d.
#define WGMMA(N, i0, i1, i2, i3, i4, i5, i6)                                                     \
  namespace ptx {                                                                                \
  template <int TransA, int TransB>                                                              \
  DEVICE void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                        \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES_##N    \
                 "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}"                        \
                 : WGMMA_D_##N                                                                   \
                 : "l"(a), "l"(b), "r"(scale_d), "n"(TransA), "n"(TransB)                        \
                 : "memory");                                                                    \
  }                                                                                              \
  template <int TransB>                                                                          \
  DEVICE void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,             \
                              int scale_d) {                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                        \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES_##N    \
                 "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}"  \
                 : WGMMA_D_##N                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TransB) \
                 : "memory");                                                                    \
  }                                                                                              \
  }
WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef WGMMA
#undef WGMMA_FOUR

// d [64,N] (+)= a [64,16] b [16,N]: = where scale_d is 0. Trans: 0 K-major, 1 MN-major.
template <int N, int TransA = 0, int TransB = 0>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  ptx::wgmma_shared<TransA, TransB>(d, a, b, scale_d);
}
// The same with A in registers.
template <int N, int TransB = 0>
DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  ptx::wgmma_registers<TransB>(d, a, b, scale_d);
}

#endif  // DEVICE_HAS_SM90A
