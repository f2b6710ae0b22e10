//! Milliseconds of a step.
//!
//! Every op takes the longer of its operations at the card's rate for them and its bytes at the rate of memory, plus the gap
//! before its kernel. LoRA is skinny: its products cost the bytes that they read again. What is computed again is the same op a
//! second time. Copies to the host and back run beside: a pass takes the longer of its work and its copies, in each direction.

use super::blocks::tail_of;
use super::card::Card;
use super::memory::KEYS_FOR_HOST;
use super::{Layer, Linear, Work};
use crate::ops::{Place, Policy};
use crate::train::Optim;

/// A step over the same ops one by one in a cool card's short bursts: the card's power limit, skinny products, gaps. Fitted to
/// QLoRA 8B (1.05 to 1.08), 14B (1.08) and 16-bit 8B (1.07) on H200s and H100s.
const SUSTAINED: f64 = 1.08;

/// What a block costs, and what filling in each part of it costs the backward that does not find it.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockMs {
    pub forward: f64,
    pub backward: f64,
    pub normed: f64,
    pub projected: f64,
    pub inner: f64,
    pub output: f64,
}

impl Work {
    /// A whole optimizer step under one policy a layer.
    pub fn milliseconds(&self, policies: &[Policy], card: &Card) -> f64 {
        self.with_shared_prompts().milliseconds_of_passes(policies, card)
    }

    fn milliseconds_of_passes(&self, policies: &[Policy], card: &Card) -> f64 {
        let (mut forward, mut backward, mut host) = (0.0, 0.0, 0.0);
        // Layers alike cost alike.
        let mut known: Vec<(&Layer, [BlockMs; 2])> = Vec::new();
        for (layer, policy) in self.layers.iter().zip(policies) {
            let found = known.iter().position(|(other, _)| *other == layer).unwrap_or_else(|| {
                known.push((layer, self.blocks(layer, card)));
                known.len() - 1
            });
            for (block, policy) in known[found].1.iter().zip([policy.attention, policy.mlp]) {
                forward += block.forward;
                backward += block.backward;
                for (place, ms) in [
                    // Made again together with what is made from it.
                    (
                        if policy.projected == Place::Device { policy.normed } else { Place::Recompute },
                        block.normed,
                    ),
                    (policy.projected, block.projected),
                    (policy.inner, block.inner),
                    (policy.output, block.output),
                ] {
                    backward += if place == Place::Recompute { ms } else { 0.0 };
                }
            }
            host += self.host_bytes(layer, policy);
        }
        let loss = self.loss_ms(card);
        let copies = card.bus(host);
        let pass = (forward + loss).max(copies) + backward.max(copies);
        (pass * self.gradient_accumulation_steps as f64 + self.update_ms(card)) * SUSTAINED
    }

    /// Whether attention's output of this layer is quicker to fetch from the host than to compute.
    pub(super) fn inner_to_host(&self, layer: &Layer) -> bool {
        self.keys(layer) >= KEYS_FOR_HOST
    }

    /// Copied out in the forward, and in again in the backward.
    fn host_bytes(&self, layer: &Layer, policy: &Policy) -> f64 {
        let of = |place: Place, bytes: u64| if place == Place::Host { bytes as f64 } else { 0.0 };
        let input = 2 * self.shape.c;
        let inner = of(policy.attention.inner, 2 * layer.query() + 4 * layer.h);
        self.tokens as f64 * (of(policy.attention.input, input) + of(policy.mlp.input, input) + inner)
    }

