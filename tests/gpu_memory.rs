//! What trades a little time for memory, and f16, on a GPU (tests/less_memory.rs and tests/step.rs say what).

use tch::Kind;

use crate::gpu::{gpu, in_child, is_child};
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

/// In a process of its own: what is deterministic stays so.
#[test]
fn an_embedding_on_the_host() {
    const TEST: &str = "gpu_memory::an_embedding_on_the_host";
    if !is_child(TEST) {
        return in_child(TEST);
    }
    let Some(device) = gpu("an embedding in the host's memory") else { return };
    check_offloaded_embedding(device);
    step::check_offloaded_steps(device);
}

#[test]
fn f16_steps() {
    let Some(device) = gpu("f16 steps") else { return };
    step::check_f16_steps(device);
}
