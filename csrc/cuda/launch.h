// Launches with the attributes of a device, and what the runtime says of them. Only for .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dmoe::cuda {

inline const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

inline cudaError_t attribute(cudaDeviceAttr name, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, name, device) : error;
}

struct Shape {
  int64_t ctas;
  int threads;
  int64_t shared_bytes;
  int cluster;  // thread blocks per cluster
  bool early;   // may start while the launch before it runs: the kernel waits for that by griddepcontrol.wait
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Shape& shape, void* stream, const Args&... args) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  unsigned n = 0;
  if (shape.cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    ++n;
  }
  if (shape.early) {
    attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n].val.programmaticStreamSerializationAllowed = 1;
    ++n;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.ctas));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = n;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace dmoe::cuda
