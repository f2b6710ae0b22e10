//! Writing a GGUF file whose tensors come piece by piece.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::value::write_string;
use super::{ALIGNMENT, GgmlType, MAGIC, TensorInfo, VERSION, Value};

/// A file being filled.
pub struct GgufWriter {
    path: PathBuf,
    file: File,
    data_start: u64,
    size: u64,
    /// Of each tensor: its place, and the bytes that have been written.
    tensors: HashMap<String, (TensorInfo, usize)>,
}

impl GgufWriter {
    /// Bytes of a file's data with these tensors.
    pub fn data_bytes(tensors: &[(String, Vec<i64>, GgmlType)]) -> u64 {
        let size = |(_, shape, kind): &(String, Vec<i64>, GgmlType)| {
            (kind.bytes(shape.iter().product::<i64>() as usize) as u64).next_multiple_of(ALIGNMENT)
        };
        tensors.iter().map(size).sum()
    }

    /// Writes the header of a file with `tensors` (name, shape, type) in this order.
    pub fn create(
        path: &Path,
        metadata: &[(String, Value)],
        tensors: &[(String, Vec<i64>, GgmlType)],
    ) -> Result<GgufWriter> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            write_string(key, &mut header);
            value.write(&mut header);
        }
        let mut places = HashMap::new();
        let mut offset = 0u64;
        for (name, shape, kind) in tensors {
            let info = TensorInfo { name: name.clone(), shape: shape.clone(), kind: *kind, offset };
            ensure!(
                info.row_len().is_multiple_of(kind.block_len()),
                "{name}: rows of {} elements in blocks of {}",
                info.row_len(),
                kind.block_len()
            );
            write_string(name, &mut header);
            header.extend((shape.len() as u32).to_le_bytes());
            for size in shape.iter().rev() {
                header.extend((*size as u64).to_le_bytes());
            }
            header.extend(kind.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += (info.bytes() as u64).next_multiple_of(ALIGNMENT);
            places.insert(name.clone(), (info, 0));
        }
        let data_start = (header.len() as u64).next_multiple_of(ALIGNMENT);
        let size = data_start + offset;
        let create = || -> Result<File> {
            let file = File::create(path)?;
            // The padding behind tensors is zeros.
            file.set_len(size)?;
            file.write_all_at(&header, 0)?;
            Ok(file)
        };
        let file = create().with_context(|| format!("writing {}", path.display()))?;
        Ok(GgufWriter { path: path.to_path_buf(), file, data_start, size, tensors: places })
    }

    /// Bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes of tensor `name`.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (info, written) =
            self.tensors.get_mut(name).with_context(|| format!("{name} was not announced"))?;
        ensure!(
            *written + bytes.len() <= info.bytes(),
            "{name} gets {} bytes, {} were announced",
            *written + bytes.len(),
            info.bytes()
        );
        let place = self.data_start + info.offset + *written as u64;
        *written += bytes.len();
        self.file.write_all_at(bytes, place).with_context(|| format!("writing {}", self.path.display()))
    }

    /// Syncs the file, which must be full.
    pub fn finish(self) -> Result<()> {
        for (info, written) in self.tensors.values() {
            ensure!(
                *written == info.bytes(),
                "{}: tensor {} is not complete",
                self.path.display(),
                info.name
            );
        }
        self.file.sync_all().with_context(|| format!("writing {}", self.path.display()))
    }
}
