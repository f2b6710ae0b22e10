//! What trades a little time for memory, and f16, on a GPU (tests/less_memory.rs and tests/step.rs say what).

use tch::Kind;

use crate::gpu::{gpu, in_child, is_child};
use crate::grpo::check_shared_prompts;
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
fn prompts_that_completions_share() {
    let Some(device) = gpu("prompts that completions share") else { return };
    check_shared_prompts(device);
}

/// 8 x 20,000 tokens of 4096, 128,256 words: beyond hidden states and head the loss part holds less than 1 GiB.
#[test]
fn the_loss_of_long_completions() {
    if gpu("the loss of long completions").is_none() {
        return;
    }
    // In a bundle the executable lies beside the tests.
    let beside = std::env::current_exe().unwrap().with_file_name("ferrotune");
    let built = std::path::Path::new(env!("CARGO_BIN_EXE_ferrotune"));
    let mut command = std::process::Command::new(if beside.exists() { &beside } else { built });
    let output = command.args(["bench", "loss", "--device", "cuda", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{report}");
    assert!(
        report["hidden"] == 160_000 * 4096 * 2 && report["beyond"].as_u64().unwrap() < 1 << 30,
        "{report}"
    );
}

#[test]
fn f16_steps() {
    let Some(device) = gpu("f16 steps") else { return };
    step::check_f16_steps(device);
}
