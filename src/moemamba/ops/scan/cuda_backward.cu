// The gradients of the selective scan; compiled as one with cuda.cu, which comes first.
//
// A warp has 16 channels and works alone: lane l has channel l % 16 and states 8 (l / 16) to 8 (l / 16) + 7. Chunk by chunk, back
// in time, it walks forward once, keeping the state before every group of GROUP positions in shared memory, and then takes group
// after group backward, decays and states of one group in registers. Its lanes also load and store, two channels and
// every fourth position each. Warps of a block meet twice a chunk, to sum dB and dC over the block's channels.

constexpr int GROUP = 4, CHANNELS = 16, WARPS = TILE / CHANNELS, OWN = N / 2, GROUPS = CHUNK / GROUP;

struct Block {
    float4 states[WARPS][GROUPS][2][32];  // of each lane before each group; then sums over the warp's channels:
                                          // [GROUP / 2 pairs of positions][dB, dC][2][N] floats
    float4 elements[WARPS][GROUP][CHANNELS];       // step, step times u, dout, u
    float results[WARPS][GROUP][3][2][CHANNELS];   // sums over each half of the states
    float weights[CHUNK][2 * N];                   // B and C
    int marks[CHUNK];
};

__device__ inline float leading(float x) { return __int_as_float(__float_as_int(x) & 0xffffe000); }

// Values loaded from shared memory before are not kept in registers beyond this.
__device__ inline void forget() {
#ifndef EMULATED
    asm volatile("" ::: "memory");
#endif
}

// Sums over the channels of four neighbouring lanes v[0] to v[7] of the first or second of two positions: in lane l, with k = l % 4,
// `sum` gets those of position k / 2 and states 4 (k % 2) + {0, 2, 1, 3}, in lane 4 r + k of lanes 4 r to 4 r + 3.
// Products of float inputs are exact to float: each addend goes in two parts, since tf32 keeps 11 bits of one.
// Where there are marks a position's sums are selected: the other position may be of another sequence, and zero times what is not
// a number is none.
__device__ inline void gather(float (&total)[4], const float (&v)[OWN], int position, int r) {
#if MARKED
    float sum[4] = {};
#else
    float(&sum)[4] = total;
#endif
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const int column = 4 * position + 2 * q;
        const float left = r == column, right = r == column + 1, *x = v + 4 * q;
        product(sum, x[0], x[1], x[2], x[3], left, right);
        if (TYPE == 0)
            product(sum, x[0] - leading(x[0]), x[1] - leading(x[1]), x[2] - leading(x[2]), x[3] - leading(x[3]), left, right);
    }
#if MARKED
    if (threadIdx.x % 4 / 2 == position)
#pragma unroll
        for (int i = 0; i < 4; i++) total[i] = sum[i];
#endif
}

// The sum of what `gather` left, over the warp's channels: of state 4 (k % 2) + r % 4 of the half r / 4.
__device__ inline float scattered(const float (&sum)[4], int lane) {
    const bool upper = lane & 8, odd = lane & 4;
    const float even = (upper ? sum[1] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[1], 8);
    const float other = (upper ? sum[3] : sum[2]) + __shfl_xor_sync(~0u, upper ? sum[2] : sum[3], 8);
    return (odd ? other : even) + __shfl_xor_sync(~0u, odd ? even : other, 4);
}

