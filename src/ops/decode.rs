//! All layers of a decoder on few new rows: one launch on a GPU (kernels/decode.cu) or a few a layer
//! (kernels/decode_groups.cu), one parallel loop on the CPU (csrc/decode_rows.h).

use anyhow::Result;
use cxx::UniquePtr;
use tch::Tensor;

use super::{AttentionBlock, MlpBlock, Pass, RmsNorm, Rows, attention_views, mlp_views, norm_view, op_error};
use crate::ffi::{self, bridge};

/// What the first layer reads, one new row of each of M sequences.
#[derive(Debug, Clone, Copy)]
pub enum DecodeInput<'a> {
    /// `[M, C]`.
    Rows(&'a Tensor),
    /// Row `ids[m]` (int64 `[M]`) of `embedding` for each. cos and sin of the layers are then of all positions, and a launch looks up
    /// those of the sequences' newest keys; on a GPU, up to 8 rows.
    Tokens { embedding: &'a Tensor, ids: &'a Tensor },
}

/// The layers of one launch or loop, in their order.
pub struct DecodeStack(UniquePtr<bridge::DecodeStack>);

impl DecodeStack {
    /// With no layer yet.
    pub fn new(input: DecodeInput) -> Result<DecodeStack> {
        let absent = Tensor::new();
        let (x, ids) = match input {
            DecodeInput::Rows(x) => (x, &absent),
            DecodeInput::Tokens { embedding, ids } => (embedding, ids),
        };
        Ok(DecodeStack(bridge::decode_stack(ffi::borrow(x), ffi::borrow(ids)).map_err(op_error)?))
    }

    /// The next layer; false where it cannot be taken. What it is made of must live until [`run`](DecodeStack::run).
    pub fn push(
        &mut self,
        attention: &AttentionBlock,
        rows: &Rows,
        mlp: &MlpBlock,
        pass: Pass,
    ) -> Result<bool> {
        let stack = self.0.pin_mut();
        attention_views(attention, rows, pass, |norm, qkv, o, post_norm, view| {
            mlp_views(mlp, pass, |mlp_norm, gate_up, down, mlp_post_norm| {
                let activation = mlp.activation;
                stack.push(norm, qkv, o, post_norm, view, mlp_norm, gate_up, down, mlp_post_norm, activation)
            })
        })
        .map_err(op_error)
    }

    /// What the last layer gives, `[M, C]`, behind `norm`; None where it cannot be, or does not pay.
    pub fn run(mut self, norm: &RmsNorm) -> Result<Option<Tensor>> {
        let absent = Tensor::new();
        let y = self.0.pin_mut().run(&norm_view(Some(norm), &absent)).map_err(op_error)?;
        Ok((!y.is_null()).then(|| ffi::take(y)))
    }
}
