//! Milliseconds of a step.
//!
//! Every op takes the longer of its operations at the card's rate for them and its bytes at the rate of memory, plus the gap
//! before its kernel. LoRA is skinny: its products cost the bytes that they read again. What is computed again is the same op a
//! second time. Copies to the host and back run beside: a pass takes the longer of its work and its copies, in each direction.

use super::attention::Kernel;
use super::card::{Card, Rates};
use super::memory::KEYS_FOR_HOST;
use super::{Layer, Linear, Part, Work};
use crate::ops::{Place, Policy};
use crate::train::Optim;

/// A step over the same ops one by one in a cool card's short bursts: the card's power limit, skinny products, gaps. Fitted to
/// QLoRA 8B (1.05 to 1.08), 14B (1.08) and 16-bit 8B (1.07) on H200s and H100s.
const SUSTAINED: f64 = 1.08;

/// The same for products in e4m3, beyond that: 1,279 TFLOPS in one step of 8B on an H200 whose bursts reach 1,484.
const HOT_FP8: f64 = 1.07;

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
        let input = self.element * self.shape.c;
        let inner = of(policy.attention.inner, self.element * layer.query() + 4 * layer.h);
        self.tokens as f64 * (of(policy.attention.input, input) + of(policy.mlp.input, input) + inner)
    }

    /// The attention and the MLP block.
    pub(super) fn blocks(&self, layer: &Layer, card: &Card) -> [BlockMs; 2] {
        let n = self.tokens as f64;
        let (c, f) = (self.shape.c as f64, self.shape.f as f64);
        let (query, turned) = (layer.query() as f64, layer.turned() as f64);
        let moved = |elements: f64| self.moved(elements, card);
        let (norm, norm_backward) = (moved(2.0 * c), moved(4.0 * c));
        // Causal pairs of a query and a key, all samples as long as the longest.
        let keys = self.keys(layer) as f64;
        let pairs = n * keys * (1.0 - keys / (2.0 * self.sample as f64));
        let head = 2.0 * query * pairs;

        let mut rotation = moved(2.0 * turned);
        if self.shape.qk_norm {
            rotation += moved(2.0 * turned);
        }
        let rates = self.attention_rates(layer, card);
        let attending = |operations: f64, tflops: f64| operations / (tflops * 1e9) + card.gap();
        let attention_forward = attending(2.0 * head, rates.forward);
        let (post, post_backward) = if self.shape.post_norms { (norm, norm_backward) } else { (0.0, 0.0) };
        let sum = moved(3.0 * c);
        // Bytes a row in e4m3: written with the row in 16 bits, or by a kernel that reads it again.
        let written = |columns: f64| if self.fp8 { card.memory(n * columns) } else { 0.0 };
        let read_again =
            |columns: f64| if self.fp8 { card.memory(3.0 * n * columns) + card.gap() } else { 0.0 };
        let (qkv, o) = (self.linear_ms(&layer.qkv, false, card), self.linear_ms(&layer.o, false, card));
        let attention = BlockMs {
            forward: norm
                + written(c)
                + qkv[0]
                + rotation
                + attention_forward
                + read_again(query)
                + o[0]
                + post
                + sum,
            backward: o[1]
                + post_backward
                + attending(5.0 * head, rates.backward)
                + rotation
                + read_again(layer.qkv.rows() as f64)
                + qkv[1]
                + norm_backward
                + written(c),
            normed: norm,
            projected: written(c) + qkv[0] + rotation,
            inner: attention_forward,
            output: if self.shape.post_norms { o[0] + post } else { 0.0 },
        };
        let (gate_up, down) =
            (self.linear_ms(&layer.gate_up, true, card), self.linear_ms(&layer.down, false, card));
        let activation = moved(3.0 * f);
        let mlp = BlockMs {
            forward: norm + written(c) + gate_up[0] + activation + written(f) + down[0] + post + sum,
            backward: down[1]
                + post_backward
                + moved(5.0 * f)
                + written(2.0 * f)
                + gate_up[1]
                + norm_backward
                + written(c),
            normed: norm,
            projected: written(c) + gate_up[0],
            inner: activation,
            output: if self.shape.post_norms { down[0] + post } else { 0.0 },
        };
        [attention, mlp]
    }

    /// An op that is bound by memory, on so many elements a row.
    fn moved(&self, elements: f64, card: &Card) -> f64 {
        card.memory(self.element as f64 * self.tokens as f64 * elements) + card.gap()
    }

    fn attention_rates(&self, layer: &Layer, card: &Card) -> Rates {
        match self.attention_kernel(layer) {
            Kernel::Cudnn => card.attention_tflops,
            Kernel::Flash => card.flash_tflops,
            Kernel::Efficient | Kernel::Formula => card.attention_f32_tflops,
        }
    }

    /// [n, inner] times [inner, rows].
    fn product(&self, n: f64, inner: f64, rows: f64, card: &Card) -> f64 {
        let tflops = if self.element == 4 { card.product_f32_tflops } else { card.product_tflops };
        let operations = 2.0 * n * inner * rows / (tflops * 1e9);
        let bytes = self.element as f64 * (n * inner + inner * rows + n * rows);
        operations.max(card.memory(bytes)) + card.gap()
    }

    /// The same in e4m3. A card whose rate is not known is refused before.
    fn product_fp8(&self, n: f64, inner: f64, rows: f64, card: &Card) -> f64 {
        let tflops = card.product_fp8_tflops.unwrap_or(card.product_tflops);
        let operations = HOT_FP8 * 2.0 * n * inner * rows / (tflops * 1e9);
        let bytes = n * inner + inner * rows + self.element as f64 * n * rows;
        operations.max(card.memory(bytes)) + card.gap()
    }

    /// A matrix in f32 that products take in 16 bits.
    fn cast(&self, elements: f64, card: &Card) -> f64 {
        if self.element == 4 { 0.0 } else { card.memory(6.0 * elements) + card.gap() }
    }

    /// Forward and backward of a projection with its LoRA; `folded`: LoRA inside the product (csrc/linear.h).
    fn linear_ms(&self, linear: &Linear, folded: bool, card: &Card) -> [f64; 2] {
        let n = self.tokens as f64;
        let (columns, rows) = (linear.columns as f64, linear.rows() as f64);
        let moved = |elements: f64| self.moved(elements, card);
        let product = |inner: f64| match self.fp8 {
            true => self.product_fp8(n, inner, rows, card),
            false => self.product(n, inner, rows, card),
        };
        let made = |bytes: f64, part: &Part| card.memory(part.rows as f64 * columns * bytes) + card.gap();
        let in_4bit = linear.parts.iter().filter(|part| part.module.nf4);
        let mut weights: f64 = in_4bit.map(|part| made(4.127 / 8.0 + self.element as f64, part)).sum();
        if linear.trained() {
            weights += self.cast(rows * columns, card);
        }
        let mut forward = product(columns) + weights;
        let mut backward = forward;
        if linear.trained() {
            // Its gradient, written in f32.
            backward += self.product(rows, n, columns, card).max(card.memory(4.0 * rows * columns));
        }
        if linear.rank() == 0 {
            return [forward, backward];
        }
        forward += moved(columns);
        let (tail, fp8_tail) = (self.tail(linear), self.fp8_tail(linear) as f64);
        let folded = (folded && tail > 0) || fp8_tail > 0.0;
        if folded {
            forward += product(columns + tail as f64 + fp8_tail) - product(columns);
        }
        if fp8_tail > 0.0 {
            // Behind both operands, and in the backward inside the product, too.
            forward += card.memory(fp8_tail * (n + rows)) + card.gap();
            backward += product(columns + fp8_tail) - product(columns)
                + card.memory(fp8_tail * (n + columns))
                + card.gap();
        }
        for part in linear.parts.iter().filter(|part| part.module.r > 0) {
            if !folded {
                forward += moved(2.0 * part.rows as f64);
            }
            backward += 2.0 * moved(part.rows as f64);
            if self.dropout {
                // In the forward its input, in the backward that and its gradient.
                let dropping = card.memory(DROPPING_BYTES * n * columns) + DROPPING_KERNELS * card.gap();
                forward += dropping;
                backward += 2.0 * dropping;
            }
        }
        backward += moved(columns) + if fp8_tail > 0.0 { 0.0 } else { moved(2.0 * columns) };
        [forward, backward]
    }

    fn loss_ms(&self, card: &Card) -> f64 {
        let (n, c, v) = (self.tokens as f64, self.shape.c as f64, self.shape.v as f64);
        let words = v * c;
        // f32 logits, read and written twice; the head forward and backward.
        let mut ms = 2.0 * self.product(n, c, v, card) + card.memory(16.0 * n * v);
        if self.trained.head {
            // Its gradient: zeros, to which each chunk adds, then multiplied.
            let chunk = self.loss_chunk() as f64;
            let added = self.product(v, chunk, c, card) + card.memory(8.0 * words);
            ms += self.cast(words, card) + card.memory(12.0 * words) + (n / chunk).ceil() * added;
        }
        if self.trained.embedding {
            // Zeros, and where the head has the same gradient their sum.
            ms += card.memory(if self.head == 0 { 16.0 } else { 4.0 } * words);
        }
        ms
    }

    fn update_ms(&self, card: &Card) -> f64 {
        let elements = self.elements();
        // Parameters, gradients and moments; those of an embedding are never in 8 bits.
        const FULL: f64 = 32.0;
        let moments = match self.optim {
            Optim::AdamwTorch => FULL,
            Optim::Adamw8bit => 16.0,
        };
        let [lora, projections, embedding] =
            [elements.lora, elements.projections, elements.embedding].map(|count| count as f64);
        // Gradient norm, LoRA's casts to 16 bits, sums of the gradients of passes.
        let summed = 4.0 + 12.0 * (self.gradient_accumulation_steps - 1) as f64;
        card.memory(lora * (10.0 + moments) + projections * (summed + moments) + embedding * (summed + FULL))
    }
}

/// csrc/linear.cpp, `dropout`: read and written for an element by the ops on its hash of 8 bytes, and how many these are.
const DROPPING_BYTES: f64 = 292.0;
const DROPPING_KERNELS: f64 = 20.0;