__device__ inline void read(float (&to)[OWN], const float* from) {
    const float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) backward(const Scan s) {
    Block& block = *(Block*)shared;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, r = lane / 4;
    const int tiles = (s.width + TILE - 1) / TILE, tile = blockIdx.x % tiles, part = blockIdx.x / tiles % s.parts;
    const int chunks = (s.length + CHUNK - 1) / CHUNK;
    const wide_int row = blockIdx.x / tiles / s.parts;
    const int own = lane % CHANNELS, half = lane / CHANNELS, channel = tile * TILE + warp * CHANNELS + own;  // of its states
    const bool inside = channel < s.width;
    // The two channels that it loads and stores, and the first of its positions in a group.
    const int couple = lane % 8, turn = lane / 8, pair = tile * TILE + warp * CHANNELS + 2 * couple, channels = s.width - pair;
    const float2 bias = load_vector(s.bias, pair, channels), skip = load_vector(s.D, pair, channels);
    const int line = s.width * (int)sizeof(Element);
    const Element *u = place(s.u, row, s.u_b, pair), *dt = place(s.dt, row, s.dt_b, pair), *z = place(s.z, row, s.z_b, pair);
    const Element* dy = place(s.dy, row * s.length, line, pair);
    const int n = lane % N;  // what it loads of B and C
    const bool is_C = lane / N;
    const Element* weight = is_C ? place(s.C, row, s.C_b, n) : place(s.B, row, s.B_b, n);
    float4(*elements)[CHANNELS] = block.elements[warp];
    float(*results)[3][2][CHANNELS] = block.results[warp];
    // Where what `scattered` returns belongs.
    const int target = (lane % 4 / 2) * N + (lane / 16) * OWN + lane % 2 * 4 + lane / 4 % 4;

    float A[OWN], g[OWN], dA[OWN], h[OWN];
    Element weighed[CHUNK / WARPS];
    float2 dD = make_float2(0, 0), dbias = make_float2(0, 0);
#pragma unroll
    for (int j = 0; j < OWN; j++) A[j] = g[j] = dA[j] = 0;
    if (inside) load_states(A, s.A, channel, OWN * half, s.states);
    if (inside && s.dfinal && s.parts == 1) load_states(g, s.dfinal, row * s.width + channel, OWN * half, s.states);
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        A[j] *= LOG2E;
        if (inside && s.parts > 1) g[j] = s.entry[((row * s.parts + part) * N + OWN * half + j) * s.width + channel];
    }

    const int first = part * s.span;
    Pair next[4];
    auto fetch = [&](int time, bool all) {
        const int some = time >= first * CHUNK && time < s.length ? channels : 0;
        next[0] = load(moved(u, time, s.u_t), some);
        next[1] = load(moved(dt, time, s.dt_t), some);
        if (all) next[2] = load(moved(dy, time, line), some);
        if (all && GATED) next[3] = load(moved(z, time, s.z_t), some);
    };
    auto open_chunk = [&](int chunk) {
        const bool exists = chunk >= first;
        const float* start = s.starts + ((row * chunks + chunk) * N + OWN * half) * s.width + channel;
#pragma unroll
        for (int j = 0; j < OWN; j++, start += s.width) h[j] = exists && inside ? *start : 0;
        fetch(chunk * CHUNK + turn, false);
        const int rows = exists && n < s.states ? s.length - chunk * CHUNK - warp : 0, stride = is_C ? s.C_t : s.B_t;
        const Element* from = moved(weight, chunk * CHUNK + warp, stride);
#pragma unroll
        for (int i = 0; i < CHUNK / WARPS; i++, from = moved(from, WARPS, stride)) {
            weighed[i] = i * WARPS < rows ? *from : Element();
            if (MARKED && i * WARPS < rows && s.marks[row * s.length + chunk * CHUNK + warp + i * WARPS] == PADDING) weighed[i] = Element();
        }
    };

    int chunk = min(chunks, first + s.span) - 1;
    open_chunk(chunk);
    for (; chunk >= first; chunk--) {
        const int begin = chunk * CHUNK, count = min(CHUNK, s.length - begin), groups = (count + GROUP - 1) / GROUP;
#pragma unroll
        for (int i = 0; i < CHUNK / WARPS; i++) block.weights[i * WARPS + warp][lane] = value(weighed[i]);
        if (MARKED && thread < CHUNK) block.marks[thread] = thread < count ? s.marks[row * s.length + begin + thread] : PADDING;
        __syncthreads();

        if (chunk > first && pair - 2 * couple < s.width) {  // what the next chunk reads: each lane a row, or a state
            const int t = begin - CHUNK + lane % CHUNK;
            prefetch(moved(u, t, s.u_t) - 2 * couple), prefetch(moved(dt, t, s.dt_t) - 2 * couple);
            prefetch(moved(dy, t, line) - 2 * couple);
            if (GATED) prefetch(moved(z, t, s.z_t) - 2 * couple);
            prefetch(s.starts + ((row * chunks + chunk - 1) * N + n) * s.width + pair - 2 * couple);
        }

        // Forward, for the state before each group.
#pragma unroll 1
        for (int group = 0; group < groups; group++) {
            float4(*state)[32] = block.states[warp][group];
            state[0][lane] = make_float4(h[0], h[1], h[2], h[3]), state[1][lane] = make_float4(h[4], h[5], h[6], h[7]);
            if (group == groups - 1) break;
            const int at = group * GROUP + turn;
            float2 x = values(next[0]), step = values(next[1]);
            fetch(begin + at + GROUP, false);
            step.x += bias.x, step.y += bias.y;
            if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
            if (MARKED && block.marks[at] == PADDING) step = x = make_float2(0, 0);
            float4(*pairs)[CHANNELS / 2] = (float4(*)[CHANNELS / 2])elements + group % 2 * GROUP;  // step, step times u of two channels
            pairs[turn][couple] = make_float4(step.x, step.x * x.x, step.y, step.y * x.y);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const float2 element = ((const float2*)pairs[i])[own];
                float B[OWN];
                read(B, &block.weights[group * GROUP + i][OWN * half]);
                const bool reset = MARKED && block.marks[group * GROUP + i] == BEGIN;
#pragma unroll
                for (int j = 0; j < OWN; j++) h[j] = (reset ? 0 : ex2(element.x * A[j]) * h[j]) + element.y * B[j];
            }
        }

        // Backward.
        fetch(begin + (groups - 1) * GROUP + turn, true);
        __syncwarp();
