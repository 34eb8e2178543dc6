// Attention of a fused projection (..., T, 3, heads, size) in float32 and its gradient, for CPUs.
//
// One task is one head of one sample. Sixteen queries at a time meet all keys, so that logits and what follows from
// them stay in the first caches. Formulas as in ops/by_head.py, the oracle.

#include <cmath>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int kQueries = 16;

typedef int32_t Integers __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

// exp of x <= 0 to 2 units in the last place; 0 below -87. What is no number stays none.
inline Vector Exp(Vector x) {
  const Vector low = All(-87.0f), magic = All(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  const Integers gone = x < low;
  x = gone ? low : x;
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = All(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector two;
  std::memcpy(&two, &power, sizeof two);
  const Vector value = p * two;
  return gone ? Vector{} : value;
}

// Both halves a vector becomes one of, again and again: a few instructions, where element by element is a long chain.
template <typename Join>
inline float Joined(Vector v, Join join) {
  float part[kWidth];
  Store(part, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = join(part[i], part[i + half]);
  return part[0];
}

inline float Sum(Vector v) {
  return Joined(v, [](float a, float b) { return a + b; });
}

inline float Most(Vector v) {
  return Joined(v, [](float a, float b) { return a > b ? a : b; });
}

struct Shape {
  int64_t tokens, heads, size;
  int64_t padded, wide;  // tokens and size, rounded up to whole vectors
  int64_t row() const { return 3 * heads * size; }
};

// (T, size) with `stride` between rows to (T, wide), the rest zero.
void PackRows(float* to, const float* from, int64_t stride, const Shape& s) {
  for (int64_t t = 0; t < s.tokens; ++t) {
    std::memcpy(to + t * s.wide, from + t * stride, s.size * 4);
    std::memset(to + t * s.wide + s.size, 0, (s.wide - s.size) * 4);
  }
}

// (T, size) with `stride` between rows to (size, padded), times factor, the rest zero.
void PackTurned(float* to, const float* from, int64_t stride, float factor, const Shape& s) {
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t d = 0; d < s.size; ++d) to[d * s.padded + t] = from[t * stride + d] * factor;
  for (int64_t d = 0; d < s.size; ++d) std::memset(to + d * s.padded + s.tokens, 0, (s.padded - s.tokens) * 4);
}

// Logits (rows, padded) to exp(logit - max of the row), 0 where there is no key; 1 / sum of each row to inverse.
void Softmax(float* logits, float* inverse, int64_t rows, const Shape& s) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = logits + r * s.padded;
    for (int64_t t = s.tokens; t < s.padded; ++t) row[t] = -INFINITY;
    Vector most = Load(row);
    for (int64_t t = kWidth; t < s.padded; t += kWidth) {
      const Vector next = Load(row + t);
      most = next > most ? next : most;
    }
    const Vector highest = All(Most(most));
    Vector sum = {};
    for (int64_t t = 0; t < s.padded; t += kWidth) {
      const Vector weight = Exp(Load(row + t) - highest);
      Store(row + t, weight);
      sum += weight;
    }
    inverse[r] = 1.0f / Sum(sum);
  }
}

struct Head {
  const float *query, *key, *value;
};

Head At(const float* projection, int64_t task, const Shape& s) {
  const float* base = projection + (task / s.heads) * s.tokens * s.row() + (task % s.heads) * s.size;
  return {base, base + s.heads * s.size, base + 2 * s.heads * s.size};
}

void Forward(const float* projection, float* out, int64_t task, const Shape& s) {
  const Head own = At(projection, task, s);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.size));
  Memory memory = Allocate(s.size * s.padded + s.tokens * s.wide + kQueries * (s.padded + s.wide));
  float* keys = memory.get();
  float* values = keys + s.size * s.padded;
  float* logits = values + s.tokens * s.wide;
  float* mixed = logits + kQueries * s.padded;
  PackTurned(keys, own.key, s.row(), scale, s);
  PackRows(values, own.value, s.row(), s);
  const int64_t out_row = s.heads * s.size;
  float* to = out + (task / s.heads) * s.tokens * out_row + (task % s.heads) * s.size;
  float inverse[kQueries];
  for (int64_t first = 0; first < s.tokens; first += kQueries) {
    const int64_t rows = std::min<int64_t>(kQueries, s.tokens - first);
    Product(logits, s.padded, own.query + first * s.row(), s.row(), 1, keys, s.padded, rows, s.size, s.padded, false);
    Softmax(logits, inverse, rows, s);
    Product(mixed, s.wide, logits, s.padded, 1, values, s.wide, rows, s.tokens, s.wide, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < s.size; ++d) to[(first + r) * out_row + d] = mixed[r * s.wide + d] * inverse[r];
  }
}

