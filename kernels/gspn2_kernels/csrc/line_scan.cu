// Chooses a kernel of the line scan and its sizes for a shape, and launches it. See line_scan.cuh for the kernels.
//
// Nothing is allocated and nothing waits: a launch may be captured in a CUDA graph, and runs give equal bits.

#include "line_scan.h"

#include <algorithm>
#include <climits>

#include "cuda_error.h"
#include "line_scan.cuh"
#include "line_scan_direct.cuh"

#ifdef GSPN2_CUDA
namespace gspn2 {
namespace {

// Wide tiles hold 16 bytes of channels a lane, for throughput; thin ones 4 bytes, so that few channels keep many warps
// busy. A direct kernel is one warp a block or two, for the fewest.
enum class Kind { kThin, kWide, kDirect };

// How a block is made up. positions is 0 for the plain kernel, which holds channel_warps channels a block; stages
// matters to thin tiles only.
struct Plan {
  Kind kind;
  int positions, stages, line_warps, channel_warps;
  bool helped;
};

// What the host has to know of a compiled kernel.
struct Kernel {
  const void* function;
  int held, channels, threads;
  Layout (*layout)(int line_warps, int channel_warps, int groups);
};

struct Device {
  int processors, shared_bytes;
};

template <class Tile>
Kernel KernelOf() {
  return {reinterpret_cast<const void*>(&FastKernel<Tile>), Tile::kHeld, Tile::kChannels, Tile::kThreads,
          &LayoutOf<Tile>};
}

// More lines are under way where lines are short: they take less time, and less memory. With four stages of the
// shortest, eight blocks fit a multiprocessor of an H100.
template <typename T>
Kernel WideKernel(int positions) {
  constexpr int V = kChunk / sizeof(T), CL = 2;
  switch (positions) {
    case 1: return KernelOf<Tile<T, V, CL, 1, 4>>();
    case 2: return KernelOf<Tile<T, V, CL, 2, 4>>();
    case 3: return KernelOf<Tile<T, V, CL, 3, 3>>();
    case 4: return KernelOf<Tile<T, V, CL, 4, 3>>();
    default: return KernelOf<Tile<T, V, CL, 5, 3>>();
  }
}

template <typename T>
Kernel ThinKernel(int positions, int stages) {
  constexpr int V = 4 / sizeof(T), CL = 4;
  switch (positions) {
    case 1: return KernelOf<Tile<T, V, CL, 1, 8>>();
    case 2: return KernelOf<Tile<T, V, CL, 2, 6>>();
    default: return stages == 3 ? KernelOf<Tile<T, V, CL, 4, 3>>() : KernelOf<Tile<T, V, CL, 4, 2>>();
  }
}

template <class Tile>
Kernel DirectKernelOf() {
  // What it has of shared memory is its own.
  return {reinterpret_cast<const void*>(&DirectKernel<Tile>), kLanes * Tile::kPositions, Tile::kVector,
          kLanes * Tile::kWarps, [](int, int, int) { return Layout{}; }};
}

template <typename T>
Kernel Find(const Plan& plan) {
  if (plan.positions == 0) return {reinterpret_cast<const void*>(&PlainKernel<T>), 0, 1, 256, nullptr};
  switch (plan.kind) {
    case Kind::kWide: return WideKernel<T>(plan.positions);
    case Kind::kThin: return ThinKernel<T>(plan.positions, plan.stages);
    default:
      if (plan.line_warps == 2) return DirectKernelOf<DirectTile<T, 1, 2>>();
      return plan.positions == 1 ? DirectKernelOf<DirectTile<T, 1>>() : DirectKernelOf<DirectTile<T, 2>>();
  }
}

Kernel Find(Dtype dtype, const Plan& plan) {
  switch (dtype) {
    case Dtype::kHalf: return Find<__half>(plan);
    case Dtype::kBfloat16: return Find<__nv_bfloat16>(plan);
    default: return Find<float>(plan);
  }
}

int64_t SizeOf(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

template <typename T>
T Quotient(T a, T b) {
  return (a + b - 1) / b;
}

// Groups that the channels of a block may touch.
int GroupsHeld(const Shape& shape, int channels) {
  const int64_t each = shape.channels / shape.groups;
  return static_cast<int>(std::min(shape.groups, (channels + each - 2) / each + 1));
}

int ThreadsOf(const Plan& plan) { return plan.line_warps * plan.channel_warps * kLanes * (plan.helped ? 2 : 1); }

bool Fits(const Shape& shape, Dtype dtype, const Plan& plan, const Device& device) {
  const Kernel kernel = Find(dtype, plan);
  if (ThreadsOf(plan) > kernel.threads) return false;
  if (kernel.held * plan.line_warps < std::max(shape.height, shape.width)) return false;
  const int groups = GroupsHeld(shape, plan.channel_warps * kernel.channels);
  // Offsets are ints; no line that is near their end would fit.
  const int64_t rough = int64_t{16} * groups * kernel.held * plan.line_warps;
  return rough < device.shared_bytes &&
         kernel.layout(plan.line_warps, plan.channel_warps, groups).total <= device.shared_bytes;
}

// Few blocks, which have a multiprocessor each, of a warp that can hold a line, or of two for more channels.
bool ChooseDirect(const Shape& shape, Dtype dtype, const Device& device, Plan* plan) {
  const int64_t length = std::max(shape.height, shape.width), each = shape.channels / shape.groups;
  if (length > 2 * kLanes) return false;
  const bool two = length > kLanes && each % (kChunk / SizeOf(dtype)) == 0;
  const int64_t vector = (two ? kChunk : 8) / SizeOf(dtype);
  const int warps = two ? 2 : 1, positions = static_cast<int>(Quotient<int64_t>(length, kLanes * warps));
  *plan = {Kind::kDirect, positions, 0, warps, 1, false};
  return each % vector == 0 && 4 * shape.batch * shape.channels / vector <= device.processors;
}

// Few warps that are wide: four or two along the channels, if that leaves a block for seven of ten multiprocessors, and
// as many along the line as keep a lane to five positions, or more while multiprocessors have less than three.
bool ChooseWide(const Shape& shape, Dtype dtype, const Device& device, Plan* plan) {
  const int64_t vector = kChunk / SizeOf(dtype), tiles = Quotient(shape.channels, 2 * vector);
  const int64_t length = std::max(shape.height, shape.width), lanes = kLanes / 2;
  if (shape.channels / shape.groups % vector || shape.channels == vector) return false;
  if (4 * shape.batch * tiles < 64) return false;
  for (const int channel_warps : {4, 2, 1}) {
    const int64_t blocks = 4 * shape.batch * Quotient<int64_t>(tiles, channel_warps);
    if (channel_warps > 1 && (tiles % channel_warps || blocks * 10 < int64_t{device.processors} * 7)) continue;
    int64_t line_warps = Quotient(length, 5 * lanes);
    while (blocks * channel_warps * line_warps < 3 * device.processors && line_warps * lanes < length) line_warps *= 2;
    if (line_warps > kLanes) continue;
    const int64_t positions = Quotient(length, line_warps * lanes);
    // Without the warps that would hold nothing.
    line_warps = Quotient(length, positions * lanes);
    *plan = {Kind::kWide, static_cast<int>(positions), 0, static_cast<int>(line_warps), channel_warps, false};
    if (Fits(shape, dtype, *plan, device)) return true;
  }
  return false;
}

bool ChooseThin(const Shape& shape, Dtype dtype, const Device& device, Plan* plan) {
  const int64_t vector = 4 / SizeOf(dtype), lanes = kLanes / 4;
  const int64_t length = std::max(shape.height, shape.width);
  if (shape.channels / shape.groups % vector || length > kLanes * 4 * lanes) return false;
  const int64_t positions = length <= 32 ? 1 : length <= 128 ? 2 : 4;
  for (const int stages : {3, 2}) {
    *plan = {Kind::kThin, static_cast<int>(positions), stages, static_cast<int>(Quotient(length, positions * lanes)), 1,
             length <= kLanes / 2 * positions * lanes};
    if (Fits(shape, dtype, *plan, device)) return true;
  }
  return false;
}

bool ChoosePlain(const Shape& shape, const Device& device, Plan* plan) {
  const int64_t length = std::max(shape.height, shape.width);
  int64_t channels = std::min<int64_t>(shape.channels, 8);
  while (channels > 1 && 2 * length * channels * 4 > device.shared_bytes) --channels;
  *plan = {Kind::kThin, 0, 0, 1, static_cast<int>(channels), false};
  return 2 * length * channels * 4 <= device.shared_bytes;
}

// Whether 16 bytes can be copied at once, by strides of 32 bits inside an image.
bool CanCopy(const Shape& shape, Dtype dtype, const Scan& scan) {
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const int64_t widest = 4 * std::max(shape.channels, 3 * shape.groups) * SizeOf(dtype);
  return shape.channels * SizeOf(dtype) % kChunk == 0 && shape.height * shape.width < INT_MAX / widest &&
         aligned(scan.x, 16) && aligned(scan.lam, 16) && aligned(scan.u, 16) && aligned(scan.y, 16) &&
         aligned(scan.logits, 4);
}

bool Choose(const Shape& shape, Dtype dtype, const Scan& scan, const Device& device, Plan* plan) {
  if (CanCopy(shape, dtype, scan) &&
      (ChooseDirect(shape, dtype, device, plan) || ChooseWide(shape, dtype, device, plan) ||
       ChooseThin(shape, dtype, device, plan)))
    return true;
  return ChoosePlain(shape, device, plan);
}

cudaError_t Query(Device* device) {
  int id;
  cudaError_t error = cudaGetDevice(&id);
  if (!error) error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, id);
  if (!error) error = cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  return error;
}

cudaError_t Launch(const void* function, int blocks, int threads, int most_bytes, Scan scan, cudaStream_t stream) {
  const int bytes = scan.layout.total;
  // Beyond 48 KB a kernel has to ask. All ask for the same, lest a thread take back what another is about to use.
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    if (error) return error;
  }
  void* arguments[] = {&scan};
  return cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, bytes, stream);
}

