//! Learning rates against transformers 5.23's `get_scheduler`, early stopping against its callback.

use ferrotune::train::schedule::SchedulerType::{self, *};
use ferrotune::train::{BestMetric, Schedule};

/// (kind, total steps, warmup steps, decay steps, factors of the steps 0, 3, 6, .. 21), from
/// `get_scheduler(name, SGD(lr=1), num_warmup_steps, num_training_steps, {"num_decay_steps": ..})`.
const TRANSFORMERS: [(SchedulerType, u64, u64, u64, [f64; 8]); 8] = [
    (Linear, 20, 4, 0, [0.0, 0.75, 0.875, 0.6875, 0.5, 0.3125, 0.125, 0.0]),
    (Linear, 7, 0, 0, [1.0, 0.5714285714285714, 0.14285714285714285, 0.0, 0.0, 0.0, 0.0, 0.0]),
    (
        Cosine,
        20,
        4,
        0,
        [
            0.0,
            0.75,
            0.9619397662556434,
            0.7777851165098011,
            0.5,
            0.22221488349019902,
            0.03806023374435663,
            0.009607359798384785,
        ],
    ),
    (
        Cosine,
        18,
        0,
        0,
        [
            1.0,
            0.9330127018922194,
            0.75,
            0.5,
            0.2500000000000001,
            0.06698729810778065,
            0.0,
            0.0669872981077807,
        ],
    ),
    (Constant, 20, 4, 0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    (ConstantWithWarmup, 20, 5, 0, [0.0, 0.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    (Wsd, 20, 4, 6, [0.0, 0.75, 1.0, 1.0, 1.0, 0.9330127018922194, 0.2500000000000001, 0.0]),
    (
        Wsd,
        21,
        0,
        21,
        [
            1.0,
            0.9504844339512095,
            0.8117449009293668,
            0.6112604669781572,
            0.38873953302184283,
            0.18825509907063326,
            0.04951556604879048,
            0.0,
        ],
    ),
];

#[test]
fn learning_rates_equal_transformers() {
    for (kind, total_steps, warmup_steps, decay_steps, factors) in TRANSFORMERS {
        let schedule = Schedule { kind, learning_rate: 1.0, total_steps, warmup_steps, decay_steps };
        for (step, expected) in (0..).step_by(3).zip(factors) {
            let found = schedule.at(step);
            assert!((found - expected).abs() < 1e-15, "{schedule:?} at {step}: {found}, expected {expected}");
        }
    }
}

#[test]
fn shares_of_the_steps_are_rounded_up() {
    let schedule = |total, warmup, ratio, decay| Schedule::new(Wsd, 2e-4, total, (warmup, ratio), decay);
    assert_eq!(schedule(61, None, 0.1, 0.2).warmup_steps, 7);
    assert_eq!(schedule(61, None, 0.1, 0.2).decay_steps, 13);
    assert_eq!(schedule(61, Some(5), 0.1, 0.2).warmup_steps, 5);
    assert_eq!(schedule(10, Some(8), 0.0, 0.9).decay_steps, 2);
    assert_eq!(schedule(10, Some(0), 0.1, 0.1).at(0), 2e-4);
    assert_eq!(schedule(10, Some(0), 0.1, 0.1).at(10), 0.0);
}

#[test]
fn early_stopping_counts_as_transformers_does() {
    let mut best = BestMetric::default();
    let is_best: Vec<bool> = [2.0, 1.5, 1.45, f64::NAN, 1.2]
        .iter()
        .zip(1..)
        .map(|(loss, step)| best.update(step, *loss, 0.1))
        .collect();
    assert_eq!(is_best, [true, true, true, false, true]);
    assert_eq!((best.best_step, best.evaluations_without_improvement), (Some(5), 0));
    for step in 6..8 {
        assert!(!best.should_stop(Some(2)));
        best.update(step, 1.19, 0.1);
    }
    assert!(best.should_stop(Some(2)) && !best.should_stop(Some(3)) && !best.should_stop(None));
    let mut broken = BestMetric::default();
    assert!(!broken.update(1, f64::NAN, 0.0) && broken.update(2, 3.0, 0.0));
}
