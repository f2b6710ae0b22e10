#include "ferrotune/csrc/profile.h"

#include <ATen/DeviceAccelerator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include "ferrotune/csrc/ops.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

std::unique_ptr<Event> record_event(std::int32_t index) {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  // BACKEND_DEFAULT takes the time; PYTORCH_DEFAULT only orders.
  auto event = std::make_unique<Event>(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
  event->record(guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index))));
  return event;
}

double elapsed_ms(const Event& start, const Event& end) {
  end.synchronize();
  return start.elapsedTime(end);
}

void wait_for(const Event& event) { event.synchronize(); }

void start_profile(std::int32_t index) {
  namespace profiler = torch::autograd::profiler;
  at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(index));
  const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
  const std::set<profiler::ActivityType> activities{profiler::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
}

rust::Vec<DeviceActivity> stop_profile(std::int32_t index) {
  at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(index));
  const auto result = torch::autograd::profiler::disableProfiler();
  rust::Vec<DeviceActivity> found;
  for (const auto& event : result->events()) {
    using libkineto::ActivityType;
    const auto type = static_cast<ActivityType>(event.activityType());
    const bool kernel = type == ActivityType::CONCURRENT_KERNEL;
    if (!kernel && type != ActivityType::GPU_MEMCPY && type != ActivityType::GPU_MEMSET) continue;
    if (event.deviceIndex() != index) continue;
    DeviceActivity activity{};
    activity.name = event.name();
    activity.kernel = kernel;
    activity.start_ns = event.startNs();
    activity.duration_ns = event.durationNs();
    found.push_back(std::move(activity));
  }
  return found;
}

}  // namespace ferrotune
