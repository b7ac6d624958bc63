// The selective scan's walk along time with the tensor cores: bfloat16, with N states. Compiled as one with cuda_scan.cu, which comes first.
//
// A warp has 64 channels. As the tensor cores hold matrices, lane l, with r = l / 4 and k = l % 4, has states 4k to 4k + 3 of
// channels 8r to 8r + 7. Eight positions at a time: first each lane finds steps dt and drives dt u of two channels and leaves
// them in shared memory; then states go along time, drives times B being an outer product, and y's sums over states products
// with a matrix that has C in the column of its position; last come skip and gate, of eight channels and two positions a lane.
//
// A drive goes in two parts, so that no more than 2^-17 of it is lost; B and C are exact. States lose what tf32 drops (2^-10 at
// most) where they are multiplied by C, and only there.

#ifndef MATRIX
#define MATRIX 1
#endif
#ifndef UNROLL
#define UNROLL 4
#endif
#ifndef POLYNOMIALS
#define POLYNOMIALS 0
#endif
#ifndef SUMMARY_POLYNOMIALS
#define SUMMARY_POLYNOMIALS 0
#endif
#ifndef FOURS
#define FOURS 1
#endif
#ifndef SUMMED
#define SUMMED 1
#endif
#ifndef RESIDENT
#define RESIDENT 4
#endif
#ifndef PREPARED
#define PREPARED 2
#endif
constexpr int UNROLLED = UNROLL, PREPARING = PREPARED;
constexpr bool BY_MATRIX = MATRIX && TYPE == 1 && WEIGHED && ABREAST == 8;

#if TYPE == 1
// silu of four by one reciprocal; exponents are kept at 30 or less, where silu is 2e-8 at most.
__device__ inline void silu_of_four(float2& x, float2& y) {
    const float a = 1 + ex2(fminf(-LOG2E * x.x, 30)), b = 1 + ex2(fminf(-LOG2E * x.y, 30));
    const float c = 1 + ex2(fminf(-LOG2E * y.x, 30)), d = 1 + ex2(fminf(-LOG2E * y.y, 30));
    const float ab = a * b, cd = c * d, r = reciprocal(ab * cd), one = r * cd, two = r * ab;
    x.x *= one * b, x.y *= one * a, y.x *= two * d, y.y *= two * c;
}

// 2^(x y) in the multiply-add units, relative error below 5e-6 where x y is between -126 and 127, and next to nothing below.
__device__ inline float ex2_of_product(float x, float y) {
    const float magic = 12582912;  // 1.5 2^23: of a sum with it the last bits are the nearest whole number
    const float sum = fmaxf(fmaf(x, y, magic), magic - 126), f = fmaf(x, y, magic - sum);
    float p = 0.00958285f;
    p = p * f + 0.05590642f;
    p = p * f + 0.24024099f;
    p = p * f + 0.69312419f;
    p = p * f + 1.0f;
    return __int_as_float(__float_as_int(p) + (__float_as_int(sum) << 23));
}

struct Two {
    alignas(8) unsigned x[2];
};
struct Four {
    alignas(16) unsigned x[4];
};

// Where in a tile is, of channel c of two, state n of two.
__device__ constexpr int spot(int c, int n) { return 2 * c + n; }

struct Board {
    Pair ring[2][3][STEPS][32];  // as in a desk
    Element raw[2][STEPS][2 * N];
    unsigned weights[STEPS][2 * N];  // of the drive's factor each twice, of four states first, third, second, last; of the other as floats
    float2 steps[STEPS][32];
    Two drives[STEPS][32];  // two parts of each
    float2 skip[32];
    float4 zeros;
#if MARKED
    int marks[2][STEPS];
#endif
};

