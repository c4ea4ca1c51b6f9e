// What moves between global and shared memory: lines of x, lam, u and y, and logits, which become weights.
#pragma once

#include "line_scan_tiles.cuh"

namespace gspn2 {

// What a block works on, and which part a thread has in it.
struct Job {
  int image, direction, channel, group;  // the last two are the block's first
  Direction lines;
  bool moves, scans;
  int mover, movers;  // this thread among those that move

  __device__ Job(const Scan& scan, int channels_of_block, bool helped) {
    movers = helped ? blockDim.x / 2 : blockDim.x;
    const int thread = threadIdx.x;
    // Said so, the compiler knows that a warp takes a branch as a whole.
    const int warp = __shfl_sync(~0u, thread / kLanes, 0);
    moves = !helped || warp >= movers / kLanes;
    scans = !helped || warp < movers / kLanes;
    mover = helped && moves ? thread - movers : thread;
    const int block = blockIdx.x, scans = block / scan.channel_blocks;
    channel = block % scan.channel_blocks * channels_of_block;
    group = channel / (scan.channels / scan.groups);
    image = scans / 4;
    direction = scans % 4;
    lines = DirectionOf(direction, scan.height, scan.width);
  }

  // Counted in all images.
  __device__ int64_t FirstPixel(const Scan& scan) const {
    return static_cast<int64_t>(image) * scan.height * scan.width + lines.start;
  }
};

// Moves lines of x, lam, u and y, in chunks of 16 bytes: a thread has one place along a position, and takes every
// `stride_`-th position.
template <class Tile>
class Copies {
 public:
  __device__ Copies(const Scan& scan, const Job& job) : layout_(scan.layout) {
    constexpr int kSize = sizeof(typename Tile::Number);
    const int chunks = layout_.chunks, chunk = job.mover % chunks;
    const int channel = job.channel + chunk * (kChunk / kSize);
    position_ = job.mover / chunks;
    stride_ = kLanes * scan.line_warps / Tile::kRowChunks;
    positions_ = job.lines.positions;
    limit_ = channel < scan.channels ? positions_ : 0;
    shared_ = layout_.template Place<Tile>(position_, chunk);
    // Chunks are turned alike in all passes: the stride is a multiple of 16 positions.
    shared_pass_ = stride_ * chunks * kChunk;

    const int pixel = kSize * scan.channels;
    step_ = job.lines.step * pixel;
    pass_ = static_cast<uint32_t>(stride_) * job.lines.across * pixel;
    Keep(shared_), Keep(shared_pass_), Keep(step_), Keep(pass_), Keep(limit_);
    const int64_t first = (job.FirstPixel(scan) + int64_t{position_} * job.lines.across) * pixel;
    const int64_t at = 4 * first + job.direction * pixel + channel * kSize;
    x_ = scan.x + first + channel * kSize;
    lam_ = reinterpret_cast<intptr_t>(scan.lam) + at;
    u_beyond_lam_ = reinterpret_cast<intptr_t>(scan.u) - reinterpret_cast<intptr_t>(scan.lam);
    // A line is written kStages lines after it was asked for.
    y_beyond_lam_ = reinterpret_cast<intptr_t>(scan.y) - reinterpret_cast<intptr_t>(scan.lam) -
                    int64_t{4} * Tile::kStages * step_;
  }

  // Clears what a warp holds beyond the line: what is computed there must be numbers.
  __device__ void ClearOutside() const {
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const int position = position_ + pass * stride_;
      if (position < positions_ || position >= layout_.held) continue;
      for (int tensor = 0; tensor < 3 * Tile::kStages; ++tensor)
        *Chunk(tensor * layout_.tensor, pass) = make_uint4(0, 0, 0, 0);
    }
  }

  // Asks for the next line, if there is one.
  __device__ void Load(int stage, bool there) {
    const int limit = there ? limit_ : 0, at = stage * layout_.stage;
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const bool wanted = position_ + pass * stride_ < limit;
      CopyAsync16(wanted, Chunk(at, pass), x_ + Pass(pass));
      const int64_t lam = lam_ + Pass(4 * pass), u = lam + u_beyond_lam_;
      CopyAsync16(wanted, Chunk(at + layout_.tensor, pass), reinterpret_cast<const char*>(lam));
      CopyAsync16(wanted, Chunk(at + 2 * layout_.tensor, pass), reinterpret_cast<const char*>(u));
    }
    x_ += step_;
    lam_ += int64_t{4} * step_;
  }

  // Writes the line of y before the one in use, if there is one. The thread that reads y here is the one that asks,
  // after that, for the line which takes its place.
  __device__ void Store(int stage, bool there) const {
    const int limit = there ? limit_ : 0, at = stage * layout_.stage + 2 * layout_.tensor;
    uint4 line[Tile::kPasses];
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass)
      if (position_ + pass * stride_ < limit) line[pass] = *Chunk(at, pass);
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const int64_t y = lam_ + y_beyond_lam_ + Pass(4 * pass);
      Store16(position_ + pass * stride_ < limit, reinterpret_cast<char*>(y), line[pass]);
    }
  }

 private:
  __device__ uint4* Chunk(int at, int pass) const {
    return reinterpret_cast<uint4*>(shared_memory + (shared_ + at + pass * shared_pass_));
  }

  // Wraps where nothing is copied.
  __device__ uint32_t Pass(int passes) const { return static_cast<uint32_t>(passes) * static_cast<uint32_t>(pass_); }

  const Layout& layout_;
  const char* x_;
  // Addresses: lam, u and y have the same strides, and one of them is enough to follow.
  int64_t lam_, u_beyond_lam_, y_beyond_lam_;
  int step_, pass_, position_, stride_, positions_, limit_, shared_, shared_pass_;
};

