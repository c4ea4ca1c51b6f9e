// The ONNX Runtime custom op `ai.gspn2::LineScan`, in fp32, fp16 and bf16, for the CPU and, if built so, for CUDA.
//
// A node whose op a library knows never falls back to its function body, so every type and provider that a model
// can ask for is registered here. All calls are of ORT API 17 or older, but the version asked for is that of the
// headers or of the runtime, whichever is older: a runtime gives no API that is newer than itself.

// The API is set at registration; without this macro a static initialiser would ask for the headers' version.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "line_scan.h"
#include "line_scan_cpu.h"

#define GSPN2_EXPORT extern "C" __attribute__((visibility("default")))

namespace gspn2 {
namespace {

constexpr char kDomain[] = "ai.gspn2";
constexpr int kOldestMinor = 18;
constexpr const char* kInputs[] = {"x", "lam", "logits", "u"};

using Dims = std::vector<int64_t>;

template <Dtype kDtype>
constexpr ONNXTensorElementDataType kOnnxType = kDtype == Dtype::kFloat  ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                                                : kDtype == Dtype::kHalf ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                                                         : ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

std::string Text(const Dims& dims) {
  std::string text = "(";
  for (const int64_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + ")";
}

OrtStatusPtr Error(const std::string& text, OrtErrorCode code = ORT_INVALID_ARGUMENT) {
  return Ort::GetApi().CreateStatus(code, ("ai.gspn2::LineScan: " + text).c_str());
}

// Says what is wrong with the shapes, or nothing.
std::string Check(const Dims& x, const Dims& lam, const Dims& logits, const Dims& u) {
  if (x.size() != 4) return "x has shape " + Text(x) + ", expected (B, H, W, C)";
  const Dims like_lam{x[0], x[1], x[2], 4, x[3]};
  if (lam != like_lam) return "lam has shape " + Text(lam) + ", expected (B, H, W, 4, C) = " + Text(like_lam);
  if (logits.size() != 6 || !std::equal(like_lam.begin(), like_lam.end() - 1, logits.begin()) || logits[5] != 3) {
    const std::string grid = std::to_string(x[0]) + ", " + std::to_string(x[1]) + ", " + std::to_string(x[2]);
    return "logits has shape " + Text(logits) + ", expected (B, H, W, 4, G, 3) = (" + grid + ", 4, G, 3)";
  }
  if (logits[4] < 1 || x[3] % logits[4] != 0) {
    return "logits has " + std::to_string(logits[4]) + " groups, expected a divisor of the " + std::to_string(x[3]) +
           " channels of x";
  }
  if (u != like_lam) return "u has shape " + Text(u) + ", expected (B, H, W, 4, C) = " + Text(like_lam);
  return "";
}

void RunOnPool(void* pool, size_t count, Task task, void* data) {
  const auto* context = static_cast<const Ort::KernelContext*>(pool);
  if (count == 1) {
    task(data, 0);
  } else {
    context->ParallelFor(task, count, 0, data);  // 0: as many batches as there are threads
  }
}

// One kernel serves concurrent runs: it holds the attribute and nothing else.
template <Dtype kDtype, bool kCuda>
class Kernel {
 public:
  explicit Kernel(int64_t segment) : segment_(segment) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* c) noexcept {
    try {
      return Compute(Ort::KernelContext(c));
    } catch (const std::exception& error) {
      return Error(error.what(), ORT_RUNTIME_EXCEPTION);
    }
  }

 private:
  OrtStatusPtr Compute(const Ort::KernelContext& context) const {
    if (context.GetInputCount() != 4) return Error("expected the four inputs x, lam, logits and u");
    Dims dims[4];
    const void* data[4];
    for (size_t i = 0; i < 4; ++i) {
      const Ort::ConstValue input = context.GetInput(i);
      dims[i] = input.GetTensorTypeAndShapeInfo().GetShape();
      data[i] = input.GetTensorRawData();
    }
    const std::string wrong = Check(dims[0], dims[1], dims[2], dims[3]);
    if (!wrong.empty()) return Error(wrong);
    void* y = context.GetOutput(0, dims[1]).GetTensorMutableRawData();
    const Shape shape{dims[0][0], dims[0][1], dims[0][2], dims[0][3], dims[2][4], segment_};
    if (shape.batch == 0 || shape.height == 0 || shape.width == 0 || shape.channels == 0) return nullptr;
    const char* failed = Launch(context, shape, data, y);
    return failed == nullptr ? nullptr : Error(failed, ORT_RUNTIME_EXCEPTION);
  }

  static const char* Launch(const Ort::KernelContext& context, const Shape& shape, const void* const* data, void* y) {
#ifdef GSPN2_CUDA
    if constexpr (kCuda) {
      return LaunchLineScan(shape, kDtype, data[0], data[1], data[2], data[3], y, context.GetGPUComputeStream());
    }
#endif
    void* pool = const_cast<Ort::KernelContext*>(&context);
    return LineScanCpu(shape, kDtype, data[0], data[1], data[2], data[3], y, RunOnPool, pool);
  }

  int64_t segment_;
};

// Reads the attribute, 0 where it is missing. Returns what is wrong with it.
OrtStatusPtr ReadSegment(const OrtApi& api, const OrtKernelInfo* info, int64_t* segment) {
  *segment = 0;
  if (OrtStatus* missing = api.KernelInfoGetAttribute_int64(info, "segment", segment)) {
    api.ReleaseStatus(missing);
    *segment = 0;
    float other = 0;
    OrtStatus* no_float = api.KernelInfoGetAttribute_float(info, "segment", &other);
    if (no_float == nullptr) return Error("attribute segment is a float, expected an int");
    api.ReleaseStatus(no_float);
  }
  if (*segment >= 0) return nullptr;
  return Error("attribute segment is " + std::to_string(*segment) + ", expected 0 (no restart) or a number of lines");
}

// Says which input has another type than x, whose type chose the op. ONNX Runtime would name none.
OrtStatusPtr CheckTypes(const Ort::ConstKernelInfo& info, ONNXTensorElementDataType expected) {
  for (size_t i = 1; i < info.GetInputCount(); ++i) {
    if (info.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType() != expected) {
      return Error(std::string(kInputs[i]) + " has another dtype than x, expected one for all inputs");
    }
  }
  return nullptr;
}

// The output has the type of x and the shape of lam. Not the class's InferOutputShape with a type: of several ops of
// one name ONNX Runtime asks the first alone, for every type. It ignores an error from here.
OrtStatusPtr InferShape(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo *x = nullptr, *lam = nullptr;
  ONNXTensorElementDataType type;
  if (OrtStatus* status = api.ShapeInferContext_GetInputTypeShape(context, 0, &x)) return status;
  if (OrtStatus* status = api.ShapeInferContext_GetInputTypeShape(context, 1, &lam)) return status;
  if (OrtStatus* status = api.GetTensorElementType(x, &type)) return status;
  if (OrtStatus* status = api.SetTensorElementType(lam, type)) return status;  // lam is a copy of this context's
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, lam);
}

template <Dtype kDtype, bool kCuda>
struct Op : Ort::CustomOpBase<Op<kDtype, kCuda>, Kernel<kDtype, kCuda>, /*WithStatus=*/true> {
  explicit Op(uint32_t api_version) {
    OrtCustomOp::version = api_version;
    OrtCustomOp::InferOutputShapeFn = InferShape;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      int64_t segment = 0;
      if (OrtStatusPtr wrong = CheckTypes(Ort::ConstKernelInfo(info), kOnnxType<kDtype>)) return wrong;
      if (OrtStatusPtr wrong = ReadSegment(api, info, &segment)) return wrong;
      *kernel = new Kernel<kDtype, kCuda>(segment);
      return nullptr;
    } catch (const std::exception& error) {
      return api.CreateStatus(ORT_FAIL, error.what());
    }
  }

