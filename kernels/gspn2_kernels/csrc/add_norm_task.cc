// Compiled once for each kind of processor, with its name in GSPN2_PROCESSOR; see line_scan_task.h.
#include "add_norm_task.h"

#include "lanes.h"

namespace gspn2 {
namespace GSPN2_PROCESSOR {
namespace {

GSPN2_INLINE float Total(Floats lanes) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Zero in the lanes from `count` on.
GSPN2_INLINE Floats First(Floats value, int64_t count) {
  for (int64_t i = count; i < kLanes; ++i) value[i] = 0;
  return value;
}

GSPN2_INLINE float SquareRoot(float value) { return __builtin_sqrtf(value); }

template <class T>
struct Row {
  const T *x, *update, *bias, *scale, *shift;
  T *sum, *normed;
  int64_t channels;
  bool one_bias;
};

// A row's mean, and the sum in its place, from which everything else is computed: rounded as it is handed on.
template <class T>
GSPN2_INLINE float Add(const Row<T>& row) {
  const Floats bias = All(Load(row.bias, 1)[0]);
  Floats total{};
  int64_t c = 0;
  for (; c + kLanes <= row.channels; c += kLanes) {
    Store(Load(row.x + c) + (Load(row.update + c) + (row.one_bias ? bias : Load(row.bias + c))), row.sum + c);
    total += Load(row.sum + c);
  }
  if (const int64_t rest = row.channels - c) {
    const Floats of_update = Load(row.update + c, rest) + (row.one_bias ? bias : Load(row.bias + c, rest));
    Store(Load(row.x + c, rest) + of_update, row.sum + c, rest);
    total += Load(row.sum + c, rest);
  }
  return Total(total) / static_cast<float>(row.channels);
}

// The squares of deviations from the mean, which a large mean does not swallow.
template <class T>
GSPN2_INLINE float Variance(const Row<T>& row, float mean) {
  Floats total{};
  int64_t c = 0;
  for (; c + kLanes <= row.channels; c += kLanes) {
    const Floats deviation = Load(row.sum + c) - mean;
    total += deviation * deviation;
  }
  if (const int64_t rest = row.channels - c) {
    const Floats deviation = First(Load(row.sum + c, rest) - mean, rest);
    total += deviation * deviation;
  }
  return Total(total) / static_cast<float>(row.channels);
}

template <class T>
GSPN2_INLINE void Normalise(const Row<T>& row, float mean, float factor) {
  int64_t c = 0;
  for (; c + kLanes <= row.channels; c += kLanes) {
    Store((Load(row.sum + c) - mean) * factor * Load(row.scale + c) + Load(row.shift + c), row.normed + c);
  }
  if (const int64_t rest = row.channels - c) {
    const Floats normed = (Load(row.sum + c, rest) - mean) * factor;
    Store(normed * Load(row.scale + c, rest) + Load(row.shift + c, rest), row.normed + c, rest);
  }
}

template <class T>
GSPN2_INLINE void Run(const AddNorm& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * call.channels;
    const Row<T> row{static_cast<const T*>(call.x) + at,
                     static_cast<const T*>(call.update) + at,
                     static_cast<const T*>(call.bias),
                     static_cast<const T*>(call.scale),
                     static_cast<const T*>(call.shift),
                     static_cast<T*>(call.sum) + at,
                     static_cast<T*>(call.normed) + at,
                     call.channels,
                     call.one_bias};
    const float mean = Add(row);
    Normalise(row, mean, 1.0f / SquareRoot(Variance(row, mean) + call.epsilon));
  }
}

}  // namespace

void AddNormFloat(const AddNorm& call, int64_t begin, int64_t end) { Run<float>(call, begin, end); }
void AddNormHalf(const AddNorm& call, int64_t begin, int64_t end) { Run<Half>(call, begin, end); }
void AddNormBfloat16(const AddNorm& call, int64_t begin, int64_t end) { Run<Bfloat16>(call, begin, end); }

}  // namespace GSPN2_PROCESSOR
}  // namespace gspn2
