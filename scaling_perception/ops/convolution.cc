// Convolutions of pictures (B, H, W, C) in float32 on CPUs: dense ones, and a whole inverted bottleneck. Formulas as in
// ops/convolution.py, the oracle.
//
// Of a dense one, a task is a strip of rows of one sample. Kernels of 3 by 3 at stride 1 are computed by Winograd's
// F(2x2, 3x3) (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1): 16 products for
// the 36 of four pixels. All others are sums over the rows of the kernel, each a product of matrices, as the pixels
// under one row of the kernel follow each other in memory.

#include <cmath>
#include <cstring>

#include "vectors.h"

namespace {

struct Picture {
  int64_t height, width, channels;
};

// What follows a sum: its bias, the residual, and the limits of the result. What is no number stays none.
struct Finish {
  const float *bias, *residual;  // residual: as the result, or null
  float low, high;

  inline Vector operator()(Vector sum, int64_t channel, const float* residual_here) const {
    sum += Load(bias + channel);
    if (residual_here != nullptr) sum += Load(residual_here);
    sum = sum < All(low) ? All(low) : sum;
    return sum > All(high) ? All(high) : sum;
  }
};

struct Convolution {
  Picture in, out;
  int64_t high, wide, stride, top, left;  // of the kernel, then of the padding
  const float *picture, *kernel;          // the kernel's last axis, and the bias, are whole vectors
  int64_t padded;                         // their length
  Finish finish;
  float* result;
};

// `count` rows from `first` on (which may lie outside) of one sample, each `length` pixels beginning `left` pixels
// before the picture's; zeros outside.
void CopyRows(float* to, const float* sample, const Picture& in, int64_t first, int64_t count, int64_t left,
              int64_t length) {
  const int64_t c = in.channels, begin = std::min(left, length), end = std::min(length, left + in.width);
  for (int64_t y = first; y < first + count; ++y, to += length * c) {
    if (y < 0 || y >= in.height) {
      std::memset(to, 0, length * c * 4);
      continue;
    }
    std::memset(to, 0, begin * c * 4);
    std::memcpy(to + begin * c, sample + y * in.width * c, (end - begin) * c * 4);
    std::memset(to + end * c, 0, (length - end) * c * 4);
  }
}

// Sums (pixels, padded) of a row, finished, to the result's pixels, which may have fewer channels.
void FinishRow(float* to, float* sums, int64_t pixels, int64_t channels, int64_t padded, const Finish& finish,
               const float* residual) {
  for (int64_t x = 0; x < pixels; ++x, to += channels, sums += padded) {
    if (channels == padded) {
      for (int64_t c = 0; c < channels; c += kWidth)
        Store(to + c, finish(Load(sums + c), c, residual == nullptr ? nullptr : residual + x * channels + c));
      continue;
    }
    for (int64_t c = 0; residual != nullptr && c < channels; ++c) sums[c] += residual[x * channels + c];
    for (int64_t c = 0; c < padded; c += kWidth) Store(sums + c, finish(Load(sums + c), c, nullptr));
    std::memcpy(to, sums, channels * 4);
  }
}

void Direct(const Convolution& v, int64_t sample, int64_t first, int64_t rows) {
  const int64_t length = (v.out.width - 1) * v.stride + v.wide, count = (rows - 1) * v.stride + v.high;
  const int64_t row = length * v.in.channels, depth = v.wide * v.in.channels;
  const float* from = v.picture + sample * v.in.height * v.in.width * v.in.channels;
  Memory memory = Allocate(count * row + v.out.width * v.padded);
  float* sums = memory.get() + count * row;
  CopyRows(memory.get(), from, v.in, first * v.stride - v.top, count, v.left, length);
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t k = 0; k < v.high; ++k)
      Product(sums, v.padded, memory.get() + (y * v.stride + k) * row, v.stride * v.in.channels, 1,
              v.kernel + k * depth * v.padded, v.padded, v.out.width, depth, v.padded, k > 0);
    const int64_t at = (sample * v.out.height + first + y) * v.out.width * v.out.channels;
    FinishRow(v.result + at, sums, v.out.width, v.out.channels, v.padded, v.finish,
              v.finish.residual == nullptr ? nullptr : v.finish.residual + at);
  }
}

