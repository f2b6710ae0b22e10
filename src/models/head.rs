//! The head of a decoder: which matrix it is, its logits, and how it is held for inference.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::decoder::Decoder;
use crate::device;
use crate::ops::{self, Bf12, Head};

impl Decoder {
    /// Logits `[N, V]` of hidden states, in f32 (f64 in an f64 model), final softcap applied.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = ops::head_scores(hidden, self.head())?;
        let logits = if logits.kind() == Kind::Double { logits } else { logits.f_to_kind(Kind::Float)? };
        Ok(match self.config.final_logit_softcapping {
            Some(cap) => logits.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?,
            None => logits,
        })
    }

    /// lm_head, or the tied embedding.
    pub fn head(&self) -> Head<'_> {
        match (&self.nf4_head, &self.bf12_head) {
            (Some(nf4), _) => Head::Nf4(nf4),
            (None, Some(bf12)) => Head::Bf12(bf12),
            (None, None) => Head::Dense(self.lm_head.as_ref().unwrap_or(&self.embed_tokens)),
        }
    }

    /// Keeps an untied bf16 head in 12 bits where decoding reads it so: in a model in 4 bits on a GPU of compute capability 8.0 or newer. Logits
    /// change by rounding alone, and the head is the same to the bit for who asks for its weights.
    pub(super) fn pack_head(&mut self) -> Result<()> {
        let Some(head) = &self.lm_head else { return Ok(()) };
        let reads = device::has_kernels() && self.device.is_cuda() && device::supports_bf16(self.device);
        if !reads || !self.is_quantized() || head.kind() != Kind::BFloat16 || head.requires_grad() {
            return Ok(());
        }
        match Bf12::pack(head) {
            Ok(Some(packed)) => {
                let (bytes, before) = (packed.bytes(), 2 * head.numel());
                tracing::debug!("the head is in 12 bits without loss: {bytes} bytes, {before} before");
                self.bf12_head = Some(packed);
                self.lm_head = None;
                // For keys and values, which are given a share of what is free.
                device::empty_cache(self.device)?;
            }
            Ok(None) => {
                tracing::debug!("the head stays in 16 bits: its weights differ too much in size for 12")
            }
            // A GPU that is nearly full: what was there before still is.
            Err(error) => tracing::warn!("the head stays in 16 bits: {error:#}"),
        }
        Ok(())
    }

    /// Takes [`Decoder::pack_head`] back.
    pub(super) fn unpack_head(&mut self) -> Result<()> {
        if let Some(packed) = self.bf12_head.take() {
            self.lm_head = Some(packed.unpack()?);
        }
        Ok(())
    }
}
