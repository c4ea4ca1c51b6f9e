// The kernel for a small batch, where time goes by the length of what a line waits for: warps on their own.
//
// A block is one warp, which scans one direction of one image for V channels and holds the whole line: a lane has P
// adjacent positions. A lane copies what it alone reads, kStages - 1 lines ahead, so that there are no barriers. Only
// the states of a lane's outermost positions go to its neighbours, by shuffles. Of each sector in L2 a warp uses a
// part: for a large batch, that is too much traffic.
#pragma once

#include "line_scan_copies.cuh"

namespace gspn2 {

template <typename T, int V, int P>
struct DirectTile {
  using Number = T;
  // With eight stages, five lines are on their way while a line waits: more than DRAM's latency.
  static constexpr int kVector = V, kPositions = P, kStages = 8;
  static constexpr int kVectorBytes = V * static_cast<int>(sizeof(T));
  // Offsets in a stage, where the lanes' words lie side by side, then those of their next positions.
  static constexpr int kTensor = kLanes * P * kVectorBytes, kLogits = 3 * kTensor;
  static constexpr int kStage = kLogits + kLanes * P * kLogitSlot<T>;
};

// Copies of lines of x, lam, u and logits into the lane's own slots, and y on its way back.
template <class Tile>
class DirectCopies {
 public:
  using T = typename Tile::Number;
  using Vector = Words<Tile::kVectorBytes>;
  static constexpr int P = Tile::kPositions;

  __device__ DirectCopies(const Scan& scan, const Job& job, char* memory) {
    constexpr int kSize = sizeof(T);
    const int position = threadIdx.x * P, pixel = kSize * scan.channels, logit_pixel = 12 * kSize * scan.groups;
    here_ = job.lines.positions - position;
    index_ = job.direction * scan.groups + job.group;
    values_ = memory + threadIdx.x * Tile::kVectorBytes;
    slots_ = memory + Tile::kLogits + threadIdx.x * kLogitSlot<T>;
    step_ = job.lines.step * pixel;
    logit_step_ = job.lines.step * logit_pixel;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      // Of the line before the first: a step is made before each use. y is stored once, for no line, before that.
      const int64_t pixels = job.FirstPixel(scan) + int64_t{position + p} * job.lines.across - job.lines.step;
      const int64_t at = (4 * pixels + job.direction) * pixel + job.channel * kSize;
      x_[p] = reinterpret_cast<intptr_t>(scan.x) + pixels * pixel + job.channel * kSize;
      lam_[p] = reinterpret_cast<intptr_t>(scan.lam) + at;
      u_[p] = reinterpret_cast<intptr_t>(scan.u) + at;
      y_[p] = reinterpret_cast<intptr_t>(scan.y) + at - int64_t{4} * step_;
      logits_[p] = reinterpret_cast<intptr_t>(scan.logits) + pixels * logit_pixel + (index_ * 3 * kSize & ~3);
    }
  }

  // Whether position p of the lane is in the line; p may be P.
  __device__ bool Holds(int p) const { return p < here_; }

  // Asks for the next line, if there is one.
  __device__ void Load(int stage, bool there) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const bool wanted = there && Holds(p);
      CopyWordsAsync<sizeof(T) == 2 ? 2 : 3>(wanted, Slot(stage, p), Step(logits_[p], logit_step_));
      CopyAsync<Tile::kVectorBytes>(wanted, Value(stage, 0, p), Step(x_[p], step_));
      CopyAsync<Tile::kVectorBytes>(wanted, Value(stage, 1, p), Step(lam_[p], int64_t{4} * step_));
      CopyAsync<Tile::kVectorBytes>(wanted, Value(stage, 2, p), Step(u_[p], int64_t{4} * step_));
    }
    CommitCopies();
  }

  // Writes the next line of y.
  __device__ void Store(const Vector (&y)[P], bool there) {
#pragma unroll
    for (int p = 0; p < P; ++p) StoreWords(there && Holds(p), Step(y_[p], int64_t{4} * step_), y[p].word);
  }

  // x, lam or u.
  __device__ Vector Read(int stage, int tensor, int p) const { return Vector::Read(Value(stage, tensor, p)); }

  __device__ float4 Logits(int stage, int p) const { return ReadLogits<T>(Slot(stage, p), index_); }

 private:
  __device__ char* Value(int stage, int tensor, int p) const {
    return values_ + stage + tensor * Tile::kTensor + p * kLanes * Tile::kVectorBytes;
  }

  __device__ char* Slot(int stage, int p) const { return slots_ + stage + p * kLanes * kLogitSlot<T>; }

  // Steps first: hardware reads the address of a copy late, and would hold up the step to the next.
  __device__ static char* Step(int64_t& address, int64_t step) {
    address += step;
    return reinterpret_cast<char*>(address);
  }

  int64_t x_[P], lam_[P], u_[P], y_[P], logits_[P];  // addresses
  char *values_, *slots_;
  int step_, logit_step_, here_, index_;
};