constexpr int kTiles = 64;  // of two by two pixels, at a time

// Kernels (3, 3, C, O) as Winograd's (16, C, O), for one channel of the input.
void TurnKernel(float* to, const float* kernel, int64_t channel, int64_t channels, int64_t outs) {
  const int64_t tap = channels * outs, part = channels * outs;
  for (int64_t o = 0; o < outs; o += kWidth) {
    const float* from = kernel + channel * outs + o;
    Vector half[4][3];
    for (int x = 0; x < 3; ++x) {
      const Vector a = Load(from + x * tap), b = Load(from + (3 + x) * tap), c = Load(from + (6 + x) * tap);
      half[0][x] = a, half[1][x] = (a + b + c) * 0.5f, half[2][x] = (a - b + c) * 0.5f, half[3][x] = c;
    }
    float* at = to + channel * outs + o;
    for (int y = 0; y < 4; ++y, at += 4 * part) {
      const Vector a = half[y][0], b = half[y][1], c = half[y][2];
      Store(at, a), Store(at + part, (a + b + c) * 0.5f);
      Store(at + 2 * part, (a - b + c) * 0.5f), Store(at + 3 * part, c);
    }
  }
}

// Rows `first` to `first + rows - 1` of a sample, of which `first` is even; v.kernel is Winograd's.
void Winograd(const Convolution& v, int64_t sample, int64_t first, int64_t rows) {
  const int64_t c = v.in.channels, o = v.out.channels, across = (v.out.width + 1) / 2, length = 2 * across + 2;
  const float* from = v.picture + sample * v.in.height * v.in.width * c;
  Memory memory = Allocate(4 * length * c + 16 * kTiles * (c + o));
  float *window = memory.get(), *given = window + 4 * length * c, *made = given + 16 * kTiles * c;
  for (int64_t y = first; y < first + rows; y += 2) {
    CopyRows(window, from, v.in, y - v.top, 4, v.left, length);
    for (int64_t tile = 0; tile < across; tile += kTiles) {
      const int64_t tiles = std::min<int64_t>(kTiles, across - tile);
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t k = 0; k < c; k += kWidth) {
          const float* at = window + (tile + t) * 2 * c + k;
          Vector half[4][4];
          for (int x = 0; x < 4; ++x, at += c) {
            const Vector p = Load(at), q = Load(at + length * c), r = Load(at + 2 * length * c);
            const Vector s = Load(at + 3 * length * c);
            half[0][x] = p - r, half[1][x] = q + r, half[2][x] = r - q, half[3][x] = q - s;
          }
          float* to = given + t * c + k;
          for (int j = 0; j < 4; ++j, to += 4 * kTiles * c) {
            const Vector p = half[j][0], q = half[j][1], r = half[j][2], s = half[j][3];
            Store(to, p - r), Store(to + kTiles * c, q + r);
            Store(to + 2 * kTiles * c, r - q), Store(to + 3 * kTiles * c, q - s);
          }
        }
      for (int64_t part = 0; part < 16; ++part)
        Product(made + part * kTiles * o, o, given + part * kTiles * c, c, 1, v.kernel + part * c * o, o, tiles, c, o,
                false);
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t k = 0; k < o; k += kWidth) {
          const float* at = made + t * o + k;
          Vector half[2][4];
          for (int x = 0; x < 4; ++x, at += kTiles * o) {
            const Vector p = Load(at), q = Load(at + 4 * kTiles * o), r = Load(at + 8 * kTiles * o);
            const Vector s = Load(at + 12 * kTiles * o);
            half[0][x] = p + q + r, half[1][x] = q - r - s;
          }
          const int64_t x = 2 * (tile + t);
          for (int j = 0; j < 2 && y + j < first + rows; ++j) {
            const int64_t to = ((sample * v.out.height + y + j) * v.out.width + x) * o + k;
            const float* residual = v.finish.residual == nullptr ? nullptr : v.finish.residual + to;
            const Vector p = half[j][0], q = half[j][1], r = half[j][2], s = half[j][3];
            Store(v.result + to, v.finish(p + q + r, k, residual));
            if (x + 1 < v.out.width)
              Store(v.result + to + o, v.finish(q - r - s, k, residual == nullptr ? nullptr : residual + o));
          }
        }
    }
  }
}

