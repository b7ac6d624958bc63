// The selective scan and its gradients for NVIDIA GPUs (sm_80 and later), compiled at run time by cuda_runtime.py.
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = (C_t h_t + D u_t) silu(z_t)
//
// Constants of a compilation. TYPE is that of u, dt, z, B, C and y: 0 float, 1 bfloat16, 2 float16; everything is computed in
// float. MARKED: there are marks (b, l) that say which positions reset the state (BEGIN) and which are padding (PADDING).
// GATED: there is a z. SOFTPLUS: steps go through it. PAIRED: two channels can be loaded at a time. CHUNK: positions between
// saved states, a multiple of STEPS.
//
// Time is cut into `parts` of `span` chunks, which run side by side. One part will do where batch and channels fill the
// GPU. Where not, `summarise` finds what each part adds to a state that enters as zero, and the sum of its steps, from which
// its decay follows; `carry` turns these into the states that enter the parts (`entry`); likewise, back in time, for adjoints.
// States that only kernels see lie as (b, parts or chunks, N, i), so that neighbouring channels are neighbours in memory.
//
// Nothing is summed by atomics: results repeat bit for bit.

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
template <class Pair> __device__ inline void copy(Pair* to, const Pair* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from),
                 "n"(sizeof(Pair)));
}

__device__ inline void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sum += left right, of tf32: left (16, 8), right (8, 8), sum (16, 8). In lane l, with r = l / 4 and k = l % 4, left holds
// (r, k), (r + 8, k), (r, k + 4), (r + 8, k + 4); right (k, r), (k + 4, r); sum (r, 2k), (r, 2k + 1), (r + 8, 2k), (r + 8, 2k + 1).
__device__ inline void product(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// The same with a sum that begins with zero.
__device__ inline void first_product(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(0.0f));
}
#endif

typedef long long wide_int;
constexpr int N = 16;      // states of a channel; a scan of fewer is padded with states that stay zero
constexpr int STEPS = 8;   // positions that are loaded at a time
constexpr int PLAIN = 0, BEGIN = 1, PADDING = 2;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
extern __shared__ float4 shared[];
#define INFINITE __int_as_float(0x7f800000)

// Laid out as cuda_scan.py packs it. u, dt, z, B and C have strides, in bytes; every other tensor is contiguous.
struct Scan {
    const void *u, *dt, *z, *B, *C, *dy;
    const float *A, *D, *bias, *initial, *dfinal;
    const signed char* marks;
    float *entry, *totals, *starts;
    void *y, *du, *ddt, *dz;
    float *final, *dinitial, *dBC, *sums;
    wide_int u_b, dt_b, z_b, B_b, C_b;
    int u_t, dt_t, z_t, B_t, C_t;
    int batch, length, width, states, span, parts;
};

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

// A tensor's elements from some row and element of it.
__device__ inline const Element* place(const void* tensor, wide_int row, wide_int stride, int element) {
    return (const Element*)((const char*)tensor + row * stride) + element;
}

__device__ inline const Element* moved(const Element* from, int rows, int stride) {
    return (const Element*)((const char*)from + (wide_int)rows * stride);
}

// Two neighbouring channels of a row, of which `count` (2 or more, 1, 0 or less) exist.
__device__ inline Pair load(const Element* row, int count) {
    if (PAIRED) return count > 0 ? *(const Pair*)row : Pair();
    return paired(count > 0 ? row[0] : Element(), count > 1 ? row[1] : Element());
}

__device__ inline void store(Element* row, int count, float2 x) {
    Pair pair = packed(x);
    if (PAIRED) {
        if (count > 0) *(Pair*)row = pair;
    } else {
        if (count > 0) row[0] = low(pair);
        if (count > 1) row[1] = high(pair);
    }
}

__device__ inline float2 load_vector(const float* vector, int channel, int count) {
    if (!vector) return make_float2(0, 0);
    return make_float2(count > 0 ? vector[channel] : 0, count > 1 ? vector[channel + 1] : 0);
}

__device__ inline float sigmoid(float x) { return reciprocal(1 + ex2(-LOG2E * x)); }

