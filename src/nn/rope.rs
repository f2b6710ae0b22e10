//! Angles of the rotary position embedding, with the scaling rules of Hugging Face's `rope_parameters`.
//!
//! Computed as transformers does, in f32 and in the same order, so that angles agree to the last bit or two.

use std::collections::HashMap;
use std::f64::consts::PI;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

/// How frequencies `theta^(-2i/R)` are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Base grown with the sequence length past `max_position_embeddings` (NTK-aware scaling).
    Dynamic {
        factor: f64,
        max_position_embeddings: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
    /// arXiv:2309.00071
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        original_max_position_embeddings: f64,
    },
    /// arXiv:2402.13753: one divisor a frequency, for sequences within and past the original context.
    LongRope {
        short_factor: Vec<f64>,
        long_factor: Vec<f64>,
        original_max_position_embeddings: f64,
    },
}

/// Rotary embedding of `dim` dims (R), for some or all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// Rotated dims R: `head_dim * partial_rotary_factor`.
    pub dim: i64,
    pub scaling: RopeScaling,
    /// Multiplies cos and sin.
    pub attention_factor: f64,
}

impl Rope {
    /// cos and sin `[N, R/2]` in f32 of `positions` (int64 `[N]`) in a batch whose longest sequence has `seq_len` tokens.
    pub fn cos_sin(&self, positions: &Tensor, seq_len: i64) -> Result<(Tensor, Tensor)> {
        let frequencies = self.inv_freq(seq_len, positions.device())?;
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
        let scaled = |t: Tensor| -> Result<Tensor> {
            Ok(if self.attention_factor == 1.0 { t } else { t.f_mul_scalar(self.attention_factor)? })
        };
        Ok((scaled(angles.f_cos()?)?, scaled(angles.f_sin()?)?))
    }