template <Pass PASS> __device__ inline void walk_by_matrix(const Scan& s) {
    const int threads = blockDim.x, thread = threadIdx.x, tiles = (s.width + 2 * threads - 1) / (2 * threads), lane = thread % 32;
    const int parts = PASS == FORWARD ? s.parts : s.parts - 1;  // no part needs the summary of the last
    const int part = blockIdx.x / tiles % parts + (PASS == ADJOINT);
    const wide_int row = blockIdx.x / tiles / parts;
    const int base = blockIdx.x % tiles * threads * 2 + thread / 32 * 64;  // the warp's first channel
    const int begin = part * s.span * CHUNK, end = min(s.length, begin + s.span * CHUNK), count = end - begin;
    constexpr int WAY = PASS == ADJOINT ? -1 : 1;
    constexpr bool gated = GATED && PASS != SUMMARY;
    constexpr int INPUTS = gated ? 3 : 2;
    Board& board = ((Board*)shared)[thread / 32];
    const int r = lane / 4, k = lane % 4;

    // A lane copies eight channels of every fourth position, or eight of B and C of one.
    const int from_channel = base + lane % 8 * 8, ahead = lane / 8, column = k * 8;
    const int first_row = PASS == ADJOINT ? end - 1 : begin, line = s.width * (int)sizeof(Element);
    const int strides[3] = {PASS == ADJOINT ? line : s.u_t, s.dt_t, s.z_t};
    const Element* inputs[3] = {
        PASS == ADJOINT ? place(s.dy, row * s.length, line, from_channel) : place(s.u, row, s.u_b, from_channel),
        place(s.dt, row, s.dt_b, from_channel), place(s.z, row, s.z_b, from_channel)};
#pragma unroll
    for (int i = 0; i < INPUTS; i++) inputs[i] = moved(inputs[i], first_row + WAY * ahead, strides[i]);
    const int weight_t = column < N ? s.B_t : s.C_t;
    const Element* weight = column < N ? place(s.B, row, s.B_b, column) : place(s.C, row, s.C_b, column - N);
    weight = moved(weight, first_row + WAY * r, weight_t);

    int side = 0, left = count;  // to be fetched
    auto fetch = [&]() {
#pragma unroll
        for (int j = 0; j < STEPS; j += 4) {
            const bool exists = j + ahead < left && from_channel < s.width;
#pragma unroll
            for (int i = 0; i < INPUTS; i++) {
                if (exists) copy<16>(&board.ring[side][i][j + ahead][lane % 8 * 4], inputs[i]);
                inputs[i] = moved(inputs[i], WAY * 4, strides[i]);
            }
        }
        if (r < left) copy<16>(&board.raw[side][r][column], weight);
        weight = moved(weight, WAY * STEPS, weight_t);
#if MARKED
        if (lane < STEPS) board.marks[side][lane] = lane < left ? s.marks[row * s.length + first_row + WAY * (count - left + lane)] : PLAIN;
#endif
        side ^= 1, left -= STEPS;
    };
    fetch();
    if (PASS == FORWARD) follow();
    else invite();

    // h[m][t]: of channels 8r + 2m and the next, states 4k + 2t and the next, one channel's after the other's.
    const int eight = base + 8 * r;
    const bool inside = eight < s.width;
    float h[4][2][4] = {}, A[4][2][4] = {};
    float* entry = s.entry + ((row * s.parts + part) * N + 4 * k) * s.width + eight;
    if (inside) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float four[4];
            load_states(four, s.A, eight + j, 4 * k, s.states);
#pragma unroll
            for (int n = 0; n < 4; n++) A[j / 2][n / 2][spot(j % 2, n % 2)] = four[n] * LOG2E;
            if (PASS != FORWARD || s.parts > 1 || !s.initial) continue;
            load_states(four, s.initial, row * s.width + eight + j, 4 * k, s.states);
#pragma unroll
            for (int n = 0; n < 4; n++) h[j / 2][n / 2][spot(j % 2, n % 2)] = four[n];
        }
        if (PASS == FORWARD && s.parts > 1)
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    const float4 x = *(const float4*)(entry + (wide_int)n * s.width + j);
                    h[j / 2][n / 2][spot(0, n % 2)] = x.x, h[j / 2][n / 2][spot(1, n % 2)] = x.y;
                    h[j / 2 + 1][n / 2][spot(0, n % 2)] = x.z, h[j / 2 + 1][n / 2][spot(1, n % 2)] = x.w;
                }
    }
    auto leave = [&](float* to) {  // states, in a tensor (.., N, i)
        if (!inside) return;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int j = 0; j < 8; j += 4)
                *(float4*)(to + (wide_int)n * s.width + j) = make_float4(
                    h[j / 2][n / 2][spot(0, n % 2)], h[j / 2][n / 2][spot(1, n % 2)], h[j / 2 + 1][n / 2][spot(0, n % 2)],
                    h[j / 2 + 1][n / 2][spot(1, n % 2)]);
    };
    const int channel = base + 2 * lane, channels = s.width - channel;
    const float2 bias = load_vector(s.bias, channel, channels);
    board.skip[lane] = load_vector(s.D, channel, channels);
    if (lane == 0) board.zeros = make_float4(0, 0, 0, 0);
    float2 total = make_float2(0, 0);
    Element* to = (Element*)s.y + (row * s.length + begin + 2 * k) * s.width + eight;

    for (int group = 0; group * STEPS < count; group++) {
        const int now = side ^ 1, here = min(STEPS, count - group * STEPS), first = begin + group * STEPS;
        arrived();
        __syncwarp();  // all copies are there, and what was made of those before is done with
        {
            const Four lump = r < here ? *(const Four*)&board.raw[now][r][column] : Four();
            const bool twice = PASS == ADJOINT ? k >= 2 : k < 2;
            const unsigned low = twice ? 0x1010 : 0x1044, high = twice ? 0x3232 : 0x3244;  // as two, or in the upper half
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const unsigned x = lump.x[j], y = lump.x[j + 1];
                *(Four*)&board.weights[r][column + 2 * j] = {
                    {__byte_perm(x, 0, low), __byte_perm(twice ? y : x, 0, twice ? low : high),
                     __byte_perm(twice ? x : y, 0, twice ? high : low), __byte_perm(y, 0, high)}};
            }
        }
