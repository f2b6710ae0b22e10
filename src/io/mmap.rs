//! A file mapped into memory, and views of it as tensors. With ffi.rs the only unsafe code of the crate.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

#[derive(Debug)]
pub(crate) struct Mmap(memmap2::Mmap);

impl Mmap {
    pub(crate) fn open(path: &Path) -> Result<Mmap> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        // SAFETY: the map is read-only. Another process that truncates a checkpoint while it is read is the one thing
        // that can still fault; every mmapping loader has that limit.
        let map =
            unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("mapping {}", path.display()))?;
        Ok(Mmap(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Says that the pages of `range` were read and are not needed soon: they leave the process's memory, not the system's cache.
    pub(crate) fn release(&self, range: Range<usize>) {
        // Shorter ranges are not worth a call of the system.
        const LEAST: usize = 1 << 20;
        if range.len() >= LEAST {
            // SAFETY: a map of a file that is never written to reads the same bytes from it again. That it cannot be done costs
            // nothing but memory.
            let _ = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
    }

    /// Lends the bytes of `range` to `use_tensor` as a CPU tensor without copying them, and releases them. `range` must hold exactly the
    /// elements of `shape`.
    pub(crate) fn with_tensor<T>(
        &self,
        range: Range<usize>,
        shape: &[i64],
        kind: Kind,
        use_tensor: impl FnOnce(&Tensor) -> Result<T>,
    ) -> Result<T> {
        let bytes = &self.0[range.clone()];
        let elements: i64 = shape.iter().product();
        assert_eq!(bytes.len(), elements as usize * kind.elt_size_in_bytes(), "caller checks the extent");
        if !(bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) || bytes.is_empty() {
            return use_tensor(&Tensor::f_from_data_size(bytes, shape, kind)?);
        }
        // SAFETY: the memory outlives the tensor (it is borrowed for this call and the closure cannot keep a reference
        // to it beyond), is aligned, holds all elements, and is only read: `use_tensor` gets a shared reference and
        // copies from it.
        let tensor = unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &[], kind, Device::Cpu) };
        let tensor = match tensor {
            Ok(tensor) => tensor,
            Err(_) => Tensor::f_from_data_size(bytes, shape, kind)?,
        };
        let result = use_tensor(&tensor);
        self.release(range);
        result
    }
}
