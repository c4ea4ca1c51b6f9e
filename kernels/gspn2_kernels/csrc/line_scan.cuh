// The kernels of the line scan: one that is fast, and one for what the first cannot hold.
//
// The fast one takes one barrier a line. Between two barriers, warps
//   - write y of the line before, and ask for a line that is kStages - 1 lines away (`Copies`),
//   - compute the weights of the next line, each position once (`Weights`),
//   - take the states, which live in registers, to this line (`States`).
// All warps do all of it, one after the other; where they are few and the time goes by the length of that, half of
// them do the first two and half the last.
// Copies run along 128 bytes of a position, whichever lane needs them: a warp that read only what its lanes need would
// ask L2 for one sector at a time. States of the outermost positions of a warp go to its neighbours by shared memory.
#pragma once

#include "line_scan_copies.cuh"

namespace gspn2 {

// The states of a lane: P positions of V channels.
template <class Tile>
class States {
 public:
  static constexpr int P = Tile::kPositions, V = Tile::kVector;

  __device__ States(const Scan& scan, const Job& job) : layout_(scan.layout) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int line_warp = warp / scan.channel_warps, channel_warp = warp % scan.channel_warps;
    const int position_lane = lane / Tile::kChannelLanes;
    const int position = (line_warp * Tile::kPositionLanes + position_lane) * P;
    const int channel = channel_warp * Tile::kChannels + lane % Tile::kChannelLanes * V;
    const int byte = lane % Tile::kChannelLanes * Tile::kVectorBytes;
    const int chunk = channel_warp * Tile::kRowChunks + byte / kChunk;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      values_[p] = layout_.template Place<Tile>(position + p, chunk) + byte % kChunk;
      Keep(values_[p]);
    }
    // Channels beyond the last are computed like it and not written.
    const int group = min(job.channel + channel, scan.channels - 1) / (scan.channels / scan.groups) - job.group;
    weight_ = group * layout_.held + position;

    first_lane_ = position_lane == 0;
    last_lane_ = position_lane == Tile::kPositionLanes - 1;
    shares_line_ = scan.line_warps > 1;
    const int row = scan.channel_warps * Tile::kChannels, zeros = layout_.edges + channel * 4;
    own_edge_ = zeros + (2 * line_warp + (first_lane_ ? 2 : 3)) * row * 4;
    other_edge_ = shares_line_ ? own_edge_ + (first_lane_ ? -4 * row : 4 * row) : zeros;
    Keep(weight_), Keep(own_edge_), Keep(other_edge_);
    Restart();
  }

  __device__ void Restart() {
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int v = 0; v < V; ++v) h_[p][v] = 0.0f;
  }

  __device__ void ClearEdges(const Job& job) const {
    for (int at = layout_.edges + job.mover * 4; at < layout_.total; at += job.movers * 4)
      *reinterpret_cast<float*>(shared_memory + at) = 0.0f;
  }

  // Takes the states to the line in a stage, and leaves y there. The first line of a scan has no edges.
  //
  // What a position takes from the one before it is added up before that one changes: no state has to be copied.
  __device__ void Advance(int stage, const float4* weights, int buffer, bool first) {
    float before[V], after[V], sum[V], next[V];
    Exchange(before, after, buffer ^ 1, first);
    char* const line = shared_memory + stage * layout_.stage;
    Inflow(sum, line + values_[0]);
    float4 w = weights[weight_], next_w = w;
#pragma unroll
    for (int p = 0; p < P; ++p, w = next_w) {
      if (p + 1 < P) {
        Inflow(next, line + values_[p + 1]);
        next_w = weights[weight_ + p + 1];
#pragma unroll
        for (int v = 0; v < V; ++v) next[v] = fmaf(next_w.x, h_[p][v], next[v]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        h_[p][v] = fmaf(w.z, p + 1 < P ? h_[p + 1][v] : after[v], fmaf(w.y, h_[p][v], sum[v]));
        // What comes from another lane last: its shuffle is the longest wait.
        if (p == 0) h_[p][v] = fmaf(w.x, before[v], h_[p][v]);
        sum[v] = next[v];
      }
      Outflow(h_[p], line + values_[p]);
    }
    if (shares_line_ && first_lane_) ToWords<float>(h_[0]).Write(Edge(own_edge_, buffer));
    if (shares_line_ && last_lane_) ToWords<float>(h_[P - 1]).Write(Edge(own_edge_, buffer));
  }

 private:
  using T = typename Tile::Number;
  using Vector = Words<Tile::kVectorBytes>;

  // lam * x
  __device__ void Inflow(float (&sum)[V], const char* values) const {
    const Vector x = Vector::Read(values), lam = Vector::Read(values + layout_.tensor);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = Get<T>(x, v) * Get<T>(lam, v);
  }

  // y = u * h, in the place of u
  __device__ void Outflow(const float (&h)[V], char* values) const {
    char* const at = values + 2 * layout_.tensor;
    const Vector u = Vector::Read(at);
    float y[V];
#pragma unroll
    for (int v = 0; v < V; ++v) y[v] = h[v] * Get<T>(u, v);
    ToWords<T>(y).Write(at);
  }

  // Gets the states of the positions next to a lane's outermost ones.
  __device__ void Exchange(float (&before)[V], float (&after)[V], int buffer, bool first) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      before[v] = __shfl_up_sync(~0u, h_[P - 1][v], Tile::kChannelLanes);
      after[v] = __shfl_down_sync(~0u, h_[0][v], Tile::kChannelLanes);
    }
    if (first_lane_ && !first) ReadEdge(before, Edge(other_edge_, buffer));
    if (last_lane_ && !first) ReadEdge(after, Edge(other_edge_, buffer));
  }

  __device__ char* Edge(int at, int buffer) const { return shared_memory + (at + buffer * layout_.edge_buffer); }

  __device__ static void ReadEdge(float (&states)[V], const char* edge) {
    const auto words = Words<V * sizeof(float)>::Read(edge);
#pragma unroll
    for (int v = 0; v < V; ++v) states[v] = __uint_as_float(words.word[v]);
  }

  float h_[P][V];
  const Layout& layout_;
  int values_[P], own_edge_, other_edge_, weight_;
  bool first_lane_, last_lane_, shares_line_;
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) FastKernel(const __grid_constant__ Scan scan) {
  constexpr int kStages = Tile::kStages;
  const Job job(scan, scan.channel_warps * Tile::kChannels, Tile::kMayBeHelped && scan.helped);
  const int lines = job.lines.lines;
  Copies<Tile> copies(scan, job);
  Weights<Tile> weights(scan, job);
  States<Tile> states(scan, job);

  if (job.moves) {
    copies.ClearOutside();
    weights.ClearOutside(scan.groups_held);
    // A group of copies is a line of x, lam and u, and the logits of the line after it.
    weights.Load(0, true);
#pragma unroll
    for (int line = 0; line < kStages - 1; ++line) {
      copies.Load(line, line < lines);
      weights.Load(line + 1, line + 1 < lines);
      CommitCopies();
    }
    WaitForCopies<kStages - 2>();
    weights.Compute(0, 0);
  }
  if (job.scans) states.ClearEdges(job);

  int stage = 0, before = kStages - 1, buffer = 0;
  for (int start = 0; start < lines; start += scan.segment) {
    states.Restart();
    const int end = min(scan.segment, lines - start) + start;
    for (int line = start; line < end; ++line) {
      const int next = stage + 1 < kStages ? stage + 1 : 0;
      if (job.moves) WaitForCopies<kStages - 2>();
      __syncthreads();
      if (job.moves) {
        copies.Store(before, line > 0);
        copies.Load(before, line + kStages - 1 < lines);
        weights.Load(stage, line + kStages < lines);
        CommitCopies();
        // After the last line this works on numbers that nobody reads.
        weights.Compute(next, buffer ^ 1);
      }
      if (job.scans) states.Advance(stage, weights.Weight(buffer, 0), buffer, line == start);
      buffer ^= 1;
      before = stage;
      stage = next;
    }
  }
  __syncthreads();
  if (job.moves) copies.Store(before, true);
}

