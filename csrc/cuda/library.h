// The functions of this folder, declared once for the table in library.cpp.
#pragma once

#include "cuda_library.h"

namespace ferrotune {

// ---- graph.cpp
std::unique_ptr<CudaGraph> graph();

}  // namespace ferrotune
