//! A checkpoint on disk: tensor names to mapped bytes. One `model.safetensors`, or shards with an index.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, SafeTensors};
use safetensors::{Dtype, View};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::mmap::Mmap;
use super::write_atomically_with;
use crate::error::Error;

/// Bytes of a file that are read before their pages leave the process's memory.
const RELEASED: usize = 1 << 25;

/// The tensors of one or several safetensors files, read on demand. What was read leaves the process's memory again.
pub struct Weights {
    files: Vec<Mapped>,
    /// Tensor name -> index into `files`.
    place: HashMap<String, usize>,
}

struct Mapped {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens the checkpoint of a Hugging Face model folder.
    pub fn open(dir: &Path) -> Result<Weights> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            return Weights::open_sharded(dir, &index);
        }
        if single.is_file() {
            return Weights::open_files(&[single]);
        }
        let has_pickle = std::fs::read_dir(dir)
            .with_context(|| format!("reading the model folder {}", dir.display()))?
            .flatten()
            .any(|entry| entry.path().extension().is_some_and(|e| e == "bin" || e == "pth" || e == "pt"));
        if has_pickle {
            bail!(
                "{}: only pickled weights (.bin or .pt) were found; save the model as safetensors \
                 (`save_pretrained(..., safe_serialization=True)`)",
                dir.display()
            );
        }
        bail!("{}: neither model.safetensors nor model.safetensors.index.json was found", dir.display())
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Weights> {
        let text = std::fs::read_to_string(index).with_context(|| format!("reading {}", index.display()))?;
        let parsed: Index = serde_json::from_str(&text)
            .with_context(|| format!("{}: not a weight index", index.display()))?;
        let mut shards: Vec<&String> = parsed.weight_map.values().collect();
        shards.sort();
        shards.dedup();
        for shard in &shards {
            if Path::new(shard).components().count() != 1 {
                bail!("{}: shard name {shard:?} is not a plain file name", index.display());
            }
            if !dir.join(shard).is_file() {
                bail!("{}: shard {shard} is missing from {}", index.display(), dir.display());
            }
        }
        let weights = Weights::open_files(&shards.iter().map(|shard| dir.join(shard)).collect::<Vec<_>>())?;
        for (name, shard) in &parsed.weight_map {
            if !weights.contains(name) {
                bail!("{}: names tensor {name} in {shard}, which does not hold it", index.display());
            }
        }
        Ok(weights)
    }

    /// Opens safetensors files; a name must stand in only one of them.
    pub fn open_files(paths: &[PathBuf]) -> Result<Weights> {
        let mut weights = Weights { files: Vec::new(), place: HashMap::new() };
        for path in paths {
            let mapped = Mapped::open(path)?;
            for name in mapped.metadata.tensors().keys() {
                if let Some(&other) = weights.place.get(name) {
                    let first = weights.files[other].path.display();
                    bail!("tensor {name} stands in both {first} and {}", path.display());
                }
                weights.place.insert(name.clone(), weights.files.len());
            }
            weights.files.push(mapped);
        }
        Ok(weights)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// Sum of the tensors' bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| (file.map.bytes().len() - file.data_start) as u64).sum()
    }

    /// Dtype of the stored tensor.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let (file, info) = self.find(name)?;
        file.kind(name, info.dtype)
    }

    /// Dtype of the stored tensor in safetensors' words, also one that tensors here cannot have.
    pub(super) fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.find(name)?.1.dtype)
    }

    /// Shape of the stored tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.find(name)?.1.shape.iter().map(|&d| d as i64).collect())
    }

    /// An error, naming file and tensor, unless tensor `name` is there with this shape.
    pub fn expect_shape(&self, name: &str, expected: &[i64]) -> Result<()> {
        let found = self.shape(name)?;
        if found != expected {
            let (file, name) = (self.find(name)?.0.path.display().to_string(), name.to_string());
            return Err(Error::ShapeMismatch { file, name, expected: expected.to_vec(), found }.into());
        }
        Ok(())
    }

    /// Copies tensor `name` into `destination`, converting dtype and device. Errors name the file and the tensor: a shape
    /// other than the destination's, an unknown dtype, integers where the destination has floats, a value that is NaN
    /// or infinite.
    pub fn copy_into(&self, name: &str, destination: &Tensor) -> Result<()> {
        let (file, info) = self.find(name)?;
        let shape = destination.size();
        self.expect_shape(name, &shape)?;
        let kind = file.kind(name, info.dtype)?;
        if destination.is_floating_point()
            && !matches!(kind, Kind::Double | Kind::Float | Kind::Half | Kind::BFloat16)
        {
            return Err(file.not_a_weight(name, info.dtype).into());
        }
        let (start, end) = info.data_offsets;
        file.map.with_tensor(file.data_start + start..file.data_start + end, &shape, kind, |stored| {
            let rows = shape.first().copied().unwrap_or(1);
            let bytes = (end - start) / rows.max(1) as usize;
            // On the CPU in pieces that are still in the cache when they are summed.
            let step = match destination.device() {
                Device::Cpu if rows > 0 => (rows * (1 << 17) / destination.numel().max(1) as i64).max(1),
                _ => rows.max(1),
            };
            let copy = |(mut to, from): (Tensor, Tensor)| -> Result<()> {
                to.f_copy_(&from)?;
                if !is_finite(&to)? {
                    let reason = format!("tensor {name} holds NaN or infinite values");
                    return Err(Error::Corrupt { file: file.path.display().to_string(), reason }.into());
                }
                Ok(())
            };
            let mut released = 0;
            let mut pieces = Vec::new();
            for first in (0..rows).step_by(step as usize) {
                let last = (first + step).min(rows);
                let piece = |tensor: &Tensor| match shape.is_empty() {
                    true => Ok(tensor.shallow_clone()),
                    false => tensor.f_narrow(0, first, last - first),
                };
                pieces.push((piece(destination)?, piece(stored)?));
                let read = last as usize * bytes;
                if read - released < RELEASED && last < rows {
                    continue;
                }
                // In a thread of a pool libtorch's ops have one thread each (device::reading_threads).
                match rayon::current_thread_index() {
                    Some(_) => pieces.into_par_iter().try_for_each(copy)?,
                    None => pieces.into_iter().try_for_each(copy)?,
                }
                pieces = Vec::new();
                // A matrix of a gigabyte is not to stand in memory beside its copy.
                let begin = file.data_start + start;
                file.map.release(begin + released..begin + read);
                released = read;
            }
            Ok(())
        })
    }

    /// Lends tensor `name` as stored to `read`, without a copy. It must hold floats.
    pub fn with_stored<T>(&self, name: &str, read: impl FnOnce(&Tensor) -> Result<T>) -> Result<T> {
        let (file, info) = self.find(name)?;
        let kind = file.kind(name, info.dtype)?;
        if !matches!(kind, Kind::Double | Kind::Float | Kind::Half | Kind::BFloat16) {
            return Err(file.not_a_weight(name, info.dtype).into());
        }
        let (start, end) = info.data_offsets;
        file.map.with_tensor(file.data_start + start..file.data_start + end, &self.shape(name)?, kind, read)
    }

    /// Lends the bytes of tensor `name` to `read` as uint8, flat, whatever its dtype, without a copy.
    pub fn with_stored_bytes<T>(&self, name: &str, read: impl FnOnce(&Tensor) -> Result<T>) -> Result<T> {
        let (file, info) = self.find(name)?;
        let (start, end) = info.data_offsets;
        let range = file.data_start + start..file.data_start + end;
        file.map.with_tensor(range, &[(end - start) as i64], Kind::Uint8, read)
    }

    /// Lends the bytes of tensor `name` to `read`, whatever its dtype.
    pub fn with_bytes<T>(&self, name: &str, read: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        let (file, info) = self.find(name)?;
        let (start, end) = info.data_offsets;
        let range = file.data_start + start..file.data_start + end;
        let result = read(&file.map.bytes()[range.clone()]);
        file.map.release(range);
        result
    }

    /// The file that holds tensor `name`.
    pub fn file(&self, name: &str) -> Result<String> {
        Ok(self.find(name)?.0.path.display().to_string())
    }

    /// The file, or the first of several.
    pub fn first_file(&self) -> String {
        self.files.first().map_or(String::new(), |file| file.path.display().to_string())
    }

    /// An error about tensor `name`, naming its file too.
    pub fn corrupt(&self, name: &str, what: &str) -> Error {
        let file = self.file(name).unwrap_or_default();
        Error::Corrupt { file, reason: format!("tensor {name} {what}") }
    }

    /// The files, each with the names of its tensors in the order of their bytes.
    pub fn shards(&self) -> impl Iterator<Item = (&Path, Vec<&str>)> {
        self.files.iter().map(|file| {
            let mut tensors: Vec<_> = file.metadata.tensors().into_iter().collect();
            tensors.sort_by_key(|(_, info)| info.data_offsets);
            let names = tensors.iter().filter_map(|(name, _)| self.place.get_key_value(name.as_str()));
            (file.path.as_path(), names.map(|(name, _)| name.as_str()).collect())
        })
    }

    /// Tensor `name` as stored, on the CPU.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = Tensor::f_empty(self.shape(name)?, (self.kind(name)?, Device::Cpu))?;
        self.copy_into(name, &tensor)?;
        Ok(tensor)
    }

    fn find(&self, name: &str) -> Result<(&Mapped, &safetensors::tensor::TensorInfo)> {
        let missing = || Error::MissingTensor { file: self.first_file(), name: name.to_string() };
        let file = &self.files[*self.place.get(name).ok_or_else(missing)?];
        Ok((file, file.metadata.info(name).ok_or_else(missing)?))
    }
}

