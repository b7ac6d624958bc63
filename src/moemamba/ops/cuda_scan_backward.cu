// The gradients of the selective scan; compiled as one with cuda_scan.cu, which comes first.
//
// A block has 64 channels. A warp has 8 of them, channel r = lane / 4, states 4k to 4k + 3, k = lane % 4:
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