// (rows, columns), padded with zeros to whole vectors of columns; the array itself where they are whole.
const float* Whole(Memory& memory, const float* from, int64_t rows, int64_t columns) {
  const int64_t padded = RoundUp(columns);
  if (padded == columns) return from;
  memory = Allocate(rows * padded);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(memory.get() + r * padded, from + r * columns, columns * 4);
    std::memset(memory.get() + r * padded + columns, 0, (padded - columns) * 4);
  }
  return memory.get();
}

// Rows of a task: some tasks for each thread, in which rows come in pairs.
int64_t RowsOfTask(const ffi::ThreadPool& pool, int64_t rows, int64_t height, int64_t tasks_of_thread) {
  const int64_t tasks = tasks_of_thread * std::max<int64_t>(1, pool.num_threads());
  return std::min(height, ((rows + tasks - 1) / tasks + 1) / 2 * 2);
}

ffi::Error Convolve(ffi::ThreadPool pool, Array picture, Array kernel, Array bias, Array residual, Result result,
                    int64_t stride, int64_t top, int64_t left, float low, float high, bool adds) {
  const auto in = picture.dimensions(), taps = kernel.dimensions(), out = result->dimensions();
  if (in.size() != 4 || taps.size() != 4 || out.size() != 4 || in[3] != taps[2] || out[3] != taps[3])
    return ffi::Error::InvalidArgument("a picture is (B, H, W, C), a kernel (h, w, C, O)");
  if (result->element_count() == 0) return ffi::Error::Success();
  Convolution v{{in[1], in[2], in[3]}, {out[1], out[2], out[3]}, taps[0], taps[1], stride, top, left};
  Memory wide_kernel, wide_bias;
  const int64_t taps_and_channels = taps[0] * taps[1] * taps[2];
  v.padded = RoundUp(out[3]);
  v.picture = picture.typed_data();
  v.kernel = Whole(wide_kernel, kernel.typed_data(), taps_and_channels, out[3]);
  v.finish = {Whole(wide_bias, bias.typed_data(), 1, out[3]), adds ? residual.typed_data() : nullptr, low, high};
  v.result = result->typed_data();
  const int64_t rows = RowsOfTask(pool, out[0] * out[1], out[1], 4), strips = (out[1] + rows - 1) / rows;
  const bool wino = taps[0] == 3 && taps[1] == 3 && stride == 1 && in[3] % kWidth == 0 && v.padded == out[3];
  if (wino) {
    wide_kernel = Allocate(16 * in[3] * out[3]);
    for (int64_t c = 0; c < in[3]; ++c) TurnKernel(wide_kernel.get(), v.kernel, c, in[3], out[3]);
    v.kernel = wide_kernel.get();
  }
  ForAll(pool, out[0] * strips, [=](int64_t task) {
    const int64_t first = task % strips * rows, count = std::min(rows, out[1] - first);
    wino ? Winograd(v, task / strips, first, count) : Direct(v, task / strips, first, count);
  });
  return ffi::Error::Success();
}

constexpr int64_t kPixelsOfGroup = 64;  // of a bottleneck, that meet its matrices together

// relu6(x W1 + b1), relu6 of each channel's own convolution of that, that times W2 + b2, and the input where `adds`.
struct Bottleneck {
  Picture in, out;
  int64_t inner, padded, side, stride, top, left;  // padded: channels of the result, in whole vectors
  const float *picture, *expand, *expand_bias;     // no expand: null, and the picture has `inner` channels
  const float *taps, *taps_bias, *project;
  Finish finish;
  float* result;
};

