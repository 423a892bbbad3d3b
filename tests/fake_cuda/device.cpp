// What the CPU build of torch asks a CUDA device for besides kernels: a guard, hooks, and the name of the accelerator.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;
constexpr auto CUDA = DeviceType::CUDA;

struct Guard : impl::NoOpDeviceGuardImpl<CUDA> {
  Device getDevice() const override { return {CUDA, 0}; }
  Device exchangeDevice(Device) const override { return {CUDA, 0}; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, {CUDA, 0}); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, {CUDA, 0}); }
};
static Guard guard;
static impl::DeviceGuardImplRegistrar registrar(CUDA, &guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::Hooks);
namespace accelerator {
std::optional<DeviceType> getAccelerator(bool) { return CUDA; }
}
}
