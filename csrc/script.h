// TorchScript archives.
#pragma once

#include "ops.h"

namespace ferrotune {

// Compiles `source` (methods of a module, in TorchScript) with the tensors as its parameters `names`, and saves the module to `path`.
void script_save(rust::Str path, rust::Str source, const rust::Vec<rust::String>& names, const TensorList& tensors);

}  // namespace ferrotune
