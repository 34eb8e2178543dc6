// What the kernels for CPUs are made of: vectors as wide as the processor's registers, products of small matrices whose
// sums stay in registers, memory, and tasks on XLA's threads. Each file that includes it has its own copy.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 8, kColumns = 3;  // 32 registers: 24 sums
#elif defined(__aarch64__)
constexpr int kWidth = 4, kRows = 8, kColumns = 3;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 4, kColumns = 3;  // 16 registers: 12 sums
#else
constexpr int kWidth = 4, kRows = 4, kColumns = 3;
#endif

// The compiler's own type.
typedef float Vector __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline Vector Load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline void Store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }
inline Vector All(float value) { return value - Vector{}; }

// C[i][n] (+)= sum over k of A[i, k] B[k][n] for kR rows i and kC vectors n; A's strides are (by_row, by_k).
template <int kR, int kC>
inline void Tile(float* c, int64_t c_stride, const float* a, int64_t by_row, int64_t by_k, const float* b,
                 int64_t b_stride, int64_t depth, bool add) {
  Vector sums[kR][kC];
  for (int r = 0; r < kR; ++r)
    for (int n = 0; n < kC; ++n) sums[r][n] = add ? Load(c + r * c_stride + n * kWidth) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kC];
    for (int n = 0; n < kC; ++n) row[n] = Load(b + k * b_stride + n * kWidth);
    for (int r = 0; r < kR; ++r) {
      const Vector factor = All(a[r * by_row + k * by_k]);
      for (int n = 0; n < kC; ++n) sums[r][n] += factor * row[n];
    }
  }
  for (int r = 0; r < kR; ++r)
    for (int n = 0; n < kC; ++n) Store(c + r * c_stride + n * kWidth, sums[r][n]);
}

template <int kC>
inline void Panel(float* c, int64_t c_stride, const float* a, int64_t by_row, int64_t by_k, const float* b,
                  int64_t b_stride, int64_t rows, int64_t depth, bool add) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    Tile<kRows, kC>(c + r * c_stride, c_stride, a + r * by_row, by_row, by_k, b, b_stride, depth, add);
  for (; r + kRows / 2 <= rows; r += kRows / 2)
    Tile<kRows / 2, kC>(c + r * c_stride, c_stride, a + r * by_row, by_row, by_k, b, b_stride, depth, add);
  for (; r < rows; ++r) Tile<1, kC>(c + r * c_stride, c_stride, a + r * by_row, by_row, by_k, b, b_stride, depth, add);
}

// The same for any number of rows; columns are a multiple of kWidth. A few columns of B at a time meet all rows.
void Product(float* c, int64_t c_stride, const float* a, int64_t by_row, int64_t by_k, const float* b, int64_t b_stride,
             int64_t rows, int64_t depth, int64_t columns, bool add) {
  for (int64_t left = columns / kWidth; left > 0;) {
    if (left == 3 || left > 4) {
      Panel<3>(c, c_stride, a, by_row, by_k, b, b_stride, rows, depth, add);
      left -= 3, c += 3 * kWidth, b += 3 * kWidth;
    } else if (left > 1) {
      Panel<2>(c, c_stride, a, by_row, by_k, b, b_stride, rows, depth, add);
      left -= 2, c += 2 * kWidth, b += 2 * kWidth;
    } else {
      Panel<1>(c, c_stride, a, by_row, by_k, b, b_stride, rows, depth, add);
      left -= 1;
    }
  }
}

int64_t RoundUp(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

struct Freed {
  void operator()(float* at) const { std::free(at); }
};
using Memory = std::unique_ptr<float, Freed>;

Memory Allocate(int64_t floats) {
  void* at = std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64);
  if (at == nullptr) throw std::bad_alloc();
  return Memory(static_cast<float*>(at));
}

// Calls work(task) for all tasks on the pool's threads and this one. Tasks are handed out one by one, so that this
// thread, which may be the pool's last, never waits for one that has not begun.
template <typename Work>
void ForAll(ffi::ThreadPool pool, int64_t tasks, Work work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto run = [state, tasks, work] {
    for (int64_t task; (task = state->next.fetch_add(1)) < tasks;) {
      work(task);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(tasks, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  while (state->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

}  // namespace
