// The kernel for a small batch, where time goes by the length of what a line waits for: warps on their own.
//
// A block is one warp, which scans one direction of one image for two words of channels and holds the whole line: a
// lane has P adjacent positions. Copies run lines ahead, so that there are no barriers but the warp's own. Only the
// states of a lane's outermost positions go to its neighbours, by shuffles. Of each sector in L2 a warp uses a part:
// for a large batch, that is too much traffic.
//
// What limits it is the tag stage of L1, which takes about two cycles for every 128 bytes that an instruction touches
// a part of. One warp keeps it busy. Positions of lam, u and y are further apart than that: each costs a tag. The
// words of a position's logits, and x and logits of two lines where these are columns, lie close together: lanes side
// by side copy them in one instruction. To spread the work, each line comes with half of the positions of two lines.
#pragma once

#include "line_scan_copies.cuh"

namespace gspn2 {

// With two warps, each holds half of the positions; what one needs of the other's states goes through shared memory.
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
    for (int line = 0; line < Tile::kAhead - 1; line += 2) LoadOrNot<false>(line), LoadOrNot<true>(line + 1);
    LoadOrNot<false>(Tile::kAhead - 1);
  }

  // Writes y of the line before, if any, and asks for a line ahead, if any. All is inside of branches, which begin with
  // different things: the compiler would move shuffles behind what is outside.
  template <bool kOdd>
  __device__ void Move(const Vector (&y)[P], bool there, int line) {
    if (line < lines_) {
      Store(y, there);
      Load<kOdd>(line);
    } else {
      CommitCopies();
      Store(y, there);
    }
  }

  // Asks for lam and u of `line`, and for what else is due with it.
  template <bool kOdd>
  __device__ void Load(int line) {
    lam_ += step_;
    u_ += step_;
    Keep(lam_), Keep(u_);
    const uint32_t to = to_ + Tile::StageOf(line - kOdd) + kOdd * Tile::kStage;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      CopyAsync<Tile::kVectorBytes>(true, to + Place(1, p), lam_ + offsets_[p]);
      CopyAsync<Tile::kVectorBytes>(true, to + Place(2, p), u_ + offsets_[p]);
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
  template <bool kOdd>
  __device__ void LoadOrNot(int line) {
    if (line < lines_)
      Load<kOdd>(line);
    else
      CommitCopies();
  }

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

// The states of a lane: P positions of V channels, and their weights in the next line.
template <class Tile>
class DirectStates {
 public:
  using T = typename Tile::Number;
  static constexpr int P = Tile::kPositions, V = Tile::kVector;

  __device__ explicit DirectStates(char* edges)
      : own_(edges + Tile::Warp() * Tile::kEdge), other_(edges + (1 - Tile::Warp()) * Tile::kEdge) {}

  // Before a line.
  __device__ void Restart(int line) {
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int v = 0; v < V; ++v) h_[p][v] = 0.0f;
    SendEdge(line % 2);
  }

  // Sends the outermost states to the neighbours.
  __device__ void Exchange(int odd) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      before_[v] = __shfl_up_sync(~0u, h_[P - 1][v], 1);
      after_[v] = __shfl_down_sync(~0u, h_[0][v], 1);
    }
    if constexpr (Tile::kWarps == 2) {
      if (threadIdx.x == kLanes - 1) ReadEdge(odd, after_);
      if (threadIdx.x == kLanes) ReadEdge(odd, before_);
    }
  }

  // Leaves the states next to the other warp where that finds them after the barrier, for a line that is odd or not.
  // There are two places: of two lines one after the other, only one is certainly read.
  __device__ void SendEdge(int odd) const {
    if constexpr (Tile::kWarps == 2)
      if (threadIdx.x == kLanes - 1 || threadIdx.x == kLanes) ToWords<float>(h_[0]).Write(own_ + odd * 2 * Tile::kEdge);
  }

  // Reads x, lam and u of a line, and the logits of the line whose weights come next.
  __device__ void Read(const DirectCopies<Tile>& copies, int line, int next) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      x_[p] = copies.Read(line, 0, p);
      lam_[p] = copies.Read(line, 1, p);
      u_[p] = copies.Read(line, 2, p);
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
  __device__ void ReadEdge(int odd, float (&to)[V]) const {
    const auto words = Words<Tile::kEdge>::Read(other_ + odd * 2 * Tile::kEdge);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = Get<float>(words, v);
  }

  Words<Tile::kVectorBytes> x_[P], lam_[P], u_[P];
  float4 logits_[P], weights_[P];
  float h_[P][V], before_[V], after_[V];
  char *const own_, *const other_;  // the edges of the two warps
};

// What a warp works on: of all positions, its own.
template <class Tile>
__device__ inline Job DirectJob(const Scan& scan) {
  Job job(scan, Tile::kVector, false);
  const int first = Tile::Warp() * kLanes * Tile::kPositions, left = job.lines.positions - first;
  // A warp that has none copies the first positions, and does nothing with them.
  job.lines.positions = max(left, 0);
  if (left > 0) job.lines.start += first * job.lines.across;
  return job;
}

// Takes the states to a line. What takes long comes last: shuffles and reads of shared memory would wait behind copies
// and stores.
template <bool kOdd, class Tile>
__device__ inline void Step(int line, DirectCopies<Tile>& copies, DirectStates<Tile>& states,
                            Words<Tile::kVectorBytes> (&y)[Tile::kPositions]) {
  copies.Wait();
  states.Exchange(kOdd);
  states.Read(copies, line, line + 1);
  copies.template Move<kOdd != Tile::kAhead % 2>(y, line > 0, line + Tile::kAhead);
  states.Advance(copies);
  states.SendEdge(!kOdd);
  states.Outflow(y);
  // After the last line this works on numbers that nobody reads.
  states.Weigh(copies);
}

// Lines go by two, an even one first: then it is known beforehand which half of a pair is due.
template <class Tile>
__global__ void __launch_bounds__(kLanes * Tile::kWarps) DirectKernel(const __grid_constant__ Scan scan) {
  constexpr int kEdges = Tile::kWarps * Tile::kMemory;
  __shared__ __align__(16) char memory[kEdges + 4 * (Tile::kWarps - 1) * Tile::kEdge];
  const Job job = DirectJob<Tile>(scan);
  const int lines = job.lines.lines;
  DirectCopies<Tile> copies(scan, job, memory + Tile::Warp() * Tile::kMemory);
  DirectStates<Tile> states(memory + kEdges);
  Words<Tile::kVectorBytes> y[Tile::kPositions];

  copies.LoadFirst();
  copies.Wait();
  states.Read(copies, 0, 0);
  states.Weigh(copies);
  for (int line = 0; line < lines;) {
    states.Restart(line);
    const int end = min(scan.segment, lines - line) + line;
    if (line % 2) Step<true>(line++, copies, states, y);
#pragma unroll 1
    for (; line + 1 < end; line += 2) {
      Step<false>(line, copies, states, y);
      Step<true>(line + 1, copies, states, y);
    }
    if (line < end) Step<false>(line++, copies, states, y);
  }
  copies.Store(y, true);
}

}  // namespace gspn2
