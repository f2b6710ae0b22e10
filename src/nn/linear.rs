//! Building projections and norms: from a checkpoint, or at random from a config.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::nf4::{quantize_stored, read_nf4};
use crate::device::Generator;
use crate::io::Weights;
use crate::io::adapter::InitLoraWeights;
use crate::ops::{Fp8, Linear, Lora, Nf4, Part, PartWeight, RmsNorm, Weight};

/// Where values come from.
pub enum Init<'a> {
    Checkpoint(&'a Weights),
    /// Matrices from N(0, std^2), biases 0, norms such that they start as the identity. A generator of the CPU gives the
    /// same on every device, one of a GPU is quick.
    Random {
        std: f64,
        generator: Generator,
    },
    /// Nowhere yet: the tensors get their shape, and values from who builds the model.
    Unset,
}

/// What a model's tensors become.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Dtype of the activations, and of the weights that are not in 4 bits.
    pub kind: Kind,
    pub device: Device,
    /// Quantise every projection to NF4. Without effect on a checkpoint that is quantised already: what it keeps in 16
    /// bits was kept so on purpose.
    pub load_in_4bit: bool,
    /// Keep the projections in e4m3 and multiply activations in it, too ([`Fp8`]). The embedding, the head and the norms stay in
    /// `kind`: bf16 on a GPU, which must be of compute capability 8.9 or newer.
    pub base_fp8: bool,
    /// Leave the embedding in the host's memory, from where each batch takes its rows.
    pub offload_embedding: bool,
    /// Quantise the head to NF4; where it is the embedding, a copy of it.
    pub nf4_head: bool,
}

impl LoadOptions {
    /// All weights in `kind` on `device`.
    pub fn new(kind: Kind, device: Device) -> LoadOptions {
        LoadOptions {
            kind,
            device,
            load_in_4bit: false,
            base_fp8: false,
            offload_embedding: false,
            nf4_head: false,
        }
    }
}

/// Makes tensors of one dtype on one device.
pub struct Loader<'a> {
    pub init: Init<'a>,
    pub options: LoadOptions,
    /// Modules that `load_in_4bit` does not quantise.
    pub kept: &'a BTreeSet<String>,
}

