//! 4-bit weights from a checkpoint: read as bitsandbytes stored them, or quantised on their way in.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::io::{QuantKeys, Weights};
use crate::ops::{Nested, Nf4, Nf4Quantizer, shared_map};

/// Elements that are on the device before they are quantised: 32 MiB in 16 bits, for each thread that loads.
const PIECE: i64 = 1 << 24;

/// Reads the quantised weight `name`.
///
/// # Errors
/// Its tensors do not belong together, or are not a `shape` matrix. Names the file and the tensor.
pub(super) fn read_nf4(weights: &Weights, name: &str, shape: [i64; 2], device: Device) -> Result<Nf4> {
    let keys = QuantKeys::of(name);
    let state = weights.quant_state(name)?.ok_or_else(|| weights.corrupt(name, "is not quantised"))?;
    if state.shape != shape {
        let what = format!("has shape {:?}, expected {shape:?}", state.shape);
        return Err(weights.corrupt(&keys.quant_state, &what).into());
    }
    let ceil_div = |a: i64, b: i64| (a + b - 1) / b;
    let n = shape[0] * shape[1];
    let blocks = ceil_div(n, state.blocksize);
    let on = |device: Device, name: &str, size: i64, kind: Kind| -> Result<Tensor> {
        weights.expect_shape(name, &[size])?;
        if weights.kind(name)? != kind {
            let what = format!("holds {:?}, expected {kind:?}", weights.kind(name)?);
            return Err(weights.corrupt(name, &what).into());
        }
        let tensor = Tensor::f_empty([size], (kind, device))?;
        weights.copy_into(name, &tensor)?;
        Ok(tensor)
    };
    let tensor = |name: &str, size: i64, kind: Kind| on(device, name, size, kind);
    let map = |name: &str, size: i64| shared_map(on(Device::Cpu, name, size, Kind::Float)?, device);
    // quant_storage may call the bytes bf16, f16 or f32.
    let packed = weights.with_stored_bytes(name, |bytes| {
        let expected = ceil_div(n, 2);
        if bytes.numel() as i64 != expected {
            let what = format!("holds {} bytes, expected {expected} for {shape:?}", bytes.numel());
            return Err(weights.corrupt(name, &what).into());
        }
        let mut packed = Tensor::f_empty([expected], (Kind::Uint8, device))?;
        packed.f_copy_(bytes)?;
        Ok(packed)
    })?;
    let nested = match (weights.contains(&keys.nested_absmax), state.nested_blocksize, state.nested_offset) {
        (true, Some(blocksize), Some(offset)) => Some(Nested {
            absmax: tensor(&keys.nested_absmax, ceil_div(blocks, blocksize), Kind::Float)?,
            quant_map: map(&keys.nested_quant_map, 256)?,
            offset,
            blocksize,
        }),
        _ => None,
    };
    let absmax_kind = if nested.is_some() { Kind::Uint8 } else { Kind::Float };
    Ok(Nf4 {
        shape,
        packed,
        quant_map: map(&keys.quant_map, 16)?,
        absmax: tensor(&keys.absmax, blocks, absmax_kind)?,
        blocksize: state.blocksize,
        nested,
    })
}

/// Quantises the stored weight `name` on `device`, piece by piece. The values are those of the checkpoint, without a
/// rounding to another dtype before.
///
/// # Errors
/// A shape other than `shape`; values that are NaN or infinite. Names the file and the tensor.
pub fn quantize_stored(weights: &Weights, name: &str, shape: [i64; 2], device: Device) -> Result<Nf4> {
    weights.expect_shape(name, &shape)?;
    let mut quantizer = Nf4Quantizer::new(shape, device)?;
    weights.with_stored(name, |stored| {
        let flat = stored.f_view([-1])?;
        let n = flat.size()[0];
        for start in (0..n).step_by(PIECE as usize) {
            let piece = flat.f_narrow(0, start, PIECE.min(n - start))?;
            let piece = if piece.kind() == Kind::Double { piece.f_to_kind(Kind::Float)? } else { piece };
            quantizer.push(&piece.f_to_device(device)?)?;
        }
        Ok(())
    })?;
    quantizer
        .finish()
        .map_err(|error| weights.corrupt(name, &format!("cannot be quantised: {error:#}")).into())
}

/// The values of weight `name` that bitsandbytes quantised, in f32 on the CPU.
pub fn dequantize_stored(weights: &Weights, name: &str, shape: [i64; 2]) -> Result<Tensor> {
    read_nf4(weights, name, shape, Device::Cpu)?.dequantize(Kind::Float)
}
