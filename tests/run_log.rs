//! What a run leaves to read: metrics.jsonl, TensorBoard events, the loss curve, train_results.json.

use std::fs;
use std::path::Path;

use ferrotune::train::metrics::{
    LOSS_CURVE, LossHistory, METRICS, MetricsFile, RunLog, TENSORBOARD, TRAIN_RESULTS,
};
use ferrotune::train::observer::{EvalMetrics, RunStart, StepMetrics, TrainObserver, TrainResults};
use ferrotune::train::plot::loss_curve;

fn step(step: u64) -> StepMetrics {
    StepMetrics { step, loss: 1.0 / step as f64, learning_rate: 1e-4, ..StepMetrics::default() }
}

fn run(folder: &Path, start_step: u64, steps: std::ops::RangeInclusive<u64>) {
    let mut log = RunLog::new(folder, "a <model> & data", 1);
    log.on_start(&RunStart { total_steps: 6, start_step, num_train_epochs: 1.0 }).unwrap();
    for number in steps {
        log.on_step(&step(number)).unwrap();
    }
    log.on_eval(&EvalMetrics { step: 4, eval_loss: Some(0.5), ..EvalMetrics::default() }).unwrap();
    log.on_end(&TrainResults::default()).unwrap();
}

#[test]
fn a_resumed_run_rewrites_the_steps_it_does_again() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join(METRICS);
    run(folder.path(), 0, 1..=5);
    // What a process that was killed inside a write leaves.
    let mut text = fs::read_to_string(&metrics).unwrap();
    text.push_str(r#"{"step": 3, "lo"#);
    fs::write(&metrics, text).unwrap();

    run(folder.path(), 3, 4..=6);
    let text = fs::read_to_string(&metrics).unwrap();
    let steps: Vec<u64> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6, 4]);
    let (_, history) = MetricsFile::open(&metrics, 6).unwrap();
    assert_eq!(history.train.len(), 6);
    assert_eq!(history.train[1], (2, 0.5));
    assert_eq!(history.eval, [(4, 0.5)]);
    let results: TrainResults =
        serde_json::from_slice(&fs::read(folder.path().join(TRAIN_RESULTS)).unwrap()).unwrap();
    assert_eq!(results, TrainResults::default());
    let picture = fs::read_to_string(folder.path().join(LOSS_CURVE)).unwrap();
    assert!(picture.contains("&lt;model&gt; &amp; data") && picture.trim_end().ends_with("</svg>"));
}

#[test]
fn event_files_are_what_tensorboard_reads() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), 3, 4..=4);
    let file = fs::read_dir(folder.path().join(TENSORBOARD)).unwrap().next().unwrap().unwrap().path();
    assert!(file.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
    let bytes = fs::read(file).unwrap();

    let masked = |data: &[u8]| crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8);
    let mut events = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(u32::from_le_bytes(rest[8..12].try_into().unwrap()), masked(&rest[..8]));
        let event = &rest[12..12 + length];
        assert_eq!(u32::from_le_bytes(rest[12 + length..16 + length].try_into().unwrap()), masked(event));
        events.push(event);
        rest = &rest[16 + length..];
    }
    assert_eq!(events.len(), 4);
    assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    // Every event starts with its time: tag 9 and eight bytes.
    assert_eq!(&events[0][9..], b"\x10\x00\x1a\x0dbrain.Event:2");
    assert_eq!(&events[1][9..], b"\x10\x04\x3a\x02\x08\x01");
    assert_eq!(&events[3][9..15], b"\x10\x04\x2a\x31\x0a\x10");
    assert_eq!(&events[3][15..31], b"\x0a\x09eval/loss\x15\x00\x00\x00\x3f");
}

#[test]
fn loss_curves_of_odd_histories_are_drawn() {
    let nothing = LossHistory::default();
    let one = LossHistory { train: vec![(1, 2.0)], ..Default::default() };
    let broken =
        LossHistory { train: vec![(1, f64::NAN), (2, 1.0), (3, f64::INFINITY)], eval: vec![(3, f64::NAN)] };
    let long = LossHistory {
        train: (1..=50_000).map(|step| (step, 1.0 / step as f64)).collect(),
        ..Default::default()
    };
    for history in [nothing, one, broken, long] {
        let picture = loss_curve("t", &history).unwrap();
        assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
        assert!(picture.len() < 100_000, "{} bytes", picture.len());
    }
}
