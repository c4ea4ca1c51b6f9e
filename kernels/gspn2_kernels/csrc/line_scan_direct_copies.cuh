// What moves to a direct kernel, see line_scan_direct.cuh.
#pragma once

#include "line_scan_copies.cuh"

namespace gspn2 {

// With two warps, the second holds the positions after the first 32; what one needs of the other's states goes through
// shared memory.
template <typename T, int P, int kWarps_ = 1>
struct DirectTile {
  using Number = T;
  static constexpr int kWarps = kWarps_, kPositions = P;
  static constexpr int kVectorBytes = 8 * kWarps, kVector = kVectorBytes / sizeof(T);
  static_assert(kWarps == 1 || (kWarps == 2 && P == 1));
  // Lines between asking for a line and using it: more than DRAM's latency. Pairs of lines, and logits that are used a
  // line early, make for three stages more.
  static constexpr int kAhead = 5, kStages = kAhead + 3;
  static constexpr int kTensor = kLanes * P * kVectorBytes, kLogits = 3 * kTensor;
  static constexpr int kStage = kLogits + kLanes * P * kLogitSlot<T>;
  static constexpr int kMemory = kStages * kStage;  // of a warp
  static constexpr int kEdge = kVector * sizeof(float);  // states at the border between two warps, of one of them

  // Where the stage of a line begins, and which place a position has in a stage: the lanes' first positions lie side
  // by side, then their next ones.
  __device__ static int StageOf(int line) { return static_cast<unsigned>(line) % kStages * kStage; }
  __device__ static int PlaceOf(int position) { return position % P * kLanes + position / P; }

  __device__ static int Warp() { return kWarps == 1 ? 0 : threadIdx.x / kLanes; }
  __device__ static int Lane() { return kWarps == 1 ? threadIdx.x : threadIdx.x % kLanes; }
};

// Copies of kWords words, of kBytes each, at every position of two lines at once.
template <class Tile, int kWords, int kBytes, int kSlot>
class PairCopies {
 public:
  // `from` is where the first word of position 0 is in the first line.
  __device__ PairCopies(const Direction& lines, const char* from, int pixel, char* to) {
    const int lane = Tile::Lane(), word = lane % kWordLanes, second = lane / kWordLanes % 2;
    const int position = lane / (2 * kWordLanes);
    lines_ = lines.lines - second;
    pair_step_ = 2 * lines.step * pixel;
#pragma unroll
    for (int i = 0; i < 2 * kPasses; ++i) {
      const int at = position + i * kPassPositions;
      offsets_[i] = (at < lines.positions ? at : 0) * lines.across * pixel;
      Keep(offsets_[i]);
    }
    // Of the pair before the first: a step is made before each use.
    from_ = reinterpret_cast<intptr_t>(from) + min(word, kWords - 1) * kBytes + int64_t{second} * lines.step * pixel -
            pair_step_;
    to_ = SharedAddress(to + Tile::PlaceOf(position) * kSlot + word * kBytes + second * Tile::kStage);
    Keep(pair_step_), Keep(lines_), Keep(to_);
  }

  // Asks for half of the positions of two lines, where there are such: the first half if `line` is the first of the
  // two, an even one, or else the second half. Has to be called for every line, in order.
  //
  // Whether a position is in the line is not asked: there, what is at position 0 is copied, and next to the last word
  // that word again. Nobody reads these places, and conditions take longer than a copy does.
  template <bool kOdd>
  __device__ void Load(int line) {
    const uint32_t to = to_ + Tile::StageOf(line - kOdd);
    const bool there = line - kOdd < lines_;
    // Steps first: hardware reads the address of a copy late, and would hold up the step to the next.
    if (!kOdd) from_ += pair_step_;
    Keep(from_);
#pragma unroll
    for (int i = kOdd * kPasses; i < (kOdd + 1) * kPasses; ++i)
      CopyAsync<kBytes>(there, to + i * (kPassPositions / Tile::kPositions * kSlot), from_ + offsets_[i]);
  }

 private:
  static constexpr int kWordLanes = kWords == 3 ? 4 : kWords;  // next to three words' lanes, one is idle
  static constexpr int kPassPositions = kLanes / (2 * kWordLanes);
  static constexpr int kPasses = kLanes * Tile::kPositions / 2 / kPassPositions;  // of half of the positions
  static_assert(kPassPositions % Tile::kPositions == 0);  // then a pass takes as many places as any other

  int64_t from_;  // an address
  uint32_t to_;
  int offsets_[2 * kPasses], pair_step_, lines_;
};

// Copies of lines of x, lam, u and logits, and y on its way back.
//
// With a line l, a lane asks for lam and u of line l + kAhead, and for what completes x of that line and logits of the
// line after it. These copies are a group: what line l needs, with the logits of line l + 1, is in the groups up to
// that of line l - kAhead. All that is overwritten was read at line l - 1 or before.
template <class Tile>
class DirectCopies {
 public:
  using T = typename Tile::Number;
  using Vector = Words<Tile::kVectorBytes>;
  static constexpr int P = Tile::kPositions, kSize = sizeof(T);