// The states of a lane: P positions of V channels, and their weights in the next line.
template <class Tile>
class DirectStates {
 public:
  using T = typename Tile::Number;
  static constexpr int P = Tile::kPositions, V = Tile::kVector;

  __device__ void Restart() {
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int v = 0; v < V; ++v) h_[p][v] = 0.0f;
  }

  // Sends the outermost states to the neighbours.
  __device__ void Exchange() {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      before_[v] = __shfl_up_sync(~0u, h_[P - 1][v], 1);
      after_[v] = __shfl_down_sync(~0u, h_[0][v], 1);
    }
  }

  // Reads x, lam and u of a line, and the logits of the line after it.
  __device__ void Read(const DirectCopies<Tile>& copies, int stage, int next) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      x_[p] = copies.Read(stage, 0, p);
      lam_[p] = copies.Read(stage, 1, p);
      u_[p] = copies.Read(stage, 2, p);
      logits_[p] = copies.Logits(next, p);
    }
  }

  // Takes the states to the line that was read.
  __device__ void Advance(const DirectCopies<Tile>& copies) {
    float past[V], now[V];
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float4 w = weights_[p];
        now[v] = fmaf(w.y, h_[p][v], Get<T>(x_[p], v) * Get<T>(lam_[p], v));
        if (p > 0) now[v] = fmaf(w.x, past[v], now[v]);
        // Beyond the line a lane computes with what happens to be there: nothing may be taken from that, not even 0
        // times it. What comes from another lane is added last.
        if (copies.Holds(p + 1)) now[v] = fmaf(w.z, p + 1 < P ? h_[p + 1][v] : after_[v], now[v]);
        if (p == 0 && threadIdx.x > 0) now[v] = fmaf(w.x, before_[v], now[v]);
        past[v] = h_[p][v];
        h_[p][v] = now[v];
      }
    }
  }

  // y = u * h
  __device__ void Outflow(Words<Tile::kVectorBytes> (&y)[P]) const {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = h_[p][v] * Get<T>(u_[p], v);
      y[p] = ToWords<T>(values);
    }
  }

  // Turns the logits that were read into weights.
  __device__ void Weigh(const DirectCopies<Tile>& copies) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const float4 a = logits_[p];
      weights_[p] = Normalise(a.x, a.y, a.z, p == 0 && threadIdx.x == 0, !copies.Holds(p + 1));
    }
  }

 private:
  Words<Tile::kVectorBytes> x_[P], lam_[P], u_[P];
  float4 logits_[P], weights_[P];
  float h_[P][V], before_[V], after_[V];
};

// What takes long comes last: shuffles and reads of shared memory would wait behind copies and stores.
template <class Tile>
__global__ void __launch_bounds__(kLanes) DirectKernel(const __grid_constant__ Scan scan) {
  constexpr int kStages = Tile::kStages, kEnd = kStages * Tile::kStage;
  __shared__ __align__(16) char memory[kEnd];
  const Job job(scan, Tile::kVector, false);
  const int lines = job.lines.lines;
  DirectCopies<Tile> copies(scan, job, memory);
  DirectStates<Tile> states;
  Words<Tile::kVectorBytes> y[Tile::kPositions];

#pragma unroll 1
  for (int line = 0; line < kStages - 1; ++line) copies.Load(line * Tile::kStage, line < lines);
  WaitForCopies<kStages - 2>();
  states.Read(copies, 0, 0);
  states.Weigh(copies);

  int stage = 0, before = kEnd - Tile::kStage;
  for (int start = 0; start < lines; start += scan.segment) {
    states.Restart();
    const int end = min(scan.segment, lines - start) + start;
#pragma unroll 1
    for (int line = start; line < end; ++line) {
      const int next = stage + Tile::kStage < kEnd ? stage + Tile::kStage : 0;
      WaitForCopies<kStages - 3>();
      states.Exchange();
      states.Read(copies, stage, next);
      copies.Store(y, line > 0);
      copies.Load(before, line + kStages - 1 < lines);
      states.Advance(copies);
      states.Outflow(y);
      // After the last line this works on numbers that nobody reads.
      states.Weigh(copies);
      before = stage;
      stage = next;
    }
  }
  copies.Store(y, true);
}

}  // namespace gspn2
