// The ONNX Runtime custom op `ai.gspn2::AddNorm`.
#include <string>

#include "add_norm_cpu.h"
#include "onnx_op.h"

namespace gspn2 {
namespace {

struct AddNormOp {
  static constexpr char kName[] = "AddNorm";
  static constexpr const char* kInputs[] = {"x", "update", "bias", "scale", "shift"};
  static constexpr char kWanted[] = "expected the five inputs x, update, bias, scale and shift";
  static constexpr size_t kOutputs = 2;
  using Attribute = float;

  // Says what is wrong with the shapes, or nothing.
  static std::string Check(const Dims (&dims)[5]) {
    const Dims& x = dims[0];
    if (x.empty()) return "x is a scalar, expected (..., C)";
    if (dims[1] != x) return "update has shape " + Text(dims[1]) + ", expected that of x, " + Text(x);
    for (size_t i = 2; i < std::size(dims); ++i) {
      const bool one = i == 2 && dims[i] == Dims{1};
      if (!one && dims[i] != Dims{x.back()}) {
        const std::string expected = (i == 2 ? "(1) or (C) = " : "(C) = ") + Text({x.back()});
        return std::string(kInputs[i]) + " has shape " + Text(dims[i]) + ", expected " + expected;
      }
    }
    return "";
  }

  static OrtStatusPtr ReadAttribute(const OrtApi& api, const OrtKernelInfo* info, float* epsilon) {
    OrtStatus* const missing = api.KernelInfoGetAttribute_float(info, "epsilon", epsilon);
    if (missing == nullptr) return nullptr;
    api.ReleaseStatus(missing);
    return Error(kName, "attribute epsilon is missing or no float");
  }

  // Both outputs are as x. ONNX Runtime ignores an error from here.
  static OrtStatusPtr InferShape(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
    const OrtApi& api = Ort::GetApi();
    OrtTensorTypeAndShapeInfo* x = nullptr;
    if (OrtStatus* status = api.ShapeInferContext_GetInputTypeShape(context, 0, &x)) return status;
    if (OrtStatus* status = api.ShapeInferContext_SetOutputTypeShape(context, 0, x)) return status;
    return api.ShapeInferContext_SetOutputTypeShape(context, 1, x);
  }

  template <Dtype kDtype, bool kCuda>
  static OrtStatusPtr Compute(const Ort::KernelContext& context, const Inputs<5>& inputs, float epsilon) {
    const auto& [dims, data] = inputs;
    const std::string wrong = Check(dims);
    if (!wrong.empty()) return Error(kName, wrong);
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims[0].size(); ++i) rows *= dims[0][i];
    void* sum = context.GetOutput(0, dims[0]).GetTensorMutableRawData();
    void* normed = context.GetOutput(1, dims[0]).GetTensorMutableRawData();
    const AddNorm call{rows,    dims[0].back(), dims[2] == Dims{1}, epsilon, data[0], data[1],
                       data[2], data[3],        data[4],            sum,     normed};
    const char* failed = Launch<kDtype, kCuda>(context, call);
    return failed == nullptr ? nullptr : Error(kName, failed, ORT_RUNTIME_EXCEPTION);
  }

  template <Dtype kDtype, bool kCuda>
  static const char* Launch(const Ort::KernelContext& context, const AddNorm& call) {
#ifdef GSPN2_CUDA
    if constexpr (kCuda) return LaunchAddNorm(call, kDtype, context.GetGPUComputeStream());
#endif
    AddNormCpu(call, kDtype, RunOnPool, const_cast<Ort::KernelContext*>(&context));
    return nullptr;
  }
};

}  // namespace

void AddAddNorm(Ort::CustomOpDomain* domain, uint32_t api_version) { AddOp<AddNormOp>(domain, api_version); }

}  // namespace gspn2
