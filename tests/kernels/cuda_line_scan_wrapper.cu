// The CUDA line scan as functions that Python can call, for cuda_line_scan.py. A shape is B, H, W, C, G, segment; the
// pointers are x, lam, logits, u and y; a plan is the numbers of `Plan`, in its order. Each returns what went wrong.
#include "line_scan.cu"
using namespace gspn2;

static Shape ShapeOf(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
static Scan ScanOf(void* const* p) {
  Scan scan = {};
  scan.x = (const char*)p[0], scan.lam = (const char*)p[1], scan.logits = (const char*)p[2];
  scan.u = (const char*)p[3], scan.y = (char*)p[4];
  return scan;
}

extern "C" const char* scan(const int64_t* s, int dtype, void* const* p, void* stream) {
  return LaunchLineScan(ShapeOf(s), (Dtype)dtype, p[0], p[1], p[2], p[3], p[4], stream);
}

extern "C" const char* choose(const int64_t* s, int dtype, void* const* p, int* out) {
  Device device;
  Plan plan = {};
  if (const char* text = TextOf(Query(&device))) return text;
  if (!Choose(ShapeOf(s), (Dtype)dtype, ScanOf(p), device, &plan)) return "no plan";
  const int numbers[] = {(int)plan.kind, plan.positions, plan.stages, plan.line_warps, plan.channel_warps, plan.helped};
  std::copy(numbers, numbers + 6, out);
  return nullptr;
}

extern "C" const char* scan_by_plan(const int64_t* s, int dtype, void* const* p, void* stream, const int* n) {
  const Shape shape = ShapeOf(s);
  const Plan plan = {(Kind)n[0], n[1], n[2], n[3], n[4], n[5] != 0};
  Device device;
  if (const char* text = TextOf(Query(&device))) return text;
  if (!Fits(shape, (Dtype)dtype, plan, device)) return "does not fit";
  return LaunchPlan(shape, (Dtype)dtype, plan, device, ScanOf(p), (cudaStream_t)stream);
}
