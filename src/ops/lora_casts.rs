//! LoRA matrices in the dtype of the products.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Linear, op_error};
use crate::ffi::{self, bridge};

/// The LoRA matrices of a decoder in the dtype of its products, for a training step: made by a few kernels once a step, not
/// by two at each product of each pass. They hold what the matrices were at the last [`LoraCasts::refresh`].
#[derive(Debug)]
pub struct LoraCasts {
    /// Of each layer qkv, o, gate_up, down.
    linears: Vec<LinearCast>,
    /// Matrices and their casts.
    from: Vec<Tensor>,
    to: Vec<Tensor>,
}

#[derive(Debug)]
pub(super) struct LinearCast {
    /// `[sum of R, in]`, the parts below each other; undefined where none has LoRA.
    pub(super) a: Tensor,
    /// `[rows, R]` of each part; undefined where it has none.
    pub(super) b: Vec<Tensor>,
}

impl LoraCasts {
    /// Room for the casts of `linears`; [`refresh`](LoraCasts::refresh) fills it. None where nothing is to be cast.
    pub fn new<'a>(linears: impl IntoIterator<Item = &'a Linear>, kind: Kind) -> Result<Option<LoraCasts>> {
        let mut casts = LoraCasts { linears: Vec::new(), from: Vec::new(), to: Vec::new() };
        for linear in linears {
            casts.add(linear, kind)?;
        }
        Ok((!casts.from.is_empty()).then_some(casts))
    }

    fn add(&mut self, linear: &Linear, kind: Kind) -> Result<()> {
        let loras = || linear.parts.iter().filter_map(|part| part.lora.as_ref());
        let rank: i64 = loras().map(|lora| lora.a.size()[0]).sum();
        let Some(first) = loras().next().filter(|_| loras().all(|lora| lora.a.kind() != kind)) else {
            let b = linear.parts.iter().map(|_| Tensor::new()).collect();
            self.linears.push(LinearCast { a: Tensor::new(), b });
            return Ok(());
        };
        let options = (kind, first.a.device());
        let a = Tensor::f_empty([rank, first.a.size()[1]], options)?;
        let (mut b, mut row) = (Vec::new(), 0);
        for part in &linear.parts {
            let Some(lora) = &part.lora else {
                b.push(Tensor::new());
                continue;
            };
            let part_rank = lora.a.size()[0];
            let part_b = Tensor::f_empty(lora.b.size(), options)?;
            self.from.extend([lora.a.detach(), lora.b.detach()]);
            self.to.extend([a.f_narrow(0, row, part_rank)?, part_b.shallow_clone()]);
            b.push(part_b);
            row += part_rank;
        }
        self.linears.push(LinearCast { a, b });
        Ok(())
    }

    /// Casts the matrices as they are now.
    pub fn refresh(&self) -> Result<()> {
        bridge::copy_all(&ffi::list(&self.to), &ffi::list(&self.from)).map_err(op_error)
    }

    pub(super) fn linear(&self, layer: usize, index: usize) -> &LinearCast {
        &self.linears[4 * layer + index]
    }
}
