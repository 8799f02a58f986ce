// Launches with the attributes of a device, and what the runtime says of them. Only for .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dmoe::cuda {

inline const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The runtime keeps the last error until somebody asks for it; who asks next should not be told of this one again.
inline cudaError_t forget(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline cudaError_t attribute(cudaDeviceAttr name, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return forget(error == cudaSuccess ? cudaDeviceGetAttribute(value, name, device) : error);
}

struct Shape {
  int64_t ctas;
  int threads;
  int64_t shared_bytes;
  int cluster;  // thread blocks per cluster
  bool early;   // may start while the launch before it runs: the kernel waits for that by griddepcontrol.wait
};

// A launch's configuration; it points into itself.
struct Config {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  explicit Config(const Shape& shape, void* stream = nullptr) {
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
    config.gridDim = dim3(static_cast<unsigned>(shape.ctas));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = n;
  }
  Config(const Config&) = delete;
};

// How many clusters of a shape the device can run at once.
template <class... Params>
cudaError_t active_clusters(void (*kernel)(Params...), const Shape& shape, int* clusters) {
  const Config config(shape);
  return forget(cudaOccupancyMaxActiveClusters(clusters, kernel, &config.config));
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Shape& shape, void* stream, const Args&... args) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return forget(error);
  }
  const Config config(shape, stream);
  return forget(cudaLaunchKernelEx(&config.config, kernel, args...));
}

}  // namespace dmoe::cuda