#pragma unroll(PREPARING)
        for (int p = 0; p < STEPS; p++) {
            float2 x = values(board.ring[now][0][p][lane]), step = values(board.ring[now][1][p][lane]);
            step.x += bias.x, step.y += bias.y;
            if (SOFTPLUS) step.x = softplus(step.x), step.y = softplus(step.y);
            float2 drive = make_float2(step.x * x.x, step.y * x.y);
            if (PASS == ADJOINT) {
                drive = x;
                if (gated) {
                    const float2 open = silu(values(board.ring[now][2][p][lane]));
                    drive.x *= open.x, drive.y *= open.y;
                }
            }
#if MARKED
            const int mark = board.marks[now][p];
            const bool absent = mark == PADDING;
#else
            constexpr bool absent = false;
#endif
            if (absent) step = drive = make_float2(0, 0);
            if (PASS != FORWARD && (PASS == SUMMARY || p < here)) {
                total.x += step.x, total.y += step.y;
#if MARKED
                if (mark == BEGIN) total = make_float2(INFINITE, INFINITE);
#endif
            }
            board.steps[p][lane] = step;
            const float2 most = values(packed(drive));
            board.drives[p][lane] = {{packed(make_float2(drive.x, drive.x - most.x)), packed(make_float2(drive.y, drive.y - most.y))}};
        }
        for (int p = here; p < STEPS; p++) board.steps[p][lane] = make_float2(0, 0), board.drives[p][lane] = {};
        __syncwarp();
        if (left > 0) fetch();
        else side ^= 1;
        if (PASS == FORWARD && s.starts && first % CHUNK == 0)
            leave(s.starts + ((row * ((s.length + CHUNK - 1) / CHUNK) + first / CHUNK) * N + 4 * k) * s.width + eight);

        float sum[4][4] = {};
        constexpr int COMPUTED = PASS == FORWARD ? POLYNOMIALS : SUMMARY_POLYNOMIALS;
        constexpr int DRIVEN = PASS == ADJOINT ? N : 0;
        const unsigned* B_at = k == 0 ? &board.weights[0][DRIVEN + 2 * r] : (const unsigned*)&board.zeros;
        const int B_step = k == 0 ? 2 * N : 0;