#pragma unroll 1
        for (int group = groups - 1; group >= 0; group--) {
            const int at = group * GROUP + turn, time = begin + at;
            const bool dead = time >= s.length || (MARKED && block.marks[at] == PADDING);
            Pair raw[4];
#pragma unroll
            for (int i = 0; i < 4; i++) raw[i] = next[i];
            {
                float2 x = values(raw[0]), step = values(raw[1]), dout = values(raw[2]), gate = values(raw[3]);
                step.x += bias.x, step.y += bias.y;
                if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
                if (GATED) dout.x *= gate.x * sigmoid(gate.x), dout.y *= gate.y * sigmoid(gate.y);
                if (dead) step = x = dout = make_float2(0, 0);
                elements[turn][2 * couple] = make_float4(step.x, step.x * x.x, dout.x, x.x);
                elements[turn][2 * couple + 1] = make_float4(step.y, step.y * x.y, dout.y, x.y);
            }
            float4(*state)[32] = block.states[warp][group];
            const float4 low = state[0][lane], high = state[1][lane];
            h[0] = low.x, h[1] = low.y, h[2] = low.z, h[3] = low.w, h[4] = high.x, h[5] = high.y, h[6] = high.z, h[7] = high.w;
            if (group) fetch(time - GROUP, true);
            __syncwarp();

            float* sums = (float*)state;
            float decay[GROUP][OWN], decayed[GROUP][OWN];  // exp(dt A), and that times the state before
            float sum[4];
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const float4 element = elements[i][own];
                float B[OWN], C[OWN], terms[OWN], out = 0;
                read(B, &block.weights[group * GROUP + i][OWN * half]);
                read(C, &block.weights[group * GROUP + i][OWN * half + N]);
                const bool reset = MARKED && block.marks[group * GROUP + i] == BEGIN;
#pragma unroll
                for (int j = 0; j < OWN; j++) {
                    decay[i][j] = reset ? 0 : ex2(element.x * A[j]);
                    decayed[i][j] = reset ? 0 : decay[i][j] * h[j];
                    h[j] = decayed[i][j] + element.y * B[j];
                    out += h[j] * C[j];
                    terms[j] = element.z * h[j];
                }
                results[i][0][half][own] = out;
                if (i % 2 == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
                gather(sum, terms, i % 2, r);
                if (i % 2) sums[(i / 2 * 2 + 1) * 2 * N + target] = scattered(sum, lane);
            }
            forget();
#pragma unroll
            for (int i = GROUP - 1; i >= 0; i--) {
                const float4 element = elements[i][own];
                float B[OWN], C[OWN], terms[OWN], ddrive = 0, dstep = 0;
                read(B, &block.weights[group * GROUP + i][OWN * half]);
                read(C, &block.weights[group * GROUP + i][OWN * half + N]);
                const bool reset = MARKED && block.marks[group * GROUP + i] == BEGIN;
#pragma unroll
                for (int j = 0; j < OWN; j++) {
                    g[j] += element.z * C[j];
                    terms[j] = element.y * g[j];
                    ddrive += g[j] * B[j];
                    const float dexponent = g[j] * decayed[i][j];
                    dstep += dexponent * A[j];
                    dA[j] += dexponent * element.x;
                    g[j] = reset ? 0 : g[j] * decay[i][j];
                }
                results[i][1][half][own] = ddrive, results[i][2][half][own] = dstep;
                if (i % 2) sum[0] = sum[1] = sum[2] = sum[3] = 0;
                gather(sum, terms, i % 2, r);
                if (i % 2 == 0) sums[i / 2 * 2 * 2 * N + target] = scattered(sum, lane);
            }
            __syncwarp();

            {
                float2 result[3];
#pragma unroll
                for (int i = 0; i < 3; i++) {
                    const float2 a = *(float2*)&results[turn][i][0][2 * couple], b = *(float2*)&results[turn][i][1][2 * couple];
                    result[i] = make_float2(a.x + b.x, a.y + b.y);
                }
                const float2 sum = result[0], driven = result[1], exponent = result[2], before = values(raw[1]);
                const float4 left = elements[turn][2 * couple], right = elements[turn][2 * couple + 1];
                const float2 step = make_float2(left.x, right.x), dout = make_float2(left.z, right.z), x = make_float2(left.w, right.w);
                float2 du = make_float2(skip.x * dout.x + step.x * driven.x, skip.y * dout.y + step.y * driven.y);
                float2 ddt = make_float2(exponent.x * LN2 + x.x * driven.x, exponent.y * LN2 + x.y * driven.y);
                if (SOFTPLUS) ddt.x *= sigmoid(before.x + bias.x), ddt.y *= sigmoid(before.y + bias.y);
                if (dead) du = ddt = make_float2(0, 0);
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
            }
            __syncwarp();
        }
        open_chunk(chunk - 1);  // nothing if there is none
        __syncthreads();

        // Of dB and dC, over the block's warps, four states a thread.
        float4* dweights = (float4*)s.dBC + ((tile * (wide_int)s.batch + row) * s.length + begin) * (2 * N / 4);
        const int place = thread / 8;  // among the 4 WARPS positions, so WARPS groups, that are summed together
        const int within = (place % GROUP / 2 * 2 + thread / 4 % 2) * 2 * N + place % 2 * N + thread % 4 * 4;
