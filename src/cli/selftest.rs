//! `ferrotune selftest`: every fused op against its reference on this machine, with its time.

mod adamw_8bit;
mod blocks;
mod case;
mod cases;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tch::{Device, Kind};

use super::format::rate;
use super::model_args::MachineArgs;
use super::progress::BARS;
use crate::device;
use case::{Case, Work};

/// Values and gradients of every fused op, in each dtype of the device, against f64 on the CPU.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    #[arg(long, help = "Print the report as JSON")]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    passed: bool,
    rows: Vec<Row>,
}

/// One op in one dtype.
#[derive(Debug, Serialize)]
struct Row {
    op: &'static str,
    /// That is timed.
    shape: String,
    dtype: &'static str,
    /// What of it is nearest to its budget, or furthest beyond: the value, or a gradient.
    worst: String,
    /// Its distance from f64 and what is allowed, in the 2-norm and in the max-norm.
    error: [f64; 2],
    budget: [f64; 2],
    forward_ms: Option<f64>,
    forward_and_backward_ms: Option<f64>,
    /// Of the forward: moved bytes, or operations.
    gb_per_s: Option<f64>,
    tflop_per_s: Option<f64>,
    /// Why it did not run.
    problem: Option<String>,
    passed: bool,
}

/// # Errors
/// An op is further from its reference than allowed, or did not run: named, after the table.
pub fn run(args: SelftestArgs) -> Result<()> {
    let device = args.machine.init()?;
    // The same operands each time, so that a failure repeats.
    tch::manual_seed(0);
    let report = measure(cases::cases(), device)?;
    super::show(&report, args.json, render)?;
    verdict(&report)
}