void Backward(const float* projection, const float* gradient, float* out, int64_t task, const Shape& s) {
  const Head own = At(projection, task, s);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.size));
  const int64_t turned = s.size * s.padded;
  Memory memory = Allocate(4 * turned + s.tokens * s.wide + kQueries * (2 * s.padded + s.wide));
  float* keys = memory.get();
  float* values = keys + turned;
  float* by_key = values + turned;
  float* by_value = by_key + turned;
  float* key_rows = by_value + turned;
  float* weights = key_rows + s.tokens * s.wide;
  float* moved = weights + kQueries * s.padded;
  float* by_query = moved + kQueries * s.padded;
  PackTurned(keys, own.key, s.row(), scale, s);
  PackTurned(values, own.value, s.row(), 1.0f, s);
  PackRows(key_rows, own.key, s.row(), s);
  std::memset(by_key, 0, 2 * turned * 4);
  const int64_t in_row = s.heads * s.size;
  const float* from = gradient + (task / s.heads) * s.tokens * in_row + (task % s.heads) * s.size;
  float* to = out + (own.query - projection);
  float inverse[kQueries];
  for (int64_t first = 0; first < s.tokens; first += kQueries) {
    const int64_t rows = std::min<int64_t>(kQueries, s.tokens - first);
    const float* query = own.query + first * s.row();
    const float* pulled = from + first * in_row;
    Product(weights, s.padded, query, s.row(), 1, keys, s.padded, rows, s.size, s.padded, false);
    Softmax(weights, inverse, rows, s);
    Product(moved, s.padded, pulled, in_row, 1, values, s.padded, rows, s.size, s.padded, false);
    for (int64_t r = 0; r < rows; ++r) {
      float *weight = weights + r * s.padded, *change = moved + r * s.padded;
      const Vector divided = All(inverse[r]);
      Vector sum = {};
      for (int64_t t = 0; t < s.padded; t += kWidth) {
        const Vector w = Load(weight + t) * divided;
        Store(weight + t, w);
        sum += w * Load(change + t);
      }
      const Vector mean = All(Sum(sum));
      for (int64_t t = 0; t < s.padded; t += kWidth) Store(change + t, Load(weight + t) * (Load(change + t) - mean));
    }
    Product(by_value, s.padded, pulled, 1, in_row, weights, s.padded, s.size, rows, s.padded, true);
    Product(by_key, s.padded, query, 1, s.row(), moved, s.padded, s.size, rows, s.padded, true);
    Product(by_query, s.wide, moved, s.padded, 1, key_rows, s.wide, rows, s.tokens, s.wide, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < s.size; ++d) to[(first + r) * s.row() + d] = by_query[r * s.wide + d] * scale;
  }
  for (int64_t t = 0; t < s.tokens; ++t) {
    float* row = to + t * s.row();
    for (int64_t d = 0; d < s.size; ++d) {
      row[s.heads * s.size + d] = by_key[d * s.padded + t] * scale;
      row[2 * s.heads * s.size + d] = by_value[d * s.padded + t];
    }
  }
}

ffi::Error Described(const Array& projection, int64_t heads, Shape& s, int64_t& tasks) {
  const auto sizes = projection.dimensions();
  if (sizes.size() < 2 || heads < 1 || sizes.back() % (3 * heads))
    return ffi::Error::InvalidArgument("a projection is (..., T, 3 heads size)");
  s.tokens = sizes[sizes.size() - 2], s.heads = heads, s.size = sizes.back() / (3 * heads);
  s.padded = RoundUp(s.tokens), s.wide = RoundUp(s.size);
  tasks = heads;
  for (size_t i = 0; i + 2 < sizes.size(); ++i) tasks *= sizes[i];
  if (s.tokens == 0 || s.size == 0) tasks = 0;
  return ffi::Error::Success();
}

ffi::Error AttentionForward(ffi::ThreadPool pool, Array projection, Result out, int64_t heads) {
  Shape s;
  int64_t tasks;
  if (auto error = Described(projection, heads, s, tasks); error.failure()) return error;
  const float* from = projection.typed_data();
  float* to = out->typed_data();
  ForAll(pool, tasks, [=](int64_t task) { Forward(from, to, task, s); });
  return ffi::Error::Success();
}

ffi::Error AttentionBackward(ffi::ThreadPool pool, Array projection, Array gradient, Result out, int64_t heads) {
  Shape s;
  int64_t tasks;
  if (auto error = Described(projection, heads, s, tasks); error.failure()) return error;
  const float *from = projection.typed_data(), *pulled = gradient.typed_data();
  float* to = out->typed_data();
  ForAll(pool, tasks, [=](int64_t task) { Backward(from, pulled, to, task, s); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward, AttentionForward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Ret<Array>().Attr<int64_t>("heads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    attention_backward, AttentionBackward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>().Attr<int64_t>("heads"));
