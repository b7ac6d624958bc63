// The selective scan and its gradients for NVIDIA GPUs (sm_80 and later), compiled as one with kit/elements.cu, which comes first.
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = (C_t h_t + D u_t) silu(z_t)
//
// Constants of a compilation. TYPE is that of u, dt, z, B, C and y: 0 float, 1 bfloat16, 2 float16; everything is computed in
// float. MARKED: there are marks (b, l) that say which positions reset the state (BEGIN) and which are padding (PADDING).
// GATED: there is a z. SOFTPLUS: steps go through it. ABREAST: how many channels can be loaded together, 1, 2 or those of 16
// bytes. WEIGHED: there are N states, and 16 bytes of B and C can be loaded together. CHUNK: positions between saved states, a
// multiple of STEPS. TILE: channels of a block of the backward pass.
//
// Time is cut into `parts` of `span` chunks, which run side by side. One part will do where batch and channels fill the
// GPU. Where not, `summarise` finds what each part adds to a state that enters as zero, and the sum of its steps, from which
// its decay follows; `carry` turns these into the states that enter the parts (`entry`); likewise, back in time, for adjoints.
// States that only kernels see lie as (b, parts or chunks, N, i), so that neighbouring channels are neighbours in memory.
//
// Nothing is summed by atomics: results repeat bit for bit.

constexpr int N = 16;      // states of a channel; a scan of fewer is padded with states that stay zero
constexpr int STEPS = 8;   // positions that are loaded at a time
constexpr bool PAIRED = ABREAST > 1;
constexpr int PLAIN = 0, BEGIN = 1, PADDING = 2;
#define INFINITE __int_as_float(0x7f800000)

// Laid out as cuda.py packs it. u, dt, z, B and C have strides, in bytes; every other tensor is contiguous.
struct Scan {
    const void *u, *dt, *z, *B, *C, *dy;
    const float *A, *D, *bias, *initial, *dfinal;
    const signed char* marks;
    float *entry, *totals, *starts;
    void *y, *du, *ddt, *dz;
    float *final, *dinitial, *dBC, *sums, *dA, *dD, *dbias;
    void *dB, *dC;
    wide_int u_b, dt_b, z_b, B_b, C_b;
    int u_t, dt_t, z_t, B_t, C_t;
    int batch, length, width, states, span, parts;
};

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

// COUNT neighbouring states of a channel, from state `first` on, of a tensor (rows, states): 0 where there is none.
template <int COUNT> __device__ inline void load_states(float (&to)[COUNT], const float* tensor, wide_int row, int first, int states) {
    const float* from = tensor + row * states + first;
    if (states == N && (wide_int)tensor % sizeof(float4) == 0)
#pragma unroll
        for (int n = 0; n < COUNT; n += 4) {
            const float4 four = *(const float4*)(from + n);
            to[n] = four.x, to[n + 1] = four.y, to[n + 2] = four.z, to[n + 3] = four.w;
        }
    else
#pragma unroll
        for (int n = 0; n < COUNT; n++) to[n] = first + n < states ? from[n] : 0;
}

template <int COUNT> __device__ inline void store_states(float* tensor, const float (&x)[COUNT], wide_int row, int first, int states) {
    float* to = tensor + row * states + first;
    if (states == N)
#pragma unroll
        for (int n = 0; n < COUNT; n += 4) *(float4*)(to + n) = make_float4(x[n], x[n + 1], x[n + 2], x[n + 3]);
    else
#pragma unroll
        for (int n = 0; n < COUNT; n++)
            if (first + n < states) to[n] = x[n];
}

// One state of two neighbouring channels, of a tensor (.., N, i).
__device__ inline float2 load_column(const float* from, int count) {
    if (PAIRED) return count > 0 ? *(const float2*)from : make_float2(0, 0);
    return make_float2(count > 0 ? from[0] : 0, count > 1 ? from[1] : 0);
}

__device__ inline void store_column(float* to, int count, float x, float y) {
    if (PAIRED) {
        if (count > 0) *(float2*)to = make_float2(x, y);
    } else {
        if (count > 0) to[0] = x;
        if (count > 1) to[1] = y;
    }
}

__device__ inline float2 load_vector(const float* vector, int channel, int count) {
    if (!vector) return make_float2(0, 0);
    return make_float2(count > 0 ? vector[channel] : 0, count > 1 ? vector[channel + 1] : 0);
}

// max(x, 0) + log1p(e^-|x|), the logarithm as e P(e): Chebyshev fits on [0, 1], relative errors below 4e-7, and 1e-5 for 16 bits.
__device__ inline float softplus(float x) {
    const float e = ex2(-LOG2E * fabsf(x));
#if TYPE == 0
    float p = -0.008574675768613815f;
    p = p * e + 0.044214192777872086f;
    p = p * e - 0.10785368084907532f;
    p = p * e + 0.17757023870944977f;
    p = p * e - 0.2449961155653f;
    p = p * e + 0.3327617645263672f;
    p = p * e - 0.49997448921203613f;
    p = p * e + 0.9999998211860657f;
#else
    float p = -0.023869110271334648f;
    p = p * e + 0.10122217983007431f;
    p = p * e - 0.2100486010313034f;
    p = p * e + 0.3252066373825073f;
    p = p * e - 0.4993613660335541f;
    p = p * e + 0.9999915957450867f;
#endif
    return fmaxf(x, 0) + e * p;
}