    /// Equal for two lengths exactly if their frequencies are: a cache of rotated keys is valid only within one regime.
    pub fn regime(&self, seq_len: i64) -> i64 {
        match self.scaling {
            RopeScaling::Dynamic { max_position_embeddings, .. } => {
                seq_len.max(max_position_embeddings as i64)
            }
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                i64::from(seq_len as f64 > original_max_position_embeddings)
            }
            _ => 0,
        }
    }

    /// What llama3 scaling divides each frequency by, `[R/2]`: 1 for short wavelengths, `factor` for long ones, a ramp between.
    ///
    /// # Errors
    /// Another scaling.
    pub fn divisors(&self) -> Result<Vec<f32>> {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        } = self.scaling
        else {
            bail!("{:?} has no divisors of its own", self.scaling);
        };
        let divisor = |i: i64| {
            let wavelength = 2.0 * PI * self.theta.powf((2 * i) as f64 / self.dim as f64);
            if wavelength < original / high_freq_factor {
                1.0
            } else if wavelength > original / low_freq_factor {
                factor
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        Ok((0..self.dim / 2).map(|i| divisor(i) as f32).collect())
    }

    /// Frequencies `[R/2]` in f32 for sequences of `seq_len` tokens.
    pub fn inv_freq(&self, seq_len: i64, device: Device) -> Result<Tensor> {
        let dim = self.dim as f64;
        let exponents = Tensor::f_arange_start_step(0, self.dim, 2, (Kind::Int64, device))?
            .f_to_kind(Kind::Float)?
            .f_div_scalar(dim)?;
        let powers = |theta: f64| Tensor::f_pow_scalar(theta, &exponents);
        let plain = || -> Result<Tensor> { Ok(powers(self.theta)?.f_reciprocal()?) };
        Ok(match &self.scaling {
            RopeScaling::Default => plain()?,
            RopeScaling::Linear { factor } => plain()?.f_div_scalar(*factor)?,
            RopeScaling::Dynamic { factor, max_position_embeddings } => {
                let length = (seq_len as f64).max(*max_position_embeddings);
                let stretch = factor * length / max_position_embeddings - (factor - 1.0);
                powers(self.theta * stretch.powf(dim / (dim - 2.0)))?.f_reciprocal()?
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let inv_freq = plain()?;
                let wavelength = inv_freq.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
                let low_wavelength = original_max_position_embeddings / low_freq_factor;
                let high_wavelength = original_max_position_embeddings / high_freq_factor;
                let smooth = wavelength
                    .f_reciprocal()?
                    .f_mul_scalar(*original_max_position_embeddings)?
                    .f_sub_scalar(*low_freq_factor)?
                    .f_div_scalar(high_freq_factor - low_freq_factor)?
                    .f_clamp(0.0, 1.0)?;
                let divided = inv_freq.f_div_scalar(*factor)?;
                // smooth is 0 past the low-frequency wavelength and 1 below the high-frequency one.
                let ramp =
                    divided.f_mul(&smooth.f_neg()?.f_add_scalar(1.0)?)?.f_add(&inv_freq.f_mul(&smooth)?)?;
                let ramp = divided.f_where_self(&wavelength.f_gt(low_wavelength)?, &ramp)?;
                inv_freq.f_where_self(&wavelength.f_lt(high_wavelength)?, &ramp)?
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
            } => {
                // The dim whose frequency turns `rotations` times over the original context.
                let turning_dim = |rotations: f64| {
                    dim * (original_max_position_embeddings / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (low, high) = (turning_dim(*beta_fast), turning_dim(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let interpolated = Tensor::f_arange(self.dim / 2, (Kind::Float, device))?
                    .f_sub_scalar(low)?
                    .f_div_scalar(high - low)?
                    .f_clamp(0.0, 1.0)?;
                let inv_freq = plain()?;
                let divided = inv_freq.f_div_scalar(*factor)?;
                let kept = interpolated.f_neg()?.f_add_scalar(1.0)?;
                divided.f_mul(&interpolated)?.f_add(&inv_freq.f_mul(&kept)?)?
            }
            RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings } => {
                let long = seq_len as f64 > *original_max_position_embeddings;
                let divisors: Vec<f32> =
                    (if long { long_factor } else { short_factor }).iter().map(|&d| d as f32).collect();
                let divisors = Tensor::f_from_slice(&divisors)?.f_to_device(device)?;
                powers(self.theta)?.f_mul(&divisors)?.f_reciprocal()?
            }
        })
    }
}

/// The angles of all positions up to some length, computed once: cos and sin `[positions, R/2]` of each rope and regime.
#[derive(Debug, Default)]
pub struct RopeTables {
    tables: HashMap<(usize, i64), (Tensor, Tensor)>,
}

/// Tables kept at most: a rope that stretches with every token has one for each length.
const MOST_TABLES: usize = 16;

impl RopeTables {
    /// As [`Rope::cos_sin`], for `positions` (int64 `[N]`, all below `end`) of sequences of `seq_len` tokens; `index` tells
    /// the rope apart from others.
    pub fn cos_sin(
        &mut self,
        index: usize,
        rope: &Rope,
        positions: &Tensor,
        end: usize,
        seq_len: i64,
    ) -> Result<(Tensor, Tensor)> {
        let (cos, sin) = self.table(index, rope, positions.device(), end, seq_len)?;
        Ok((cos.f_index_select(0, positions)?, sin.f_index_select(0, positions)?))
    }

    /// cos and sin of all positions below `end`, or more.
    pub fn table(
        &mut self,
        index: usize,
        rope: &Rope,
        device: Device,
        end: usize,
        seq_len: i64,
    ) -> Result<(Tensor, Tensor)> {
        let key = (index, rope.regime(seq_len));
        let long_enough = self.tables.get(&key).is_some_and(|(cos, _)| cos.size()[0] >= end as i64);
        if !long_enough {
            if self.tables.len() >= MOST_TABLES {
                self.tables.clear();
            }
            let length = end.next_power_of_two().max(128) as i64;
            let all = Tensor::f_arange(length, (Kind::Int64, device))?;
            self.tables.insert(key, rope.cos_sin(&all, seq_len)?);
        }
        let (cos, sin) = &self.tables[&key];
        Ok((cos.shallow_clone(), sin.shallow_clone()))
    }
}
