// The number by which csrc recognises a kernel library of its own version.
#include "kernels.h"

extern "C" int ferrotune_kernels_abi(void) { return FERROTUNE_KERNELS_ABI; }
