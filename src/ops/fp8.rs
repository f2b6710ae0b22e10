//! Matrices in e4m3 (arXiv:2209.05433) with one power-of-two scale. csrc/fp8.h has the formulas.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::op_error;
use crate::ffi::{self, bridge};

/// Columns behind the bytes on a GPU, for three times LoRA's ranks side by side, each part's rounded up to 16: r = 16 on q, k
/// and v. Higher ranks are added by products of their own.
const ROOM: i64 = 192;

/// A frozen matrix `[rows, in]`, its bytes twice: as they lie in the checkpoint for the forward pass, transposed for the
/// backward one.
#[derive(Debug)]
pub struct Fp8 {
    /// uint8 `[rows, in + room]`.
    by_rows: Tensor,
    /// uint8 `[in, rows + room]`.
    by_columns: Tensor,
    /// Its scale, f32 `[max(rows, in)]`, all the same: products take one a row.
    scale: Tensor,
}

impl Fp8 {
    /// Rounds a matrix `[rows, in]` in any float dtype to e4m3, where it is. The bytes are the same on every device. They take the place
    /// of `weight` if nobody else holds it: behind it they would leave a hole of its size, and of a checkpoint's holes many are too small
    /// for anything (0.9 GiB at 8B).
    ///
    /// # Errors
    /// NaN or infinite values; on a GPU, sizes that are no multiples of 16, which is what its products take.
    pub fn quantize(weight: Tensor) -> Result<Fp8> {
        let (size, device) = (weight.size(), weight.device());
        ensure!(size.len() == 2, "fp8: the weight is {size:?}, expected [rows, in]");
        let (rows, in_features) = (size[0], size[1]);
        let fits = rows % 16 == 0 && in_features % 16 == 0;
        ensure!(fits || !device.is_cuda(), "fp8: the weight is {size:?}, expected multiples of 16");
        let room = if device.is_cuda() { ROOM } else { 0 };
        let fp8 = Fp8 {
            by_rows: Tensor::f_empty([rows, in_features + room], (Kind::Uint8, device))?,
            by_columns: Tensor::f_empty([in_features, rows + room], (Kind::Uint8, device))?,
            scale: Tensor::f_empty([rows.max(in_features)], (Kind::Float, device))?,
        };
        let absent = Tensor::new();
        bridge::fp8_quantize(ffi::borrow(&weight), &view(Some(&fp8), &absent)).map_err(op_error)?;
        drop(weight);
        let moved = |tensor: Tensor| -> Result<Tensor> {
            let mut to = tensor.f_empty_like()?;
            to.f_copy_(&tensor)?;
            Ok(to)
        };
        let Fp8 { by_rows, by_columns, scale } = fp8;
        Ok(Fp8 { by_rows: moved(by_rows)?, by_columns: moved(by_columns)?, scale: moved(scale)? })
    }

    /// `[rows, in]`.
    pub fn shape(&self) -> [i64; 2] {
        [self.by_rows.size()[0], self.by_columns.size()[0]]
    }

    /// The matrix in a float dtype; every value of e4m3 with its scale is one of bf16.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        let (destination, absent) =
            (Tensor::f_empty(self.shape(), (kind, self.by_rows.device()))?, Tensor::new());
        bridge::fp8_dequantize(&view(Some(self), &absent), ffi::borrow(&destination)).map_err(op_error)?;
        Ok(destination)
    }
}

pub(super) fn view<'a>(fp8: Option<&'a Fp8>, absent: &'a Tensor) -> bridge::Fp8View<'a> {
    let tensor = |of: fn(&Fp8) -> &Tensor| ffi::borrow(fp8.map_or(absent, of));
    bridge::Fp8View {
        by_rows: tensor(|fp8| &fp8.by_rows),
        by_columns: tensor(|fp8| &fp8.by_columns),
        scale: tensor(|fp8| &fp8.scale),
    }
}
