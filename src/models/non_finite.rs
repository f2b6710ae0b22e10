//! Finding the module in which a forward pass first goes wrong.

use anyhow::Result;
use tch::Tensor;

use super::decoder::{Decoder, DecoderLayer, Input};
use crate::ops::{self, Linear, Pass, RmsNorm};

fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1)
}

impl Decoder {
    /// Runs the forward pass on `input` again, module by module, and names the first whose output holds a NaN or an
    /// infinity. `None` if the loss is finite.
    pub fn first_non_finite(&self, input: Input, labels: &[i64]) -> Result<Option<String>> {
        let _no_grad = tch::no_grad_guard();
        let mut found = None;
        let hidden =
            self.hidden_watched(&self.upload_input(input)?, Pass::INFERENCE, &mut |layer, before, after| {
                if found.is_none() && !is_finite(after)? {
                    found = Some(match layer {
                        Some(layer) => layer.blame(before)?,
                        None => format!("{}embed_tokens", self.prefix),
                    });
                }
                Ok(())
            })?;
        if found.is_some() {
            return Ok(found);
        }
        if !is_finite(&hidden)? {
            return Ok(Some(self.norm.name.clone()));
        }
        let loss = self.loss_sum(input, labels, Pass::INFERENCE)?;
        Ok((!is_finite(&loss)?).then(|| "lm_head".into()))
    }
}

impl DecoderLayer {
    /// The first module that turns the finite input `x` of the layer into something else. Attention itself and the
    /// activation have no name of their own; they count to the projection that reads them.
    fn blame(&self, x: &Tensor) -> Result<String> {
        let branches: [(&RmsNorm, &Linear, &Linear); 2] =
            [(&self.input_norm, &self.qkv, &self.o), (&self.mlp_norm, &self.gate_up, &self.down)];
        for (norm, first, second) in branches {
            let normed = ops::rms_norm(x, norm)?;
            if !is_finite(&normed)? {
                return Ok(norm.name.clone());
            }
            let projected = ops::linear(&normed, first, Pass::INFERENCE)?;
            for (row, part) in first.rows() {
                if !is_finite(&projected.f_narrow(1, row, part.rows)?)? {
                    return Ok(part.name.clone());
                }
            }
            let weights = second.dense_weights().into_iter().chain(
                second.parts.iter().filter_map(|part| part.lora.as_ref()).flat_map(|lora| [&lora.a, &lora.b]),
            );
            for weight in weights {
                if !is_finite(weight)? {
                    return Ok(second.parts[0].name.clone());
                }
            }
        }
        Ok(self.down.parts[0].name.clone())
    }
}
