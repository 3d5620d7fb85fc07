// The CUDA runtime as far as csrc/cuda/launch.cpp uses it, over the memory of the CPU: for the tests' emulator.
//
// Under a pretended capture, everything that a CUDA graph could not hold is an error: copies, events, new host memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

using cudaStream_t = void*;
using cudaEvent_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotReady = 600, cudaErrorStreamCaptureUnsupported = 900 };
enum { cudaHostAllocDefault = 0, cudaEventDisableTiming = 2, cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

// Set by the tests: whether a capture is on, and what the device has.
struct EmulatedDevice {
  int capturing, shared_bytes, multiprocessors, copies;
};
extern "C" inline __attribute__((used, visibility("default"))) EmulatedDevice* emulated_device() {
  static EmulatedDevice device{0, 163 << 10, 2, 0};
  return &device;
}
inline cudaError_t unless_capturing(cudaError_t otherwise) {
  return emulated_device()->capturing ? cudaErrorStreamCaptureUnsupported : otherwise;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "a launch failed";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const EmulatedDevice& device = *emulated_device();
  return *value = name == cudaDevAttrMultiProcessorCount ? device.multiprocessors : device.shared_bytes, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = emulated_device()->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return *memory = std::malloc(bytes), unless_capturing(cudaSuccess);
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = nullptr, unless_capturing(cudaSuccess); }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return unless_capturing(cudaSuccess); }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return unless_capturing(cudaSuccess); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  ++emulated_device()->copies;
  std::memcpy(to, from, bytes);
  return unless_capturing(cudaSuccess);
}