// max(x, 0) + log1p(e^-|x|), the logarithm as e P(e): Chebyshev fit on [0, 1], relative error below 4e-7.
__device__ inline float softplus(float x) {
    float e = ex2(-LOG2E * fabsf(x)), p = -0.008574675768613815f;
    p = p * e + 0.044214192777872086f;
    p = p * e - 0.10785368084907532f;
    p = p * e + 0.17757023870944977f;
    p = p * e - 0.2449961155653f;
    p = p * e + 0.3327617645263672f;
    p = p * e - 0.49997448921203613f;
    p = p * e + 0.9999998211860657f;
    return fmaxf(x, 0) + e * p;
}

// 2^x by the multiply-add units, for some of the states: the unit that computes `ex2` is what limits a forward pass.
__device__ inline float ex2_by_polynomial(float x) {
    const float SHIFT = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    x = fmaxf(x, -126);
    const float rounded = x + SHIFT, f = x - (rounded - SHIFT);
    float p = 1.3394e-3f;
    p = p * f + 9.6188e-3f;
    p = p * f + 5.550325e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1;
    return __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23));
}

// ---- Along time, or back: one thread has two neighbouring channels with all their states in registers.

enum Pass { FORWARD, SUMMARY, ADJOINT };  // ADJOINT: the summary of adjoint states, g_{t-1} = exp(dt_t A) (g_t + C_t dout_t)

