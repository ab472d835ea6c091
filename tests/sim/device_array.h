// SPDX-License-Identifier: Apache-2.0
// Memory that kernels see, and launches that overlap, so that the same host code runs kernels on a
// device and in the simulator.
#pragma once

#include <cstring>
#include <vector>

#include "cuda/primitives.h"

namespace frnn::cuda {

#if defined(FRNN_SIM)

using sim::overlapping;

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : values_(values) {}
  T* get() { return values_.data(); }
  void write(const std::vector<T>& values) { values_ = values; }
  std::vector<T> read() const { return values_; }

 private:
  std::vector<T> values_;
};

#else

template <class F>
void overlapping(F host) {
  host();
}

// An error of CUDA as an exception.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(reinterpret_cast<void**>(&p_), size_ * sizeof(T)));
    write(values);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(p_); }
  T* get() { return p_; }
  void write(const std::vector<T>& values) {  // of the same size
    check(cudaMemcpy(p_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  // Waits for the kernels launched so far, and throws if one of them failed.
  std::vector<T> read() const {
    std::vector<T> values(size_);
    check(cudaMemcpy(values.data(), p_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* p_ = nullptr;
  size_t size_;
};

#endif

// What a kernel must overwrite.
template <class T>
DeviceArray<T> poison(size_t n) {
  std::vector<T> values(n);
  std::memset(static_cast<void*>(values.data()), 0xff, n * sizeof(T));
  return DeviceArray<T>(values);
}

}  // namespace frnn::cuda
