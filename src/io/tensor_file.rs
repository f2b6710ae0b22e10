//! A safetensors file whose tensors come one after the other, so that only one of them stands in memory.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::Weights;
use super::weights::to_bytes;

/// What will stand in the file: names, dtypes and shapes, but not yet values.
#[derive(Default)]
pub struct TensorFile {
    entries: Vec<(String, Dtype, Vec<usize>)>,
}

/// The file being filled.
pub struct Filling {
    path: PathBuf,
    file: File,
    /// Of each tensor that is still to come: where its bytes begin and end.
    places: HashMap<String, (usize, usize)>,
}

impl TensorFile {
    /// Announces a tensor.
    pub fn add(&mut self, name: &str, kind: Kind, shape: &[i64]) -> Result<()> {
        let dtype = match kind {
            Kind::Float => Dtype::F32,
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Uint8 => Dtype::U8,
            other => bail!("{name}: {other:?} cannot be announced"),
        };
        self.entries.push((name.to_string(), dtype, shape.iter().map(|&size| size as usize).collect()));
        Ok(())
    }

    /// Announces a tensor that is to be copied from `weights` as it is.
    pub fn add_copy(&mut self, name: &str, weights: &Weights) -> Result<()> {
        let shape = weights.shape(name)?.iter().map(|&size| size as usize).collect();
        self.entries.push((name.to_string(), weights.dtype(name)?, shape));
        Ok(())
    }

    /// The announced tensors and their bytes.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.entries.iter().map(|(name, dtype, shape)| (name.as_str(), bytes(*dtype, shape)))
    }

    /// Writes the header. The largest elements come first, as safetensors orders them, so that each is aligned.
    pub fn create(mut self, path: &Path) -> Result<Filling> {
        self.entries.sort_by(|a, b| (b.1.bitsize(), &a.0).cmp(&(a.1.bitsize(), &b.0)));
        let mut header = Map::from_iter([("__metadata__".to_string(), json!({"format": "pt"}))]);
        let (mut places, mut start) = (HashMap::new(), 0);
        for (name, dtype, shape) in self.entries {
            let end = start + bytes(dtype, &shape);
            header
                .insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
            places.insert(name, (start, end));
            start = end;
        }
        let mut header = serde_json::to_vec(&Value::Object(header))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let data_start = 8 + header.len();
        places.values_mut().for_each(|place| *place = (place.0 + data_start, place.1 + data_start));
        let create = || -> Result<File> {
            let file = File::create(path)?;
            file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)?;
            file.write_all_at(&header, 8)?;
            Ok(file)
        };
        let file = create().with_context(|| format!("writing {}", path.display()))?;
        Ok(Filling { path: path.to_path_buf(), file, places })
    }
}

fn bytes(dtype: Dtype, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

impl Filling {
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let bytes = to_bytes(tensor).with_context(|| format!("tensor {name}"))?;
        self.write_bytes(name, &bytes.data)
    }

    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (start, end) = self.places.remove(name).with_context(|| format!("{name} was not announced"))?;
        if bytes.len() != end - start {
            bail!("{name} has {} bytes, {} were announced", bytes.len(), end - start);
        }
        self.file
            .write_all_at(bytes, start as u64)
            .with_context(|| format!("writing {}", self.path.display()))
    }

    /// Syncs the file, which must be full.
    pub fn finish(self) -> Result<()> {
        if let Some(name) = self.places.keys().next() {
            bail!("{}: {name} was announced and not written", self.path.display());
        }
        self.file.sync_all().with_context(|| format!("writing {}", self.path.display()))
    }
}
