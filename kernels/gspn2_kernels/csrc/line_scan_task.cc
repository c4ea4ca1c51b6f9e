// Compiled once for each kind of processor, with its name in GSPN2_PROCESSOR; see line_scan_task.h.
#include "line_scan_task.h"

#include "lanes.h"

namespace gspn2 {
namespace GSPN2_PROCESSOR {
namespace {

// Pointers to the first position of a line and the first channel or group of the block.
template <class T>
struct Line {
  const T *x, *lam, *logits, *u;
  T* y;
};

GSPN2_INLINE Floats Sigmoid(Floats minus_logit, Floats m, Floats one) { return 1.0f / (one + Exp(minus_logit - m)); }

// w_k = s_k / (s_0 + s_1 + s_2), s_k the sigmoid of logit k. Each s_k is multiplied by e^m, m > 0 where all logits
// are negative: the largest is at least 1/2 then, and the sum is never zero, however low the logits are.
GSPN2_INLINE void Normalise(Floats* weights) {
  const Floats a0 = -weights[0], a1 = -weights[1], a2 = -weights[2];
  const Floats lower = a0 < a1 ? a0 : a1;
  const Floats least = lower < a2 ? lower : a2;
  const Floats m = least > 0.0f ? least : Floats{};
  const Floats one = Exp(-m);
  const Floats s0 = Sigmoid(a0, m, one), s1 = Sigmoid(a1, m, one), s2 = Sigmoid(a2, m, one);
  // Divided each: times a reciprocal, the one weight of a line of one position is not quite 1, line after line.
  const Floats sum = s0 + s1 + s2;
  weights[0] = s0 / sum;
  weights[1] = s1 / sum;
  weights[2] = s2 / sum;
}

// Gathers the logits of a line by neighbour: for each of them an array over positions and, in them, groups.
template <class T>
GSPN2_INLINE void GatherLogits(const Block& block, int64_t stride, const T* logits, T* const* gathered) {
  int64_t i = 0;
  for (int64_t j = 0; j < block.positions; ++j) {
    const T* at = logits + j * stride;
    for (int64_t g = 0; g < block.groups; ++g, ++i, at += 3) {
      for (int k = 0; k < 3; ++k) gathered[k][i] = at[k];
    }
  }
  for (int64_t rest = i; rest % kLanes != 0; ++rest) {
    for (int k = 0; k < 3; ++k) gathered[k][rest] = T{};
  }
  // A neighbour outside the line: the lowest logit that there is, and so a weight of less than 1e-34, of a zero.
  T absent[kLanes];
  Store(All(-__builtin_inff()), absent);
  for (int64_t g = 0; g < block.groups; ++g) {
    gathered[0][g] = absent[0];
    gathered[2][i - block.groups + g] = absent[0];
  }
}

template <class T>
GSPN2_INLINE void ComputeWeights(const ScanTask& task, const T* logits, const Scratch& scratch) {
  const int64_t count = task.block.positions * task.block.groups;
  const int64_t room = (count + kLanes - 1) / kLanes * kLanes;
  // At the end of the room of the weights that they become: these never overtake narrower numbers there.
  T* gathered[3];
  for (int k = 0; k < 3; ++k) gathered[k] = reinterpret_cast<T*>(scratch.weights[k] + room) - room;
  GatherLogits(task.block, task.position.logits, logits, gathered);
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats weights[3];
    for (int k = 0; k < 3; ++k) weights[k] = Load(gathered[k] + i);
    Normalise(weights);
    for (int k = 0; k < 3; ++k) Store(weights[k], scratch.weights[k] + i);
  }
}

GSPN2_INLINE void ExpandWeights(const Block& block, const Scratch& scratch) {
  const int64_t count = block.positions * block.groups;
  for (int k = 0; k < 3; ++k) {
    float* expanded = scratch.expanded[k];
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < block.group_channels; ++c) *expanded++ = scratch.weights[k][i];
    }
  }
}

template <bool kFull, class T>
GSPN2_INLINE Floats Read(const T* from, int64_t rest) {
  if constexpr (kFull) return Load(from);
  return Load(from, rest);
}

template <bool kFull, class T>
GSPN2_INLINE void Write(Floats value, T* to, int64_t rest) {
  if constexpr (kFull) {
    Store(value, to);
  } else {
    Store(value, to, rest);
  }
}

// Some channels of one position. `left` is the state of its left neighbour in the line before; `stride` leads on.
template <class T>
struct Site {
  const T *x, *lam, *u;
  T* y;
  const float* left;
  int64_t stride;
  float* h;
  const float* weights[3];
};