#pragma unroll(UNROLLED)
        for (int p = 0; p < STEPS; p++) {
            const Two B = *(const Two*)B_at;
            B_at += B_step;
            const float4 C = PASS == FORWARD ? *(const float4*)(r == p ? (const void*)&board.weights[p][N + 4 * k] : &board.zeros) : float4();
#if MARKED
            const bool begins = board.marks[now][p] == BEGIN;
            if (PASS != ADJOINT && begins)
#pragma unroll
                for (int i = 0; i < 32; i++) h[i / 8][i / 4 % 2][i % 4] = 0;
#endif
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const float2 step = board.steps[p][4 * r + m];
                const Two drive = board.drives[p][4 * r + m];
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    float(&state)[4] = h[m][t];
                    float decay[4], added[4] = {};
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        decay[i] = i == 0 && 2 * m + t < COMPUTED ? ex2_of_product(i / 2 ? step.y : step.x, A[m][t][i])
                                                                  : ex2((i / 2 ? step.y : step.x) * A[m][t][i]);
                    outer(PASS == ADJOINT ? state : added, drive.x[0], drive.x[1], B.x[t]);
#pragma unroll
                    for (int i = 0; i < 4; i++) state[i] = decay[i] * state[i] + added[i];
                    if (PASS == FORWARD)
                        product(sum[m], state[spot(0, 0)], state[spot(1, 0)], state[spot(0, 1)], state[spot(1, 1)], t ? C.z : C.x, t ? C.w : C.y);
                }
            }
#if MARKED
            if (PASS == ADJOINT && begins)
#pragma unroll
                for (int i = 0; i < 32; i++) h[i / 8][i / 4 % 2][i % 4] = 0;
#endif
        }
        if (PASS != FORWARD) continue;
#pragma unroll
        for (int q = 0; q < 2; q++) {  // positions 2k and the next
            const Four u = *(const Four*)&board.ring[now][0][2 * k + q][4 * r];
            Four z = {}, y;
            if (gated) z = *(const Four*)&board.ring[now][2][2 * k + q][4 * r];
            float2 open[4];
#pragma unroll
            for (int m = 0; m < 4; m++) open[m] = gated ? values(z.x[m]) : make_float2(1, 1);
            if (gated && FOURS) silu_of_four(open[0], open[1]), silu_of_four(open[2], open[3]);
            else if (gated)
#pragma unroll
                for (int m = 0; m < 4; m++) open[m] = silu(open[m]);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const float2 skip = board.skip[4 * r + m], x = values(u.x[m]);
                y.x[m] = packed(make_float2((sum[m][q] + skip.x * x.x) * open[m].x, (sum[m][2 + q] + skip.y * x.y) * open[m].y));
            }
#if MARKED
            if (board.marks[now][2 * k + q] == PADDING) y = {};
#endif
            if (inside && 2 * k + q < here) *(Four*)(to + (wide_int)q * s.width) = y;
        }
        to += (wide_int)STEPS * s.width;
    }
    if (PASS != FORWARD) {
        float* sum = s.totals + (row * s.parts + part) * s.width + channel;
        if (channels > 0) *(float2*)sum = total;
        leave(entry);
    } else if (part == s.parts - 1 && inside)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int c = j % 2;
            const float four[4] = {h[j / 2][0][spot(c, 0)], h[j / 2][0][spot(c, 1)], h[j / 2][1][spot(c, 0)], h[j / 2][1][spot(c, 1)]};
            store_states(s.final, four, row * s.width + eight + j, 4 * k, s.states);
        }
}

#endif

template <Pass PASS> __device__ inline void any_walk(const Scan& s) {
#if TYPE == 1
    if constexpr (BY_MATRIX && (SUMMED || PASS == FORWARD)) walk_by_matrix<PASS>(s);
    else
#endif
    walk<PASS>(s);
}

extern "C" __global__ void __launch_bounds__(128, RESIDENT) forward(const Scan s) { any_walk<FORWARD>(s); }
extern "C" __global__ void __launch_bounds__(128, RESIDENT) summarise(const Scan s) { any_walk<SUMMARY>(s); }
extern "C" __global__ void __launch_bounds__(128, RESIDENT) summarise_back(const Scan s) { any_walk<ADJOINT>(s); }
