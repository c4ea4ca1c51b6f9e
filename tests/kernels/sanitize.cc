// Runs the CPU kernels under sanitizers: random calls against plain loops in double, every 16-bit number through
// the conversions. Prints "N line scans, N numbers, N sums with norms: passed", or what differs and returns 1.
//   sanitize CALLS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "add_norm_cpu.h"
#include "line_scan_cpu.h"

using gspn2::Dtype;
using gspn2::Shape;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr const char* kNames[] = {"fp32", "fp16", "bf16"};

// A 16-bit type: bits of the fraction, exponent of the smallest normal number and of the first beyond the largest.
struct Format {
  int fraction, smallest, beyond;
};

Format FormatOf(Dtype dtype) { return dtype == Dtype::kHalf ? Format{10, -14, 16} : Format{7, -126, 128}; }

double Decode(uint16_t bits, Dtype dtype) {
  const Format f = FormatOf(dtype);
  const int fraction = bits & ((1 << f.fraction) - 1), exponent = (bits & 0x7fff) >> f.fraction;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == f.beyond - f.smallest + 1) return fraction ? std::nan("") : sign * kInfinity;
  const int implied = exponent ? 1 << f.fraction : 0;
  return sign * std::ldexp(implied + fraction, std::max(exponent, 1) - 1 + f.smallest - f.fraction);
}

// To nearest, ties to even.
double Round(double value, Dtype dtype) {
  if (dtype == Dtype::kFloat) return static_cast<float>(value);
  const Format f = FormatOf(dtype);
  if (value == 0 || !std::isfinite(value)) return value;
  const int unit = std::max(std::ilogb(value), f.smallest) - f.fraction;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
  return std::fabs(rounded) >= std::ldexp(1, f.beyond) ? std::copysign(kInfinity, value) : rounded;
}

// Exactly as large as what it holds, for the sanitizer to see the first number beyond.
struct Tensor {
  Tensor(int64_t count, Dtype type) : dtype(type), bytes(count * (type == Dtype::kFloat ? 4 : 2)) {}

  double Get(int64_t i) const {
    if (dtype == Dtype::kFloat) {
      float value;
      std::memcpy(&value, &bytes[4 * i], 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, &bytes[2 * i], 2);
    return Decode(bits, dtype);
  }

  void Set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == Dtype::kFloat) std::memcpy(&bytes[4 * i], &bits, 4);
    if (dtype == Dtype::kBfloat16) SetBits(i, static_cast<uint16_t>(bits >> 16));
    if (dtype == Dtype::kHalf) {
      // Small numbers become zero: here only inputs are made.
      const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
      const uint32_t magnitude = exponent <= 0 ? 0 : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023);
      SetBits(i, static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(magnitude));
    }
  }

  void SetBits(int64_t i, uint16_t bits) { std::memcpy(&bytes[2 * i], &bits, 2); }

  Dtype dtype;
  std::vector<char> bytes;
};

struct Tensors {
  Tensors(const Shape& s, Dtype dtype)
      : x(s.batch * s.height * s.width * s.channels, dtype),
        lam(4 * s.batch * s.height * s.width * s.channels, dtype),
        logits(12 * s.batch * s.height * s.width * s.groups, dtype),
        u(4 * s.batch * s.height * s.width * s.channels, dtype),
        y(4 * s.batch * s.height * s.width * s.channels, dtype) {}
  Tensor x, lam, logits, u, y;
};

void ParallelFor(void*, size_t count, gspn2::Task task, void* data) {
  std::thread other([=] {
    for (size_t i = 1; i < count; i += 2) task(data, i);
  });
  for (size_t i = 0; i < count; i += 2) task(data, i);
  other.join();
}

const char* Call(const Shape& s, Tensors* t) {
  return gspn2::LineScanCpu(s, t->x.dtype, t->x.bytes.data(), t->lam.bytes.data(), t->logits.bytes.data(),
                            t->u.bytes.data(), t->y.bytes.data(), ParallelFor, nullptr);
}

