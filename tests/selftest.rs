//! `ferrotune selftest` on the CPU.

use std::process::Command;

#[test]
fn every_op_passes() {
    let output = Command::new(env!("CARGO_BIN_EXE_ferrotune"))
        .args(["selftest", "--device", "cpu", "--threads", "1", "--json"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], true, "{report:#}");
    for op in ["rms_norm", "rope", "swiglu, silu", "nf4_quantize", "nf4_dequantize", "linear, NF4 + LoRA"]
        .into_iter()
        .chain([
            "attention, packed",
            "cross_entropy",
            "log_probs",
            "attention_block, keep",
            "mlp_block, NF4, recompute",
        ])
    {
        let rows = report["rows"].as_array().unwrap();
        for dtype in ["f32", "bf16"] {
            let row = rows.iter().find(|row| row["op"] == op && row["dtype"] == dtype);
            let row = row.unwrap_or_else(|| panic!("{op} in {dtype} is missing"));
            let (error, budget) = (row["error"][0].as_f64().unwrap(), row["budget"][0].as_f64().unwrap());
            assert!(error <= budget && row["forward_ms"].as_f64().unwrap() > 0.0, "{row:#}");
        }
    }
}

#[test]
fn a_wrong_device_is_refused() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_ferrotune")).args(["selftest", "--device", "gpu"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("--device") && stderr.contains("expected auto, cpu, cuda or cuda:N"), "{stderr}");
}