// How a line is computed: kBegin, as the first of a scan; kEach, with a weight for each channel, not one for all.
// h = lam x + w_0 h_left + w_1 h_middle + w_2 h_right and y = u h, of kLanes channels or, unless kFull, the rest.
template <bool kBegin, bool kEach, bool kFull, class T>
GSPN2_INLINE void Step(const Site<T>& at, const Floats* shared, int64_t c, int64_t rest) {
  Floats h = Read<kFull>(at.lam + c, rest) * Read<kFull>(at.x + c, rest);
  if constexpr (!kBegin) {
    const float* neighbour = at.left + c;
    for (int k = 0; k < 3; ++k, neighbour += at.stride) {
      const Floats weight = kEach ? Read<kFull>(at.weights[k] + c, rest) : shared[k];
      h += weight * Read<kFull>(neighbour, rest);
    }
  }
  Write<kFull>(h, at.h + c, rest);
  Write<kFull>(Read<kFull>(at.u + c, rest) * h, at.y + c, rest);
}

template <bool kBegin, bool kEach, class T>
GSPN2_INLINE void StepAll(const Site<T>& at, int64_t channels) {
  Floats shared[3] = {};
  if constexpr (!kBegin && !kEach) {
    for (int k = 0; k < 3; ++k) shared[k] = All(*at.weights[k]);
  }
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) Step<kBegin, kEach, true>(at, shared, c, kLanes);
  if (c < channels) Step<kBegin, kEach, false>(at, shared, c, channels - c);
}

// A line in runs of channels that are of one group, or of all channels where each has its weight.
template <bool kBegin, bool kEach, class T>
GSPN2_INLINE void StepLine(const ScanTask& task, const Line<T>& line, const float* previous, float* state,
                           float* const* weights) {
  const Block& block = task.block;
  const bool whole = kBegin || kEach;
  const int64_t runs = whole ? 1 : block.groups, channels = whole ? block.channels : block.group_channels;
  for (int64_t j = 0, w = 0; j < block.positions; ++j) {
    for (int64_t run = 0; run < runs; ++run, w += kEach ? channels : 1) {
      const int64_t c = run * channels, of_lam = j * task.position.lam + c, of_state = j * block.channels + c;
      const Site<T> at{line.x + j * task.position.x + c,
                       line.lam + of_lam,
                       line.u + of_lam,
                       line.y + of_lam,
                       previous + of_state,
                       block.channels,
                       state + of_state + block.channels,
                       {weights[0] + w, weights[1] + w, weights[2] + w}};
      StepAll<kBegin, kEach>(at, channels);
    }
  }
}

template <class T>
GSPN2_INLINE Line<T> LineOf(const ScanTask& task, int64_t i) {
  return {static_cast<const T*>(task.x) + i * task.line.x, static_cast<const T*>(task.lam) + i * task.line.lam,
          static_cast<const T*>(task.logits) + i * task.line.logits,
          static_cast<const T*>(task.u) + i * task.line.lam, static_cast<T*>(task.y) + i * task.line.lam};
}

template <class T>
GSPN2_INLINE void Run(const ScanTask& task, const Scratch& scratch) {
  float *previous = scratch.state[0], *state = scratch.state[1];
  const bool each = task.block.group_channels < kSmallGroup, expand = each && task.block.group_channels > 1;
  float* const* weights = expand ? scratch.expanded : scratch.weights;
  for (int64_t i = task.begin, phase = 0; i < task.end; ++i, ++phase) {
    const Line<T> line = LineOf<T>(task, i);
    if (phase == task.segment) phase = 0;
    if (phase == 0) {
      StepLine<true, false>(task, line, previous, state, weights);
    } else {
      ComputeWeights(task, line.logits, scratch);
      if (expand) ExpandWeights(task.block, scratch);
      if (each) {
        StepLine<false, true>(task, line, previous, state, weights);
      } else {
        StepLine<false, false>(task, line, previous, state, weights);
      }
    }
    float* const done = state;
    state = previous;
    previous = done;
  }
}

}  // namespace

void RunFloat(const ScanTask& task, const Scratch& scratch) { Run<float>(task, scratch); }
void RunHalf(const ScanTask& task, const Scratch& scratch) { Run<Half>(task, scratch); }
void RunBfloat16(const ScanTask& task, const Scratch& scratch) { Run<Bfloat16>(task, scratch); }

}  // namespace GSPN2_PROCESSOR
}  // namespace gspn2
