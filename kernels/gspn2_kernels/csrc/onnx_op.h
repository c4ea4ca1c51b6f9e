// What the custom ops share: an op for each dtype and provider, dtypes, texts of errors, the thread pool.
#pragma once

// The API is set at registration; without this macro a static initialiser would ask for the headers' version.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <iterator>
#include <string>
#include <vector>

#include "dtype.h"
#include "parallel.h"

namespace gspn2 {

using Dims = std::vector<int64_t>;

template <Dtype kDtype>
constexpr ONNXTensorElementDataType kOnnxType = kDtype == Dtype::kFloat  ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                                                : kDtype == Dtype::kHalf ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                                                         : ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

// Adds the op in fp32, fp16 and bf16 to a domain, for the CPU and, if built so, for CUDA. The domain refers to them
// from then on, so they are never destroyed, not even at the end of the process.
void AddLineScan(Ort::CustomOpDomain* domain, uint32_t api_version);
void AddAddNorm(Ort::CustomOpDomain* domain, uint32_t api_version);

inline std::string Text(const Dims& dims) {
  std::string text = "(";
  for (const int64_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + ")";
}

inline OrtStatusPtr Error(const char* op, const std::string& text, OrtErrorCode code = ORT_INVALID_ARGUMENT) {
  return Ort::GetApi().CreateStatus(code, ("ai.gspn2::" + std::string(op) + ": " + text).c_str());
}

// A `ParallelFor` whose pool is the context of a call.
inline void RunOnPool(void* pool, size_t count, Task task, void* data) {
  const auto* context = static_cast<const Ort::KernelContext*>(pool);
  if (count == 1) {
    task(data, 0);
  } else {
    context->ParallelFor(task, count, 0, data);  // 0: as many batches as there are threads
  }
}

// Says which input has another type than x, whose type chose the op. ONNX Runtime would name none.
inline OrtStatusPtr CheckTypes(const char* op, const Ort::ConstKernelInfo& info, const char* const* names,
                               ONNXTensorElementDataType expected) {
  for (size_t i = 1; i < info.GetInputCount(); ++i) {
    if (info.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType() != expected) {
      return Error(op, std::string(names[i]) + " has another dtype than x, expected one for all inputs");
    }
  }
  return nullptr;
}

// What a node got.
template <size_t kCount>
struct Inputs {
  Dims dims[kCount];
  const void* data[kCount];

  explicit Inputs(const Ort::KernelContext& context) {
    for (size_t i = 0; i < kCount; ++i) {
      const Ort::ConstValue input = context.GetInput(i);
      dims[i] = input.GetTensorTypeAndShapeInfo().GetShape();
      data[i] = input.GetTensorRawData();
    }
  }
};

// A `Definition` says what an op is: kName, kInputs, kWanted (its inputs in words), kOutputs, the type of its one
// Attribute, and what it does by ReadAttribute, InferShape and Compute.

// One kernel serves concurrent runs: it holds the attribute and nothing else.
template <class Definition, Dtype kDtype, bool kCuda>
class Kernel {
 public:
  using Attribute = typename Definition::Attribute;

  explicit Kernel(Attribute attribute) : attribute_(attribute) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* c) noexcept {
    try {
      constexpr size_t kCount = std::size(Definition::kInputs);
      const Ort::KernelContext context(c);
      if (context.GetInputCount() != kCount) return Error(Definition::kName, Definition::kWanted);
      return Definition::template Compute<kDtype, kCuda>(context, Inputs<kCount>(context), attribute_);
    } catch (const std::exception& error) {
      return Error(Definition::kName, error.what(), ORT_RUNTIME_EXCEPTION);
    }
  }

 private:
  Attribute attribute_;
};

template <class Definition, Dtype kDtype, bool kCuda>
struct Op : Ort::CustomOpBase<Op<Definition, kDtype, kCuda>, Kernel<Definition, kDtype, kCuda>, /*WithStatus=*/true> {
  explicit Op(uint32_t api_version) {
    OrtCustomOp::version = api_version;
    OrtCustomOp::InferOutputShapeFn = Definition::InferShape;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      const Ort::ConstKernelInfo given(info);
      if (OrtStatusPtr wrong = CheckTypes(GetName(), given, Definition::kInputs, kOnnxType<kDtype>)) return wrong;
      typename Definition::Attribute attribute = 0;
      if (OrtStatusPtr wrong = Definition::ReadAttribute(api, info, &attribute)) return wrong;
      *kernel = new Kernel<Definition, kDtype, kCuda>(attribute);
      return nullptr;
    } catch (const std::exception& error) {
      return api.CreateStatus(ORT_FAIL, error.what());
    }
  }

  const char* GetName() const { return Definition::kName; }
  const char* GetExecutionProviderType() const { return kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return std::size(Definition::kInputs); }
  size_t GetOutputTypeCount() const { return Definition::kOutputs; }
  // x chooses the op; the others may have any type, so that CheckTypes can say which one is wrong.
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == 0 ? kOnnxType<kDtype> : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kOnnxType<kDtype>; }
};

template <class Definition, bool kCuda>
void AddFor(Ort::CustomOpDomain* domain, uint32_t version) {
  static const auto* const of_float = new Op<Definition, Dtype::kFloat, kCuda>(version);
  static const auto* const of_half = new Op<Definition, Dtype::kHalf, kCuda>(version);
  static const auto* const of_bfloat16 = new Op<Definition, Dtype::kBfloat16, kCuda>(version);
  domain->Add(of_float);
  domain->Add(of_half);
  domain->Add(of_bfloat16);
}

template <class Definition>
void AddOp(Ort::CustomOpDomain* domain, uint32_t version) {
  AddFor<Definition, false>(domain, version);
#ifdef GSPN2_CUDA
  AddFor<Definition, true>(domain, version);
#endif
}

}  // namespace gspn2
