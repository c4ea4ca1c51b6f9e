// What the custom ops share: the API of ONNX Runtime, dtypes, texts of errors, the thread pool.
#pragma once

// The API is set at registration; without this macro a static initialiser would ask for the headers' version.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

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

}  // namespace gspn2