// silu of two, by one reciprocal, of a product; that is finite since exponents are kept at 60 or less, where silu is nothing.
__device__ inline float2 silu(float2 x) {
    const float a = 1 + ex2(fminf(-LOG2E * x.x, 60)), b = 1 + ex2(fminf(-LOG2E * x.y, 60)), r = reciprocal(a * b);
    return make_float2(x.x * (r * b), x.y * (r * a));
}

// ---- Along time, or back: one thread has two neighbouring channels with all their states in registers.

enum Pass { FORWARD, SUMMARY, ADJOINT };  // ADJOINT: the summary of adjoint states, g_{t-1} = exp(dt_t A) (g_t + C_t dout_t)

// A warp walks on its own: what it has in shared memory. B and C lie side by side, as they are in memory and as floats.
struct Desk {
    Pair ring[2][3][STEPS][32];  // u or dy, dt, z of the positions at hand, and of the next
    Element raw[2][STEPS][2 * N];
#if TYPE != 0
    float weights[STEPS][2 * N];
#endif
#if MARKED
    int marks[2][STEPS];
#endif
};

template <Pass PASS> __device__ inline void walk(const Scan& s) {
    const int threads = blockDim.x, thread = threadIdx.x, tiles = (s.width + 2 * threads - 1) / (2 * threads), lane = thread % 32;
    const int parts = PASS == FORWARD ? s.parts : s.parts - 1;  // no part needs the summary of the last
    const int part = blockIdx.x / tiles % parts + (PASS == ADJOINT);
    const wide_int row = blockIdx.x / tiles / parts;
    const int channel = (blockIdx.x % tiles * threads + thread) * 2, channels = s.width - channel;
    const int begin = part * s.span * CHUNK, end = min(s.length, begin + s.span * CHUNK), count = end - begin;
    constexpr int WAY = PASS == ADJOINT ? -1 : 1;
    Desk& desk = ((Desk*)shared)[thread / 32];

    // A warp copies ABREAST channels a lane, ROWS positions together; of B and C 16 bytes a lane, WROWS positions.
    constexpr bool gated = GATED && PASS != SUMMARY, copied = ABREAST > 1;
    constexpr int ACROSS = copied ? 64 / ABREAST : 32, ROWS = 32 / ACROSS, INPUTS = gated ? 3 : 2;
    constexpr int LUMP = 16 / sizeof(Element), WACROSS = 2 * N / LUMP, WROWS = 32 / WACROSS;
    const int from_channel = copied ? channel - 2 * lane + lane % ACROSS * ABREAST : channel, ahead = lane / ACROSS;
    const int first_row = PASS == ADJOINT ? end - 1 : begin, line = s.width * (int)sizeof(Element);
    const int strides[3] = {PASS == ADJOINT ? line : s.u_t, s.dt_t, s.z_t};
    const Element* inputs[3] = {
        PASS == ADJOINT ? place(s.dy, row * s.length, line, from_channel) : place(s.u, row, s.u_b, from_channel),
        place(s.dt, row, s.dt_b, from_channel), place(s.z, row, s.z_b, from_channel)};
#pragma unroll
    for (int i = 0; i < INPUTS; i++) inputs[i] = moved(inputs[i], first_row + WAY * ahead, strides[i]);
    const int column = WEIGHED ? lane % WACROSS * LUMP : lane, wahead = WEIGHED ? lane / WACROSS : 0;
    const int weight_t = column < N ? s.B_t : s.C_t;
    const Element* weight = column < N ? place(s.B, row, s.B_b, column) : place(s.C, row, s.C_b, column - N);
    weight = moved(weight, first_row + WAY * wahead, weight_t);

    int side = 0, left = count;  // to be fetched
    auto fetch = [&]() {
        Pair* to = copied ? &desk.ring[side][0][ahead][lane % ACROSS * ABREAST / 2] : &desk.ring[side][0][0][lane];
#pragma unroll
        for (int k = 0; k < STEPS; k += ROWS) {
            const bool exists = k + ahead < left && from_channel < s.width;
#pragma unroll
            for (int i = 0; i < INPUTS; i++) {
                if (copied) {
                    if (exists) copy<ABREAST * sizeof(Element)>(to + (i * STEPS + k) * 32, inputs[i]);
                } else if (exists)
                    to[(i * STEPS + k) * 32] = load(inputs[i], channels);
                inputs[i] = moved(inputs[i], WAY * ROWS, strides[i]);
            }
        }
        if (WEIGHED)
#pragma unroll
            for (int k = 0; k < STEPS; k += WROWS) {
                if (k + wahead < left) copy<16>(&desk.raw[side][k + wahead][column], weight);
                weight = moved(weight, WAY * WROWS, weight_t);
            }
        else
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                desk.raw[side][k][lane] = k < left && lane % N < s.states ? *weight : Element();
                weight = moved(weight, WAY, weight_t);
            }
#if MARKED
        if (lane < STEPS) desk.marks[side][lane] = lane < left ? s.marks[row * s.length + first_row + WAY * (count - left + lane)] : PLAIN;
#endif
        side ^= 1, left -= STEPS;
    };

    fetch();
    if (PASS == FORWARD) follow();  // what comes next is of the kernel before
    else invite();
    float h[2][N] = {}, A[2][N] = {};
    float* entry = s.entry + (row * s.parts + part) * N * s.width + channel;
