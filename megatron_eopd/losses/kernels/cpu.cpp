// Both sweeps on CPU, one pass over memory each. What they compute is said in __init__.py.
//
// A row goes block by block through the first-level cache: its maximum, then its sums relative to
// the maximum so far. When a block raises the maximum, the sums are moved to the new one. Vectors
// are GNU vector extensions: they mean the same on any CPU, for any GCC or Clang.
//
// x_s, x_t: logits of student and teacher. m: maximum so far. i_s, i_t: 1 / temperature.

#include <cstdint>
#include <cstring>

// Floats of one register of the target. Wider vectors would be split, and GCC splits comparisons and
// selects down to single floats. AVX without AVX2 has 8 lanes of floats, but none of integers.
#if defined(__AVX512F__)
#define INSTRUCTION_SET "avx512"
constexpr int LANES = 16;
#elif defined(__AVX2__)
#define INSTRUCTION_SET "avx2"
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#if defined(__AVX__)
#define INSTRUCTION_SET "avx"
#elif defined(__SSE2__)
#define INSTRUCTION_SET "sse"
#elif defined(__ARM_NEON)
#define INSTRUCTION_SET "neon"
#else
#define INSTRUCTION_SET "other"
#endif
#endif

extern "C" int lanes() { return LANES; }
extern "C" const char *instruction_set() { return INSTRUCTION_SET; }

constexpr int BLOCK = 256;
constexpr float LOWEST = -1e30f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

static inline Floats all(float x) { return Floats{} + x; }

