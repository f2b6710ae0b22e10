//! Reading a GGUF file: metadata in memory, tensors mapped.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::value::Cursor;
use super::{ALIGNMENT, GgmlType, MAGIC, TensorInfo, VERSION, Value, dequantize_row};
use crate::error::Error;
use crate::io::mmap::Mmap;

/// A GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    pub metadata: BTreeMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

impl Gguf {
    /// # Errors
    /// A file that is no GGUF of version 3 (or 2), torn, or with a tensor type that ferrotune cannot read. The message names the file.
    pub fn open(path: &Path) -> Result<Gguf> {
        let map = Mmap::open(path)?;
        let parsed = parse(map.bytes()).map_err(|error| Error::Corrupt {
            file: path.display().to_string(),
            reason: format!("not a readable GGUF file: {error:#}"),
        })?;
        let (data_start, metadata, tensors) = parsed;
        Ok(Gguf { path: path.to_path_buf(), map, data_start, metadata, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Where tensor `name` is, if there is one.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The metadata value of `key`.
    ///
    /// # Errors
    /// There is none: the message names file and key.
    pub fn value(&self, key: &str) -> Result<&Value> {
        self.metadata.get(key).with_context(|| format!("{}: the key {key} is missing", self.path.display()))
    }

    /// Bytes of tensor `name` as they are.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.info(name)?;
        let start = self.data_start + info.offset as usize;
        Ok(&self.map.bytes()[start..start + info.bytes()])
    }

    /// All elements of tensor `name` in f32, on all cores.
    pub fn dequantize(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        self.dequantize_rows(name, 0..info.numel() / info.row_len().max(1))
    }

    /// Those of its `rows`, runs of as many elements as its last dimension has.
    pub fn dequantize_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        let row = info.row_len().max(1);
        let stored = info.kind.bytes(row);
        let start = self.data_start + info.offset as usize + rows.start * stored;
        let range = start..start + rows.len() * stored;
        let mut values = vec![0f32; rows.len() * row];
        values
            .par_chunks_mut(row)
            .zip(self.map.bytes()[range.clone()].par_chunks(stored))
            .for_each(|(values, bytes)| dequantize_row(info.kind, bytes, values));
        self.map.release(range);
        Ok(values)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing =
            || Error::MissingTensor { file: self.path.display().to_string(), name: name.to_string() };
        Ok(self.tensors.get(name).ok_or_else(missing)?)
    }
}

type Parsed = (usize, BTreeMap<String, Value>, HashMap<String, TensorInfo>);

fn parse(bytes: &[u8]) -> Result<Parsed> {
    let mut cursor = Cursor { bytes, at: 0 };
    ensure!(cursor.take(4)? == MAGIC, "it does not start with GGUF");
    let version = cursor.u32()?;
    ensure!((2..=VERSION).contains(&version), "version {version}, expected {VERSION}");
    let (tensor_count, pairs) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let key = cursor.string()?;
        let value = cursor.value().with_context(|| format!("key {key}"))?;
        metadata.insert(key, value);
    }
    let mut tensors = HashMap::new();
    for _ in 0..tensor_count {
        let info = tensor_info(&mut cursor)?;
        if tensors.contains_key(&info.name) {
            bail!("tensor {} stands in it twice", info.name);
        }
        tensors.insert(info.name.clone(), info);
    }
    let alignment = metadata.get("general.alignment").and_then(Value::as_i64).unwrap_or(ALIGNMENT as i64);
    ensure!(alignment > 0 && alignment <= 1 << 20, "general.alignment is {alignment}");
    let data_start = cursor.at.next_multiple_of(alignment as usize);
    for info in tensors.values() {
        let end =
            info.offset.checked_add(info.bytes() as u64).and_then(|end| end.checked_add(data_start as u64));
        let fits = end.is_some_and(|end| end <= bytes.len() as u64);
        ensure!(fits, "tensor {} ends behind the file: truncated or torn", info.name);
    }
    Ok((data_start, metadata, tensors))
}

fn tensor_info(cursor: &mut Cursor) -> Result<TensorInfo> {
    let name = cursor.string()?;
    let dims = cursor.u32()?;
    ensure!((1..=4).contains(&dims), "tensor {name} has {dims} dimensions");
    let mut shape = Vec::new();
    let mut numel: i64 = 1;
    for _ in 0..dims {
        let size = i64::try_from(cursor.u64()?)?;
        ensure!(size > 0, "tensor {name} has a size of {size}");
        numel = numel
            .checked_mul(size)
            .filter(|n| *n < 1 << 48)
            .with_context(|| format!("tensor {name} is too large"))?;
        shape.insert(0, size);
    }
    let (id, offset) = (cursor.u32()?, cursor.u64()?);
    let kind = GgmlType::from_id(id).with_context(|| {
        format!("tensor {name} has ggml type {id}; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are supported")
    })?;
    let info = TensorInfo { name, shape, kind, offset };
    ensure!(
        info.row_len().is_multiple_of(kind.block_len()),
        "tensor {} has rows of {} elements, {} has blocks of {}",
        info.name,
        info.row_len(),
        kind.name(),
        kind.block_len()
    );
    Ok(info)
}