// Numbers one by one, states of two lines in shared memory: right for any channels, groups and alignment.
template <typename T>
__global__ void __launch_bounds__(256) PlainKernel(const __grid_constant__ Scan scan) {
  const int block_channels = scan.channel_warps;
  const Job job(scan, block_channels, false);
  const Direction& d = job.lines;
  const T *const x = reinterpret_cast<const T*>(scan.x), *const lam = reinterpret_cast<const T*>(scan.lam);
  const T *const logits = reinterpret_cast<const T*>(scan.logits), *const u = reinterpret_cast<const T*>(scan.u);
  T* const y = reinterpret_cast<T*>(scan.y);
  float* const states = reinterpret_cast<float*>(shared_memory);
  const int held = d.positions * block_channels;

  for (int line = 0; line < d.lines; ++line) {
    float* const now = states + line % 2 * held;
    const float* const past = states + (1 - line % 2) * held;
    const bool restarts = line % scan.segment == 0;
    for (int i = threadIdx.x; i < held; i += blockDim.x) {
      const int q = i / block_channels, channel = job.channel + i % block_channels;
      if (channel >= scan.channels) continue;
      const bool first = q == 0, last = q == d.positions - 1;
      const int64_t pixel = job.FirstPixel(scan) + static_cast<int64_t>(line) * d.step + q * d.across;
      const int64_t at = (pixel * 4 + job.direction) * scan.channels + channel;
      float h = static_cast<float>(x[pixel * scan.channels + channel]) * static_cast<float>(lam[at]);
      if (!restarts) {
        const int group = channel / (scan.channels / scan.groups);
        const T* const a = logits + ((pixel * 4 + job.direction) * scan.groups + group) * 3;
        const float4 w =
            Normalise(static_cast<float>(a[0]), static_cast<float>(a[1]), static_cast<float>(a[2]), first, last);
        h = fmaf(w.y, past[i], h);
        if (!last) h = fmaf(w.z, past[i + block_channels], h);
        if (!first) h = fmaf(w.x, past[i - block_channels], h);
      }
      now[i] = h;
      y[at] = static_cast<T>(h * static_cast<float>(u[at]));
    }
    __syncthreads();
  }
}

}  // namespace gspn2