// Logits from a slot; 16-bit ones are in the two words that they touch.
template <typename T>
__device__ inline float4 ReadLogits(const char* slot, int index) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float4*>(slot);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(slot);
    const int shift = (index & 1) * 16;
    const float2 pair = Unpack(__funnelshift_r(words.x, words.y, shift), T());
    const float2 third = Unpack(words.y >> shift, T());
    return make_float4(pair.x, pair.y, third.x, 0.0f);
  }
}

// Turns logits into weights. A thread asks for the logits of its own positions, and needs no barrier to read them.
template <class Tile>
class Weights {
 public:
  using T = typename Tile::Number;
  static constexpr int kSize = sizeof(T);

  __device__ Weights(const Scan& scan, const Job& job) : layout_(scan.layout) {
    const int last = min(job.channel + scan.channel_warps * Tile::kChannels, scan.channels) - 1;
    groups_ = last / (scan.channels / scan.groups) - job.group + 1;
    positions_ = job.lines.positions;
    own_ = job.mover;
    all_ = job.movers;
    index_ = job.direction * scan.groups + job.group;
    const int pixel = 12 * kSize * scan.groups;
    across_ = job.lines.across * pixel;
    step_ = job.lines.step * pixel;
    Keep(own_), Keep(step_), Keep(index_);
    logits_ = scan.logits + job.FirstPixel(scan) * pixel + int64_t{own_} * across_;
  }

  __device__ void ClearOutside(int held_groups) const {
    for (int buffer = 0; buffer < 2; ++buffer)
      for (int group = 0; group < held_groups; ++group)
        for (int q = own_; q < layout_.held; q += all_)
          if (q >= positions_) *Weight(buffer, group * layout_.held + q) = make_float4(0, 0, 0, 0);
  }

  // Asks for the next line, if there is one.
  __device__ void Load(int stage, bool there) {
    LoadOne(stage, own_, 0, there);
    if (there) ForOthers([&](int q, int group) { LoadOne(stage, q, group, true); });
    logits_ += step_;
  }

  // Weights of the next line.
  __device__ void Compute(int stage, int buffer) const {
    ComputeOne(stage, buffer, own_, 0);
    ForOthers([&](int q, int group) { ComputeOne(stage, buffer, q, group); });
  }

  __device__ float4* Weight(int buffer, int item) const {
    return reinterpret_cast<float4*>(shared_memory + (layout_.weights + buffer * layout_.weight_buffer)) + item;
  }

 private:
  __device__ char* Slot(int stage, int item) const {
    return shared_memory + (layout_.logits + stage * layout_.logit_stage + item * kLogitSlot<T>);
  }

  // 16-bit logits come as the two words that they touch, since copies are of 4 bytes at least.
  __device__ void LoadOne(int stage, int q, int group, bool there) const {
    const char* const from = logits_ + int64_t{q - own_} * across_ + ((index_ + group) * 3 * kSize & ~3);
    CopyWordsAsync<kSize == 2 ? 2 : 3>(there && q < positions_, Slot(stage, group * layout_.held + q), from);
  }

  __device__ void ComputeOne(int stage, int buffer, int q, int group) const {
    if (q >= positions_) return;
    const int item = group * layout_.held + q;
    const float4 a = ReadLogits<T>(Slot(stage, item), index_ + group);
    const float4 w = Normalise(a.x, a.y, a.z, q == 0, q == positions_ - 1);
    *Weight(buffer, item) = w;
  }

  // All positions and groups of a thread but the first.
  template <class Function>
  __device__ void ForOthers(Function function) const {
    if (groups_ == 1 && all_ >= positions_) return;
#pragma unroll 1
    for (int q = own_, group = 1; true; ++group) {
      if (group == groups_) {
        group = 0;
        q += all_;
        if (q >= positions_) break;
      }
      function(q, group);
    }
  }

  const Layout& layout_;
  const char* logits_;
  int step_, across_, groups_, positions_, own_, all_, index_;
};

}  // namespace gspn2