// Launches a plan that fits the shape.
const char* LaunchPlan(const Shape& shape, Dtype dtype, const Plan& plan, const Device& device, Scan scan,
                       cudaStream_t stream) {
  const Kernel kernel = Find(dtype, plan);
  const bool plain = plan.positions == 0;
  const int block_channels = plan.channel_warps * kernel.channels;
  const int64_t channel_blocks = Quotient<int64_t>(shape.channels, block_channels);
  const int64_t blocks = 4 * shape.batch * channel_blocks;
  if (blocks > INT_MAX) return "too many images and channels for one launch";
  scan.height = static_cast<int>(shape.height), scan.width = static_cast<int>(shape.width);
  scan.channels = static_cast<int>(shape.channels), scan.groups = static_cast<int>(shape.groups);
  // No scan is longer than this, nor is its double too large.
  const int64_t longest = std::max(shape.height, shape.width);
  scan.segment = static_cast<int>(shape.segment > 0 ? std::min(shape.segment, longest) : longest);
  scan.channel_blocks = static_cast<int>(channel_blocks);
  scan.line_warps = plan.line_warps, scan.channel_warps = plan.channel_warps;
  scan.groups_held = GroupsHeld(shape, block_channels);
  scan.helped = plan.helped;
  if (plain)
    scan.layout.total = static_cast<int>(2 * std::max(shape.height, shape.width) * block_channels * 4);
  else
    scan.layout = kernel.layout(plan.line_warps, plan.channel_warps, scan.groups_held);
  const int threads = plain ? kernel.threads : ThreadsOf(plan);
  return TextOf(Launch(kernel.function, static_cast<int>(blocks), threads, device.shared_bytes, scan, stream));
}

}  // namespace

const char* LaunchLineScan(const Shape& shape, Dtype dtype, const void* x, const void* lam, const void* logits,
                           const void* u, void* y, void* stream) {
  if (shape.batch * shape.height * shape.width * shape.channels == 0) return nullptr;
  if (shape.height > INT_MAX / shape.width || shape.channels > INT_MAX / 16)
    return "an image has too many pixels or channels";
  Device device;
  if (const char* text = TextOf(Query(&device))) return text;
  Scan scan = {};
  scan.x = static_cast<const char*>(x), scan.lam = static_cast<const char*>(lam);
  scan.logits = static_cast<const char*>(logits), scan.u = static_cast<const char*>(u);
  scan.y = static_cast<char*>(y);
  Plan plan = {};
  if (!Choose(shape, dtype, scan, device, &plan)) return "a line is too long for shared memory";
  return LaunchPlan(shape, dtype, plan, device, scan, static_cast<cudaStream_t>(stream));
}

}  // namespace gspn2
#endif  // GSPN2_CUDA
