// The kernel for a small batch, where time goes by the length of what a line waits for: warps on their own.
//
// A block scans one direction of one image for a few channels and holds the whole line: a lane has P adjacent
// positions. A block is one warp, for two words of channels, or, where a line is longer than a warp and channels come
// in fours of words, two warps: one for the first 32 positions and one for the rest. Copies run lines ahead, so that
// one barrier a line is all. Only the states of a lane's outermost positions go to its neighbours, by shuffles, and
// between the two warps through shared memory. Of each sector in L2 a block uses a part: for a large batch, that is too
// much traffic.
//
// What limits it is the tag stage of L1, whose cycles go by the number of 128 bytes that an instruction touches a part
// of: 1.6 each for copies of 4 and 8 bytes, 1.1 for those of 16, which go past L1, and 2 for stores. Positions of lam,
// u and y are further apart than that. The words of a position's logits, and x and logits of two lines where these are
// columns, lie close together: lanes side by side copy them in one instruction. To spread the work, each line comes
// with half of the positions of two lines.
#pragma once

#include "line_scan_direct_copies.cuh"

namespace gspn2 {

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
  // There are two places: while a warp leaves states for the next line, the other may still read those for this one.
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
        // Beyond the line a lane computes with what is at position 0: nothing may be taken from that, not even 0 times
        // it, for it may be infinite. What comes from another lane is added last.
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
  copies.Store(y, line > 0);
  copies.template Load<kOdd != Tile::kAhead % 2>(line + Tile::kAhead);
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
