#include "line_scan_cpu.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "line_scan_task.h"
#include "processors.h"

namespace gspn2 {
namespace {

constexpr int64_t kDirections = 4;
// A block is this many channels at least, where there are so many: its weights are computed for it alone.
constexpr int64_t kFewChannels = 16;
// The two lines of state stay in a core's own cache.
constexpr int64_t kStateBytes = 128 << 10;

struct Operands {
  const void* x;
  const void* lam;
  const void* logits;
  const void* u;
  void* y;
};

// How a call is cut into tasks: an image, a direction, a block of channels and a part of the lines that starts where
// the scan restarts.
struct Plan {
  Shape shape;
  int64_t block_groups;        // whole groups of a block, or 1
  int64_t block_channels;      // of a group, in a block
  int64_t blocks_per_group;    // where a group is cut
  int64_t blocks;              // of all channels
  int64_t parts[2];            // of the lines, down and up, right and left
};

int64_t Ceil(int64_t count, int64_t size) { return count / size + (count % size != 0); }

int64_t LineCount(const Shape& shape, int64_t direction) { return direction < 2 ? shape.height : shape.width; }

// Scans that restart are as many scans.
int64_t ScanCount(const Shape& shape, int64_t direction) {
  return shape.segment > 0 ? Ceil(LineCount(shape, direction), shape.segment) : 1;
}

int64_t Threads() {
  static const int64_t threads = std::max(1u, std::thread::hardware_concurrency());  // slow: it reads a file
  return threads;
}

Plan MakePlan(const Shape& shape) {
  Plan plan{};
  plan.shape = shape;
  const int64_t threads = Threads();
  const int64_t longest = std::max(shape.height, shape.width) + 2;
  const int64_t fit = kStateBytes / static_cast<int64_t>(2 * sizeof(float)) / longest;
  const int64_t scans = shape.batch * kDirections * ScanCount(shape, 0);
  const int64_t share = shape.channels / std::max<int64_t>(1, Ceil(threads, scans));
  const int64_t channels = std::max(kFewChannels, std::min(fit, share) / kSmallGroup * kSmallGroup);
  const int64_t group = shape.channels / shape.groups;
  plan.block_channels = std::min(group, channels);
  plan.blocks_per_group = Ceil(group, plan.block_channels);
  plan.block_groups = std::min(shape.groups, std::max<int64_t>(1, channels / group));
  plan.blocks = plan.blocks_per_group * Ceil(shape.groups, plan.block_groups);
  for (int64_t pair = 0; pair < 2; ++pair) {
    const int64_t wanted = Ceil(4 * threads, shape.batch * kDirections * plan.blocks);
    plan.parts[pair] = std::min(ScanCount(shape, 2 * pair), wanted);
  }
  return plan;
}

// Scans from `part` on, as a line.
int64_t PartBegin(const Shape& shape, int64_t direction, int64_t part, int64_t parts) {
  const int64_t lines = LineCount(shape, direction);
  const int64_t length = shape.segment > 0 ? shape.segment : lines;
  return std::min(lines, ScanCount(shape, direction) * part / parts * length);
}

const char* Skip(const void* numbers, int64_t count, int64_t size) {
  return static_cast<const char*>(numbers) + count * size;
}

// Points a task at its first line: of this image and direction, of the block that starts at this group and channel.
void Place(const Shape& s, const Operands& operands, int64_t size, int64_t image, int64_t direction, int64_t group,
           int64_t channel, ScanTask* task) {
  const int64_t lam = kDirections * s.channels, logits = kDirections * s.groups * 3;
  const Strides row{s.width * s.channels, s.width * lam, s.width * logits}, column{s.channels, lam, logits};
  task->line = direction < 2 ? row : column;
  task->position = direction < 2 ? column : row;
  int64_t pixel = image * s.height * s.width;
  if (direction % 2 == 1) {
    pixel += (LineCount(s, direction) - 1) * (direction < 2 ? s.width : 1);
    task->line = {-task->line.x, -task->line.lam, -task->line.logits};
  }
  const int64_t of_lam = pixel * lam + direction * s.channels + channel;
  task->x = Skip(operands.x, pixel * s.channels + channel, size);
  task->lam = Skip(operands.lam, of_lam, size);
  task->logits = Skip(operands.logits, pixel * logits + (direction * s.groups + group) * 3, size);
  task->u = Skip(operands.u, of_lam, size);
  task->y = const_cast<char*>(Skip(operands.y, of_lam, size));
}

// Finds image, direction, block and part of a task by its number: parts vary fastest, then directions.
ScanTask MakeTask(const Plan& plan, const Operands& operands, int64_t size, int64_t number) {
  const Shape& s = plan.shape;
  const int64_t per_block = 2 * (plan.parts[0] + plan.parts[1]);
  const int64_t image = number / per_block / plan.blocks, block = number / per_block % plan.blocks;
  number %= per_block;
  const int64_t pair = number < 2 * plan.parts[0] ? 0 : 1, parts = plan.parts[pair];
  number -= pair * 2 * plan.parts[0];
  const int64_t direction = 2 * pair + number / parts, part = number % parts;

  const int64_t group = block / plan.blocks_per_group * plan.block_groups;
  const int64_t within = block % plan.blocks_per_group * plan.block_channels;
  const int64_t group_size = s.channels / s.groups;
  ScanTask task{};
  task.block.positions = pair == 0 ? s.width : s.height;
  task.block.groups = std::min(plan.block_groups, s.groups - group);
  task.block.group_channels = std::min(plan.block_channels, group_size - within);
  task.block.channels = task.block.groups * task.block.group_channels;
  task.begin = PartBegin(s, direction, part, parts);
  task.end = PartBegin(s, direction, part + 1, parts);
  task.segment = s.segment;
  Place(s, operands, size, image, direction, group, group * group_size + within, &task);
  return task;
}

// The scratch of a task, in one piece of memory; null where there is not enough.
std::unique_ptr<float[]> Allocate(const Block& block, Scratch* scratch) {
  const bool expand = block.group_channels > 1 && block.group_channels < kSmallGroup;
  const int64_t state = (block.positions + 2) * block.channels;
  const int64_t weights = Ceil(block.positions * block.groups, kWeightRoom) * kWeightRoom;
  const int64_t expanded = expand ? block.positions * block.channels : 0;
  std::unique_ptr<float[]> memory(new (std::nothrow) float[2 * state + 3 * (weights + expanded)]);
  float* next = memory.get();
  if (next == nullptr) return memory;
  for (float*& line : scratch->state) {
    line = next;
    next += state;
    std::fill(line, line + block.channels, 0.0f);
    std::fill(next - block.channels, next, 0.0f);
  }
  for (int k = 0; k < 3; ++k) {
    scratch->weights[k] = next;
    scratch->expanded[k] = next + weights;
    next += weights + expanded;
  }
  return memory;
}

using RunTask = void (*)(const ScanTask&, const Scratch&);

RunTask Fastest(Dtype dtype) {
#ifdef GSPN2_WITH_AVX2
  if (RunsAvx2()) {
    return dtype == Dtype::kFloat ? avx2::RunFloat : dtype == Dtype::kHalf ? avx2::RunHalf : avx2::RunBfloat16;
  }
#endif
  return dtype == Dtype::kFloat ? generic::RunFloat : dtype == Dtype::kHalf ? generic::RunHalf : generic::RunBfloat16;
}

struct Call {
  Plan plan;
  Operands operands;
  int64_t size;  // of a number
  RunTask run;
  std::atomic<bool> out_of_memory;
};

void Run(void* data, size_t number) {
  Call& call = *static_cast<Call*>(data);
  const ScanTask task = MakeTask(call.plan, call.operands, call.size, static_cast<int64_t>(number));
  Scratch scratch{};
  const std::unique_ptr<float[]> memory = Allocate(task.block, &scratch);
  if (memory == nullptr) {
    call.out_of_memory = true;
  } else {
    call.run(task, scratch);
  }
}

}  // namespace

const char* LineScanCpu(const Shape& shape, Dtype dtype, const void* x, const void* lam, const void* logits,
                        const void* u, void* y, ParallelFor parallel_for, void* pool) {
  if (shape.batch == 0 || shape.height == 0 || shape.width == 0 || shape.channels == 0) return nullptr;
  const Plan plan = MakePlan(shape);
  Call call{plan, {x, lam, logits, u, y}, dtype == Dtype::kFloat ? 4 : 2, Fastest(dtype), {false}};
  const int64_t tasks = shape.batch * plan.blocks * 2 * (plan.parts[0] + plan.parts[1]);
  parallel_for(pool, static_cast<size_t>(tasks), Run, &call);
  return call.out_of_memory ? "out of memory" : nullptr;
}

}  // namespace gspn2