// One direction, image and channel by the definition.
std::vector<double> Expected(const Shape& s, const Tensors& t, int64_t image, int64_t direction, int64_t channel) {
  const int64_t lines = direction < 2 ? s.height : s.width, positions = direction < 2 ? s.width : s.height;
  std::vector<double> y(s.height * s.width), before(positions + 2), h(positions + 2);
  for (int64_t i = 0; i < lines; ++i) {
    const int64_t line = direction % 2 ? lines - 1 - i : i;
    for (int64_t j = 0; j < positions; ++j) {
      const int64_t pixel = direction < 2 ? line * s.width + j : j * s.width + line;
      const int64_t site = (image * s.height * s.width + pixel) * 4 + direction;
      double value = t.lam.Get(site * s.channels + channel) * t.x.Get(site / 4 * s.channels + channel);
      if (i > 0 && !(s.segment > 0 && i % s.segment == 0)) {
        double total = 0, sum = 0;
        for (int64_t k = 0; k < 3; ++k) {
          if (j + k == 0 || j + k == positions + 1) continue;
          const int64_t group = channel / (s.channels / s.groups);
          const double weight = 1 / (1 + std::exp(-t.logits.Get((site * s.groups + group) * 3 + k)));
          total += weight;
          sum += weight * before[j + k];
        }
        value += sum / total;
      }
      h[j + 1] = value;
      y[pixel] = t.u.Get(site * s.channels + channel) * value;
    }
    std::swap(before, h);
  }
  return y;
}

bool Agrees(const Shape& s, const Tensors& t) {
  double error = 0, scale = 0;
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t direction = 0; direction < 4; ++direction) {
      for (int64_t channel = 0; channel < s.channels; ++channel) {
        const std::vector<double> want = Expected(s, t, image, direction, channel);
        for (int64_t pixel = 0; pixel < s.height * s.width; ++pixel) {
          const int64_t site = (image * s.height * s.width + pixel) * 4 + direction;
          error += std::pow(t.y.Get(site * s.channels + channel) - want[pixel], 2);
          scale += want[pixel] * want[pixel];
        }
      }
    }
  }
  const double limit = t.x.dtype == Dtype::kFloat ? 2e-6 : t.x.dtype == Dtype::kHalf ? 1e-3 : 4e-3;
  const bool agrees = std::sqrt(error) <= limit * std::sqrt(scale);
  if (!agrees) {
    std::printf("%s B%d H%d W%d C%d G%d segment %d: relative error %g\n", kNames[static_cast<int>(t.x.dtype)],
                int(s.batch), int(s.height), int(s.width), int(s.channels), int(s.groups), int(s.segment),
                std::sqrt(error / scale));
  }
  return agrees;
}

bool RandomCall(std::mt19937* random) {
  const auto draw = [&](int64_t below) { return static_cast<int64_t>((*random)() % below); };
  const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 13, 33};
  const int64_t groups = draw(4) + 1;
  const int64_t group = (draw(8) == 0 ? 70 : draw(20)) / (draw(3) + 1);
  const Shape s{draw(3), sizes[draw(8)], sizes[draw(8)], groups * group, groups, draw(6)};
  const auto dtype = static_cast<Dtype>(draw(3));
  Tensors t(s, dtype);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  const float spread = draw(4) == 0 ? 30 : 1;
  for (int64_t i = 0; i < s.batch * s.height * s.width * s.channels; ++i) t.x.Set(i, normal(*random) + 0.5f);
  for (int64_t i = 0; i < 4 * s.batch * s.height * s.width * s.channels; ++i) {
    t.lam.Set(i, uniform(*random));
    t.u.Set(i, normal(*random));
  }
  for (int64_t i = 0; i < 12 * s.batch * s.height * s.width * s.groups; ++i) t.logits.Set(i, spread * normal(*random));
  if (const char* failed = Call(s, &t)) {
    std::printf("%s\n", failed);
    return false;
  }
  return Agrees(s, t);
}

