//! What dynamic 4-bit recovers of NF4's loss: `cargo run --release --example measure_dynamic -- MODEL CALIBRATION HELDOUT`.
//!
//! Held-out loss in f32 products, of conversations on the assistant's turns: as stored, in NF4, dynamic by the calibration
//! data and by the shipped text, with other budgets, random choices of the same bytes, and the choice that knows what each
//! module alone costs on the held-out data itself.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use ferrotune::data::{BatchOptions, BatchStream, DatasetOptions, TokenDataset, prepare};
use ferrotune::device;
use ferrotune::export::{Calibration, DynamicPlan, PlannedModule};
use ferrotune::models::{FastLanguageModel, Input};
use ferrotune::nn::LoadOptions;
use ferrotune::ops::Pass;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind};

const SEEDS: u64 = 10;
const BUDGET: f64 = 0.1;

struct Measure {
    dir: String,
    device: Device,
    held_out: Arc<TokenDataset>,
}

impl Measure {
    /// Mean loss of the held-out targets; with no `kept`, of the model as stored.
    fn loss(&self, kept: Option<&BTreeSet<String>>) -> Result<f64> {
        let options =
            LoadOptions { load_in_4bit: kept.is_some(), ..LoadOptions::new(Kind::Float, self.device) };
        let none = BTreeSet::new();
        let model =
            FastLanguageModel::from_pretrained_keeping(Path::new(&self.dir), options, kept.unwrap_or(&none))?;
        let batches =
            BatchOptions { batch_size: 64, max_seq_length: 512, packing: false, shuffle: false, seed: 0 };
        let mut stream = BatchStream::new(self.held_out.clone(), batches)?;
        let _no_grad = tch::no_grad_guard();
        let mut sum = 0.0;
        while let Some(batch) = stream.next_batch()? {
            let input = Input {
                input_ids: &batch.input_ids,
                position_ids: &batch.position_ids,
                cu_seqlens: &batch.cu_seqlens,
                prefixes: &[],
            };
            sum += model.decoder.loss_sum(input, &batch.labels, Pass::INFERENCE)?.double_value(&[]);
        }
        Ok(sum / self.held_out.num_targets() as f64)
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, calibration, held_out] = &args[..] else { anyhow::bail!("usage: MODEL CALIBRATION HELDOUT") };
    let device =
        device::init("auto".parse()?, std::env::var_os("FERROTUNE_KERNELS").as_deref().map(Path::new))?;
    let tokenizer = ferrotune::data::Tokenizer::from_dir(Path::new(dir))?;
    let options = DatasetOptions { assistant_only_loss: true, allow_missing_eot: true, ..Default::default() };
    let read = |file: &String| -> Result<TokenDataset> {
        Ok(prepare(&[file], &tokenizer, &options).context(file.clone())?.0)
    };
    let (calibration_data, held_out) = (read(calibration)?, Arc::new(read(held_out)?));
    let measure = Measure { dir: dir.clone(), device, held_out };
    let plan = |calibration: Calibration| {
        DynamicPlan::of_checkpoint(
            Path::new(dir),
            (Kind::Float, device),
            BUDGET,
            |_| Ok(calibration),
            |_, _| (),
        )
    };
    let judged = plan(Calibration::of_dataset(calibration.clone(), &calibration_data))?;
    let shipped = plan(Calibration::shipped(&tokenizer)?)?;
    let choose = |budget: f64, score: &mut dyn FnMut(&PlannedModule) -> f64| {
        let rescored = |module: &PlannedModule| PlannedModule { score: score(module), ..module.clone() };
        let modules = judged.modules.iter().map(rescored).collect();
        DynamicPlan::choose(modules, budget, judged.calibration.clone())
    };

    let (base, nf4) = (measure.loss(None)?, measure.loss(Some(&BTreeSet::new()))?);
    println!(
        "{} held-out targets; loss {base:.5}, NF4 {nf4:.5} ({:+.2} %)\n",
        measure.held_out.num_targets(),
        100.0 * (nf4 / base - 1.0)
    );
    println!("| choice | bytes | loss | recovered | kept |\n|---|---|---|---|---|");
    let show = |name: &str, plan: &DynamicPlan| -> Result<f64> {
        let loss = measure.loss(Some(&plan.kept()))?;
        let (bytes, gap) = (plan.bytes as f64 / plan.nf4_bytes as f64 - 1.0, (nf4 - loss) / (nf4 - base));
        let kept: Vec<String> = plan.kept().into_iter().collect();
        println!(
            "| {name} | +{:.1} % | {loss:.5} | {:.1} % | {} |",
            100.0 * bytes,
            100.0 * gap,
            kept.join(", ")
                .replace("model.layers.", "")
                .replace("self_attn.", "")
                .replace("mlp.", "")
                .replace("_proj", "")
        );
        Ok(gap)
    };
    show("dynamic, calibration data", &judged)?;
    show("dynamic, shipped text", &shipped)?;
    let mut random = Vec::new();
    for seed in 0..SEEDS {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let plan = choose(BUDGET, &mut |module| rng.random::<f64>() * module.extra_bytes() as f64);
        random.push(show(&format!("random {seed}"), &plan)?);
    }
    println!("| random, mean | | | {:.1} % | |", 100.0 * random.iter().sum::<f64>() / SEEDS as f64);
    for budget in [0.05, 0.2, 0.4, 0.8] {
        show(&format!("dynamic, budget {budget}"), &choose(budget, &mut |module| module.score))?;
    }
    let mut alone = Vec::new();
    for module in &judged.modules {
        let others = judged.modules.iter().map(|other| &other.module).filter(|name| **name != module.module);
        alone.push(measure.loss(Some(&others.cloned().collect()))? - base);
    }
    let mut costs = alone.into_iter();
    show("by each module's own held-out cost", &choose(BUDGET, &mut |_| costs.next().unwrap_or(0.0)))?;
    Ok(())
}