#pragma unroll
        for (int i = 0; i < GROUPS / WARPS; i++) {
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float4 part = *(const float4*)((const float*)block.states[w][i * WARPS + place / GROUP] + within);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            if (i * 4 * WARPS + place < count) dweights[i * 32 * WARPS + thread] = sum;
        }
    }

    float* sums = s.sums + (row * s.parts + part) * (N + 2) * s.width;
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        if (inside) sums[(wide_int)(OWN * half + j) * s.width + channel] = dA[j];
    }
    if (inside && part == 0 && s.dinitial) store_states(s.dinitial, g, row * s.width + channel, OWN * half, s.states);
    float ends[4] = {dD.x, dD.y, dbias.x, dbias.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ends[i] += __shfl_xor_sync(~0u, ends[i], 8);
        ends[i] += __shfl_xor_sync(~0u, ends[i], 16);
        if (turn == 0 && channels > i % 2) sums[(wide_int)(N + i / 2) * s.width + pair + i % 2] = ends[i];
    }
}

// dB and dC summed over tiles, four states a thread; in the blocks after those, dA, dD and dbias over rows and parts, of 32 channels.
extern "C" __global__ void __launch_bounds__(256) finish(const Scan s) {
    const wide_int cells = (wide_int)s.batch * s.length * (2 * N / 4), cell = blockIdx.x * (wide_int)256 + threadIdx.x;
    const int blocks = (int)((cells + 255) / 256), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (blockIdx.x < blocks) {
        if (cell >= cells) return;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (int tile = 0; tile < (s.width + TILE - 1) / TILE; tile++) {
            const float4 part = ((const float4*)s.dBC)[tile * cells + cell];
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        const int n = cell % 4 * 4;
        const Pair pairs[2] = {packed(make_float2(sum.x, sum.y)), packed(make_float2(sum.z, sum.w))};
        Element* to = (Element*)(cell / 4 % 2 ? s.dC : s.dB) + cell / 8 * s.states + n;
#pragma unroll
        for (int j = 0; j < 4; j += 2)
            if (s.states == N) {
                *(Pair*)(to + j) = pairs[j / 2];
            } else {
                if (n + j < s.states) to[j] = low(pairs[j / 2]);
                if (n + j + 1 < s.states) to[j + 1] = high(pairs[j / 2]);
            }
        return;
    }
    const int columns = (s.width + 31) / 32, index = blockIdx.x - blocks, which = index / columns, channel = index % columns * 32 + lane;
    float sum = 0, *sums = (float*)shared;
    if (channel < s.width)
#pragma unroll 8
        for (int row = warp; row < s.batch * s.parts; row += 8) sum += s.sums[((wide_int)row * (N + 2) + which) * s.width + channel];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp || channel >= s.width) return;
#pragma unroll
    for (int w = 1; w < 8; w++) sum += sums[w * 32 + lane];
    if (which < s.states) s.dA[(wide_int)channel * s.states + which] = sum;
    if (which == N && s.dD) s.dD[channel] = sum;
    if (which == N + 1 && s.dbias) s.dbias[channel] = sum;
}