  const char* GetName() const { return "LineScan"; }
  const char* GetExecutionProviderType() const { return kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return 4; }
  size_t GetOutputTypeCount() const { return 1; }
  // x chooses the op; the others may have any type, so that CheckTypes can say which one is wrong.
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == 0 ? kOnnxType<kDtype> : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kOnnxType<kDtype>; }
};

template <bool kCuda>
struct Ops {
  explicit Ops(uint32_t version) : of_float(version), of_half(version), of_bfloat16(version) {}

  void AddTo(Ort::CustomOpDomain* domain) const {
    domain->Add(&of_float);
    domain->Add(&of_half);
    domain->Add(&of_bfloat16);
  }

  Op<Dtype::kFloat, kCuda> of_float;
  Op<Dtype::kHalf, kCuda> of_half;
  Op<Dtype::kBfloat16, kCuda> of_bfloat16;
};

// A session's options refer to the domain and its ops as long as they live, so these are never destroyed, not even at
// the end of the process; one domain serves all of them.
const OrtCustomOpDomain* Domain(uint32_t version) {
  static std::mutex mutex;
  static Ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    auto made = std::make_unique<Ort::CustomOpDomain>(kDomain);
    static const Ops<false>* const cpu = new Ops<false>(version);
    cpu->AddTo(made.get());
#ifdef GSPN2_CUDA
    static const Ops<true>* const cuda = new Ops<true>(version);
    cuda->AddTo(made.get());
#endif
    domain = made.release();
  }
  return *domain;
}

int Minor(const OrtApiBase& base) {
  int major = 0, minor = 0;
  std::sscanf(base.GetVersionString(), "%d.%d", &major, &minor);
  return major > 1 ? ORT_API_VERSION : minor;
}

}  // namespace
}  // namespace gspn2

GSPN2_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const int minor = std::min<int>(ORT_API_VERSION, gspn2::Minor(*base));
  const OrtApi* api = base->GetApi(static_cast<uint32_t>(minor));
  if (api == nullptr) return nullptr;  // no API, no way to say so; a session then does not know the op
  if (minor < gspn2::kOldestMinor) {
    return api->CreateStatus(ORT_FAIL, "ai.gspn2::LineScan needs onnxruntime >= 1.18");
  }
  try {
    Ort::InitApi(api);
    return api->AddCustomOpDomain(options, const_cast<OrtCustomOpDomain*>(gspn2::Domain(minor)));
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}