#pragma unroll
    for (int c = 0; c < 2; c++)
        if (c < channels) {
            load_states(A[c], s.A, channel + c, 0, s.states);
            if (PASS == FORWARD && s.parts == 1 && s.initial) load_states(h[c], s.initial, row * s.width + channel + c, 0, s.states);
        }
#pragma unroll
    for (int n = 0; n < N; n++) {
        A[0][n] *= LOG2E, A[1][n] *= LOG2E;
        if (PASS != FORWARD || s.parts == 1) continue;
        const float2 entered = load_column(entry + (wide_int)n * s.width, channels);
        h[0][n] = entered.x, h[1][n] = entered.y;
    }
    const float2 bias = load_vector(s.bias, channel, channels), skip = load_vector(s.D, channel, channels);
    float2 total = make_float2(0, 0);
    Element* to = (Element*)s.y + (row * s.length + begin) * s.width + channel;

    for (int group = 0; group * STEPS < count; group++) {
        const int now = side ^ 1, here = min(STEPS, count - group * STEPS), first = begin + group * STEPS;
        arrived();
#if TYPE == 0
        __syncwarp();
        const float(*weights)[2 * N] = desk.raw[now];
#else
        const float(*weights)[2 * N] = desk.weights;
        if (!WEIGHED) __syncwarp();
        Element lump[8];
        *(float4*)lump = *(const float4*)&desk.raw[now][lane / 4][lane % 4 * 8];
        __syncwarp();  // the positions before are done with
#pragma unroll
        for (int j = 0; j < 8; j += 4)
            *(float4*)&desk.weights[lane / 4][lane % 4 * 8 + j] =
                make_float4(value(lump[j]), value(lump[j + 1]), value(lump[j + 2]), value(lump[j + 3]));
        __syncwarp();
#endif
        if (left > 0) fetch();
        else side ^= 1;
        if (PASS == FORWARD && s.starts && first % CHUNK == 0) {
            float* start = s.starts + (row * ((s.length + CHUNK - 1) / CHUNK) + first / CHUNK) * N * s.width + channel;
#pragma unroll
            for (int n = 0; n < N; n++) store_column(start + (wide_int)n * s.width, channels, h[0][n], h[1][n]);
        }
        const Pair* at = &desk.ring[now][0][0][lane];
#pragma unroll 1
        for (int k = 0; k < here; k++) {
            float2 x = values(at[0]), step = values(at[STEPS * 32]), gate = make_float2(0, 0), open = gate;
            if (gated) gate = values(at[2 * STEPS * 32]);
            at += 32;
            step.x += bias.x, step.y += bias.y;
            if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
            if (gated) open = silu(gate);
#if MARKED
            const int mark = desk.marks[now][k];
#else
            constexpr int mark = PLAIN;
#endif
            if (MARKED && mark == PADDING) step = x = gate = open = make_float2(0, 0);
            float drive[2] = {step.x * x.x, step.y * x.y}, out[2] = {skip.x * x.x, skip.y * x.y};
            if (PASS == ADJOINT) drive[0] = gated ? x.x * open.x : x.x, drive[1] = gated ? x.y * open.y : x.y;
            if (PASS != FORWARD) total.x += step.x, total.y += step.y;
            if (MARKED && mark == BEGIN && PASS != ADJOINT)
#pragma unroll
                for (int n = 0; n < N; n++) h[0][n] = h[1][n] = 0;
            if (!MARKED || mark != PADDING)  // padding changes no state, whatever is there
#pragma unroll
            for (int n = 0; n < N; n += 4) {
                const float4 B4 = *(const float4*)&weights[k][PASS == ADJOINT ? N + n : n];
                const float4 C4 = PASS == FORWARD ? *(const float4*)&weights[k][N + n] : B4;
                const float B[4] = {B4.x, B4.y, B4.z, B4.w}, C[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const float decay = ex2((c ? step.y : step.x) * A[c][n + j]);
                        float& state = h[c][n + j];
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
                    for (int n = 0; n < N; n++) h[0][n] = h[1][n] = 0;
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
#pragma unroll
        for (int n = 0; n < N; n++) store_column(entry + (wide_int)n * s.width, channels, h[0][n], h[1][n]);
    } else if (part == s.parts - 1)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (c < channels) store_states(s.final, h[c], row * s.width + channel + c, 0, s.states);
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
            state = (decay[k] == INFINITE ? 0 : ex2(decay[k] * A) * state) + added[k];
        }
    }
}

extern "C" __global__ void carry(const Scan s) {
    invite(), follow();
    carried<false>(s);
}
extern "C" __global__ void carry_back(const Scan s) { carried<true>(s); }
