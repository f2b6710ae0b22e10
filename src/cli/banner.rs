//! What stands above and below a run: a title and a table of facts.

use std::fmt::Write;
use std::path::Path;

use super::format::{bytes, count, percent, rate, seconds};
use crate::train::metrics::{LOSS_CURVE, METRICS};
use crate::train::observer::{StopReason, TrainResults};

/// A title over aligned rows of (label, text).
pub fn table(title: &str, rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let mut text = format!("{title}\n");
    for (label, value) in rows {
        let _ = writeln!(text, "  {label:width$}  {value}");
    }
    text
}

/// `12,345 of 260,032 parameters (4.75 %)`.
pub fn trainable(trained: u64, all: u64) -> String {
    let share = percent(trained as f64 / all.max(1) as f64);
    format!("{} of {} parameters ({share})", count(trained), count(all))
}

/// The summary on screen of a run that wrote into `output_dir`.
pub fn summary(results: &TrainResults, output_dir: &Path) -> String {
    let title = match results.stop_reason {
        StopReason::Done => "Done",
        StopReason::EarlyStopping => "Stopped early: the evaluation loss no longer falls",
        StopReason::Interrupted => "Interrupted; --resume-from-checkpoint continues the run",
        StopReason::NonFiniteGradient => "Stopped: a gradient was not finite",
    };
    let mut rows = vec![
        (
            "steps",
            format!(
                "{} in {}, {:.2} epochs",
                count(results.global_step),
                seconds(results.train_runtime),
                results.epoch
            ),
        ),
        (
            "speed",
            format!(
                "{} samples/s, {} tokens/s, {} steps/s",
                rate(results.train_samples_per_second),
                rate(results.train_tokens_per_second),
                rate(results.train_steps_per_second)
            ),
        ),
    ];
    // Not a number where a resumed run had no step left to do.
    if results.train_loss.is_finite() {
        let (last, mean) = (results.final_loss, results.train_loss);
        rows.push(("loss", format!("{last:.4} at the end, {mean:.4} on average")));
    }
    if let (Some(loss), Some(step)) = (results.best_metric, results.best_step) {
        rows.push(("best", format!("evaluation loss {loss:.4} after step {step}")));
    }
    rows.push((
        "memory",
        format!(
            "{} at most: {} model, {} training; {} of the device's {}",
            bytes(results.peak_memory),
            bytes(results.model_memory),
            bytes(results.training_memory()),
            percent(results.device_memory_share),
            bytes(results.device_memory)
        ),
    ));
    if let (Some(allocated), Some(process)) =
        (results.predicted_peak_memory, results.predicted_process_memory)
    {
        let measured = results.peak_process_memory.map_or("unknown".to_owned(), bytes);
        rows.push((
            "plan",
            format!(
                "{} predicted, {measured} measured of the GPU; {} and {} held by tensors",
                bytes(process),
                bytes(allocated),
                bytes(results.peak_memory)
            ),
        ));
    }
    rows.push(("saved", format!("{} (with {METRICS} and {LOSS_CURVE})", output_dir.display())));
    table(title, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_aligned_and_short() {
        let results = TrainResults {
            global_step: 1234,
            train_runtime: 131.0,
            epoch: 3.0,
            train_samples_per_second: 12.345,
            train_tokens_per_second: 4321.0,
            train_steps_per_second: 1.5,
            final_loss: 1.25,
            train_loss: 2.5,
            best_metric: Some(1.125),
            best_step: Some(1000),
            model_memory: 3 << 29,
            peak_memory: 2 << 30,
            predicted_peak_memory: Some(9 << 28),
            peak_process_memory: Some(11 << 28),
            predicted_process_memory: Some(3 << 30),
            device_memory: 8 << 30,
            device_memory_share: 0.25,
            ..TrainResults::default()
        };
        let expected = "Done\n  \
            steps   1,234 in 2m11s, 3.00 epochs\n  \
            speed   12.3 samples/s, 4,321 tokens/s, 1.50 steps/s\n  \
            loss    1.2500 at the end, 2.5000 on average\n  \
            best    evaluation loss 1.1250 after step 1000\n  \
            memory  2.00 GiB at most: 1.50 GiB model, 512.0 MiB training; 25.00 % of the device's 8.00 GiB\n  \
            plan    3.00 GiB predicted, 2.75 GiB measured of the GPU; 2.25 GiB and 2.00 GiB held by tensors\n  \
            saved   out (with metrics.jsonl and loss.svg)\n";
        assert_eq!(summary(&results, Path::new("out")), expected);
        assert_eq!(trainable(12_345, 260_032), "12,345 of 260,032 parameters (4.75 %)");
        assert_eq!(trainable(31, 1_000_000_000), "31 of 1,000,000,000 parameters (0.0000031 %)");
        assert_eq!((seconds(3.21), seconds(11_100.0)), ("3.2s".to_owned(), "3h05m".to_owned()));
    }
}
