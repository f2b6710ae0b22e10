//! The losses as formulas over log-probabilities of whole completions; each gives one number a pair or example.

use anyhow::Result;
use tch::Tensor;

use super::{LossType, PreferenceArguments};

/// Log-probabilities of P pairs, sums over the completion's tokens, with the number of those: all `[P]`, f32.
pub struct PairLogProbs {
    pub chosen: Tensor,
    pub rejected: Tensor,
    pub chosen_len: Tensor,
    pub rejected_len: Tensor,
    /// The reference model's, of chosen and rejected.
    pub reference: Option<(Tensor, Tensor)>,
}

/// `log sigmoid(x)`
fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_log_sigmoid()?)
}

/// `-(1 - e) log sigmoid(x) - e log sigmoid(-x)`
fn smoothed(x: &Tensor, e: f64) -> Result<Tensor> {
    let loss = log_sigmoid(x)?.f_mul_scalar(e - 1.0)?;
    if e == 0.0 {
        return Ok(loss);
    }
    Ok(loss.f_sub(&log_sigmoid(&x.f_neg()?)?.f_mul_scalar(e)?)?)
}

/// `log(1 - exp(x))` of `x <= 0`; above -1e-7, where it would not be finite, that of -1e-7.
fn log_complement(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_clamp_max(-1e-7)?.f_expm1()?.f_neg()?.f_log()?)
}

impl PairLogProbs {
    /// What chosen and rejected score, up to the loss's own scale: log-ratios to the reference, log-probabilities without one,
    /// means over the tokens where the loss takes means.
    pub fn scores(&self, loss: LossType) -> Result<(Tensor, Tensor)> {
        let (mut chosen, mut rejected) = (self.chosen.shallow_clone(), self.rejected.shallow_clone());
        if let Some((of_chosen, of_rejected)) = self.reference.as_ref().filter(|_| loss.has_reference()) {
            (chosen, rejected) = (chosen.f_sub(of_chosen)?, rejected.f_sub(of_rejected)?);
        }
        if loss.takes_means() {
            (chosen, rejected) = (chosen.f_div(&self.chosen_len)?, rejected.f_div(&self.rejected_len)?);
        }
        Ok((chosen, rejected))
    }

    /// The loss of each pair without NLL terms, `[P]`. With `b` beta, `e` label_smoothing, `w`, `l` the [`scores`](Self::scores)
    /// of chosen and rejected, and `d = w - l`:
    ///
    /// - sigmoid `-log sigmoid(b d)` (arXiv:2305.18290)
    /// - hinge `max(0, 1 - b d)` (arXiv:2305.10425)
    /// - ipo `(d - 1 / (2 b))^2` (arXiv:2310.12036)
    /// - robust `[-(1 - e) log sigmoid(b d) + e log sigmoid(-b d)] / (1 - 2 e)` (arXiv:2403.00409)
    /// - cpo `-(1 - e) log sigmoid(b d) - e log sigmoid(-b d)` (arXiv:2401.08417)
    /// - simpo the same of `b d - gamma` (arXiv:2405.14734)
    /// - orpo `-b log sigmoid(odds(w) - odds(l))`, `odds(s) = s - log(1 - exp(s))` (arXiv:2403.07691)
    pub fn loss(&self, loss: LossType, args: &PreferenceArguments) -> Result<Tensor> {
        let (chosen, rejected) = self.scores(loss)?;
        let difference = chosen.f_sub(&rejected)?;
        let (beta, e) = (args.beta, args.label_smoothing);
        let scaled = difference.f_mul_scalar(beta)?;
        Ok(match loss {
            LossType::Sigmoid => log_sigmoid(&scaled)?.f_neg()?,
            LossType::Hinge => scaled.f_neg()?.f_add_scalar(1.0)?.f_relu()?,
            LossType::Ipo => difference.f_sub_scalar(1.0 / (2.0 * beta))?.f_square()?,
            LossType::Robust => {
                let flipped = log_sigmoid(&scaled.f_neg()?)?.f_mul_scalar(e)?;
                let clean = log_sigmoid(&scaled)?.f_mul_scalar(e - 1.0)?;
                clean.f_add(&flipped)?.f_div_scalar(1.0 - 2.0 * e)?
            }
            LossType::Cpo => smoothed(&scaled, e)?,
            LossType::Simpo => smoothed(&scaled.f_sub_scalar(args.simpo_gamma)?, e)?,
            LossType::Orpo => {
                let odds = difference.f_sub(&log_complement(&chosen)?.f_sub(&log_complement(&rejected)?)?)?;
                log_sigmoid(&odds)?.f_mul_scalar(-beta)?
            }
            LossType::Kto => unreachable!("it takes no pairs"),
        })
    }
}

/// KTO of E examples (arXiv:2402.01306), with `r` their log-ratios to the reference, `z` how far the model has moved on prompts with
/// other prompts' completions, at least 0 and without a gradient, and `b` beta:
/// desirable `D (1 - sigmoid(b (r - z)))`, undesirable `U (1 - sigmoid(b (z - r)))`.
pub struct Kto {
    /// `[E]`.
    pub log_ratio: Tensor,
    /// `[E]`, 1 for desirable and 0 for undesirable.
    pub desirable: Tensor,
    /// A scalar.
    pub z: Tensor,
}

impl Kto {
    /// `[E]`.
    pub fn loss(&self, args: &PreferenceArguments) -> Result<Tensor> {
        let sign = self.desirable.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
        let (desirable, undesirable) = (args.desirable_weight, args.undesirable_weight);
        let weight = self.desirable.f_mul_scalar(desirable - undesirable)?.f_add_scalar(undesirable)?;
        let moved = self.log_ratio.f_sub(&self.z)?.f_mul(&sign)?.f_mul_scalar(args.beta)?;
        // 1 - sigmoid(x) = sigmoid(-x)
        Ok(moved.f_neg()?.f_sigmoid()?.f_mul(&weight)?)
    }
}
