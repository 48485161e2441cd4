#include "plans/plan.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace ck {
namespace plans {
namespace {

constexpr int kPromote128Bytes = 2;       // CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton's launcher asks
constexpr int kFloat32 = 0;               // CUDA_R_32F
constexpr int kComputeFloat32 = 68;       // CUBLAS_COMPUTE_32F
constexpr int kDefaultTensorOp = 99;      // CUBLAS_GEMM_DEFAULT_TENSOR_OP
constexpr int kMapsAreWideUpTo = 13010;   // drivers: see encode
constexpr uint64_t kSmall = 128 * 1024;

void check_driver(int error, const char* call) {
  if (!error) return;
  const char* text = nullptr;
  driver().error_text(error, &text);
  throw std::runtime_error(std::string("a replayed plan: ") + call + " failed: " + (text ? text : "unknown error"));
}

void check_blas(int status, const char* call) {
  if (status) throw std::runtime_error(std::string("a replayed plan: ") + call + " failed: status " + std::to_string(status));
}

// A thread that PyTorch has not used has no context; Triton's launcher makes one too.
void ensure_context(int device) {
  void* context = nullptr;
  check_driver(driver().context(&context), "cuCtxGetCurrent");
  if (context) return;
  check_driver(driver().retain_primary(&context, device), "cuDevicePrimaryCtxRetain");
  check_driver(driver().set_context(context), "cuCtxSetCurrent");
}

}  // namespace

void Plan::check(Place place) const {
  if (place.slot < 0 || place.slot >= slots_) throw std::out_of_range("a slot that the plan does not have");
}

void Plan::launch(uintptr_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared_bytes) {
  commands_.push_back({-1, reinterpret_cast<void*>(function), grid, threads, shared_bytes, parameters_.size(), 0});
}

void Plan::parameter(bool is_map, size_t index) {
  if (commands_.empty() || commands_.back().gemm >= 0) throw std::logic_error("a parameter without a launch");
  places_.clear();
  parameters_.push_back({is_map, index});
  commands_.back().count++;
}

void Plan::pointer(Place place) {
  check(place);
  pointers_.push_back({words_.size(), place});
  words_.push_back(0);
  parameter(false, words_.size() - 1);
}

void Plan::bytes(const std::string& value) {
  if (value.size() > sizeof(uint64_t)) throw std::length_error("a parameter of more than 8 bytes");
  words_.push_back(0);
  std::memcpy(&words_.back(), value.data(), value.size());
  parameter(false, words_.size() - 1);
}

void Plan::map(Place place, MapLayout layout) {
  check(place);
  if (!driver().encode_tiled) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  const size_t rank = layout.shape.size();
  if (rank == 0 || rank > 5 || layout.box.size() != rank || layout.strides.size() + 1 != rank)
    throw std::length_error("a tensor map of rank 1 to 5 has a shape, a box and strides");
  maps_.push_back({place, std::move(layout), 0});
  encoded_.emplace_back();
  parameter(true, maps_.size() - 1);
}

void Plan::gemm(const Gemm& gemm) {
  for (Place place : {gemm.a, gemm.b, gemm.c}) check(place);
  if (!(gemm.dtype == kFloat32 ? blas().sgemm != nullptr : blas().gemm_ex && blas().set_math_mode))
    throw std::runtime_error("PyTorch's cuBLAS is not visible");
  commands_.push_back({static_cast<int>(gemms_.size()), nullptr, {}, 0, 0, parameters_.size(), 0});
  gemms_.push_back(gemm);
}

void Plan::encode(size_t i, uint64_t address) {
  Map& m = maps_[i];
  const MapLayout& l = m.layout;
  const uint32_t steps[5] = {1, 1, 1, 1, 1}, rank = static_cast<uint32_t>(l.shape.size());
  uint64_t strides[5] = {};  // the last is not read
  std::copy(l.strides.begin(), l.strides.end(), strides);
  check_driver(driver().encode_tiled(&encoded_[i], l.dtype, rank, reinterpret_cast<void*>(address), l.shape.data(),
                                     strides, l.box.data(), steps, 0, l.swizzle, kPromote128Bytes, 0),
               "cuTensorMapEncodeTiled");
  // As Triton's launcher and CUTLASS (b7ecaa6): drivers up to 13.1 set a bit that small tensors must not have.
  uint64_t last = 0;
  for (uint32_t k = 0; k < rank; k++) last += (l.shape[k] - 1) * (k ? l.strides[k - 1] : l.element_bytes);
  if (driver().version <= kMapsAreWideUpTo && last + 1 < kSmall) encoded_[i].words[1] &= ~(uint64_t{1} << 21);
  m.address = address;
}

// cuBLAS is column-major: c^T (cols, rows) = b^T a^T.
void Plan::multiply(const Gemm& g, void* handle, const std::vector<uint64_t>& addresses) const {
  const float alpha = g.alpha, beta = g.accumulate;
  const auto at = [&](Place p) { return reinterpret_cast<void*>(addresses[p.slot] + p.offset); };
  const int op_a = g.transposed_a, op_b = g.transposed_b;
  if (g.dtype == kFloat32) {
    check_blas(blas().sgemm(handle, op_b, op_a, g.cols, g.rows, g.inner, &alpha, static_cast<const float*>(at(g.b)), g.ldb,
                            static_cast<const float*>(at(g.a)), g.lda, &beta, static_cast<float*>(at(g.c)), g.ldc),
               "cublasSgemm");
    return;
  }
  check_blas(blas().set_math_mode(handle, g.math_mode), "cublasSetMathMode");
  const int status = blas().gemm_ex(handle, op_b, op_a, g.cols, g.rows, g.inner, &alpha, at(g.b), g.dtype, g.ldb, at(g.a),
                                    g.dtype, g.lda, &beta, at(g.c), kFloat32, g.ldc, kComputeFloat32, kDefaultTensorOp);
  check_blas(blas().set_math_mode(handle, 0), "cublasSetMathMode");
  check_blas(status, "cublasGemmEx");
}

void Plan::run(int device, uintptr_t stream, uintptr_t handle, const std::vector<uint64_t>& addresses) {
  if (addresses.size() != static_cast<size_t>(slots_)) throw std::length_error("not as many addresses as slots");
  if (multiplies() && !handle) throw std::invalid_argument("a plan with matmuls needs cuBLAS's handle");
  const std::lock_guard<std::mutex> mine(turn_);
  ensure_context(device);
  if (places_.empty())
    for (const Parameter& p : parameters_)
      places_.push_back(p.is_map ? static_cast<void*>(&encoded_[p.index]) : static_cast<void*>(&words_[p.index]));
  for (const Pointer& p : pointers_) words_[p.word] = addresses[p.place.slot] + p.place.offset;
  for (size_t i = 0; i < maps_.size(); i++) {
    const uint64_t address = addresses[maps_[i].place.slot] + maps_[i].place.offset;
    if (address != maps_[i].address) encode(i, address);
  }
  for (const Command& c : commands_) {
    if (c.gemm >= 0)
      multiply(gemms_[c.gemm], reinterpret_cast<void*>(handle), addresses);
    else
      check_driver(driver().launch(c.function, c.grid[0], c.grid[1], c.grid[2], c.threads, 1, 1, c.shared,
                                   reinterpret_cast<void*>(stream), &places_[c.first], nullptr),
                   "cuLaunchKernel");
  }
}

}  // namespace plans
}  // namespace ck
