//! The reference model's log-probabilities, computed before training.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tch::Tensor;

use super::objective::{completion_log_probs, upload_samples};
use crate::data::{BatchOptions, BatchStream, TokenDataset};
use crate::io::{Weights, write_safetensors};
use crate::models::Decoder;
use crate::ops::Pass;

/// The log-probability of each sample's completion, in the order of the data, by the decoder without its adapter. `on_rows` hears
/// the number of pairs done.
///
/// To be called before the first step: where more than the adapter trains, the weights are the reference only until then.
pub fn reference_log_probs(
    decoder: &Decoder,
    data: &Arc<TokenDataset>,
    batch_size: usize,
    on_rows: &mut dyn FnMut(u64),
) -> Result<Vec<f32>> {
    let _no_grad = tch::no_grad_guard();
    let options =
        BatchOptions { batch_size, max_seq_length: usize::MAX, packing: false, shuffle: false, seed: 0 };
    let mut stream = BatchStream::new(Arc::clone(data), options)?;
    let mut all = Vec::with_capacity(data.len());
    while let Some(batch) = stream.next_batch()? {
        let uploaded = upload_samples(decoder, &batch)?;
        let pass = Pass { without_lora: true, ..Pass::INFERENCE };
        let sums = completion_log_probs(decoder, &uploaded, pass)?.f_to_kind(tch::Kind::Float)?;
        let completions: Vec<f32> = sums.f_narrow(0, 0, batch.samples() as i64)?.try_into()?;
        all.extend(completions);
        on_rows(all.len() as u64 / 2);
    }
    Ok(all)
}

/// The file of a run's reference log-probabilities, in its output folder.
pub const REFERENCE: &str = "reference_log_probs.safetensors";

/// Reference log-probabilities on disk, each dataset's under its checksum: a resumed run does not compute them again.
pub struct ReferenceCache {
    path: PathBuf,
    tensors: Vec<(String, Tensor)>,
}

impl ReferenceCache {
    /// The cache of the run in `output_dir`, which has what the run that it continues wrote into the folder `before`; a new run
    /// has nothing, as another model may have been the reference.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn open(output_dir: &Path, before: Option<&Path>) -> Result<ReferenceCache> {
        let mut tensors = Vec::new();
        if let Some(file) = before.map(|folder| folder.join(REFERENCE)).filter(|file| file.is_file()) {
            let file = Weights::open_files(&[file])?;
            for name in file.names() {
                tensors.push((name.to_owned(), file.get(name)?));
            }
        }
        Ok(ReferenceCache { path: output_dir.join(REFERENCE), tensors })
    }

    /// The numbers of `data`: those of the file, or what `compute` gives, which is then written.
    pub fn get(
        &mut self,
        data: &TokenDataset,
        compute: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let name = format!("{:08x}", data.fingerprint());
        if let Some((_, tensor)) = self.tensors.iter().find(|(known, _)| *known == name) {
            let found: Vec<f32> = tensor.try_into()?;
            if found.len() != data.len() {
                bail!(
                    "{}: {} numbers for {} samples: remove it",
                    self.path.display(),
                    found.len(),
                    data.len()
                );
            }
            return Ok(found);
        }
        let computed = compute()?;
        self.tensors.push((name, Tensor::f_from_slice(&computed)?));
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        write_safetensors(&self.path, &self.tensors)?;
        Ok(computed)
    }
}
