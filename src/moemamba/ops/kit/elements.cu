// What the CUDA C++ kernels share: elements and pairs of them, and single instructions. Compiled as one with what follows it.
//
// TYPE is that of the tensors: 0 float, 1 bfloat16, 2 float16; everything is computed in float.

#ifndef EMULATED
__device__ inline float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float wide(unsigned short x) {  // of TYPE 2
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ inline unsigned narrow(float low, float high) {
    unsigned y;
#if TYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}

// Copies that arrive in shared memory by themselves; `arrived` waits for all that this thread has begun.
template <int BYTES> __device__ inline void copy(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES));
}

// What is at `from` will be wanted: bring it as far as the level-2 cache.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ inline void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Where a kernel was launched before the one ahead of it is done: here it waits until that is.
__device__ inline void follow() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the kernel that follows be launched: its blocks start as soon as they find room.
__device__ inline void invite() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// sum += left right, of tf32: left (16, 8), right (8, 8), sum (16, 8). In lane l, with r = l / 4 and k = l % 4, left holds
// (r, k), (r + 8, k), (r, k + 4), (r + 8, k + 4); right (k, r), (k + 4, r); sum (r, 2k), (r, 2k + 1), (r + 8, 2k), (r + 8, 2k + 1).
__device__ inline void product(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
#endif

typedef long long wide_int;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
extern __shared__ float4 shared[];

#if TYPE == 0
typedef float Element;
typedef float2 Pair;
__device__ inline float value(Element x) { return x; }
__device__ inline float2 values(Pair x) { return x; }
__device__ inline Pair packed(float2 x) { return x; }
__device__ inline Pair paired(Element low, Element high) { return make_float2(low, high); }
__device__ inline Element low(Pair x) { return x.x; }
__device__ inline Element high(Pair x) { return x.y; }
#else
typedef unsigned short Element;
typedef unsigned Pair;
#if TYPE == 1
__device__ inline float value(Element x) { return __uint_as_float((unsigned)x << 16); }
__device__ inline float2 values(Pair x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)); }
#else
__device__ inline float value(Element x) { return wide(x); }
__device__ inline float2 values(Pair x) { return make_float2(wide((Element)x), wide((Element)(x >> 16))); }
#endif
__device__ inline Pair packed(float2 x) { return narrow(x.x, x.y); }
__device__ inline Pair paired(Element low, Element high) { return low | (unsigned)high << 16; }
__device__ inline Element low(Pair x) { return (Element)x; }
__device__ inline Element high(Pair x) { return (Element)(x >> 16); }
#endif

__device__ inline float sigmoid(float x) { return reciprocal(1 + ex2(-LOG2E * x)); }

// A tensor's elements from some row and element of it.
__device__ inline const Element* place(const void* tensor, wide_int row, wide_int stride, int element) {
    return (const Element*)((const char*)tensor + row * stride) + element;
}

__device__ inline const Element* moved(const Element* from, int rows, int stride) {
    return (const Element*)((const char*)from + (wide_int)rows * stride);
}
