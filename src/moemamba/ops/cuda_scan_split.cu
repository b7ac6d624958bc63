// The scan forward in time where channels are few; compiled as one with cuda_scan.cu, which comes first.
//
// Four lanes share two neighbouring channels, a quarter of the states each, so a warp has 16 channels. Eight positions at a time, it
// first prepares steps and inputs, each lane four channels of one position, then walks, and last adds what the lanes that
// share a channel found, gates and stores it, again four channels of one position a lane.

constexpr int SHARE = N / 4, MINE = 16;  // states of a lane, channels of a warp

struct Bench {  // a warp's own, for STEPS positions
    float4 inputs[STEPS][MINE / 2];  // of two channels: their steps, and these times u
    float B[STEPS][N], C[STEPS][N], outs[STEPS][4][MINE];
    int marks[STEPS];
};

struct alignas(4 * sizeof(Element)) Four {
    Pair pairs[2];
};

__device__ inline Four load_four(const Element* row, int count) {
    if (ABREAST >= 4) return count > 0 ? *(const Four*)row : Four();
    return {load(row, count), load(row + 2, count - 2)};
}

__device__ inline Four load_weights(const Element* row, int count) {
    if (WEIGHED) return count > 0 ? *(const Four*)row : Four();
    return {paired(count > 0 ? row[0] : Element(), count > 1 ? row[1] : Element()),
            paired(count > 2 ? row[2] : Element(), count > 3 ? row[3] : Element())};
}

__device__ inline float4 values(const Four& x) {
    const float2 a = values(x.pairs[0]), b = values(x.pairs[1]);
    return make_float4(a.x, a.y, b.x, b.y);
}

__device__ inline float4 load_vector_four(const float* vector, int channel, int count) {
    const float2 a = load_vector(vector, channel, count), b = load_vector(vector, channel + 2, count - 2);
    return make_float4(a.x, a.y, b.x, b.y);
}

