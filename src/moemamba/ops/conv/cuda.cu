// The gradients of the causal depthwise convolution over whole rows; compiled as one with kit/elements.cu, which comes first.
//
//     out_t = bias + sum over j of weight_j x_{t-j}        y_t = silu(out_t)
//
// Constants of a compilation, beside TYPE: TAPS. SILU: whether there is one. OWN: channels of a thread, which it loads together.
// AHEAD: positions whose loads are under way. TALL: warps of a block, which follow each other in time. RESIDENT: blocks of a
// multiprocessor at a time.
//
// A warp has 32 OWN channels of a run of `span` positions and walks back in time, its window of inputs and what later positions
// send to earlier ones in registers, so that it reads and writes every row once. Beside its own positions it reads the
// TAPS - 1 before them, and the TAPS - 1 after them, whose gradients reach back into it. Sums are made in a fixed order.

constexpr int HISTORY = TAPS - 1, SUMS = TAPS + 1;

// Laid out as cuda.py packs it. x has strides, in bytes; every other tensor is contiguous.
struct Conv {
    const void *dy, *x;
    const float *weight, *bias;
    void* dx;
    float *partial, *dweight, *dbias;  // partial (b, blocks of runs, SUMS, i): the current position's tap first, the bias last
    wide_int x_b;
    int x_t, batch, length, width, span, parts;
};

struct alignas(OWN * sizeof(Element)) Several {
    Pair pairs[OWN / 2];
};

__device__ inline Several read(const char* from, bool exists) { return exists ? *(const Several*)from : Several(); }