// `count` rows of a sample from `first` on (which may lie outside), expanded, to rows of `length` pixels with zeros on
// all sides: a few channels of all rows, then the next.
void Expand(const Bottleneck& v, float* to, const float* sample, int64_t first, int64_t count, int64_t length) {
  if (v.expand == nullptr) return CopyRows(to, sample, v.in, first, count, v.left, length);
  const int64_t pixels = std::min(v.in.width, length - v.left), c = v.in.channels, row = length * v.inner;
  const auto inside = [&](int64_t y) { return to + (y - first) * row + v.left * v.inner; };
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + count, v.in.height);
  for (int64_t k = 0; k < v.inner; k += kColumns * kWidth)
    for (int64_t y = begin; y < end; ++y)
      Product(inside(y) + k, v.inner, sample + y * v.in.width * c, c, 1, v.expand + k, v.inner, pixels, c,
              std::min<int64_t>(kColumns * kWidth, v.inner - k), false);
  const Finish finish{v.expand_bias, nullptr, 0.0f, 6.0f};
  for (int64_t y = first; y < first + count; ++y) {
    if (y < begin || y >= end) {
      std::memset(to + (y - first) * row, 0, row * 4);
      continue;
    }
    std::memset(to + (y - first) * row, 0, v.left * v.inner * 4);
    FinishRow(inside(y), inside(y), pixels, v.inner, v.inner, finish, nullptr);
    std::memset(inside(y) + pixels * v.inner, 0, (length - v.left - pixels) * v.inner * 4);
  }
}

// Each channel's own convolution, of kPixels pixels of a row and kWidth channels; `from`: the rows under the kernel.
template <int kSide, int kStride, int kPixels>
inline void Depthwise(const Bottleneck& v, float* to, const float* from, int64_t row, int64_t channel) {
  Vector sums[kPixels];
  for (auto& sum : sums) sum = Vector{};
  const float* tap = v.taps + channel;
  for (int i = 0; i < kSide; ++i, from += row) {
    Vector given[(kPixels - 1) * kStride + kSide];
    for (int x = 0; x < (kPixels - 1) * kStride + kSide; ++x) given[x] = Load(from + x * v.inner);
    for (int j = 0; j < kSide; ++j, tap += v.inner) {
      const Vector weight = Load(tap);
      for (int p = 0; p < kPixels; ++p) sums[p] += weight * given[p * kStride + j];
    }
  }
  const Finish finish{v.taps_bias, nullptr, 0.0f, 6.0f};
  for (int p = 0; p < kPixels; ++p) Store(to + p * v.inner, finish(sums[p], channel, nullptr));
}

template <int kSide, int kStride>
void DepthwiseRow(const Bottleneck& v, float* to, const float* from, int64_t row) {
  for (int64_t k = 0; k < v.inner; k += kWidth) {
    int64_t x = 0;
    for (; x + 4 <= v.out.width; x += 4)
      Depthwise<kSide, kStride, 4>(v, to + x * v.inner + k, from + x * kStride * v.inner + k, row, k);
    for (; x < v.out.width; ++x)
      Depthwise<kSide, kStride, 1>(v, to + x * v.inner + k, from + x * kStride * v.inner + k, row, k);
  }
}