/// Whether every element is, without a copy of the tensor.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    if tensor.numel() == 0 || !tensor.is_floating_point() {
        return Ok(true);
    }
    if tensor.device() == Device::Cpu {
        // A sum is finite only if every element is.
        return Ok(tensor.f_sum(Kind::Double)?.double_value(&[]).is_finite());
    }
    // There a sum in f64 converts the whole tensor first. A NaN is both the smallest and the largest; zero times
    // infinity is one.
    let (least, most) = tensor.f_aminmax(None, false)?;
    Ok(least.f_mul_scalar(0.0)?.f_add(&most.f_mul_scalar(0.0)?)?.double_value(&[]) == 0.0)
}

impl Mapped {
    fn open(path: &Path) -> Result<Mapped> {
        let map = Mmap::open(path)?;
        let corrupt = |reason: String| Error::Corrupt { file: path.display().to_string(), reason };
        let (header, metadata) = SafeTensors::read_metadata(map.bytes())
            .map_err(|error| corrupt(format!("not a readable safetensors file: {error}")))?;
        let data_start = header + 8;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0);
        let held = map.bytes().len().saturating_sub(data_start);
        if end != held {
            let reason = format!(
                "its header promises {end} bytes of tensors, the file holds {held}: truncated or torn"
            );
            return Err(corrupt(reason).into());
        }
        Ok(Mapped { path: path.to_path_buf(), map, metadata, data_start })
    }

    fn kind(&self, name: &str, dtype: Dtype) -> Result<Kind> {
        Ok(match dtype {
            Dtype::F64 => Kind::Double,
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::I64 => Kind::Int64,
            Dtype::I32 => Kind::Int,
            Dtype::U8 => Kind::Uint8,
            Dtype::I8 => Kind::Int8,
            Dtype::BOOL => Kind::Bool,
            other => return Err(self.not_a_weight(name, other).into()),
        })
    }

    fn not_a_weight(&self, name: &str, dtype: Dtype) -> Error {
        let reason =
            format!("tensor {name} has dtype {dtype:?}; F64, F32, F16 and BF16 weights are supported");
        Error::Corrupt { file: self.path.display().to_string(), reason }
    }
}

/// A tensor ready to be written: its bytes on the CPU.
pub(super) struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    pub(super) data: Vec<u8>,
}

impl View for &Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.data.as_slice().into()
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Writes tensors as one safetensors file with metadata `{"format": "pt"}`, whole or not at all.
pub fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut bytes = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        bytes.push((name.as_str(), to_bytes(tensor).with_context(|| format!("tensor {name}"))?));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let serialized = safetensors::serialize(bytes.iter().map(|(name, bytes)| (*name, bytes)), Some(metadata))
        .with_context(|| format!("serialising {}", path.display()))?;
    write_atomically_with(path, |file| Ok(std::io::Write::write_all(file, &serialized)?))
}

pub(super) fn to_bytes(tensor: &Tensor) -> Result<Bytes> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let dtype = match tensor.kind() {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Uint8 => Dtype::U8,
        other => bail!("cannot be written as {other:?}"),
    };
    let mut data = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut data, tensor.numel())?;
    Ok(Bytes { dtype, shape: tensor.size().iter().map(|&d| d as usize).collect(), data })
}
