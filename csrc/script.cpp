#include "ferrotune/csrc/script.h"

#include <torch/csrc/jit/api/module.h>

namespace ferrotune {

void script_save(rust::Str path, rust::Str source, const rust::Vec<rust::String>& names, const TensorList& tensors) {
  TORCH_CHECK(names.size() == tensors.size(), names.size(), " names for ", tensors.size(), " tensors");
  torch::jit::Module module("CausalLM");
  // What nn.Module.eval() and train() set after torch.jit.load.
  module.register_attribute("training", c10::BoolType::get(), false);
  for (std::size_t i = 0; i < names.size(); ++i) {
    module.register_parameter(std::string(names[i]), tensors[i].detach(), /*is_buffer=*/false);
  }
  module.define(std::string(source));
  module.save(std::string(path));
}

}  // namespace ferrotune