// sum = x + update + bias, and the norm of the sum as it is handed on.
bool RandomNorm(std::mt19937* random) {
  const auto draw = [&](int64_t below) { return static_cast<int64_t>((*random)() % below); };
  const int64_t rows = draw(5), channels = draw(6) == 0 ? 8 * draw(30) : draw(40);
  const auto dtype = static_cast<Dtype>(draw(3));
  const bool one_bias = draw(2);
  const int64_t all = rows * channels;
  Tensor x(all, dtype), update(all, dtype), bias(one_bias ? 1 : channels, dtype), scale(channels, dtype);
  Tensor shift(channels, dtype), sum(all, dtype), normed(all, dtype);
  std::normal_distribution<float> normal;
  for (Tensor* tensor : {&x, &update, &bias, &scale, &shift}) {
    const int64_t count = tensor->bytes.size() / (dtype == Dtype::kFloat ? 4 : 2);
    for (int64_t i = 0; i < count; ++i) tensor->Set(i, normal(*random) + 0.5f);
  }
  const gspn2::AddNorm call{rows, channels, one_bias, 1e-3f, x.bytes.data(), update.bytes.data(), bias.bytes.data(),
                            scale.bytes.data(), shift.bytes.data(), sum.bytes.data(), normed.bytes.data()};
  gspn2::AddNormCpu(call, dtype, ParallelFor, nullptr);
  double error = 0, scale_of_error = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean += sum.Get(row * channels + c) / channels;
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(sum.Get(row * channels + c) - mean, 2) / channels;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = row * channels + c;
      const double total = x.Get(i) + update.Get(i) + bias.Get(one_bias ? 0 : c);
      const double want = (sum.Get(i) - mean) / std::sqrt(variance + call.epsilon) * scale.Get(c) + shift.Get(c);
      error += std::pow(sum.Get(i) - total, 2) + std::pow(normed.Get(i) - want, 2);
      scale_of_error += total * total + want * want;
    }
  }
  const double limit = dtype == Dtype::kFloat ? 2e-6 : dtype == Dtype::kHalf ? 1e-3 : 4e-3;
  const bool agrees = std::sqrt(error) <= limit * std::sqrt(scale_of_error);
  if (!agrees) {
    std::printf("%s %d rows of %d: relative error %g\n", kNames[static_cast<int>(dtype)], int(rows), int(channels),
                std::sqrt(error / scale_of_error));
  }
  return agrees;
}

// All 16-bit numbers times another: on one line y = u (lam x) with one rounding at the end.
bool Numbers(Dtype dtype, uint16_t factor) {
  const Shape s{1, 1, 1 << 16, 1, 1, 0};
  Tensors t(s, dtype);
  for (int i = 0; i < 1 << 16; ++i) {
    t.x.SetBits(i, static_cast<uint16_t>(i));
    t.lam.SetBits(4 * i, factor);
    t.u.Set(4 * i, 1.0f);
  }
  Call(s, &t);
  for (int i = 0; i < 1 << 16; ++i) {
    const double product = static_cast<float>(t.x.Get(i) * Decode(factor, dtype));
    const double want = Round(product, dtype), got = t.y.Get(4 * i);
    if (got != want && !(std::isnan(got) && std::isnan(want))) {
      std::printf("%s: %04x times %04x gives %g, expected %g\n", kNames[static_cast<int>(dtype)], i, factor, got, want);
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]);
  std::mt19937 random(0);
  int failed = 0, numbers = 0;
  for (int i = 0; i < calls; ++i) failed += !RandomCall(&random) + !RandomNorm(&random);
  for (const Dtype dtype : {Dtype::kHalf, Dtype::kBfloat16}) {
    const int one = dtype == Dtype::kHalf ? 0x3c00 : 0x3f80;
    // 1, about 1/3, 0.003 and 150: ties, numbers that become subnormal, numbers that become infinite.
    for (const int factor : {one, one - 0x06ab, one - 0x2155, one + 0x1cb0}) {
      failed += !Numbers(dtype, static_cast<uint16_t>(factor));
      ++numbers;
    }
  }
  if (failed == 0) {
    std::printf("%d line scans, %d numbers, %d sums with norms: passed\n", calls, numbers << 16, calls);
  }
  return failed != 0;
}
