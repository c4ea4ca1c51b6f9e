// The ONNX Runtime custom op `ai.gspn2::LineScan`.
#include <algorithm>
#include <string>

#include "line_scan.h"
#include "line_scan_cpu.h"
#include "onnx_op.h"

namespace gspn2 {
namespace {

struct LineScanOp {
  static constexpr char kName[] = "LineScan";
  static constexpr const char* kInputs[] = {"x", "lam", "logits", "u"};
  static constexpr char kWanted[] = "expected the four inputs x, lam, logits and u";
  static constexpr size_t kOutputs = 1;
  using Attribute = int64_t;

  // Says what is wrong with the shapes, or nothing.
  static std::string Check(const Dims& x, const Dims& lam, const Dims& logits, const Dims& u) {
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

  // Reads the attribute, 0 where it is missing. Returns what is wrong with it.
  static OrtStatusPtr ReadAttribute(const OrtApi& api, const OrtKernelInfo* info, int64_t* segment) {
    *segment = 0;
    const auto found = [&api](OrtStatus* status) {
      api.ReleaseStatus(status);
      return status == nullptr;
    };
    if (!found(api.KernelInfoGetAttribute_int64(info, "segment", segment))) {
      *segment = 0;
      float number = 0;
      size_t size = 0;  // what a text or a list needs is asked for without a place for it
      const char* other = nullptr;
      // Finds whatever is there, of any kind.
      if (found(api.KernelInfoGetAttributeArray_int64(info, "segment", nullptr, &size))) other = "of another kind";
      if (found(api.KernelInfoGetAttribute_float(info, "segment", &number))) other = "a float";
      if (found(api.KernelInfoGetAttribute_string(info, "segment", nullptr, &size))) other = "a text";
      if (other) return Error(kName, std::string("attribute segment is ") + other + ", expected an int");
    }
    if (*segment >= 0) return nullptr;
    const std::string given = "attribute segment is " + std::to_string(*segment);
    return Error(kName, given + ", expected 0 (no restart) or a number of lines");
  }

  // The output has the type of x and the shape of lam. Not the class's InferOutputShape with a type: of several ops of
  // one name ONNX Runtime asks the first alone, for every type. It ignores an error from here.
  static OrtStatusPtr InferShape(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
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
  static OrtStatusPtr Compute(const Ort::KernelContext& context, const Inputs<4>& inputs, int64_t segment) {
    const auto& [dims, data] = inputs;
    const std::string wrong = Check(dims[0], dims[1], dims[2], dims[3]);
    if (!wrong.empty()) return Error(kName, wrong);
    void* y = context.GetOutput(0, dims[1]).GetTensorMutableRawData();
    const Shape shape{dims[0][0], dims[0][1], dims[0][2], dims[0][3], dims[2][4], segment};
    if (shape.batch == 0 || shape.height == 0 || shape.width == 0 || shape.channels == 0) return nullptr;
    const char* failed = Launch<kDtype, kCuda>(context, shape, data, y);
    return failed == nullptr ? nullptr : Error(kName, failed, ORT_RUNTIME_EXCEPTION);
  }

  template <Dtype kDtype, bool kCuda>
  static const char* Launch(const Ort::KernelContext& context, const Shape& shape, const void* const* data, void* y) {
#ifdef GSPN2_CUDA
    if constexpr (kCuda) {
      return LaunchLineScan(shape, kDtype, data[0], data[1], data[2], data[3], y, context.GetGPUComputeStream());
    }
#endif
    void* pool = const_cast<Ort::KernelContext*>(&context);
    return LineScanCpu(shape, kDtype, data[0], data[1], data[2], data[3], y, RunOnPool, pool);
  }
};

}  // namespace

void AddLineScan(Ort::CustomOpDomain* domain, uint32_t api_version) { AddOp<LineScanOp>(domain, api_version); }

}  // namespace gspn2
