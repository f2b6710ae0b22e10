//! The predicted memory of a run beside peaks that were measured on an H200 (docs/gpu.md), and the command that shows it.

use std::process::{Command, Output};

use ferrotune::train::GradientCheckpointing::{self, Off, On, Unsloth};

fn plan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferrotune")).arg("plan").args(arguments).output().unwrap()
}

fn json(arguments: &[&str]) -> serde_json::Value {
    let output = plan(&[arguments, &["--json"]].concat());
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// (shape, samples, tokens, 4 bits, policy, GiB allocated, GiB of the process)
type Measured = (&'static str, u32, u32, bool, GradientCheckpointing, f64, f64);

const MEASURED: [Measured; 10] = [
    ("llama-3.1-8b", 2, 2048, true, Off, 24.84, 26.61),
    ("llama-3.1-8b", 2, 2048, true, On, 8.57, 10.2),
    ("llama-3.1-8b", 2, 2048, true, Unsloth, 6.81, 8.06),
    ("llama-3.1-8b", 2, 2048, false, Off, 34.6, 35.6),
    ("llama-3.1-8b", 2, 2048, false, Unsloth, 16.40, 17.60),
    ("llama-3.1-8b", 1, 16384, true, Off, 80.9, 85.3),
    ("llama-3.1-8b", 1, 16384, true, Unsloth, 7.99, 9.80),
    ("llama-3.2-1b", 8, 1024, false, Off, 13.1, 13.9),
    ("llama-3.2-1b", 8, 1024, false, Unsloth, 3.27, 4.8),
    ("phi-4", 2, 2048, true, Unsloth, 10.48, 11.83),
];

#[test]
fn predicted_peaks_are_within_5_percent_of_measured_ones() {
    let mut apart = Vec::new();
    for (shape, rows, length, four_bit, policy, allocated, process) in MEASURED {
        let [rows, length] = [rows, length].map(|n| n.to_string());
        let policy = format!("{policy:?}").to_lowercase();
        let mut arguments = vec!["--shape", shape, "--per-device-train-batch-size", &rows];
        arguments.extend(["--max-seq-length", &length, "--use-gradient-checkpointing", &policy]);
        // They were measured with this optimizer.
        arguments.extend(["--optim", "adamw_torch"]);
        if four_bit {
            arguments.push("--load-in-4bit");
        }
        let plan = json(&arguments);
        for (key, measured) in [("peak_allocated", allocated), ("peak_device", process)] {
            let predicted = plan[key].as_f64().unwrap() / f64::from(1 << 30);
            let line =
                format!("{shape} {rows} x {length} {policy} {four_bit} {key}: {predicted:.2}, {measured}");
            println!("{line}");
            if (predicted / measured - 1.0).abs() > 0.05 {
                apart.push(line);
            }
        }
    }
    assert!(apart.is_empty(), "{apart:#?}");
}

#[test]
fn what_does_not_fit_is_refused_with_the_smallest_change() {
    let run = ["--shape", "llama-3.1-8b", "--load-in-4bit", "--max-memory"];
    let output = plan(&[&run[..], &["12GiB"]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success());
    assert!(
        text.contains("the smallest change that does: --use-gradient-checkpointing on --load-in-4bit"),
        "{text}"
    );
    let small = plan(&[&run[..], &["2GiB"]].concat());
    assert!(String::from_utf8(small.stdout).unwrap().contains("no flag changes that"));
    assert!(plan(&[&run[..], &["80GiB"]].concat()).status.success());
    for (size, message) in
        [("12", "expected a size such as"), ("-1GiB", "expected"), ("0GB", "positive number")]
    {
        let output = plan(&[&run[..3], &[&format!("--max-memory={size}")]].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains(message), "{size}");
    }
}

#[test]
fn the_longest_samples_fit_and_longer_ones_do_not() {
    let at = |length: &str, more: &[&str]| {
        let mut arguments =
            vec!["--shape", "llama-3.1-8b", "--load-in-4bit", "--use-gradient-checkpointing", "unsloth"];
        arguments.extend(["--per-device-train-batch-size", "1", "--max-seq-length", length]);
        arguments.extend(more);
        json(&arguments)
    };
    let plan = at("2048", &["--max-memory", "16GiB"]);
    let longest = plan["others"][5]["longest"].as_u64().unwrap();
    let peak = |length: u64| at(&length.to_string(), &[])["peak_device"].as_u64().unwrap();
    assert!(peak(longest) <= 16 << 30, "{longest}");
    assert!(peak(longest + 256) > 16 << 30, "{longest}");
}
