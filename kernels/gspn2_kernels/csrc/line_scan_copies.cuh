// What moves between global and shared memory: lines of x, lam, u and y, and logits, which become weights.
#pragma once

#include "line_scan_tiles.cuh"

namespace gspn2 {

// What a block works on.
struct Job {
  int image, direction, channel, group;  // the last two are the block's first
  Direction lines;

  __device__ Job(const Scan& scan, int channels_of_block) {
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
  __device__ Copies(const Scan& scan, const Job& job, char* shared) : layout_(scan.layout) {
    constexpr int kSize = sizeof(typename Tile::Number);
    const int chunks = Tile::kRowChunks * scan.channel_warps;
    const int chunk = threadIdx.x % chunks, channel = job.channel + chunk * (kChunk / kSize);
    position_ = threadIdx.x / chunks;
    stride_ = kLanes * scan.line_warps / Tile::kRowChunks;
    positions_ = job.lines.positions;
    limit_ = channel < scan.channels ? positions_ : 0;
    shared_ = shared + chunk / Tile::kRowChunks * layout_.region + chunk % Tile::kRowChunks * kChunk +
              SlotOf(position_, Tile::kSkew) * Tile::kRow;
    shared_pass_ = SlotOf(stride_, Tile::kSkew) * Tile::kRow;

    const int64_t pixel = int64_t{kSize} * scan.channels;
    step_ = job.lines.step * pixel;
    pass_ = stride_ * job.lines.across * pixel;
    const int64_t first = (job.FirstPixel(scan) + static_cast<int64_t>(position_) * job.lines.across) * pixel;
    const int64_t at = 4 * first + job.direction * pixel + channel * kSize;
    x_ = scan.x + first + channel * kSize;
    lam_ = scan.lam + at;
    u_ = scan.u + at;
    y_ = scan.y + at;
    policy_ = CachePolicy(scan.stream);
  }

  // Clears what a warp holds beyond the line: what is computed there must be numbers.
  __device__ void ClearOutside() const {
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const int position = position_ + pass * stride_;
      if (position < positions_ || position >= layout_.held) continue;
      for (int tensor = 0; tensor < 3 * Tile::kStages; ++tensor)
        *reinterpret_cast<uint4*>(shared_ + tensor * layout_.tensor + pass * shared_pass_) = make_uint4(0, 0, 0, 0);
    }
  }

  // Asks for the next line, if there is one.
  __device__ void Load(int stage, bool there) {
    char* const to = shared_ + stage * layout_.stage;
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const bool wanted = there && position_ + pass * stride_ < limit_;
      char* const slot = to + pass * shared_pass_;
      CopyAsync16(wanted, slot, x_ + pass * pass_);
      CopyAsync16(wanted, slot + layout_.tensor, lam_ + pass * 4 * pass_, policy_);
      CopyAsync16(wanted, slot + 2 * layout_.tensor, u_ + pass * 4 * pass_, policy_);
    }
    x_ += step_;
    lam_ += 4 * step_;
    u_ += 4 * step_;
  }

  // Writes the next line of y. The thread that reads y here is the one that asks for the line which takes its place.
  __device__ void Store(int stage) {
    const char* const from = shared_ + stage * layout_.stage + 2 * layout_.tensor;
    uint4 line[Tile::kPasses];
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass)
      if (position_ + pass * stride_ < limit_)
        line[pass] = *reinterpret_cast<const uint4*>(from + pass * shared_pass_);
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass)
      if (position_ + pass * stride_ < limit_) Store16(y_ + pass * 4 * pass_, line[pass], policy_);
    y_ += 4 * step_;
  }

 private:
  const Layout& layout_;
  char* shared_;
  const char *x_, *lam_, *u_;
  char* y_;
  int64_t step_, pass_;
  int position_, stride_, positions_, limit_, shared_pass_;
  uint64_t policy_;
};

// Turns logits into weights. A thread asks for the logits of its own positions, and needs no barrier to read them.
template <class Tile>
class Weights {
 public:
  static constexpr int kSize = sizeof(typename Tile::Number);

  __device__ Weights(const Scan& scan, const Job& job, char* shared) : layout_(scan.layout) {
    const int last = min(job.channel + scan.channel_warps * Tile::kChannels, scan.channels) - 1;
    groups_ = last / (scan.channels / scan.groups) - job.group + 1;
    positions_ = job.lines.positions;
    own_ = threadIdx.x;
    all_ = blockDim.x;
    index_ = job.direction * scan.groups + job.group;
    const int64_t pixel = int64_t{12} * kSize * scan.groups;
    across_ = job.lines.across * pixel;
    step_ = job.lines.step * pixel;
    logits_ = scan.logits + job.FirstPixel(scan) * pixel + own_ * across_;
    slots_ = shared + layout_.logits;
    weights_ = shared + layout_.weights;
  }

  __device__ void ClearOutside(int held_groups) const {
    for (int buffer = 0; buffer < 2; ++buffer)
      for (int group = 0; group < held_groups; ++group)
        for (int q = own_; q < layout_.held; q += all_)
          if (q >= positions_) Buffer(buffer)[group * layout_.held + q] = make_float4(0, 0, 0, 0);
  }

  // Asks for the next line, if there is one. 16-bit logits come as the two words that they touch, since copies are of 4
  // bytes at least.
  __device__ void Load(int stage, bool there) {
    char* const to = slots_ + stage * layout_.logit_stage;
    ForEach([&](int q, int group) {
      const char* const from = logits_ + (q - own_) * across_ + ((index_ + group) * 3 * kSize & ~3);
      CopyWordsAsync<kSize == 2 ? 2 : 3>(there && q < positions_,
                                         to + (group * layout_.held + q) * Tile::kLogitSlot, from);
    });
    logits_ += step_;
  }

  // Only the last write depends on whether there is such a position, so that all else can be interleaved with states.
  __device__ void Compute(int stage, int buffer) const {
    const char* const from = slots_ + stage * layout_.logit_stage;
    float4* const to = Buffer(buffer);
    ForEach([&](int q, int group) {
      const int item = group * layout_.held + min(q, positions_ - 1);
      const float4 a = Read(from + item * Tile::kLogitSlot, index_ + group);
      const float4 w = Normalise(a.x, a.y, a.z, q == 0, q == positions_ - 1);
      if (q < positions_) to[item] = w;
    });
  }

  __device__ float4* Buffer(int buffer) const {
    return reinterpret_cast<float4*>(weights_ + buffer * layout_.weight_buffer);
  }

 private:
  __device__ static float4 Read(const char* slot, int index) {
    if constexpr (kSize == 4) {
      return *reinterpret_cast<const float4*>(slot);
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(slot);
      const int shift = (index & 1) * 16;
      const float2 pair = Unpack(__funnelshift_r(words.x, words.y, shift), typename Tile::Number());
      const float2 third = Unpack(words.y >> shift, typename Tile::Number());
      return make_float4(pair.x, pair.y, third.x, 0.0f);
    }
  }

  // The first item of a thread, mostly its only one, stands alone: a loop could not be interleaved with other work.
  template <class Function>
  __device__ void ForEach(Function function) const {
    function(own_, 0);
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
  char *slots_, *weights_;
  int64_t across_, step_;
  int groups_, positions_, own_, all_, index_;
};

}  // namespace gspn2
