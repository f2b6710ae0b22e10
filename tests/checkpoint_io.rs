//! Checkpoints are whole or absent: failures in the middle, damage, limits, a full disk.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use ferrotune::train::BestMetric;
use ferrotune::train::checkpoint::{
    Checkpoint, Checkpoints, TRAINER_STATE, TrainerState, check_free_space, is_disk_full, latest,
};

fn state(step: u64, best_step: Option<u64>) -> TrainerState {
    let best =
        BestMetric { best_metric: best_step.map(|_| 1.25), best_step, evaluations_without_improvement: 2 };
    let cursor = serde_json::json!({"epoch": 1, "sample": step});
    TrainerState {
        global_step: step,
        max_steps: 100,
        epoch: 0.1,
        cursor,
        seed: u64::MAX,
        best,
        ..TrainerState::default()
    }
}

fn weights(step: u64) -> impl Fn(&Path) -> Result<()> {
    move |folder| Ok(fs::write(folder.join("adapter_model.safetensors"), vec![step as u8; 3000])?)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn latest_step(folder: &Path) -> Option<u64> {
    latest(folder).unwrap().map(|checkpoint| checkpoint.state.global_step)
}

#[test]
fn what_is_saved_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(latest_step(&folder.path().join("absent")), None);
    let checkpoints = Checkpoints::open(folder.path(), None).unwrap();
    assert_eq!(latest_step(folder.path()), None);
    for step in [9, 10] {
        checkpoints.save(&state(step, Some(9)), weights(step)).unwrap();
    }
    let found = latest(folder.path()).unwrap().unwrap();
    assert_eq!(found.folder, folder.path().join("checkpoint-10"));
    let expected = state(10, Some(9));
    assert_eq!(found.state.files.keys().collect::<Vec<_>>(), ["adapter_model.safetensors"]);
    assert_eq!(found.state.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(
        TrainerState { version: String::new(), saved_at: 0.0, files: Default::default(), ..found.state },
        expected
    );
}

#[test]
fn a_failure_in_the_middle_keeps_the_previous_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path(), Some(1)).unwrap();
    checkpoints.save(&state(1, None), weights(1)).unwrap();
    let error = checkpoints
        .save(&state(2, None), |folder| {
            weights(2)(folder)?;
            bail!("no more")
        })
        .unwrap_err();
    assert!(format!("{error:#}").contains("checkpoint-2") && !is_disk_full(&error), "{error:#}");
    assert_eq!(names(folder.path()), ["checkpoint-1"]);

    // A disk that is really full: the kernel refuses every byte.
    let full = Path::new("/dev/full");
    if full.exists() {
        let error = checkpoints
            .save(&state(3, None), |_| {
                Ok(OpenOptions::new().write(true).open(full)?.write_all(b"weights")?)
            })
            .unwrap_err();
        assert!(is_disk_full(&error), "{error:#}");
        assert_eq!(names(folder.path()), ["checkpoint-1"]);
    }
    checkpoints.save(&state(4, None), weights(4)).unwrap();
    assert_eq!(names(folder.path()), ["checkpoint-4"]);
}

#[test]
fn leftovers_of_a_killed_run_are_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let torn = folder.path().join("checkpoint-7.tmp-4242");
    fs::create_dir(&torn).unwrap();
    weights(7)(&torn).unwrap();
    for other in ["checkpoint-x.tmp-1", "runs"] {
        fs::create_dir(folder.path().join(other)).unwrap();
    }
    assert_eq!(latest_step(folder.path()), None);
    let _held = Checkpoints::open(folder.path(), None).unwrap();
    assert_eq!(names(folder.path()), ["checkpoint-x.tmp-1", "runs"]);
    let second = Checkpoints::open(folder.path(), None).unwrap_err();
    assert!(second.to_string().contains("another run"), "{second}");
}

#[test]
fn damaged_checkpoints_are_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path(), None).unwrap();
    let saved: Vec<PathBuf> =
        (1..=5).map(|step| checkpoints.save(&state(step, None), weights(step)).unwrap()).collect();
    let file = |step: usize| saved[step - 1].join("adapter_model.safetensors");
    let mut flipped = fs::read(file(5)).unwrap();
    flipped[1234] ^= 1;
    fs::write(file(5), flipped).unwrap();
    OpenOptions::new().write(true).open(file(4)).unwrap().set_len(10).unwrap();
    fs::remove_file(file(3)).unwrap();
    fs::write(saved[1].join(TRAINER_STATE), "{").unwrap();
    for (damaged, reason) in [(5, "crc32c"), (4, "10 bytes"), (3, "opening"), (2, "not a trainer state")] {
        let error = format!("{:#}", Checkpoint::open(&saved[damaged - 1]).unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
    assert_eq!(latest_step(folder.path()), Some(1));
}

#[test]
fn the_limit_spares_the_best_and_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(folder.path(), Some(2)).unwrap();
    for step in 1..=5 {
        checkpoints.save(&state(step, Some(2.min(step))), weights(step)).unwrap();
    }
    assert_eq!(names(folder.path()), ["checkpoint-2", "checkpoint-5"]);
    drop(checkpoints);
    let one = Checkpoints::open(folder.path(), Some(1)).unwrap();
    one.save(&state(6, Some(2)), weights(6)).unwrap();
    assert_eq!(names(folder.path()), ["checkpoint-2", "checkpoint-6"]);

    // A run resumed from before: its own checkpoints are newer than those of higher steps.
    one.save(&state(4, Some(4)), weights(4)).unwrap();
    assert_eq!(names(folder.path()), ["checkpoint-4"]);
    one.save(&state(4, None), weights(44)).unwrap();
    assert_eq!(fs::read(folder.path().join("checkpoint-4/adapter_model.safetensors")).unwrap(), [44; 3000]);
    one.clear().unwrap();
    assert_eq!(latest_step(folder.path()), None);
}

#[test]
fn free_space_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(check_free_space(folder.path(), 1, 2).unwrap(), None);
    let error = check_free_space(folder.path(), u64::MAX, 1).unwrap_err().to_string();
    assert!(error.contains("--output-dir") && error.contains("GiB"), "{error}");
    let warning = check_free_space(folder.path(), 1 << 20, u64::MAX).unwrap().unwrap();
    assert!(warning.contains("--save-total-limit"), "{warning}");
}
