// The memsets of a recorded step as kernels.
// cuBLAS and cuDNN clear counters of a few bytes before most of their kernels. In a graph the driver gives a memset to a copy
// engine: 13 us from kernel to kernel on an H200 while tensors travel to the host and back (700 times a step of QLoRA 8B), where
// a kernel between them takes 2.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <vector>

#include "library.h"

namespace ferrotune {

namespace {

// Larger ones are as fast by any engine.
constexpr size_t kMostBytes = 1 << 20;

bool is_small_clear(const cudaMemsetParams& p) {
  const size_t bytes = p.width * p.elementSize;
  return p.value == 0 && p.height == 1 && bytes % 4 == 0 && bytes <= kMostBytes && reinterpret_cast<uintptr_t>(p.dst) % 4 == 0;
}

std::vector<cudaGraphNode_t> nodes_of(cudaGraph_t graph) {
  size_t count = 0;
  C10_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  C10_CUDA_CHECK(cudaGraphGetNodes(graph, nodes.data(), &count));
  return nodes;
}

// The nodes before or after `node`, with the kind of each edge.
struct Neighbours {
  std::vector<cudaGraphNode_t> nodes;
  std::vector<cudaGraphEdgeData> edges;

  template <typename Get>
  Neighbours(cudaGraphNode_t node, const Get& get) {
    size_t count = 0;
    C10_CUDA_CHECK(get(node, nullptr, nullptr, &count));
    nodes.resize(count);
    edges.resize(count);
    if (count > 0) C10_CUDA_CHECK(get(node, nodes.data(), edges.data(), &count));
  }
};

// The node of what `launch` enqueues, added to the graph without edges.
template <typename Launch>
cudaGraphNode_t add_kernel(cudaGraph_t graph, const Launch& launch) {
  const auto stream = c10::cuda::getStreamFromPool();
  cudaGraph_t recorded = nullptr;
  C10_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const int error = launch(stream.stream());
  C10_CUDA_CHECK(cudaStreamEndCapture(stream, &recorded));
  cudaGraphNode_t added = nullptr;
  cudaKernelNodeParams params{};
  const std::vector<cudaGraphNode_t> nodes = nodes_of(recorded);
  TORCH_CHECK(error == 0 && nodes.size() == 1, "the kernel that clears memory cannot be recorded");
  C10_CUDA_CHECK(cudaGraphKernelNodeGetParams(nodes[0], &params));
  C10_CUDA_CHECK(cudaGraphAddKernelNode(&added, graph, nullptr, 0, &params));
  C10_CUDA_CHECK(cudaGraphDestroy(recorded));
  return added;
}

}  // namespace

void memsets_to_kernels(cudaGraph_t graph, ClearMemory clear) {
  for (const cudaGraphNode_t node : nodes_of(graph)) {
    cudaGraphNodeType type;
    C10_CUDA_CHECK(cudaGraphNodeGetType(node, &type));
    if (type != cudaGraphNodeTypeMemset) continue;
    cudaMemsetParams memset{};
    C10_CUDA_CHECK(cudaGraphMemsetNodeGetParams(node, &memset));
    if (!is_small_clear(memset)) continue;
    const Neighbours before(node, cudaGraphNodeGetDependencies), after(node, cudaGraphNodeGetDependentNodes);
    const cudaGraphNode_t kernel = add_kernel(graph, [&](void* stream) {
      return clear(memset.dst, static_cast<int64_t>(memset.width * memset.elementSize), stream);
    });
    const auto connect = [&](const Neighbours& others, bool first) {
      const std::vector<cudaGraphNode_t> all(others.nodes.size(), kernel);
      const auto &from = first ? others.nodes : all, &to = first ? all : others.nodes;
      C10_CUDA_CHECK(cudaGraphAddDependencies(graph, from.data(), to.data(), others.edges.data(), others.nodes.size()));
    };
    connect(before, true);
    connect(after, false);
    C10_CUDA_CHECK(cudaGraphDestroyNode(node));
  }
}

}  // namespace ferrotune