template <Pass PASS> __device__ inline void walk(const Scan& s) {
    const int threads = blockDim.x, thread = threadIdx.x, tiles = (s.width + 2 * threads - 1) / (2 * threads);
    const int part = blockIdx.x / tiles % s.parts;
    const wide_int row = blockIdx.x / tiles / s.parts;
    const int channel = (blockIdx.x % tiles * threads + thread) * 2, channels = s.width - channel;
    const int begin = part * s.span * CHUNK, end = min(s.length, begin + s.span * CHUNK), count = end - begin;
    float(*weights)[STEPS][2 * N] = (float(*)[STEPS][2 * N]) shared;  // [2]: B and C of the positions at hand, and of the next
    int(*marks)[STEPS] = (int(*)[STEPS])(weights + 2);
    Pair* ring = (Pair*)(marks + 2);  // [2][3][STEPS][threads]: u or dy, dt, z

    constexpr bool gated = GATED && PASS != SUMMARY;
    const int line = s.width * (int)sizeof(Element);
    const Element* inputs[3] = {PASS == ADJOINT ? place(s.dy, row * s.length, line, channel) : place(s.u, row, s.u_b, channel),
                                place(s.dt, row, s.dt_b, channel), place(s.z, row, s.z_b, channel)};
    const int strides[3] = {PASS == ADJOINT ? line : s.u_t, s.dt_t, s.z_t};
    const int n = thread % N;  // what this thread loads of B and C
    const bool is_C = thread / N % 2, wanted = PASS == FORWARD || is_C == (PASS == ADJOINT);
    const Element* weight = is_C ? place(s.C, row, s.C_b, n) : place(s.B, row, s.B_b, n);

    auto fetch = [&](int group) {
        const int side = group & 1, here = min(STEPS, count - group * STEPS), way = PASS == ADJOINT ? -1 : 1;
        const int first = PASS == ADJOINT ? end - 1 - group * STEPS : begin + group * STEPS;
#pragma unroll
        for (int i = 0; i < (gated ? 3 : 2); i++) {
            const Element* from = moved(inputs[i], first, strides[i]);
            Pair* to = ring + (side * 3 + i) * STEPS * threads + thread;
            if (PAIRED && here == STEPS) {
                if (channels > 0)
#pragma unroll
                    for (int k = 0; k < STEPS; k++) copy(to + k * threads, (const Pair*)moved(from, way * k, strides[i]));
            } else
#pragma unroll 1
                for (int k = 0; k < here; k++) to[k * threads] = load(moved(from, way * k, strides[i]), channels);
        }
        if (wanted)
            for (int k = thread / 32; k < here; k += threads / 32) {
                const Element* from = moved(weight, first + way * k, is_C ? s.C_t : s.B_t);
                weights[side][k][thread % 32] = n < s.states ? value(*from) : 0;
            }
        if (MARKED && thread < here) marks[side][thread] = s.marks[row * s.length + first + way * thread];
    };

    float h[N][2], A[N][2];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const bool exists = n < s.states && c < channels;
            A[n][c] = exists ? s.A[(wide_int)(channel + c) * s.states + n] * LOG2E : 0;
            h[n][c] = 0;
            if (PASS != FORWARD) continue;
            if (s.parts > 1)
                h[n][c] = c < channels ? s.entry[((row * s.parts + part) * N + n) * s.width + channel + c] : 0;
            else if (s.initial && exists)
                h[n][c] = s.initial[(row * s.width + channel + c) * s.states + n];
        }
    const float2 bias = load_vector(s.bias, channel, channels), skip = load_vector(s.D, channel, channels);
    float2 total = make_float2(0, 0);

    fetch(0);
    for (int group = 0; group * STEPS < count; group++) {
        arrived();
        __syncthreads();
        if ((group + 1) * STEPS < count) fetch(group + 1);
        const int side = group & 1, here = min(STEPS, count - group * STEPS), first = begin + group * STEPS;
        if (PASS == FORWARD && s.starts && first % CHUNK == 0) {
            float* start = s.starts + (row * ((s.length + CHUNK - 1) / CHUNK) + first / CHUNK) * N * s.width + channel;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    if (c < channels) start[(wide_int)n * s.width + c] = h[n][c];
        }
        const Pair* at = ring + side * 3 * STEPS * threads + thread;
        Element* to = (Element*)s.y + (row * s.length + first) * s.width + channel;
#pragma unroll 1
        for (int k = 0; k < here; k++) {
            float2 x = values(at[0]), step = values(at[STEPS * threads]), gate = make_float2(0, 0), open = gate;
            if (gated) gate = values(at[2 * STEPS * threads]);
            at += threads;
            step.x += bias.x, step.y += bias.y;
            if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
            if (gated) open.x = gate.x * sigmoid(gate.x), open.y = gate.y * sigmoid(gate.y);
            const int mark = MARKED ? marks[side][k] : PLAIN;
            if (MARKED && mark == PADDING) step = x = gate = open = make_float2(0, 0);
            float drive[2] = {step.x * x.x, step.y * x.y}, out[2] = {skip.x * x.x, skip.y * x.y};
            if (PASS == ADJOINT) drive[0] = gated ? x.x * open.x : x.x, drive[1] = gated ? x.y * open.y : x.y;
            if (PASS != FORWARD) total.x += step.x, total.y += step.y;
            if (MARKED && mark == BEGIN && PASS != ADJOINT)
#pragma unroll
                for (int n = 0; n < N; n++) h[n][0] = h[n][1] = 0;
#pragma unroll
            for (int n = 0; n < N; n += 4) {
                const float4 B4 = *(const float4*)&weights[side][k][PASS == ADJOINT ? N + n : n];
                const float4 C4 = PASS == FORWARD ? *(const float4*)&weights[side][k][N + n] : B4;
                const float B[4] = {B4.x, B4.y, B4.z, B4.w}, C[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const float exponent = (c ? step.y : step.x) * A[n + j][c];
                        const float decay = n + j < POLYNOMIALS ? ex2_by_polynomial(exponent) : ex2(exponent);
                        float& state = h[n + j][c];
                        if (PASS == ADJOINT)
                            state = decay * (state + drive[c] * B[j]);
                        else
                            state = decay * state + drive[c] * B[j];
                        if (PASS == FORWARD) out[c] += state * C[j];
                    }
            }
            if (MARKED && mark == BEGIN && PASS != FORWARD) {
                total = make_float2(INFINITE, INFINITE);
                if (PASS == ADJOINT)
#pragma unroll
                    for (int n = 0; n < N; n++) h[n][0] = h[n][1] = 0;
            }
            if (PASS == FORWARD) {
                if (gated) out[0] *= open.x, out[1] *= open.y;
                if (MARKED && mark == PADDING) out[0] = out[1] = 0;
                store(to, channels, make_float2(out[0], out[1]));
                to += s.width;
            }
        }
    }
    if (PASS != FORWARD) {
        float* sum = s.totals + (row * s.parts + part) * s.width + channel;
        if (channels > 0) sum[0] = total.x;
        if (channels > 1) sum[1] = total.y;
    } else if (part != s.parts - 1)
        return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (c < channels) {
                if (PASS != FORWARD)
                    s.entry[((row * s.parts + part) * N + n) * s.width + channel + c] = h[n][c];
                else if (n < s.states)
                    s.final[(row * s.width + channel + c) * s.states + n] = h[n][c];
            }
}

