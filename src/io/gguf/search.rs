//! Scales of small runs of numbers that quantisation leaves nearest, weighted: the inner loops of the K-quants. Eight runs are searched
//! at once, each in a lane of its own.

use super::lanes::{Lanes, clamp, nearest};

/// Below this a run counts as zeros.
const TINY: f32 = 1e-15;

/// x ~ scale q with q in -top..top: the scale with the least `sum x^2 (x - scale q)^2`.
///
/// For levels q of any trial scale the best scale is `<q, x>_w / <q, q>_w`, and the error is then `<x, x>_w` less
/// `<q, x>_w^2 / <q, q>_w`: the trial with the largest such gain wins. Trials put the element of the largest magnitude on level
/// `-(top + step / 10)`.
#[inline(always)]
pub(super) fn symmetric<const N: usize>(x: &[Lanes; N], top: f32) -> Lanes {
    let size = |x: Lanes| x.map(f32::abs);
    let zero = Lanes::all(0.0);
    let extreme = x.iter().fold(zero, |extreme, &x| size(x).greater(size(extreme), x, extreme));
    let (mut best, mut scale) = (Lanes::all(-1.0), zero);
    for step in -9..=9 {
        let inverse = Lanes::all(-(top + 0.1 * step as f32)) / extreme;
        let (mut qx, mut qq) = (zero, zero);
        for &x in x {
            let q = (inverse * x).map(|q| clamp(nearest(q), -top, top - 1.0));
            let wq = x * x * q;
            qx += wq * x;
            qq += wq * q;
        }
        let gain = qq.greater(zero, qx * qx, Lanes::all(-1.0));
        let (least, trial) = (best * qq, qx / qq);
        scale = gain.greater(least, trial, scale);
        best = gain.greater(least, trial * qx, best);
    }
    Lanes::all(TINY).greater(size(extreme), zero, scale)
}

/// As [`symmetric`] for few levels, of one run: one trial, whose levels then move one at a time while that raises the gain.
// Inlined it lacks registers: Q3_K took 1.5 times as long.
#[inline(never)]
pub(super) fn symmetric_by_moves<const N: usize>(x: &[f32; N], top: f32) -> f32 {
    let extreme = x.iter().fold(0f32, |extreme, &x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme.abs() < TINY {
        return 0.0;
    }
    let inverse = -top / extreme;
    let mut levels: [f32; N] = std::array::from_fn(|i| clamp(nearest(inverse * x[i]), -top, top - 1.0));
    let (mut qx, mut qq) = (Lanes::all(0.0), Lanes::all(0.0));
    for (x, level) in x.as_chunks().0.iter().zip(levels.as_chunks().0) {
        let (x, level) = (Lanes(*x), Lanes(*level));
        let wq = x * x * level;
        qx += wq * x;
        qq += wq * level;
    }
    let (mut qx, mut qq): (f32, f32) = (qx.0.iter().sum(), qq.0.iter().sum());
    for _ in 0..5 {
        let mut moved = false;
        for (x, level) in x.iter().zip(&mut levels) {
            let weight = x * x;
            let (rest_qx, rest_qq) = (qx - weight * x * *level, qq - weight * *level * *level);
            if rest_qx <= 0.0 {
                continue;
            }
            let wanted = clamp(nearest(x * rest_qq / rest_qx), -top, top - 1.0);
            let (new_qx, new_qq) = (rest_qx + weight * x * wanted, rest_qq + weight * wanted * wanted);
            if wanted != *level && new_qq > 0.0 && new_qx * new_qx * qq > qx * qx * new_qq {
                (qx, qq, *level, moved) = (new_qx, new_qq, wanted, true);
            }
        }
        if !moved {
            break;
        }
    }
    if qq > 0.0 { qx / qq } else { 0.0 }
}

/// How [`affine`] tries scales: the k-th of `steps + 1` trials stretches the range over `top + first + k / 10` levels.
pub(super) struct Trials {
    pub(super) top: f32,
    pub(super) first: f32,
    pub(super) steps: i32,
    /// Judge a trial by `sum w |error|` instead of the squares.
    pub(super) absolute: bool,
}

/// x ~ scale q - min with q in 0..=top and min >= 0: scale and min with the least weighted error.
///
/// For levels q of a trial, scale and offset are those of weighted least squares; an offset above zero becomes zero.
#[inline(always)]
pub(super) fn affine<const N: usize>(
    x: &[Lanes; N],
    weights: &[Lanes; N],
    trials: &Trials,
) -> (Lanes, Lanes) {
    let Trials { top, first, steps, absolute } = *trials;
    let zero = Lanes::all(0.0);
    let low = x.iter().fold(zero, |low, &x| low.greater(x, x, low));
    let high = x.iter().fold(x[0], |high, &x| x.greater(high, x, high));
    let level = |inverse: Lanes, origin: Lanes, x: Lanes| {
        (inverse * (x - origin)).map(|q| clamp(nearest(q), 0.0, top))
    };
    let error = |levels: &[Lanes; N], scale: Lanes, offset: Lanes| {
        let mut sum = zero;
        for ((&q, &x), &weight) in levels.iter().zip(x).zip(weights) {
            let difference = scale * q + offset - x;
            sum += weight * if absolute { difference.map(f32::abs) } else { difference * difference };
        }
        sum
    };
    let (mut w, mut wx) = (zero, zero);
    for (&x, &weight) in x.iter().zip(weights) {
        w += weight;
        wx += weight * x;
    }
    let (mut scale, mut offset) = ((high - low) / Lanes::all(top), low);
    let inverse = Lanes::all(top) / (high - low);
    let mut least = error(&x.map(|x| level(inverse, low, x)), scale, offset);
    for step in 0..=steps {
        // Levels count from the best offset so far, which gives half a percent less error than from the least element.
        let inverse = Lanes::all(top + first + 0.1 * step as f32) / (high - offset);
        let (mut q, mut qq, mut qx) = (zero, zero, zero);
        let levels = std::array::from_fn(|i| {
            let (level, weight) = (level(inverse, offset, x[i]), weights[i]);
            let wq = weight * level;
            q += wq;
            qq += wq * level;
            qx += wq * x[i];
            level
        });
        let determinant = w * qq - q * q;
        let free = (qq * wx - q * qx) / determinant;
        let trial = free.greater(zero, qx / qq, (w * qx - wx * q) / determinant);
        let trial_offset = free.greater(zero, zero, free);
        let found = determinant.greater(zero, error(&levels, trial, trial_offset), Lanes::all(f32::INFINITY));
        scale = least.greater(found, trial, scale);
        offset = least.greater(found, trial_offset, offset);
        least = least.greater(found, found, least);
    }
    // A run of one number has no range.
    (high.greater(low, scale, zero), high.greater(low, -offset, -low))
}
