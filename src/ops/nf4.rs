//! Matrices in bitsandbytes' NF4 format (QLoRA, arXiv:2305.14314): 16 values, one scale a block of elements, the scales
//! themselves in 8 bits. csrc/nf4.h has the formulas.

use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::{checked, op_error};
use crate::ffi::{self, bridge};

/// Elements that share a scale, and scales that share one of the second level, in what is quantised here.
const BLOCK: i64 = 64;
const NESTED_BLOCK: i64 = 256;

/// A quantised matrix, by the names of bitsandbytes' quant_state.
#[derive(Debug)]
pub struct Nf4 {
    /// `[rows, in]`.
    pub shape: [i64; 2],
    /// uint8 `[ceil(rows in / 2)]`, the even element in the high nibble.
    pub packed: Tensor,
    /// f32 `[16]`.
    pub quant_map: Tensor,
    /// `[blocks]`: uint8 where nested, else f32.
    pub absmax: Tensor,
    pub blocksize: i64,
    pub nested: Option<Nested>,
}

/// Double quantisation: `absmax = quant_map[index] * absmax of the run + offset`.
#[derive(Debug)]
pub struct Nested {
    /// f32 `[ceil(blocks / blocksize)]`.
    pub absmax: Tensor,
    /// f32 `[256]`.
    pub quant_map: Tensor,
    pub offset: f64,
    pub blocksize: i64,
}

impl Nf4 {
    /// Quantises a matrix `[rows, in]` in f32, f16 or bf16 where it is, with double quantisation. The bytes are those of
    /// bitsandbytes on the CPU, whatever the device.
    pub fn quantize(weight: &Tensor) -> Result<Nf4> {
        let size = weight.size();
        ensure!(size.len() == 2, "nf4: the weight is {size:?}, expected [rows, in]");
        let mut quantizer = Nf4Quantizer::new([size[0], size[1]], weight.device())?;
        quantizer.push(&weight.f_contiguous()?.f_view([-1])?)?;
        quantizer.finish()
    }

    /// The matrix in a float dtype: `quant_map[index] * absmax` in f32, then rounded.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        let destination = Tensor::f_empty(self.shape, (kind, self.packed.device()))?;
        self.dequantize_into(&destination)?;
        Ok(destination)
    }

    /// As [`Nf4::dequantize`], into a `[rows, in]` tensor that may be columns of a wider one.
    pub fn dequantize_into(&self, destination: &Tensor) -> Result<()> {
        let absent = Tensor::new();
        bridge::nf4_dequantize(&view(Some(self), &absent), ffi::borrow(destination)).map_err(op_error)
    }
}

/// Quantises a matrix that arrives piece by piece, so that all of it never stands in memory.
pub struct Nf4Quantizer {
    shape: [i64; 2],
    packed: Tensor,
    absmax: Tensor,
    /// Elements that have arrived.
    filled: i64,
}

impl Nf4Quantizer {
    pub fn new(shape: [i64; 2], device: Device) -> Result<Nf4Quantizer> {
        let n = shape[0] * shape[1];
        ensure!(shape[0] > 0 && shape[1] > 0, "nf4: the weight is {shape:?}, expected positive sizes");
        Ok(Nf4Quantizer {
            shape,
            packed: Tensor::f_empty([ceil_div(n, 2)], (Kind::Uint8, device))?,
            absmax: Tensor::f_empty([ceil_div(n, BLOCK)], (Kind::Float, device))?,
            filled: 0,
        })
    }

    /// The next elements, flat, in f32, f16 or bf16 on the quantizer's device: a multiple of 64 but for the last piece.
    pub fn push(&mut self, piece: &Tensor) -> Result<()> {
        let (count, total) = (piece.numel() as i64, self.shape[0] * self.shape[1]);
        let fits = self.filled % BLOCK == 0 && self.filled + count <= total;
        ensure!(fits, "nf4: {count} elements after {} of {total}", self.filled);
        let packed = self.packed.f_narrow(0, self.filled / 2, ceil_div(count, 2))?;
        let absmax = self.absmax.f_narrow(0, self.filled / BLOCK, ceil_div(count, BLOCK))?;
        bridge::nf4_quantize(ffi::borrow(piece), ffi::borrow(&packed), ffi::borrow(&absmax))
            .map_err(op_error)?;
        self.filled += count;
        Ok(())
    }

