// The ONNX Runtime custom op `ai.gspn2::AddNorm`.
#include <string>

#include "add_norm_cpu.h"
#include "onnx_op.h"

namespace gspn2 {
namespace {

constexpr char kName[] = "AddNorm";
constexpr const char* kInputs[] = {"x", "update", "bias", "scale", "shift"};
constexpr size_t kInputCount = 5;

// Says what is wrong with the shapes, or nothing.
std::string Check(const Dims (&dims)[kInputCount]) {
  const Dims& x = dims[0];
  if (x.empty()) return "x is a scalar, expected (..., C)";
  if (dims[1] != x) return "update has shape " + Text(dims[1]) + ", expected that of x, " + Text(x);
  for (size_t i = 2; i < kInputCount; ++i) {
    const bool one = i == 2 && dims[i] == Dims{1};
    if (!one && dims[i] != Dims{x.back()}) {
      const std::string expected = (i == 2 ? "(1) or (C) = " : "(C) = ") + Text({x.back()});
      return std::string(kInputs[i]) + " has shape " + Text(dims[i]) + ", expected " + expected;
    }
  }
  return "";
}

// One kernel serves concurrent runs: it holds the attribute and nothing else.
template <Dtype kDtype, bool kCuda>
class Kernel {
 public:
  explicit Kernel(float epsilon) : epsilon_(epsilon) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* c) noexcept {
    try {
      return Compute(Ort::KernelContext(c));
    } catch (const std::exception& error) {
      return Error(kName, error.what(), ORT_RUNTIME_EXCEPTION);
    }
  }

 private:
  OrtStatusPtr Compute(const Ort::KernelContext& context) const {
    if (context.GetInputCount() != kInputCount) {
      return Error(kName, "expected the five inputs x, update, bias, scale and shift");
    }
    Dims dims[kInputCount];
    const void* data[kInputCount];
    for (size_t i = 0; i < kInputCount; ++i) {
      const Ort::ConstValue input = context.GetInput(i);
      dims[i] = input.GetTensorTypeAndShapeInfo().GetShape();
      data[i] = input.GetTensorRawData();
    }
    const std::string wrong = Check(dims);
    if (!wrong.empty()) return Error(kName, wrong);
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims[0].size(); ++i) rows *= dims[0][i];
    void* sum = context.GetOutput(0, dims[0]).GetTensorMutableRawData();
    void* normed = context.GetOutput(1, dims[0]).GetTensorMutableRawData();
    const AddNorm call{rows,    dims[0].back(), dims[2] == Dims{1}, epsilon_, data[0], data[1],
                       data[2], data[3],        data[4],            sum,      normed};
    if (call.rows == 0 || call.channels == 0) return nullptr;
    const char* failed = Launch(context, call);
    return failed == nullptr ? nullptr : Error(kName, failed, ORT_RUNTIME_EXCEPTION);
  }

  static const char* Launch(const Ort::KernelContext& context, const AddNorm& call) {
#ifdef GSPN2_CUDA
    if constexpr (kCuda) return LaunchAddNorm(call, kDtype, context.GetGPUComputeStream());
#endif
    AddNormCpu(call, kDtype, RunOnPool, const_cast<Ort::KernelContext*>(&context));
    return nullptr;
  }

  float epsilon_;
};

// Both outputs are as x. ONNX Runtime ignores an error from here.
OrtStatusPtr InferShape(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* x = nullptr;
  if (OrtStatus* status = api.ShapeInferContext_GetInputTypeShape(context, 0, &x)) return status;
  if (OrtStatus* status = api.ShapeInferContext_SetOutputTypeShape(context, 0, x)) return status;
  return api.ShapeInferContext_SetOutputTypeShape(context, 1, x);
}

template <Dtype kDtype, bool kCuda>
struct Op : Ort::CustomOpBase<Op<kDtype, kCuda>, Kernel<kDtype, kCuda>, /*WithStatus=*/true> {
  explicit Op(uint32_t api_version) {
    OrtCustomOp::version = api_version;
    OrtCustomOp::InferOutputShapeFn = InferShape;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      if (OrtStatusPtr wrong = CheckTypes(kName, Ort::ConstKernelInfo(info), kInputs, kOnnxType<kDtype>)) return wrong;
      float epsilon = 0;
      if (OrtStatus* missing = api.KernelInfoGetAttribute_float(info, "epsilon", &epsilon)) {
        api.ReleaseStatus(missing);
        return Error(kName, "attribute epsilon is missing or no float");
      }
      *kernel = new Kernel<kDtype, kCuda>(epsilon);
      return nullptr;
    } catch (const std::exception& error) {
      return api.CreateStatus(ORT_FAIL, error.what());
    }
  }

  const char* GetName() const { return kName; }
  const char* GetExecutionProviderType() const { return kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return kInputCount; }
  size_t GetOutputTypeCount() const { return 2; }
  // x chooses the op; the others may have any type, so that CheckTypes can say which one is wrong.
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == 0 ? kOnnxType<kDtype> : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kOnnxType<kDtype>; }
};

template <bool kCuda>
void AddFor(Ort::CustomOpDomain* domain, uint32_t version) {
  static const Op<Dtype::kFloat, kCuda>* const of_float = new Op<Dtype::kFloat, kCuda>(version);
  static const Op<Dtype::kHalf, kCuda>* const of_half = new Op<Dtype::kHalf, kCuda>(version);
  static const Op<Dtype::kBfloat16, kCuda>* const of_bfloat16 = new Op<Dtype::kBfloat16, kCuda>(version);
  domain->Add(of_float);
  domain->Add(of_half);
  domain->Add(of_bfloat16);
}

}  // namespace

void AddAddNorm(Ort::CustomOpDomain* domain, uint32_t api_version) {
  AddFor<false>(domain, api_version);
#ifdef GSPN2_CUDA
  AddFor<true>(domain, api_version);
#endif
}

}  // namespace gspn2
