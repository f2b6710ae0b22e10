//! All layers of a decoder on few new rows: one launch on a GPU (kernels/decode.cu) or a few a layer
//! (kernels/decode_groups.cu), one parallel loop on the CPU (csrc/decode_rows.h).

use anyhow::Result;
use cxx::UniquePtr;
use tch::Tensor;

use super::{AttentionBlock, MlpBlock, Pass, Rows, attention_views, mlp_views, op_error};
use crate::ffi::{self, bridge};

/// The layers of one launch or loop, in their order.
pub struct DecodeStack(UniquePtr<bridge::DecodeStack>);

impl DecodeStack {
    /// For x `[M, C]`, one new row of each of M sequences.
    pub fn new(x: &Tensor) -> Result<DecodeStack> {
        Ok(DecodeStack(bridge::decode_stack(ffi::borrow(x)).map_err(op_error)?))
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

    /// What the last layer gives, `[M, C]`; None where it cannot be, or does not pay.
    pub fn run(mut self) -> Result<Option<Tensor>> {
        let y = self.0.pin_mut().run().map_err(op_error)?;
        Ok((!y.is_null()).then(|| ffi::take(y)))
    }
}