__device__ inline void spread(float (&to)[OWN], const Several& from) {
#pragma unroll
    for (int i = 0; i < OWN / 2; i++) {
        const float2 two = values(from.pairs[i]);
        to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
}

// What a thread carries along. pending[j] is what later positions send to the one j + 1 before the next.
struct Walk {
    float taps[TAPS][OWN], bias[OWN], window[TAPS][OWN], pending[TAPS][OWN], sums[SUMS][OWN];

    // One position back, whose window's oldest input comes now: its gradient, to which `own` positions alone add sums.
    __device__ inline void step(const Several& oldest, const Several& dy, bool own, float (&dx)[OWN]) {
        float dout[OWN];
        spread(window[HISTORY], oldest), spread(dout, dy);
#pragma unroll
        for (int c = 0; c < OWN; c++) {
            if (SILU) {
                float out = bias[c];
#pragma unroll
                for (int j = 0; j < TAPS; j++) out += taps[j][c] * window[j][c];
                const float open = sigmoid(out);
                dout[c] *= open * (1 + out * (1 - open));
            }
            if (own) {
#pragma unroll
                for (int j = 0; j < TAPS; j++) sums[j][c] += dout[c] * window[j][c];
                sums[TAPS][c] += dout[c];
            }
            dx[c] = taps[0][c] * dout[c] + (HISTORY ? pending[0][c] : 0);
#pragma unroll
            for (int j = 1; j < TAPS; j++) pending[j - 1][c] = taps[j][c] * dout[c] + (j < HISTORY ? pending[j][c] : 0);
#pragma unroll
            for (int j = 0; j < HISTORY; j++) window[j][c] = window[j + 1][c];
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * TALL, RESIDENT) backward(const Conv s) {
    const int lane = threadIdx.x % 32, run = threadIdx.x / 32;
    const int tiles = (s.width + 32 * OWN - 1) / (32 * OWN), blocks = (s.parts + TALL - 1) / TALL;
    const int channel = (blockIdx.x % tiles * 32 + lane) * OWN;
    const int part = blockIdx.x / tiles % blocks * TALL + run;
    const wide_int row = blockIdx.x / tiles / blocks, line = (wide_int)s.width * (int)sizeof(Element);
    const int start = min(part * s.span, s.length), stop = min(start + s.span, s.length), from = min(channel, s.width - OWN);
    const bool inside = channel < s.width;
    const char *x = (const char*)place(s.x, row, s.x_b, from), *dy = (const char*)place(s.dy, row * s.length, line, from);

    // Loads that follow are under way together.
    Several early[HISTORY + 1], late[HISTORY + 1], older[HISTORY + 1], rows[AHEAD], grads[AHEAD];
#pragma unroll
    for (int k = 0; k < HISTORY; k++) {
        const int t = stop + HISTORY - 1 - k;  // a position of the next run
        early[k] = read(x + t * (wide_int)s.x_t, t < s.length);
        late[k] = read(dy + t * line, t < s.length);
        older[k] = read(x + (t - HISTORY) * (wide_int)s.x_t, t >= HISTORY && t - HISTORY < s.length);
    }
    const char *next_x = x + (stop - 1 - HISTORY) * (wide_int)s.x_t, *next_dy = dy + (stop - 1) * line;
    int left = stop - start, above = stop - HISTORY;  // rows of dy and of x that remain to be loaded
    auto fetch = [&](int k) {
        rows[k] = read(next_x, above > 0), grads[k] = read(next_dy, left > 0);
        next_x -= s.x_t, next_dy -= line, left--, above--;
    };
#pragma unroll
    for (int k = 0; k < AHEAD; k++) fetch(k);

    Walk walk = {};
#pragma unroll
    for (int c = 0; c < OWN; c++) {
        walk.bias[c] = s.bias ? s.bias[from + c] : 0;
#pragma unroll
        for (int j = 0; j < TAPS; j++) walk.taps[j][c] = s.weight[(wide_int)(from + c) * TAPS + HISTORY - j];
    }
    float dx[OWN];
#pragma unroll
    for (int k = 0; k < HISTORY; k++) spread(walk.window[k], early[k]);
#pragma unroll
    for (int k = 0; k < HISTORY; k++) walk.step(older[k], late[k], false, dx);

    invite();
    char* to = (char*)place(s.dx, row * s.length, line, from) + (stop - 1) * line;
    for (int count = inside ? stop - start : 0; count > 0; count -= AHEAD)
#pragma unroll
        for (int k = 0; k < AHEAD; k++, to -= line) {
            const Several oldest = rows[k], gradient = grads[k];
            fetch(k);
            walk.step(oldest, gradient, true, dx);
            Several whole;
#pragma unroll
            for (int i = 0; i < OWN / 2; i++) whole.pairs[i] = packed(make_float2(dx[2 * i], dx[2 * i + 1]));
            if (k < count) *(Several*)to = whole;
        }

    // The block's share of dweight and dbias.
    float* share = s.partial + (row * blocks + part / TALL) * SUMS * s.width + from;
    float* meeting = (float*)shared + lane * OWN;  // [TALL - 1][SUMS][32 OWN]
    if (run)
#pragma unroll
        for (int j = 0; j < SUMS; j++)
#pragma unroll
            for (int c = 0; c < OWN; c++) meeting[((run - 1) * SUMS + j) * 32 * OWN + c] = walk.sums[j][c];
    __syncthreads();
    if (run || !inside) return;
#pragma unroll
    for (int j = 0; j < SUMS; j++)
#pragma unroll
        for (int c = 0; c < OWN; c++) {
            float sum = walk.sums[j][c];
#pragma unroll
            for (int w = 1; w < TALL; w++) sum += meeting[((w - 1) * SUMS + j) * 32 * OWN + c];
            share[(wide_int)j * s.width + c] = sum;
        }
}

// dweight and dbias, of 32 channels and one tap.
extern "C" __global__ void __launch_bounds__(256) finish(const Conv s) {
    const int columns = (s.width + 31) / 32, which = blockIdx.x / columns, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel = blockIdx.x % columns * 32 + lane, shares = s.batch * ((s.parts + TALL - 1) / TALL);
    float sum = 0, *sums = (float*)shared;
    follow();
    if (channel < s.width)
#pragma unroll 8
        for (int share = warp; share < shares; share += 8) sum += s.partial[((wide_int)share * SUMS + which) * s.width + channel];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp || channel >= s.width) return;
#pragma unroll
    for (int w = 1; w < 8; w++) sum += sums[w * 32 + lane];
    if (which < TAPS) s.dweight[(wide_int)channel * TAPS + HISTORY - which] = sum;
    if (which == TAPS && s.dbias) s.dbias[channel] = sum;
}
