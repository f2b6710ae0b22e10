// defines: decode_groups, decode_groups_workspace: decode of 9 to 64 rows, a few launches a layer (decode_groups.cu).
#pragma once

#include "kernels.h"

namespace ferrotune {

int decode_groups(const KernelDecode& d, void* stream);
// 0 where decode_groups cannot.
int64_t decode_groups_workspace(const KernelDecode& d);

}  // namespace ferrotune