static inline Floats load(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline Floats load(const bfloat16 *from) {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

static inline void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

static inline void store(bfloat16 *to, Floats x) {
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest, ties to even
    rounded = x == x ? rounded : Words{} + 0x7fc0;              // NaN stays NaN
    Halves halves = __builtin_convertvector(rounded, Halves);
    memcpy(to, &halves, sizeof halves);
}

static inline float one(const float *from) { return *from; }

static inline float one(const bfloat16 *from) {
    uint32_t bits = uint32_t(from->bits) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// As x86's maximum: where one of them is NaN, it is b. So NaN passes through finite(), and the sums
// carry it.
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats finite(Floats x) { return larger(all(LOWEST), x); }

// exp(x) for x <= 88, 0 below -87; relative error 1e-7. The polynomial's own, on
// [-ln 2 / 2, ln 2 / 2], is at most 5e-9.
static inline Floats exponential(Floats x) {
    const float round_to_int = 12582912.0f; // 1.5 * 2^23: the sum's low mantissa bits are the integer
    Floats shifted = x * 1.44269504f + round_to_int;
    Floats n = shifted - round_to_int;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.3814540e-3f + 8.3687451e-3f;
    p = p * r + 4.1668391e-2f;
    p = p * r + 1.6666520e-1f;
    p = p * r + 4.9999993e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p = (Floats)((Words)p + ((Words)shifted << 23)); // times 2^n, in the exponent bits
    return x > -87.0f ? p : Floats{};
}

static inline float exponential(float x) { return exponential(all(x))[0]; }

static inline float sum(Doubles x) {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

static inline float maximum(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// The k largest so far, in descending order; equal ones in the order of their columns.
struct TopK {
    int64_t k;
    float *values;
    int64_t *columns;

    void offer(float value, int64_t column) {
        int64_t at = k - 1;
        if (!(value > values[at])) return;
        for (; at > 0 && value > values[at - 1]; at--) {
            values[at] = values[at - 1];
            columns[at] = columns[at - 1];
        }
        values[at] = value;
        columns[at] = column;
    }
};

struct Sums {
    float m_s = LOWEST, m_t = LOWEST;
    Doubles z_s{}, z_t{}, d_s{}, d_t{}, a_t{}, a_s{}; // over blocks

    // Student logits are from now on relative to `m`.
    void raise_student(float m, float i_s) {
        double shift = (m_s - m) * i_s, scale = exponential((float)shift);
        z_s *= scale;
        d_s = d_s * scale + z_s * shift;
        a_s = a_s * scale + z_s * shift;
        d_t += z_t * shift;
        m_s = m;
    }

    void raise_teacher(float m, float i_t) {
        double shift = (m_t - m) * i_t, scale = exponential((float)shift);
        z_t *= scale;
        d_t = d_t * scale - z_t * shift;
        a_t = a_t * scale + z_t * shift;
        d_s -= z_s * shift;
        m_t = m;
    }

    template <class S, class T>
    void add(const S *x_s, const T *x_t, float i_s, float i_t) {
        Floats z_s{}, z_t{}, d_s{}, d_t{}, a_t{}, a_s{}; // of the block: short sums round less
        for (int i = 0; i < BLOCK; i += LANES) {
            Floats s = (finite(load(x_s + i)) - m_s) * i_s;
            Floats t = (finite(load(x_t + i)) - m_t) * i_t;
            Floats e_s = exponential(s), e_t = exponential(t), d = s - t;
            z_s += e_s, z_t += e_t;
            d_s += e_s * d, d_t += e_t * d;
            a_t += e_t * t, a_s += e_s * s;
        }
        auto wide = [](Floats x) { return __builtin_convertvector(x, Doubles); };
        this->z_s += wide(z_s), this->z_t += wide(z_t);
        this->d_s += wide(d_s), this->d_t += wide(d_t);
        this->a_t += wide(a_t), this->a_s += wide(a_s);
    }

    void write(float *out) const {
        out[0] = m_s, out[1] = m_t;
        out[2] = sum(z_s), out[3] = sum(z_t);
        out[4] = sum(d_s), out[5] = sum(d_t);
        out[6] = sum(a_t), out[7] = sum(a_s);
    }
};

template <class X>
static float block_maximum(const X *x) {
    Floats even = load(x), odd = load(x + LANES);
    for (int i = 2 * LANES; i < BLOCK; i += 2 * LANES) {
        even = larger(load(x + i), even);
        odd = larger(load(x + i + LANES), odd);
    }
    float most = maximum(larger(even, odd));
    return most < LOWEST ? LOWEST : most;
}

// `count` elements, filled up to a block with -inf, which adds nothing.
template <class X>
static const X *padded(const X *x, int64_t count, X *buffer) {
    const float infinity = -__builtin_inff();
    for (int i = 0; i < BLOCK; i += LANES) store(buffer + i, all(infinity));
    memcpy(buffer, x, count * sizeof(X));
    return buffer;
}

template <class S, class T>
static void row_sums(const S *x_s, const T *x_t, int64_t num_columns, float i_s, float i_t, float *out,
                     TopK top) {
    Sums sums;
    S student_end[BLOCK];
    T teacher_end[BLOCK];
    for (int64_t first = 0; first < num_columns; first += BLOCK) {
        int64_t count = num_columns - first < BLOCK ? num_columns - first : BLOCK;
        const S *s = count == BLOCK ? x_s + first : padded(x_s + first, count, student_end);
        const T *t = count == BLOCK ? x_t + first : padded(x_t + first, count, teacher_end);
        float most_s = block_maximum(s), most_t = block_maximum(t);
        if (most_s > sums.m_s) sums.raise_student(most_s, i_s);
        if (most_t > sums.m_t) sums.raise_teacher(most_t, i_t);
        sums.add(s, t, i_s, i_t);
        if (top.k && most_t > top.values[top.k - 1])
            for (int i = 0; i < count; i++) top.offer(one(t + i), first + i);
    }
    sums.write(out);
}

template <class S, class T>
static void row_gradient(const S *x_s, const T *x_t, int64_t num_columns, float i_s, float i_t,
                         const float *weights, S *out) {
    const float m_s = weights[0], m_t = weights[1], log_z_s = weights[2], log_z_t = weights[3];
    const float a = weights[4] * i_s, b = weights[5] * i_s, f = weights[6] * i_s;
    auto write = [=](const S *from_s, const T *from_t, S *to) {
        Floats s = (finite(load(from_s)) - m_s) * i_s, t = (finite(load(from_t)) - m_t) * i_t;
        store(to, exponential(s - log_z_s) * (a * (s - t) + b) - f * exponential(t - log_z_t));
    };
    int64_t column = 0;
    for (; column + LANES <= num_columns; column += LANES)
        write(x_s + column, x_t + column, out + column);
    if (int64_t rest = num_columns - column) {
        S s[LANES] = {}, grad[LANES];
        T t[LANES] = {};
        memcpy(s, x_s + column, rest * sizeof(S));
        memcpy(t, x_t + column, rest * sizeof(T));
        write(s, t, grad);
        memcpy(out + column, grad, rest * sizeof(S));
    }
}

// Strides are in elements. `rows` lists the rows to work on; others are not touched.
#define BOTH_SWEEPS(NAME, S, T)                                                                    \
    extern "C" void sums_##NAME(const S *x_s, const T *x_t, int64_t stride_s, int64_t stride_t,    \
                                int64_t num_columns, float i_s, float i_t, const int64_t *rows,    \
                                int64_t num_rows, float *sums, int64_t k, float *top_values,       \
                                int64_t *top_columns) {                                            \
        for (int64_t i = 0; i < num_rows; i++) {                                                   \
            int64_t row = rows[i];                                                                 \
            TopK top{k, top_values + k * row, top_columns + k * row};                              \
            row_sums(x_s + stride_s * row, x_t + stride_t * row, num_columns, i_s, i_t,            \
                     sums + 8 * row, top);                                                         \
        }                                                                                          \
    }                                                                                              \
    extern "C" void gradient_##NAME(const S *x_s, const T *x_t, int64_t stride_s,                  \
                                    int64_t stride_t, int64_t num_columns, float i_s, float i_t,   \
                                    const int64_t *rows, int64_t num_rows, const float *weights,   \
                                    S *out, int64_t stride_out) {                                  \
        for (int64_t i = 0; i < num_rows; i++) {                                                   \
            int64_t row = rows[i];                                                                 \
            row_gradient(x_s + stride_s * row, x_t + stride_t * row, num_columns, i_s, i_t,        \
                         weights + 7 * row, out + stride_out * row);                               \
        }                                                                                          \
    }

BOTH_SWEEPS(float32_float32, float, float)
BOTH_SWEEPS(float32_bfloat16, float, bfloat16)
BOTH_SWEEPS(bfloat16_float32, bfloat16, float)
BOTH_SWEEPS(bfloat16_bfloat16, bfloat16, bfloat16)