impl Loader<'_> {
    /// A matrix `[rows, in]`, such as an embedding, on `device`.
    pub fn matrix(&self, name: &str, shape: [i64; 2], device: Device) -> Result<Tensor> {
        if let Some(weights) = self.quantized(name)? {
            return read_nf4(weights, name, shape, device)?.dequantize(self.options.kind);
        }
        self.expect(name, &shape)?;
        let tensor = Tensor::f_empty(shape, (self.options.kind, device))?;
        self.fill(name, &tensor, 0.0)?;
        Ok(tensor)
    }

    /// The matrix `[rows, in]` in 4 bits, of the values that the checkpoint stores.
    pub fn nf4_matrix(&self, name: &str, shape: [i64; 2]) -> Result<Nf4> {
        let device = self.options.device;
        match (&self.init, self.quantized(name)?) {
            (_, Some(weights)) => read_nf4(weights, name, shape, device),
            (Init::Checkpoint(weights), None) => quantize_stored(weights, name, shape, device),
            (Init::Random { .. } | Init::Unset, None) => {
                let dense = self.matrix(name, shape, device)?;
                let known = if dense.kind() == Kind::Double { Kind::Float } else { dense.kind() };
                Nf4::quantize(&dense.f_to_kind(known)?)
            }
        }
    }

    /// A projection whose parts `(module name, rows)` the checkpoint stores as `<name>.weight` and, with `bias`,
    /// `<name>.bias`.
    pub fn linear(&self, parts: &[(String, i64)], in_features: i64, bias: bool) -> Result<Linear> {
        let total: i64 = parts.iter().map(|(_, rows)| rows).sum();
        let weight = self.weight(parts, in_features, total)?;
        let bias = if bias { Some(self.empty(&[total])?) } else { None };
        let mut row = 0;
        for (name, rows) in parts {
            if let Some(bias) = &bias {
                self.fill(&format!("{name}.bias"), &bias.f_narrow(0, row, *rows)?, 0.0)?;
            }
            row += rows;
        }
        let parts =
            parts.iter().map(|(name, rows)| Part { name: name.clone(), rows: *rows, lora: None }).collect();
        Ok(Linear { weight, bias, parts })
    }

    fn weight(&self, parts: &[(String, i64)], in_features: i64, total: i64) -> Result<Weight> {
        let load_in_4bit = self.options.load_in_4bit
            && match &self.init {
                Init::Checkpoint(weights) => !weights.is_quantized(),
                Init::Random { .. } | Init::Unset => true,
            };
        let quantizes = |name: &str| load_in_4bit && !self.kept.contains(name);
        let mut any_quantized = parts.iter().any(|(name, _)| quantizes(name));
        for (name, rows) in parts {
            let name = format!("{name}.weight");
            if self.quantized(&name)?.is_some() {
                any_quantized = true;
            } else {
                self.expect(&name, &[*rows, in_features])?;
            }
        }
        if !any_quantized {
            let base_fp8 = self.options.base_fp8;
            let weight = if base_fp8 {
                self.empty(&[total, in_features])?
            } else {
                self.projection(total, in_features)?
            };
            let mut row = 0;
            for (name, rows) in parts {
                self.fill(&format!("{name}.weight"), &weight.f_narrow(0, row, *rows)?, 0.0)?;
                row += rows;
            }
            return Ok(if base_fp8 {
                Weight::Fp8(Fp8::quantize(weight).with_context(|| parts[0].0.clone())?)
            } else {
                Weight::Joined(weight)
            });
        }
        let part = |(name, rows): &(String, i64)| -> Result<PartWeight> {
            let quantizes = quantizes(name);
            let (name, shape, device) = (format!("{name}.weight"), [*rows, in_features], self.options.device);
            if let Some(weights) = self.quantized(&name)? {
                return Ok(PartWeight::Nf4(read_nf4(weights, &name, shape, device)?));
            }
            match &self.init {
                Init::Checkpoint(weights) if quantizes => {
                    Ok(PartWeight::Nf4(quantize_stored(weights, &name, shape, device)?))
                }
                _ => {
                    let dense = self.empty(&shape)?;
                    self.fill(&name, &dense, 0.0)?;
                    Ok(if quantizes {
                        PartWeight::Nf4(Nf4::quantize(&dense)?)
                    } else {
                        PartWeight::Dense(dense)
                    })
                }
            }
        };
        Ok(Weight::Parts(parts.iter().map(part).collect::<Result<_>>()?))
    }

    /// Room for a matrix `[rows, in]`. In 16 bits on a GPU there are 64 columns behind it, into which LoRA's B goes, and 64
    /// rows below it, into which A goes (csrc/linear.h: linear_tail, linear_gradient_tail): 1 % more memory.
    fn projection(&self, rows: i64, in_features: i64) -> Result<Tensor> {
        const ROOM: i64 = 64;
        let sixteen_bit = matches!(self.options.kind, Kind::Half | Kind::BFloat16);
        if !(self.options.device.is_cuda() && sixteen_bit) {
            return self.empty(&[rows, in_features]);
        }
        let wide = self.empty(&[rows + ROOM, in_features + ROOM])?;
        Ok(wide.f_narrow(0, 0, rows)?.f_narrow(1, 0, in_features)?)
    }

    /// The checkpoint, if it has the weight `name` in 4 bits.
    fn quantized(&self, name: &str) -> Result<Option<&Weights>> {
        match &self.init {
            Init::Checkpoint(weights) => Ok(weights.quant_state(name)?.map(|_| *weights)),
            Init::Random { .. } | Init::Unset => Ok(None),
        }
    }

    /// A norm stored as `name`, `[size]`.
    pub fn norm(&self, name: String, size: i64, eps: f64, offset: f64) -> Result<RmsNorm> {
        self.expect(&name, &[size])?;
        let weight = self.empty(&[size])?;
        self.fill(&name, &weight, 1.0 - offset)?;
        Ok(RmsNorm { name, weight, eps, offset })
    }

    /// Before memory is asked for: a config.json of another model may describe tensors larger than any machine.
    fn expect(&self, name: &str, shape: &[i64]) -> Result<()> {
        match &self.init {
            Init::Checkpoint(weights) => weights.expect_shape(name, shape),
            Init::Random { .. } | Init::Unset => Ok(()),
        }
    }

    fn empty(&self, shape: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (self.options.kind, self.options.device))?)
    }

    /// `vector_start` is what the elements of a random vector start as; matrices are drawn.
    fn fill(&self, name: &str, destination: &Tensor, vector_start: f64) -> Result<()> {
        match &self.init {
            Init::Checkpoint(weights) => weights.copy_into(name, destination),
            Init::Unset => Ok(()),
            Init::Random { std, generator } => {
                let mut destination = destination.shallow_clone();
                if destination.dim() == 1 {
                    let _ = destination.f_fill_(vector_start)?;
                } else if generator.device() == destination.device() && destination.device().is_cuda() {
                    generator.fill_normal(&destination, *std)?;
                } else if generator.device().is_cuda() {
                    // A matrix for the host's memory: drawn where it is quick, by pieces that take little memory there.
                    const PIECE: i64 = 4096;
                    let (rows, columns) = (destination.size()[0], destination.size()[1]);
                    for first in (0..rows).step_by(PIECE as usize) {
                        let mut piece = destination.f_narrow(0, first, PIECE.min(rows - first))?;
                        let options = (piece.kind(), generator.device());
                        let drawn = Tensor::f_empty([piece.size()[0], columns], options)?;
                        generator.fill_normal(&drawn, *std)?;
                        piece.f_copy_(&drawn)?;
                    }
                } else {
                    let drawn = Tensor::f_empty(destination.size(), (Kind::Float, Device::Cpu))?;
                    generator.fill_normal(&drawn, 1.0)?;
                    destination.f_copy_(&drawn.f_mul_scalar(*std)?)?;
                }
                Ok(())
            }
        }
    }
}

