// Runs the kernels of cuda_scan*.cu on the CPU, for a test: included before them, it stands in for what CUDA C++ adds to C++.
//
// The threads of a block are fibers that take turns. A warp's lanes wait for each other where they meet (__syncwarp, shuffles,
// matrix products), a block's threads at __syncthreads; warps run ahead of each other at random, so that a missing barrier
// shows. Shared memory begins as NaN. Copies that are asynchronous on a GPU are done at once.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> static To bits(From x) {
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static float __int_as_float(int x) { return bits<float>(x); }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static int __float_as_int(float x) { return bits<int>(x); }

static float ex2(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1 / x; }
static unsigned rounded(float x) {  // to bfloat16
    const unsigned y = bits<unsigned>(x);
    return x != x ? 0x7fc0 : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}
static unsigned narrow(float low, float high) { return rounded(low) | rounded(high) << 16; }
template <int BYTES> static void copy(void* to, const void* from) { memcpy(to, from, BYTES); }
static void arrived() {}
static void follow() {}
static void invite() {}
static void prefetch(const void* from) { (void)*(volatile const char*)from; }

struct { int x; } threadIdx, blockIdx, blockDim;
alignas(16) float4 shared[228 * 64];

enum Waiting { FOR_NOTHING, FOR_WARP, FOR_BLOCK, FOR_EVER };
struct Fiber {
    ucontext_t context;
    Waiting waiting;
    std::vector<char> stack;
    float value, left[4], right[2];
};
static Fiber fibers[1024], *current;
static ucontext_t scheduler;

static void wait(Waiting what) {
    current->waiting = what;
    swapcontext(&current->context, &scheduler);
}
static void __syncthreads() { wait(FOR_BLOCK); }
static void __syncwarp() { wait(FOR_WARP); }

static float __shfl_xor_sync(unsigned, float x, int mask) {
    current->value = x;
    __syncwarp();
    x = fibers[(current - fibers) ^ mask].value;
    __syncwarp();
    return x;
}

static float tf32(float x) { return bits<float>(bits<unsigned>(x) & 0xffffe000); }

static void product(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    const int me = current - fibers, lane = me % 32;
    const Fiber* warp = fibers + (me - lane);
    const float left[4] = {tf32(a0), tf32(a1), tf32(a2), tf32(a3)}, right[2] = {tf32(b0), tf32(b1)};
    memcpy(current->left, left, sizeof left), memcpy(current->right, right, sizeof right);
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++)  // row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2
            sum[i] += warp[lane / 4 * 4 + k % 4].left[i / 2 + k / 4 * 2] * warp[(lane % 4 * 2 + i % 2) * 4 + k % 4].right[k / 4];
    __syncwarp();
}

static void (*kernel)(const void*);
static const void* argument;
static void run_thread() {
    kernel(argument);
    wait(FOR_EVER);
}

static void run_block(int threads) {
    static unsigned random = 1;
    for (Fiber& fiber : std::vector<std::reference_wrapper<Fiber>>(fibers, fibers + threads)) {
        fiber.stack.resize(1 << 16);
        fiber.waiting = FOR_NOTHING;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_thread, 0);
    }
    memset(shared, 0xff, sizeof shared);
    // Those from `begin` on that wait for `what` go on if all do that are still running.
    auto release = [](int begin, int end, Waiting what) {
        for (int t = begin; t < end; t++)
            if (fibers[t].waiting != what && fibers[t].waiting != FOR_EVER) return;
        for (int t = begin; t < end; t++)
            if (fibers[t].waiting == what) fibers[t].waiting = FOR_NOTHING;
    };
    for (bool running = true; running;) {
        running = false;
        for (int begin = 0; begin < threads; begin += 32) {
            random = random * 1664525 + 1013904223;
            if (threads > 32 && random >> 30 == 0) continue;
            for (int i = 0; i < 32; i++) {
                threadIdx.x = begin + (i ^ (random >> 24 & 31));
                current = fibers + threadIdx.x;
                if (current->waiting == FOR_NOTHING) swapcontext(&scheduler, &current->context);
            }
            release(begin, begin + 32, FOR_WARP);
        }
        release(0, threads, FOR_BLOCK);
        for (int t = 0; t < threads; t++) running |= fibers[t].waiting != FOR_EVER;
    }
}

static void run_grid(void (*started)(const void*), const void* with, int blocks, int threads) {
    kernel = started, argument = with, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) run_block(threads);
}
