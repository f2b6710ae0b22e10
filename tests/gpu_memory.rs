//! What trades a little time for memory, and f16, on a GPU (tests/less_memory.rs and tests/step.rs say what).

use tch::Kind;

use crate::gpu::gpu;
use crate::less_memory::{check_offloaded_embedding, heads, mlps};
use crate::ops::check;
use crate::step;

#[test]
fn runs_of_columns_and_of_words() {
    let Some(device) = gpu("MLPs and heads in 4 bits") else { return };
    for kind in [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16] {
        for op in mlps().iter().chain(&heads()) {
            check(op, kind, device);
        }
    }
}

#[test]
fn an_embedding_on_the_host() {
    let Some(device) = gpu("an embedding in the host's memory") else { return };
    check_offloaded_embedding(device);
    step::check_offloaded_steps(device);
}

#[test]
fn f16_steps() {
    let Some(device) = gpu("f16 steps") else { return };
    step::check_f16_steps(device);
}
