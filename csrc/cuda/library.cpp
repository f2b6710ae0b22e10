// The table that csrc finds with dlsym: one row a function of this folder.
#include "library.h"

int ferrotune_cuda_abi(void) { return FERROTUNE_CUDA_ABI; }

const ferrotune::CudaLibrary* ferrotune_cuda_library(void) {
  static const ferrotune::CudaLibrary library{ferrotune::graph, ferrotune::stash, ferrotune::limit_memory,
                                              ferrotune::limit_stash, ferrotune::cudnn_attention_forward,
                                              ferrotune::cudnn_attention_backward};
  return &library;
}