fn measure(cases: Vec<Case>, device: Device) -> Result<Report> {
    // f16 is what GPUs without bf16 train in; on the CPU nothing does.
    let mut kinds = vec![(Kind::Float, "f32")];
    if device.is_cuda() {
        kinds.push((Kind::Half, "f16"));
    }
    if device::supports_bf16(device) {
        kinds.push((Kind::BFloat16, "bf16"));
    }
    let work: Vec<_> = cases
        .iter()
        .flat_map(|case| {
            let kinds = if case.every_dtype { &kinds[..] } else { &kinds[..1] };
            kinds.iter().map(move |&(kind, dtype)| (case, kind, dtype))
        })
        .collect();
    let style = ProgressStyle::with_template("{bar:20.cyan/blue} {pos}/{len} {wide_msg}")?;
    let bar = BARS.add(ProgressBar::new(work.len() as u64).with_style(style));
    let mut rows = Vec::new();
    for (case, kind, dtype) in work {
        bar.set_message(format!("{}, {dtype}", case.op));
        rows.push(row(case, kind, dtype, device));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let passed = rows.iter().all(|row| row.passed);
    Ok(Report { device: device::describe(device), passed, rows })
}

fn row(case: &Case, kind: Kind, dtype: &'static str, device: Device) -> Row {
    let mut row = Row {
        op: case.op,
        shape: String::new(),
        dtype,
        worst: String::new(),
        error: [f64::NAN; 2],
        budget: [f64::NAN; 2],
        forward_ms: None,
        forward_and_backward_ms: None,
        gb_per_s: None,
        tflop_per_s: None,
        problem: None,
        passed: false,
    };
    match (case.run)(kind, device) {
        Err(error) => row.problem = Some(format!("{error:#}")),
        Ok(outcome) => {
            if let Some((what, distance)) = outcome.worst() {
                row.worst = what.clone();
                (row.error, row.budget) = (distance.found, distance.allowed);
                row.passed = outcome.distances.iter().all(|(_, distance)| distance.is_allowed());
            }
            (row.forward_ms, row.forward_and_backward_ms) = (Some(outcome.forward_ms), outcome.both_ms);
            match outcome.work {
                Work::Bytes(bytes) => row.gb_per_s = Some(bytes / outcome.forward_ms / 1e6),
                Work::Flops(flops) => row.tflop_per_s = Some(flops / outcome.forward_ms / 1e9),
            }
            row.shape = outcome.shape;
        }
    }
    row
}

fn render(report: &Report) -> String {
    let pair = |[two, max]: [f64; 2]| format!("{two:.1e} {max:.1e}");
    let ms = |ms: Option<f64>| ms.map_or(String::new(), |ms| format!("{ms:.3}"));
    let mut text = format!(
        "ferrotune selftest: {}\nerror and budget in the 2-norm and in the max-norm, of the value or the gradient that is \
         nearest to its budget\n\n{:32} {:32} {:5} {:>15}  {:>15} {:>9} {:>9}  {:14}\n",
        report.device, "op", "shape", "dtype", "error", "budget", "fwd ms", "+ bwd ms", "rate, forward"
    );
    for row in &report.rows {
        let speed = match (row.gb_per_s, row.tflop_per_s) {
            (Some(bytes), _) => format!("{} GB/s", rate(bytes)),
            (_, Some(flops)) => format!("{} TFLOP/s", rate(flops)),
            _ => String::new(),
        };
        let line = format!(
            "{:32} {:32} {:5} {:>15}  {:>15} {:>9} {:>9}  {:14} {}",
            row.op,
            row.shape,
            row.dtype,
            pair(row.error),
            pair(row.budget),
            ms(row.forward_ms),
            ms(row.forward_and_backward_ms),
            speed,
            if row.passed { "PASS" } else { "FAIL" }
        );
        text += &line;
        text.push('\n');
    }
    text
}

fn verdict(report: &Report) -> Result<()> {
    let failure = |row: &Row| match &row.problem {
        Some(problem) => format!("{} in {}: {problem}", row.op, row.dtype),
        None => format!(
            "{} in {}: the {} is off by {:.1e} and {:.1e}, allowed are {:.1e} and {:.1e}",
            row.op, row.dtype, row.worst, row.error[0], row.error[1], row.budget[0], row.budget[1]
        ),
    };
    let failures: Vec<String> = report.rows.iter().filter(|row| !row.passed).map(failure).collect();
    if !failures.is_empty() {
        bail!("{} of {} checks failed\n  {}", failures.len(), report.rows.len(), failures.join("\n  "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::case::{Rows, Subject, proved};
    use super::*;
    use crate::ops::proof::Role;

    /// `factor x` beside `2 x`.
    fn doubled(op: &'static str, factor: f64) -> Case {
        proved(op, Rows { compared: 8, timed: 8 }, move |n, mut operands| {
            operands.random("x", &[n], 1.0, Role::Trained)?;
            Ok(Subject {
                shape: format!("[{n}]"),
                operands,
                ours: Box::new(move |t| Ok(t[0].f_mul_scalar(factor)?)),
                plain: Box::new(|t| Ok(t[0].f_mul_scalar(2.0)?)),
                work: Work::Bytes(1e3),
            })
        })
    }

    #[test]
    fn what_is_wrong_is_named() {
        let report = measure(vec![doubled("right", 2.0)], Device::Cpu).unwrap();
        assert!(report.passed && verdict(&report).is_ok(), "{report:?}");
        let broken =
            Case { op: "broken", every_dtype: false, run: Box::new(|_, _| bail!("it does not start")) };
        let cases = vec![doubled("right", 2.0), doubled("wrong", 2.2), doubled("lost", f64::NAN), broken];
        let report = measure(cases, Device::Cpu).unwrap();
        let verdict = verdict(&report).unwrap_err().to_string();
        for line in [
            "5 of 7 checks failed",
            "wrong in f32: the value is off by 1.0e-1 and 1.0e-1, allowed are 1.0e-6 and 1.0e-6",
            "lost in bf16: the ",
            "broken in f32: it does not start",
        ] {
            assert!(verdict.contains(line), "{verdict}");
        }
        assert_eq!(render(&report).matches("FAIL").count(), 5);
    }
}
