#include <cuda_runtime.h>

#include <string>

#include "xr0/patches.cuh"

namespace xr0 {
namespace {

std::string message(cudaError_t error) {
    // Reading the error clears it, so that the next call does not find it again.
    cudaGetLastError();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// The calling thread's device for as long as this lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        fault = message(cudaGetDevice(&before_));
        if (fault.empty()) {
            fault = message(cudaSetDevice(device));
        }
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    std::string fault;

  private:
    int before_ = 0;
};

}  // namespace

std::string cuda_fault(int device) {
    int count = 0;
    if (const std::string fault = message(cudaGetDeviceCount(&count)); !fault.empty()) {
        return "no GPU with a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + " found (" + fault + ")";
    }
    return device < count ? "" : "there are " + std::to_string(count) + " GPUs";
}

std::string cuda_memory_fault(const void* pointer, int device) {
    cudaPointerAttributes attributes{};
    if (const std::string fault = message(cudaPointerGetAttributes(&attributes, pointer)); !fault.empty()) {
        return fault;
    }
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
        return "it is in host memory";
    }
    return attributes.device == device ? "" : "it is on GPU " + std::to_string(attributes.device);
}

std::string launch_images_to_patches(const DeviceViews& views, int32_t blocks, void* out, Element element, int device,
                                     void* stream) {
    const OnDevice on_device(device);
    if (!on_device.fault.empty()) {
        return on_device.fault;
    }
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (element) {
        case Element::kFloat32:
            images_to_patches_kernel<<<blocks, kPatchThreads, 0, queue>>>(views, static_cast<float*>(out));
            break;
        case Element::kBfloat16:
            images_to_patches_kernel<<<blocks, kPatchThreads, 0, queue>>>(views, static_cast<Bfloat16*>(out));
            break;
        case Element::kFloat16:
            images_to_patches_kernel<<<blocks, kPatchThreads, 0, queue>>>(views, static_cast<Float16*>(out));
            break;
    }
    return message(cudaGetLastError());
}

}  // namespace xr0
