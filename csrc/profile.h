// Where a device's time goes: its own events between two moments, and a record of each of its kernels by libtorch's
// profiler (Kineto, which reads CUPTI; both are in libtorch_cpu).
#pragma once

#include <c10/core/Event.h>

#include <memory>

#include "rust/cxx.h"

namespace ferrotune {

// Shared with Rust; defined in src/ffi.rs.
struct DeviceActivity;

using Event = c10::Event;
// A mark in the calling thread's stream of the GPU.
std::unique_ptr<Event> record_event(std::int32_t index);
// From one mark to another, once the device has passed both.
double elapsed_ms(const Event& start, const Event& end);
// Waits for the work that was enqueued before the event, not for what came after it.
void wait_for(const Event& event);

// Records every kernel, copy and memset from here to stop_profile, which waits for the device and returns them.
void start_profile(std::int32_t index);
rust::Vec<DeviceActivity> stop_profile(std::int32_t index);

}  // namespace ferrotune
