//! TorchScript archives of every architecture, read back at several lengths and batch sizes.

use ferrotune::export::{Merged, TORCHSCRIPT_FILE, TorchScript, write_torchscript};
use ferrotune::models::FastLanguageModel;
use serde_json::Value;
use tch::{Device, Kind};

use super::{done, export};
use crate::golden::{Flat, assert_close, checkpoints, logits, rel, root};

#[test]
fn logits_of_every_architecture() {
    let (place, mut distances) = (tempfile::tempdir().unwrap(), Vec::new());
    for name in checkpoints() {
        let (dir, path) = (root().join(&name), place.path().join("model.pt"));
        write_torchscript(&Merged::open(&dir, None, false).unwrap(), &path, Kind::Float, |_, _| ())
            .unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let script = TorchScript::load(&path, Device::Cpu).unwrap();
        let model = FastLanguageModel::from_pretrained(&dir, Kind::Float, Device::Cpu).unwrap();
        for length in [1, 7, 40] {
            let ids: Vec<i64> = (0..length).map(|i| (i * 7 + 3) % 30).collect();
            let ours = logits(&model.decoder, &Flat::new([&ids[..]]));
            let theirs = script.logits(&ids, Device::Cpu).unwrap();
            distances.push((format!("{name}, {length} tokens"), rel(&theirs, &ours)));
        }
    }
    assert_close(1e-5, distances);
}

#[test]
fn the_command_with_an_adapter() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let (model, adapter) = (root().join("gemma2"), root().join("adapters/gemma2_all_linear"));
    let text = done(export(
        &["--format", "torchscript"],
        &[("--model", &model), ("--adapter", &adapter), ("--output-dir", &out)],
    ));
    assert!(text.contains(TORCHSCRIPT_FILE), "{text}");
    let report: Value =
        serde_json::from_slice(&std::fs::read(out.join("export_report.json")).unwrap()).unwrap();
    assert!(report["agreement"]["kl"].as_f64().unwrap() < 1e-9);
}