impl Linear {
    /// Input width.
    pub fn in_features(&self) -> i64 {
        match &self.weight {
            Weight::Joined(weight) => weight.size()[1],
            Weight::Parts(weights) => match &weights[0] {
                PartWeight::Dense(weight) => weight.size()[1],
                PartWeight::Nf4(nf4) => nf4.shape[1],
            },
            Weight::Fp8(fp8) => fp8.shape()[1],
        }
    }

    /// The weights that are not quantised.
    pub fn dense_weights(&self) -> Vec<&Tensor> {
        match &self.weight {
            Weight::Joined(weight) => vec![weight],
            Weight::Parts(weights) => weights.iter().filter_map(PartWeight::dense).collect(),
            Weight::Fp8(_) => Vec::new(),
        }
    }

    pub fn is_quantized(&self) -> bool {
        matches!(&self.weight, Weight::Parts(_))
    }

    /// First row of each part.
    pub fn rows(&self) -> impl Iterator<Item = (i64, &Part)> {
        self.parts.iter().scan(0, |row, part| {
            let first = *row;
            *row += part.rows;
            Some((first, part))
        })
    }
}

impl PartWeight {
    fn dense(&self) -> Option<&Tensor> {
        match self {
            PartWeight::Dense(weight) => Some(weight),
            PartWeight::Nf4(_) => None,
        }
    }
}

impl Lora {
    /// peft's initialisation of an update of a `[rows, in]` weight; both matrices f32 and trainable. `generator` is one of
    /// the CPU, so that the start is the same on every device.
    pub fn new(
        [rows, in_features]: [i64; 2],
        r: i64,
        (scale, dropout): (f64, f64),
        init: InitLoraWeights,
        generator: &Generator,
        device: Device,
    ) -> Result<Lora> {
        let empty = |shape: [i64; 2]| Tensor::f_zeros(shape, (Kind::Float, Device::Cpu));
        let uniform = |shape: [i64; 2]| -> Result<Tensor> {
            let (drawn, bound) = (empty(shape)?, 1.0 / (shape[1] as f64).sqrt());
            generator.fill_uniform(&drawn, -bound, bound)?;
            Ok(drawn)
        };
        let (a, b) = match init {
            InitLoraWeights::KaimingUniform => (uniform([r, in_features])?, empty([rows, r])?),
            InitLoraWeights::Gaussian => {
                let drawn = empty([r, in_features])?;
                generator.fill_normal(&drawn, 1.0 / r as f64)?;
                (drawn, empty([rows, r])?)
            }
            InitLoraWeights::Random => (uniform([r, in_features])?, uniform([rows, r])?),
        };
        let trainable = |tensor: Tensor| tensor.f_to_device(device)?.f_set_requires_grad(true);
        Ok(Lora { a: trainable(a)?, b: trainable(b)?, scale, dropout })
    }
}
