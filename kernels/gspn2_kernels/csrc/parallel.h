// How a kernel on the CPU gets its work done by several threads.
#pragma once

#include <cstddef>

namespace gspn2 {

// Runs task(data, i) once for each i below count, in any order and on any threads, and returns when all are done.
// A task throws nothing.
using Task = void (*)(void* data, size_t i);
using ParallelFor = void (*)(void* pool, size_t count, Task task, void* data);

}  // namespace gspn2
