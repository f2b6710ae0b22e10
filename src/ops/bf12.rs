//! Matrices of bf16 in 12 bits an element, without loss. csrc/bf12.h has the format.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::{checked, op_error};
use crate::ffi::{self, bridge};

const TILE_ROWS: i64 = 16;
const UNIT: i64 = 64;
const UNIT_BYTES: i64 = 1536;
/// Rows that are packed at once: some 100 MiB of working memory at 4096 columns.
const RUN: i64 = 1024;
/// Elements that are no code and take eight bytes each: at most one in so many, and in no tile of 16 rows more than so many, or products
/// would be slower than they save.
const ELEMENTS_EACH: i64 = 2048;
const MOST_OF_A_TILE: i64 = 512;

/// A matrix `[rows, in]` whose values are those of bf16 to the bit, and whose products those of bf16 to rounding.
#[derive(Debug)]
pub struct Bf12 {
    pub shape: [i64; 2],
    /// uint8 `[ceil(rows / 16), in / 64, 1536]`.
    units: Tensor,
    /// f32 `[16 ceil(rows / 16)]`, powers of two.
    scales: Tensor,
    /// int32 `[ceil(rows / 16) + 1]`.
    starts: Tensor,
    /// int32 `[n, 2]`.
    rest: Tensor,
}

impl Bf12 {
    /// Packs a bf16 matrix `[rows, in]` where it is. None where 12 bits are not enough: `in` is not a multiple of 64, or more than one element
    /// in 2048 (or more than 512 of 16 rows) is zero beside others or has an exponent 16 or more below the largest of its row.
    pub fn pack(weight: &Tensor) -> Result<Option<Bf12>> {
        let &[rows, in_features] = &weight.size()[..] else {
            anyhow::bail!("bf12: the weight is {:?}, expected [rows, in]", weight.size());
        };
        ensure!(weight.kind() == Kind::BFloat16, "bf12: the weight is {:?}, expected bf16", weight.kind());
        if in_features % UNIT != 0 || rows == 0 || in_features == 0 {
            return Ok(None);
        }
        let _no_grad = tch::no_grad_guard();
        let tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        let empty = |size: &[i64], kind| Tensor::f_empty(size, (kind, weight.device()));
        let units = empty(&[tiles, in_features / UNIT, UNIT_BYTES], Kind::Uint8)?;
        let scales = empty(&[tiles * TILE_ROWS], Kind::Float)?;
        let counts = empty(&[tiles], Kind::Int64)?;
        let mut rest = Vec::new();
        for first in (0..rows).step_by(RUN as usize) {
            let mut run = weight.f_narrow(0, first, RUN.min(rows - first))?;
            let missing = -run.size()[0] & (TILE_ROWS - 1);
            if missing > 0 {
                run = run.f_constant_pad_nd([0, 0, 0, missing])?;
            }
            let (tile, count) = (first / TILE_ROWS, run.size()[0] / TILE_ROWS);
            rest.push(checked(bridge::bf12_pack(
                ffi::borrow(&run),
                ffi::borrow(&units.f_narrow(0, tile, count)?),
                ffi::borrow(&scales.f_narrow(0, first, count * TILE_ROWS)?),
                ffi::borrow(&counts.f_narrow(0, tile, count)?),
            ))?);
        }
        let rest = Tensor::f_cat(&rest, 0)?;
        let most = counts.f_max()?.f_int64_value(&[])?;
        if rest.size()[0] * ELEMENTS_EACH > rows * in_features || most > MOST_OF_A_TILE {
            return Ok(None);
        }
        let starts = empty(&[tiles + 1], Kind::Int)?;
        let _ = starts.f_narrow(0, 0, 1)?.f_zero_()?;
        starts.f_narrow(0, 1, tiles)?.f_copy_(&counts.f_cumsum(0, Kind::Int64)?)?;
        Ok(Some(Bf12 { shape: [rows, in_features], units, scales, starts, rest }))
    }

    /// The matrix in bf16, to the bit.
    pub fn unpack(&self) -> Result<Tensor> {
        let destination = Tensor::f_empty(self.shape, (Kind::BFloat16, self.units.device()))?;
        bridge::bf12_unpack(&view(Some(self), &Tensor::new()), ffi::borrow(&destination))
            .map_err(op_error)?;
        Ok(destination)
    }

    /// What it takes.
    pub fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        [&self.units, &self.scales, &self.starts, &self.rest].into_iter().map(bytes).sum()
    }
}

/// `absent` stands for every tensor that is not there.
pub(super) fn view<'a>(bf12: Option<&'a Bf12>, absent: &'a Tensor) -> bridge::Bf12View<'a> {
    let tensor = |found: Option<&'a Tensor>| ffi::borrow(found.unwrap_or(absent));
    bridge::Bf12View {
        rows: bf12.map_or(0, |bf12| bf12.shape[0]),
        in_features: bf12.map_or(0, |bf12| bf12.shape[1]),
        units: tensor(bf12.map(|bf12| &bf12.units)),
        scales: tensor(bf12.map(|bf12| &bf12.scales)),
        starts: tensor(bf12.map(|bf12| &bf12.starts)),
        rest: tensor(bf12.map(|bf12| &bf12.rest)),
    }
}