  __device__ DirectCopies(const Scan& scan, const Job& job, char* memory)
      : index_(job.direction * scan.groups + job.group),
        x_(job.lines, scan.x + job.FirstPixel(scan) * scan.channels * kSize + job.channel * kSize,
           scan.channels * kSize, memory),
        logits_(job.lines, scan.logits + job.FirstPixel(scan) * 12 * scan.groups * kSize + (index_ * 3 * kSize & ~3),
                12 * scan.groups * kSize, memory + Tile::kLogits) {
    const int position = Tile::Lane() * P, pixel = 4 * kSize * scan.channels;
    here_ = job.lines.positions - position;
    lines_ = job.lines.lines;
    values_ = memory + Tile::Lane() * Tile::kVectorBytes;
    to_ = SharedAddress(values_);
    slots_ = memory + Tile::kLogits + Tile::Lane() * kLogitSlot<T>;
    step_ = job.lines.step * pixel;
    // A lane beyond the line copies what is at position 0, and nobody reads it.
#pragma unroll
    for (int p = 0; p < P; ++p) offsets_[p] = Holds(p) ? (position + p) * job.lines.across * pixel : 0;
#pragma unroll
    for (int p = 0; p < P; ++p) Keep(offsets_[p]);
    Keep(step_), Keep(to_);
    // Of the line before the first, for a step is made before each use. y is stored once, for no line, before that.
    const int64_t at = (job.FirstPixel(scan) - job.lines.step) * pixel +
                       (job.direction * scan.channels + job.channel) * kSize;
    lam_ = reinterpret_cast<intptr_t>(scan.lam) + at;
    u_ = reinterpret_cast<intptr_t>(scan.u) + at;
    y_ = reinterpret_cast<intptr_t>(scan.y) + at - step_;
  }

  // Whether position p of the lane is in the line; p may be P.
  __device__ bool Holds(int p) const { return p < here_; }

  // Asks for what the first lines use.
  __device__ void LoadFirst() {
    x_.template Load<false>(0);
    logits_.template Load<false>(0);
    logits_.template Load<true>(1);
    static_assert(Tile::kAhead % 2 == 1);
#pragma unroll 1
    for (int line = 0; line < Tile::kAhead - 1; line += 2) Load<false>(line), Load<true>(line + 1);
    Load<false>(Tile::kAhead - 1);
  }

  // Asks for lam and u of `line`, and for what else is due with it, where there is such a line.
  template <bool kOdd>
  __device__ void Load(int line) {
    const bool there = line < lines_;
    lam_ += step_;
    u_ += step_;
    Keep(lam_), Keep(u_);
    const uint32_t to = to_ + Tile::StageOf(line - kOdd) + kOdd * Tile::kStage;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      CopyAsync<Tile::kVectorBytes>(there, to + Place(1, p), lam_ + offsets_[p]);
      CopyAsync<Tile::kVectorBytes>(there, to + Place(2, p), u_ + offsets_[p]);
    }
    x_.template Load<!kOdd>(line + 1);
    logits_.template Load<kOdd>(line + 2);
    CommitCopies();
  }

  // Waits for what the next line uses. Lanes use each other's copies: what a lane has waited for, and that it is done
  // with what it used, the others know by the barrier.
  __device__ void Wait() const {
    WaitForCopies<Tile::kAhead - 1>();
    if constexpr (Tile::kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  // Writes the next line of y.
  __device__ void Store(const Vector (&y)[P], bool there) {
    y_ += step_;
    Keep(y_);
#pragma unroll
    for (int p = 0; p < P; ++p)
      StoreWords(there && Holds(p), reinterpret_cast<char*>(y_ + offsets_[p]), y[p].word);
  }

  // x, lam or u.
  __device__ Vector Read(int line, int tensor, int p) const {
    return Vector::Read(values_ + Tile::StageOf(line) + Place(tensor, p));
  }

  __device__ float4 Logits(int line, int p) const {
    return ReadLogits<T>(slots_ + Tile::StageOf(line) + p * kLanes * kLogitSlot<T>, index_);
  }

 private:
  __device__ static constexpr int Place(int tensor, int p) {
    return tensor * Tile::kTensor + p * kLanes * Tile::kVectorBytes;
  }

  const int index_;
  PairCopies<Tile, 1, Tile::kVectorBytes, Tile::kVectorBytes> x_;
  PairCopies<Tile, kSize == 2 ? 2 : 3, 4, kLogitSlot<T>> logits_;
  int64_t lam_, u_, y_;  // addresses
  char *values_, *slots_;
  uint32_t to_;
  int offsets_[P], step_, here_, lines_;
};

}  // namespace gspn2
