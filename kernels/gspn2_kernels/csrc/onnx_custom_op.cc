// Registers the custom ops of the domain `ai.gspn2`, in fp32, fp16 and bf16, for the CPU and, if built so, for CUDA.
//
// A node whose op a library knows never falls back to its function body, so every type and provider that a model
// can ask for is registered here. All calls are of ORT API 17 or older, but the version asked for is that of the
// headers or of the runtime, whichever is older: a runtime gives no API that is newer than itself.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>

#include "onnx_op.h"

#define GSPN2_EXPORT extern "C" __attribute__((visibility("default")))

namespace gspn2 {
namespace {

constexpr char kDomain[] = "ai.gspn2";
constexpr int kOldestMinor = 18;

// A session's options refer to the domain as long as they live, so it is never destroyed, not even at the end of the
// process; one serves all of them.
const OrtCustomOpDomain* Domain(uint32_t version) {
  static std::mutex mutex;
  static Ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    auto made = std::make_unique<Ort::CustomOpDomain>(kDomain);
    AddLineScan(made.get(), version);
    AddAddNorm(made.get(), version);
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
    return api->CreateStatus(ORT_FAIL, "ai.gspn2 needs onnxruntime >= 1.18");
  }
  try {
    Ort::InitApi(api);
    return api->AddCustomOpDomain(options, const_cast<OrtCustomOpDomain*>(gspn2::Domain(minor)));
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}