    /// The attention and the MLP block.
    pub(super) fn blocks(&self, layer: &Layer, card: &Card) -> [BlockMs; 2] {
        let n = self.tokens as f64;
        let (c, f) = (self.shape.c as f64, self.shape.f as f64);
        let (query, turned) = (layer.query() as f64, layer.turned() as f64);
        let moved = |elements: f64| card.memory(2.0 * n * elements) + card.gap();
        let (norm, norm_backward) = (moved(2.0 * c), moved(4.0 * c));
        // Causal pairs of a query and a key, all samples as long as the longest.
        let keys = self.keys(layer) as f64;
        let pairs = n * keys * (1.0 - keys / (2.0 * self.sample as f64));
        let head = 2.0 * query * pairs;

        let mut rotation = moved(2.0 * turned);
        if self.shape.qk_norm {
            rotation += moved(2.0 * turned);
        }
        let attention_forward = card.attention_forward(2.0 * head);
        let (post, post_backward) = if self.shape.post_norms { (norm, norm_backward) } else { (0.0, 0.0) };
        let sum = moved(3.0 * c);
        let (qkv, o) = (self.linear_ms(&layer.qkv, false, card), self.linear_ms(&layer.o, false, card));
        let attention = BlockMs {
            forward: norm + qkv[0] + rotation + attention_forward + o[0] + post + sum,
            backward: o[1]
                + post_backward
                + card.attention_backward(5.0 * head)
                + rotation
                + qkv[1]
                + norm_backward,
            normed: norm,
            projected: qkv[0] + rotation,
            inner: attention_forward,
            output: if self.shape.post_norms { o[0] + post } else { 0.0 },
        };
        let (gate_up, down) =
            (self.linear_ms(&layer.gate_up, true, card), self.linear_ms(&layer.down, false, card));
        let activation = moved(3.0 * f);
        let mlp = BlockMs {
            forward: norm + gate_up[0] + activation + down[0] + post + sum,
            backward: down[1] + post_backward + moved(5.0 * f) + gate_up[1] + norm_backward,
            normed: norm,
            projected: gate_up[0],
            inner: activation,
            output: if self.shape.post_norms { down[0] + post } else { 0.0 },
        };
        [attention, mlp]
    }

    /// Forward and backward of a projection with its LoRA; `folded`: LoRA inside the product (csrc/linear.h).
    fn linear_ms(&self, linear: &Linear, folded: bool, card: &Card) -> [f64; 2] {
        let n = self.tokens as f64;
        let (columns, rows) = (linear.columns as f64, linear.rows() as f64);
        let moved = |elements: f64| card.memory(2.0 * n * elements) + card.gap();
        let weights: f64 = (linear.parts.iter().filter(|part| part.module.nf4))
            .map(|part| card.memory(part.rows as f64 * columns * (4.127 / 8.0 + 2.0)) + card.gap())
            .sum();
        let product = |inner: f64| card.product(n, inner, rows);
        let trained = linear.parts.iter().filter(|part| part.module.r > 0);
        let (mut forward, mut backward) = (product(columns) + weights, product(columns) + weights);
        if linear.rank() == 0 {
            return [forward, backward];
        }
        forward += moved(columns);
        if folded {
            forward += product(columns + tail_of(linear) as f64) - product(columns);
        }
        for part in trained {
            if !folded {
                forward += moved(2.0 * part.rows as f64);
            }
            backward += 2.0 * moved(part.rows as f64);
        }
        backward += moved(columns) + moved(2.0 * columns);
        [forward, backward]
    }

    fn loss_ms(&self, card: &Card) -> f64 {
        let (n, c, v) = (self.tokens as f64, self.shape.c as f64, self.shape.v as f64);
        // f32 logits, read and written twice; the head forward and backward.
        2.0 * card.product(n, c, v) + card.memory(16.0 * n * v)
    }

    fn update_ms(&self, card: &Card) -> f64 {
        let lora: u64 = self.layers.iter().flat_map(Layer::linears).map(Linear::lora).sum();
        // Gradient norm, casts to 16 bits, parameters and moments.
        let moments = match self.optim {
            Optim::AdamwTorch => 32.0,
            Optim::Adamw8bit => 16.0,
        };
        card.memory(lora as f64 * (10.0 + moments))
    }
}