// Rows `first` to `first + count - 1` of a sample, `group` at a time.
void Strip(const Bottleneck& v, int64_t sample, int64_t first, int64_t count, int64_t group) {
  const int64_t length = (v.out.width - 1) * v.stride + v.side, row = length * v.inner;
  const int64_t most = (group - 1) * v.stride + v.side;
  const float* from = v.picture + sample * v.in.height * v.in.width * v.in.channels;
  Memory memory = Allocate(most * row + group * v.out.width * (v.inner + v.padded));
  float *wide = memory.get(), *mixed = wide + most * row, *sums = mixed + group * v.out.width * v.inner;
  const auto depthwise = v.side == 3 ? (v.stride == 1 ? DepthwiseRow<3, 1> : DepthwiseRow<3, 2>)
                                     : (v.stride == 1 ? DepthwiseRow<5, 1> : DepthwiseRow<5, 2>);
  int64_t above = 0, kept = 0;  // the first row that `wide` has, and how many
  for (int64_t y = first; y < first + count; y += group) {
    const int64_t rows = std::min(group, first + count - y), needed = (rows - 1) * v.stride + v.side;
    const int64_t start = y * v.stride - v.top;
    const int64_t shared = kept > 0 ? std::max<int64_t>(0, above + kept - start) : 0;
    if (shared > 0) std::memmove(wide, wide + (start - above) * row, shared * row * 4);
    Expand(v, wide + shared * row, from, start + shared, needed - shared, length);
    above = start, kept = needed;
    for (int64_t r = 0; r < rows; ++r)
      depthwise(v, mixed + r * v.out.width * v.inner, wide + r * v.stride * row, row);
    Product(sums, v.padded, mixed, v.inner, 1, v.project, v.padded, rows * v.out.width, v.inner, v.padded, false);
    const int64_t at = (sample * v.out.height + y) * v.out.width * v.out.channels;
    FinishRow(v.result + at, sums, rows * v.out.width, v.out.channels, v.padded, v.finish,
              v.finish.residual == nullptr ? nullptr : v.finish.residual + at);
  }
}

ffi::Error Invert(ffi::ThreadPool pool, Array picture, Array expand, Array expand_bias, Array taps, Array taps_bias,
                  Array project, Array project_bias, Result result, int64_t stride, int64_t top, int64_t left,
                  bool expands, bool adds) {
  const auto in = picture.dimensions(), out = result->dimensions(), sides = taps.dimensions();
  if (in.size() != 4 || out.size() != 4 || sides.size() != 3 || sides[0] != sides[1] ||
      (sides[0] != 3 && sides[0] != 5) || (stride != 1 && stride != 2) || sides[2] % kWidth ||
      (!expands && in[3] != sides[2]) || (adds && picture.element_count() != result->element_count()))
    return ffi::Error::InvalidArgument("a picture is (B, H, W, C), depthwise kernels (k, k, inner) of 3 or 5");
  if (result->element_count() == 0) return ffi::Error::Success();
  Bottleneck v{{in[1], in[2], in[3]}, {out[1], out[2], out[3]}, sides[2], RoundUp(out[3]), sides[0], stride, top, left};
  Memory wide_project, wide_bias;
  const float infinity = INFINITY;
  v.picture = picture.typed_data();
  v.expand = expands ? expand.typed_data() : nullptr;
  v.expand_bias = expand_bias.typed_data();
  v.taps = taps.typed_data();
  v.taps_bias = taps_bias.typed_data();
  v.project = Whole(wide_project, project.typed_data(), v.inner, out[3]);
  v.finish = {Whole(wide_bias, project_bias.typed_data(), 1, out[3]), adds ? v.picture : nullptr, -infinity, infinity};
  v.result = result->typed_data();
  // one for each thread: rows under the kernel that two tasks share are expanded by both
  const int64_t rows = RowsOfTask(pool, out[0] * out[1], out[1], 1), strips = (out[1] + rows - 1) / rows;
  const int64_t group = std::min(rows, std::max<int64_t>(1, kPixelsOfGroup / out[2]));
  ForAll(pool, out[0] * strips, [=](int64_t task) {
    const int64_t first = task % strips * rows;
    Strip(v, task / strips, first, std::min(rows, out[1] - first), group);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left")
                                  .Attr<float>("low")
                                  .Attr<float>("high")
                                  .Attr<bool>("adds"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(inverted_bottleneck, Invert,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left")
                                  .Attr<bool>("expands")
                                  .Attr<bool>("adds"));