extern "C" __global__ void __launch_bounds__(128, 4) forward_split(const Scan s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (s.width + 4 * MINE - 1) / (4 * MINE);
    const int part = blockIdx.x / tiles % s.parts;
    const wide_int row = blockIdx.x / tiles / s.parts;
    const int begin = part * s.span * CHUNK, count = min(s.length, begin + s.span * CHUNK) - begin;
    Bench& bench = ((Bench*)shared)[warp];
    const int base = blockIdx.x % tiles * 4 * MINE + warp * MINE;
    const int turn = lane / 4, four = lane % 4 * 4, side = base + four, sides = s.width - side;  // of what it prepares and stores
    const int couple = lane / 4, share = lane % 4 * SHARE, channel = base + 2 * couple, channels = s.width - channel;  // and walks

    const Element *u = moved(place(s.u, row, s.u_b, side), begin + turn, s.u_t), *dt = moved(place(s.dt, row, s.dt_b, side), begin + turn, s.dt_t);
    const Element *z = moved(place(s.z, row, s.z_b, side), begin + turn, s.z_t);
    const Element *B = moved(place(s.B, row, s.B_b, four), begin + turn, s.B_t), *C = moved(place(s.C, row, s.C_b, four), begin + turn, s.C_t);
    Element* y = (Element*)s.y + (row * s.length + begin + turn) * s.width + side;
    Four next_u, next_dt, next_z = {}, next_B, next_C;
    int left = count - turn, next_mark = PLAIN;  // of this lane's positions
    auto fetch = [&]() {
        const int some = left > 0 ? sides : 0, states = left > 0 ? s.states - four : 0;
        next_u = load_four(u, some), next_dt = load_four(dt, some);
        if (GATED) next_z = load_four(z, some);
        next_B = load_weights(B, states), next_C = load_weights(C, states);
        if (MARKED) next_mark = left > 0 ? s.marks[row * s.length + begin + count - left] : PADDING;
        u = moved(u, STEPS, s.u_t), dt = moved(dt, STEPS, s.dt_t), z = moved(z, STEPS, s.z_t);
        B = moved(B, STEPS, s.B_t), C = moved(C, STEPS, s.C_t), left -= STEPS;
    };

    fetch();
    follow();
    float h[2][SHARE] = {}, A[2][SHARE] = {};
    const wide_int cells = ((row * s.parts + part) * N + share) * (wide_int)s.width + channel;
#pragma unroll
    for (int c = 0; c < 2; c++)
        if (c < channels) {
            load_states(A[c], s.A, channel + c, share, s.states);
            if (s.parts == 1 && s.initial) load_states(h[c], s.initial, row * s.width + channel + c, share, s.states);
        }
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
        A[0][j] *= LOG2E, A[1][j] *= LOG2E;
        if (s.parts == 1) continue;
        const float2 entered = load_column(s.entry + cells + (wide_int)j * s.width, channels);
        h[0][j] = entered.x, h[1][j] = entered.y;
    }
    const float4 bias = load_vector_four(s.bias, side, sides), skip = load_vector_four(s.D, side, sides);

    for (int first = 0; first < count; first += STEPS) {
        const bool exists = first + turn < count, dead = !exists || (MARKED && next_mark == PADDING);
        const float4 x = values(next_u), gate = values(next_z);
        {
            float4 step = values(next_dt);
            step.x += bias.x, step.y += bias.y, step.z += bias.z, step.w += bias.w;
            if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y), step.z = softplus(step.z), step.w = softplus(step.w);
            if (dead) step = make_float4(0, 0, 0, 0);
            bench.inputs[turn][four / 2] = make_float4(step.x, step.y, dead ? 0 : step.x * x.x, dead ? 0 : step.y * x.y);
            bench.inputs[turn][four / 2 + 1] = make_float4(step.z, step.w, dead ? 0 : step.z * x.z, dead ? 0 : step.w * x.w);
            *(float4*)&bench.B[turn][four] = values(next_B), *(float4*)&bench.C[turn][four] = values(next_C);
            if (MARKED && four == 0) bench.marks[turn] = next_mark;
        }
        __syncwarp();
        fetch();
        if (s.starts && (begin + first) % CHUNK == 0) {
            float* start = s.starts + ((row * ((s.length + CHUNK - 1) / CHUNK) + (begin + first) / CHUNK) * N + share) * s.width + channel;
#pragma unroll
            for (int j = 0; j < SHARE; j++) store_column(start + (wide_int)j * s.width, channels, h[0][j], h[1][j]);
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            const float4 input = bench.inputs[k][couple], B4 = *(const float4*)&bench.B[k][share], C4 = *(const float4*)&bench.C[k][share];
            const float B[SHARE] = {B4.x, B4.y, B4.z, B4.w}, C[SHARE] = {C4.x, C4.y, C4.z, C4.w};
            float out[2] = {};
            const bool reset = MARKED && bench.marks[k] == BEGIN;
#pragma unroll
            for (int j = 0; j < SHARE; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float decay = ex2((c ? input.y : input.x) * A[c][j]);
                    h[c][j] = decay * (reset ? 0 : h[c][j]) + (c ? input.w : input.z) * B[j];
                    out[c] += h[c][j] * C[j];
                }
            *(float2*)&bench.outs[k][share / SHARE][2 * couple] = make_float2(out[0], out[1]);
        }
        __syncwarp();
        float4 out = make_float4(skip.x * x.x, skip.y * x.y, skip.z * x.z, skip.w * x.w);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float4 found = *(const float4*)&bench.outs[turn][k][four];
            out.x += found.x, out.y += found.y, out.z += found.z, out.w += found.w;
        }
        if (GATED) {
            const float2 low = opened(make_float2(gate.x, gate.y)), high = opened(make_float2(gate.z, gate.w));
            out = make_float4(out.x * low.x, out.y * low.y, out.z * high.x, out.w * high.y);
        }
        if (MARKED && dead) out = make_float4(0, 0, 0, 0);
        const Four whole = {packed(make_float2(out.x, out.y)), packed(make_float2(out.z, out.w))};
        if (exists && ABREAST >= 4) {
            if (sides > 0) *(Four*)y = whole;
        } else if (exists) {
            store(y, sides, make_float2(out.x, out.y)), store(y + 2, sides - 2, make_float2(out.z, out.w));
        }
        y += (wide_int)STEPS * s.width;
    }
    if (part == s.parts - 1)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (c < channels) store_states(s.final, h[c], row * s.width + channel + c, share, s.states);
}