    /// Quantises the scales.
    ///
    /// # Errors
    /// Elements are missing, or one was NaN or infinite.
    pub fn finish(self) -> Result<Nf4> {
        let [rows, in_features] = self.shape;
        ensure!(self.filled == rows * in_features, "nf4: {} of {} elements", self.filled, rows * in_features);
        let device = self.packed.device();
        let absmax = self.absmax.f_to_device(Device::Cpu)?;
        ensure!(absmax.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1, "NaN or infinite values");
        let blocks = absmax.size()[0];
        let index = Tensor::f_empty([blocks], (Kind::Uint8, Device::Cpu))?;
        let nested_absmax = Tensor::f_empty([ceil_div(blocks, NESTED_BLOCK)], (Kind::Float, Device::Cpu))?;
        let offset = bridge::nf4_nest(ffi::borrow(&absmax), ffi::borrow(&index), ffi::borrow(&nested_absmax))
            .map_err(op_error)?;
        let nested = Nested {
            absmax: nested_absmax.f_to_device(device)?,
            quant_map: shared_map(checked(bridge::nf4_nested_quant_map())?, device)?,
            offset,
            blocksize: NESTED_BLOCK,
        };
        Ok(Nf4 {
            shape: self.shape,
            packed: self.packed,
            quant_map: shared_map(checked(bridge::nf4_quant_map())?, device)?,
            absmax: index.f_to_device(device)?,
            blocksize: BLOCK,
            nested: Some(nested),
        })
    }
}

/// The f32 `map`, which is on the CPU, on `device`: one tensor for all matrices whose maps are equal, as those of nearly all checkpoints
/// are, so that a launch for several of them can tell that it needs one.
pub fn shared_map(map: Tensor, device: Device) -> Result<Tensor> {
    /// More kinds than these are each matrix's own.
    const MOST: usize = 8;
    static MAPS: Mutex<Vec<(Device, Tensor, Tensor)>> = Mutex::new(Vec::new());
    let mut maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., shared)) = maps.iter().find(|(of, known, _)| *of == device && known.equal(&map)) {
        return Ok(shared.shallow_clone());
    }
    let shared = map.f_to_device(device)?;
    if maps.len() < MOST {
        maps.push((device, map, shared.shallow_clone()));
    }
    Ok(shared)
}

/// Bytes of a `[rows, in]` matrix that is quantised here: packed elements and both levels of scales. The maps, the same for
/// all, are not counted.
pub fn nf4_bytes([rows, in_features]: [i64; 2]) -> u64 {
    let n = rows * in_features;
    let blocks = ceil_div(n, BLOCK);
    (ceil_div(n, 2) + blocks + 4 * ceil_div(blocks, NESTED_BLOCK)) as u64
}

fn ceil_div(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

/// `absent` stands for every tensor that is not there.
pub(super) fn view<'a>(nf4: Option<&'a Nf4>, absent: &'a Tensor) -> bridge::Nf4View<'a> {
    let nested = nf4.and_then(|nf4| nf4.nested.as_ref());
    let tensor = |found: Option<&'a Tensor>| ffi::borrow(found.unwrap_or(absent));
    bridge::Nf4View {
        rows: nf4.map_or(0, |nf4| nf4.shape[0]),
        in_features: nf4.map_or(0, |nf4| nf4.shape[1]),
        packed: tensor(nf4.map(|nf4| &nf4.packed)),
        quant_map: tensor(nf4.map(|nf4| &nf4.quant_map)),
        absmax: tensor(nf4.map(|nf4| &nf4.absmax)),
        blocksize: nf4.map_or(0, |nf4| nf4.blocksize),
        nested_absmax: tensor(nested.map(|nested| &nested.absmax)),
        nested_quant_map: tensor(nested.map(|nested| &nested.quant_map)),
        nested_offset: nested.map_or(0.0, |nested| nested.offset),
        nested_blocksize: nested.map_or(1, |nested| nested.blocksize),
    }
}
