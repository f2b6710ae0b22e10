// The launch for more than eight rows (decode_groups.cu) that decode.cu hands on to.
#pragma once

#include "kernels.h"

namespace ferrotune {

// 0 where it cannot.
int64_t decode_groups_workspace(const KernelDecode& decode);
int decode_groups(const KernelDecode& decode, void* stream);

}  // namespace ferrotune
