// Compiled once an instruction set, with FERROTUNE_CPU_TABLE naming the table; everything it includes has internal linkage.
#include "attention.h"
#include "nf4.h"
#include "optim.h"
#include "rows.h"

namespace ferrotune {

extern const CpuKernels FERROTUNE_CPU_TABLE;
const CpuKernels FERROTUNE_CPU_TABLE{
    FERROTUNE_CPU_NAME, kTileRows, kPanel, gemm, rms_norm_forward, rms_norm_backward, rope, swiglu_forward, swiglu_backward,
    attention_forward, attention_backward, nf4_block, cross_entropy,
    rows_product, widen, paged_attention, adamw, adamw_8bit, sum_of_squares};

}  // namespace ferrotune