extern "C" __global__ void __launch_bounds__(128, 4) forward(const Scan s) { walk<FORWARD>(s); }
extern "C" __global__ void __launch_bounds__(128, 4) summarise(const Scan s) { walk<SUMMARY>(s); }
extern "C" __global__ void __launch_bounds__(128, 4) summarise_back(const Scan s) { walk<ADJOINT>(s); }

// What each part adds to a state (entry, totals) becomes the state that enters it: one thread for each state.
template <bool BACK> __device__ inline void carried(const Scan& s) {
    const wide_int size = (wide_int)N * s.width, cell = (wide_int)blockIdx.x * blockDim.x + threadIdx.x;
    if (cell >= s.batch * size) return;
    const wide_int row = cell / size;
    const int n = cell % size / s.width, channel = cell % s.width;
    const bool exists = n < s.states;
    const float A = exists ? s.A[(wide_int)channel * s.states + n] * LOG2E : 0, *first = BACK ? s.dfinal : s.initial;
    float state = exists && first ? first[(row * s.width + channel) * s.states + n] : 0;
    float* entry = s.entry + row * s.parts * size + cell % size;
    const float* totals = s.totals + row * s.parts * s.width + channel;
    constexpr int AHEAD = 8;  // loads that are under way together
    for (int begin = 0; begin < s.parts; begin += AHEAD) {
        float added[AHEAD], decay[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const wide_int part = BACK ? s.parts - 1 - begin - k : begin + k;
            added[k] = begin + k < s.parts ? entry[part * size] : 0;
            decay[k] = begin + k < s.parts ? totals[part * s.width] : 0;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const wide_int part = BACK ? s.parts - 1 - begin - k : begin + k;
            if (begin + k < s.parts) entry[part * size] = state;
            state = (decay[k] == INFINITE ? 0 : ex2(decay[k] * A)) * state + added[k];
        }
    }
}

extern "C" __global__ void carry(const Scan s) { carried<false>(s); }
extern "C" __global__ void carry_back(const Scan s) { carried<true>(s); }

// ---- The gradients: a block has 64 channels. A warp has 8 of them, channel r = lane / 4, states 4k to 4k + 3, k = lane % 4:
// the layout in which the tensor cores sum over lanes. Its threads also load and store, one position and two channels each.

constexpr int CHANNELS = 64, WARPS = 8, SEGMENTS = CHUNK / STEPS, HALF = STEPS / 2;

struct Block {
    float4 states[SEGMENTS][32 * WARPS];        // of each thread at the beginning of each segment of STEPS positions
    float4 elements[STEPS][CHANNELS];           // step, step times u, dout; or, as pairs [2], the first two
    float weights[CHUNK][2 * N];                // B and C
    float results[3][STEPS][CHANNELS + 4];      // sums over states
    float partial[2][WARPS][STEPS][N + 2];      // sums over a warp's channels: of dB, of dC
    int marks[CHUNK];
};

__device__ inline float leading(float x) { return __int_as_float(__float_as_int(x) & 0xffffe000); }

// Sums over k: adds those of x0, y0 to column `column` of `sum` in rows r and r + 8, those of x1, y1 to the next column.
// Products of float inputs are exact to float: each addend goes in two parts, since tf32 keeps 11 bits of one.
__device__ inline void sum_over_k(float (&sum)[4], float x0, float y0, float x1, float y1, int r, int column) {
    const float left = r == column, right = r == column + 1;
    product(sum, x0, y0, x1, y1, left, right);
    if (TYPE == 0) product(sum, x0 - leading(x0), y0 - leading(y0), x1 - leading(x1), y1 - leading(y1), left, right);
}

// Sums over r and then, in thread (r, k), over channels 2k and 2k + 1 of v[j]: of state 4 (r % 4) + r / 4, and of the next but one.
__device__ inline float2 turned(const float (&v)[4], int r, int k) {
    const float left = r == k, right = r == k + 4;
    float sum[4];
    first_product(sum, left, 0, right, 0, v[0], v[1]);
    product(sum, 0, left, 0, right, v[2], v[3]);
    if (TYPE == 0) {
        product(sum, left, 0, right, 0, v[0] - leading(v[0]), v[1] - leading(v[1]));
        product(sum, 0, left, 0, right, v[2] - leading(v[2]), v[3] - leading(v[3]));
    }
    return make_float2(sum[0] + sum[1], sum[2] + sum[3]);
}

