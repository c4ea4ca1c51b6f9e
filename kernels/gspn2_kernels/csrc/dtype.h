// The types of numbers that the kernels take.
#pragma once

namespace gspn2 {

enum class Dtype { kFloat, kHalf, kBfloat16 };

}  // namespace gspn2