extern "C" __global__ void __launch_bounds__(256, 2) backward(const Scan s) {
    Block& block = *(Block*)shared;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, r = lane / 4, k = lane % 4;
    const int tiles = (s.width + CHANNELS - 1) / CHANNELS, tile = blockIdx.x % tiles, part = blockIdx.x / tiles % s.parts;
    const int chunks = (s.length + CHUNK - 1) / CHUNK;
    const wide_int row = blockIdx.x / tiles / s.parts;
    const int own = warp * 8 + r, channel = tile * CHANNELS + own;  // whose states this thread has
    const bool inside = channel < s.width;
    const int pair = tile * CHANNELS + 2 * lane, channels = s.width - pair;  // the two channels that it loads and stores
    const float2 bias = load_vector(s.bias, pair, channels), skip = load_vector(s.D, pair, channels);
    const int line = s.width * (int)sizeof(Element);
    const Element *u = place(s.u, row, s.u_b, pair), *dt = place(s.dt, row, s.dt_b, pair), *z = place(s.z, row, s.z_b, pair);
    const Element* dy = place(s.dy, row * s.length, line, pair);
    const int n = thread % N;  // what it loads of B and C, and sums up of their gradients
    const bool is_C = thread / N % 2;
    const Element* weight = is_C ? place(s.C, row, s.C_b, n) : place(s.B, row, s.B_b, n);
    float* dweight = s.dBC + (tile * (wide_int)s.batch + row) * s.length * 2 * N + lane;

    float A[4], g[4], dA[4] = {0, 0, 0, 0};
    float2 dD = make_float2(0, 0), dbias = make_float2(0, 0);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int n = 4 * k + j;
        const bool exists = inside && n < s.states;
        A[j] = exists ? s.A[(wide_int)channel * s.states + n] * LOG2E : 0;
        g[j] = 0;
        if (s.parts > 1)
            g[j] = inside ? s.entry[((row * s.parts + part) * N + n) * s.width + channel] : 0;
        else if (s.dfinal && exists)
            g[j] = s.dfinal[(row * s.width + channel) * s.states + n];
    }

    for (int chunk = min(chunks, (part + 1) * s.span) - 1; chunk >= part * s.span; chunk--) {
        const int begin = chunk * CHUNK, count = min(CHUNK, s.length - begin), segments = (count + STEPS - 1) / STEPS;
        __syncthreads();
        for (int t = warp; t < segments * STEPS; t += WARPS)
            block.weights[t][lane] = t < count && n < s.states ? value(*moved(weight, begin + t, is_C ? s.C_t : s.B_t)) : 0;
        if (MARKED)
            for (int t = thread; t < CHUNK; t += 32 * WARPS)
                block.marks[t] = t < count ? s.marks[row * s.length + begin + t] : PADDING;
        float h[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            h[j] = inside ? s.starts[((row * chunks + chunk) * N + 4 * k + j) * s.width + channel] : 0;
        __syncthreads();

        // Forward, for the state at the beginning of each segment.
        Pair raw[4], next[4];
        auto fetch = [&](int segment, bool all) {
            const int t = begin + segment * STEPS + warp, some = t < s.length ? channels : 0;
            next[0] = load(moved(u, t, s.u_t), some);
            next[1] = load(moved(dt, t, s.dt_t), some);
            if (all) next[2] = load(moved(dy, t, line), some);
            if (all && GATED) next[3] = load(moved(z, t, s.z_t), some);
        };
        fetch(0, false);
        for (int segment = 0; segment < segments - 1; segment++) {
            float2(*elements)[CHANNELS] = (float2(*)[CHANNELS])block.elements + (segment & 1) * STEPS;
            float2 x = values(next[0]), step = values(next[1]);
            step.x += bias.x, step.y += bias.y;
            if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
            if (MARKED && block.marks[segment * STEPS + warp] == PADDING) step = x = make_float2(0, 0);
            elements[warp][2 * lane] = make_float2(step.x, step.x * x.x);
            elements[warp][2 * lane + 1] = make_float2(step.y, step.y * x.y);
            fetch(segment + 1, false);
            block.states[segment][thread] = make_float4(h[0], h[1], h[2], h[3]);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const float2 element = elements[i][own];
                const float4 B4 = *(const float4*)&block.weights[segment * STEPS + i][4 * k];
                const float B[4] = {B4.x, B4.y, B4.z, B4.w};
                const bool reset = MARKED && block.marks[segment * STEPS + i] == BEGIN;
#pragma unroll
                for (int j = 0; j < 4; j++) h[j] = (reset ? 0 : ex2(element.x * A[j])) * h[j] + element.y * B[j];
            }
        }
        block.states[segments - 1][thread] = make_float4(h[0], h[1], h[2], h[3]);
        __syncthreads();

        // Backward, segment by segment, of each the later half first: decays and states of one half fit the registers.
        fetch(segments - 1, true);
        for (int segment = segments - 1; segment >= 0; segment--) {
#pragma unroll
            for (int i = 0; i < 4; i++) raw[i] = next[i];
            const int time = begin + segment * STEPS + warp;
            const bool dead = time >= s.length || (MARKED && block.marks[segment * STEPS + warp] == PADDING);
            {
                float2 x = values(raw[0]), step = values(raw[1]), dout = values(raw[2]), gate = values(raw[3]);
                step.x += bias.x, step.y += bias.y;
                if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
                if (GATED) dout.x *= gate.x * sigmoid(gate.x), dout.y *= gate.y * sigmoid(gate.y);
                if (dead) step = x = dout = make_float2(0, 0);
                block.elements[warp][2 * lane] = make_float4(step.x, step.x * x.x, dout.x, x.x);
                block.elements[warp][2 * lane + 1] = make_float4(step.y, step.y * x.y, dout.y, x.y);
            }
            __syncthreads();
            if (segment) fetch(segment - 1, true);

            float outs[4] = {0, 0, 0, 0}, dsteps[4] = {0, 0, 0, 0}, dBs[4] = {0, 0, 0, 0}, dCs[4] = {0, 0, 0, 0};
#pragma unroll 1
            for (int half = 1; half >= 0; half--) {
                const float4* elements = &block.elements[half * HALF][own];
                const float* weights = &block.weights[segment * STEPS + half * HALF][4 * k];
                const int* marks = &block.marks[segment * STEPS + half * HALF];
                const float4 state = block.states[segment][thread];
                float h[4] = {state.x, state.y, state.z, state.w};
                if (half)
#pragma unroll
                    for (int i = -HALF; i < 0; i++) {
                        const float4 element = elements[i * CHANNELS], B4 = *(const float4*)(weights + i * 2 * N);
                        const float B[4] = {B4.x, B4.y, B4.z, B4.w};
                        const bool reset = MARKED && marks[i] == BEGIN;
#pragma unroll
                        for (int j = 0; j < 4; j++) h[j] = (reset ? 0 : ex2(element.x * A[j])) * h[j] + element.y * B[j];
                    }
                float decay[HALF][4], decayed[HALF][4];  // exp(dt A), and that times the state before
                float sums[2][2];
                float2 turn[2];
#pragma unroll
                for (int i = 0; i < HALF; i++) {
                    const float4 element = elements[i * CHANNELS], B4 = *(const float4*)(weights + i * 2 * N);
                    const float4 C4 = *(const float4*)(weights + i * 2 * N + N);
                    const float B[4] = {B4.x, B4.y, B4.z, B4.w}, C[4] = {C4.x, C4.y, C4.z, C4.w};
                    const bool reset = MARKED && marks[i] == BEGIN;
                    float terms[4], sum = 0;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        decay[i][j] = reset ? 0 : ex2(element.x * A[j]);
                        decayed[i][j] = decay[i][j] * h[j];
                        h[j] = decayed[i][j] + element.y * B[j];
                        sum += h[j] * C[j];
                        terms[j] = element.z * h[j];
                    }
                    sums[0][i % 2] = sum, turn[i % 2] = turned(terms, r, k);
                    if (i % 2) {
                        sum_over_k(outs, sums[0][0], 0, sums[0][1], 0, r, half * HALF + i - 1);
                        sum_over_k(dCs, turn[0].x, turn[0].y, turn[1].x, turn[1].y, r, half * HALF + i - 1);
                    }
                }
#pragma unroll
                for (int i = HALF - 1; i >= 0; i--) {
                    const float4 element = elements[i * CHANNELS], B4 = *(const float4*)(weights + i * 2 * N);
                    const float4 C4 = *(const float4*)(weights + i * 2 * N + N);
                    const float B[4] = {B4.x, B4.y, B4.z, B4.w}, C[4] = {C4.x, C4.y, C4.z, C4.w};
                    float terms[4], ddrive = 0, dstep = 0;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        g[j] += element.z * C[j];
                        terms[j] = element.y * g[j];
                        ddrive += g[j] * B[j];
                        const float dexponent = g[j] * decayed[i][j];
                        dstep += dexponent * A[j];
                        dA[j] += dexponent * element.x;
                        g[j] *= decay[i][j];
                    }
                    sums[0][i % 2] = ddrive, sums[1][i % 2] = dstep, turn[i % 2] = turned(terms, r, k);
                    if (i % 2 == 0) {
                        sum_over_k(dsteps, sums[0][0], sums[1][0], sums[0][1], sums[1][1], r, half * HALF + i);
                        sum_over_k(dBs, turn[0].x, turn[0].y, turn[1].x, turn[1].y, r, half * HALF + i);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = 2 * k + i, n = 4 * (r % 4) + r / 4;
                block.results[0][t][own] = outs[i], block.results[1][t][own] = dsteps[i], block.results[2][t][own] = dsteps[i + 2];
                block.partial[0][warp][t][n] = dBs[i], block.partial[0][warp][t][n + 2] = dBs[i + 2];
                block.partial[1][warp][t][n] = dCs[i], block.partial[1][warp][t][n + 2] = dCs[i + 2];
            }
            __syncthreads();

            const float2 sum = *(float2*)&block.results[0][warp][2 * lane], driven = *(float2*)&block.results[1][warp][2 * lane];
            const float2 exponent = *(float2*)&block.results[2][warp][2 * lane], before = values(raw[1]);
            const float4 left = block.elements[warp][2 * lane], right = block.elements[warp][2 * lane + 1];
            const float2 step = make_float2(left.x, right.x), dout = make_float2(left.z, right.z), x = make_float2(left.w, right.w);
            float2 du = make_float2(skip.x * dout.x + step.x * driven.x, skip.y * dout.y + step.y * driven.y);
            float2 ddt = make_float2(exponent.x * LN2 + x.x * driven.x, exponent.y * LN2 + x.y * driven.y);
            if (SOFTPLUS) ddt.x *= sigmoid(before.x + bias.x), ddt.y *= sigmoid(before.y + bias.y);
            if (dead) ddt = make_float2(0, 0);
            dD.x += dout.x * x.x, dD.y += dout.y * x.y, dbias.x += ddt.x, dbias.y += ddt.y;
            const int some = time < s.length ? channels : 0;
            const wide_int where = (row * s.length + time) * s.width + pair;
            store((Element*)s.du + where, some, du);
            store((Element*)s.ddt + where, some, ddt);
            if (GATED) {
                const float2 dy = values(raw[2]), gate = values(raw[3]), open = make_float2(sigmoid(gate.x), sigmoid(gate.y));
                float2 dz = make_float2(dy.x * (sum.x + skip.x * x.x) * open.x * (1 + gate.x * (1 - open.x)),
                                        dy.y * (sum.y + skip.y * x.y) * open.y * (1 + gate.y * (1 - open.y)));
                if (dead) dz = make_float2(0, 0);
                store((Element*)s.dz + where, some, dz);
            }
            float weight = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) weight += block.partial[is_C][w][warp][n];
            if (time < s.length) dweight[(wide_int)time * 2 * N] = weight;
        }
    }

    float* sums = s.sums + (row * s.parts + part) * (N + 2) * s.width;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int n = 4 * k + j;
        if (inside) sums[(wide_int)n * s.width + channel] = dA[j];
        if (inside && part == 0 && n < s.states) s.dinitial[(row * s.width + channel) * s.states + n] = g[j];
    }
    float4* ends = block.elements[0];  // [WARPS][32]
    __syncthreads();
    ends[thread] = make_float4(dD.x, dD.y, dbias.x, dbias.y);
    __syncthreads();
    if (thread < 2 * CHANNELS) {
        const int which = thread / CHANNELS, c = thread % CHANNELS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += ((float*)&ends[w * 32 + c / 2])[2 * which + c % 2];
        if (tile * CHANNELS + c < s.width) sums[(wide_int)(N + which) * s.width + tile * CHANNELS + c] = sum;
    }
}
