//! Scales of small runs of numbers that quantisation leaves nearest, weighted: the inner loops of the K-quants.
//!
//! Sums are kept in eight lanes, so that they become vector instructions without a reordering that the compiler may not make.

/// f32 numbers of a vector.
const LANES: usize = 8;
/// Below this a run counts as zeros.
const TINY: f32 = 1e-15;

/// The nearest integer, halves to the even one, for |x| < 2^22: adding 1.5 x 2^23 leaves no bits behind the point. A plain
/// `round` would be a call of the C library on the x86-64 baseline.
#[inline(always)]
pub(super) fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    // Not f32::clamp: it asks for NaN.
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// `sum_i f(i)` over the run in lanes.
#[inline(always)]
fn lanes<const N: usize, const K: usize>(mut terms: impl FnMut(usize) -> [f32; K]) -> [f32; K] {
    let mut sums = [[0f32; LANES]; K];
    for base in (0..N).step_by(LANES) {
        for lane in 0..LANES {
            let term = terms(base + lane);
            for (sums, term) in sums.iter_mut().zip(term) {
                sums[lane] += term;
            }
        }
    }
    sums.map(|lanes| lanes.iter().sum())
}

/// x ~ scale q with q in -top..top: the scale with the least `sum x^2 (x - scale q)^2`.
///
/// For levels q of any trial scale the best scale is `<q, x>_w / <q, q>_w`, and the error is then `<x, x>_w` less
/// `<q, x>_w^2 / <q, q>_w`: the trial with the largest such gain wins. Trials put the element of the largest magnitude on level
/// `-(top + step / 10)`.
pub(super) fn symmetric<const N: usize>(x: &[f32; N], top: f32) -> f32 {
    let extreme = x.iter().fold(0f32, |extreme, &x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme.abs() < TINY {
        return 0.0;
    }
    let (mut best, mut scale) = (-1f32, 0f32);
    for step in -9..=9 {
        let inverse = -(top + 0.1 * step as f32) / extreme;
        let [qx, qq] = lanes::<N, 2>(|i| {
            let q = clamp(nearest(inverse * x[i]), -top, top - 1.0);
            let wq = x[i] * x[i] * q;
            [wq * x[i], wq * q]
        });
        if qq > 0.0 && qx * qx > best * qq {
            scale = qx / qq;
            best = scale * qx;
        }
    }
    scale
}

/// As [`symmetric`] for few levels: one trial, whose levels then move one at a time while that raises the gain.
pub(super) fn symmetric_by_moves<const N: usize>(x: &[f32; N], top: f32) -> f32 {
    let extreme = x.iter().fold(0f32, |extreme, &x| if x.abs() > extreme.abs() { x } else { extreme });
    if extreme.abs() < TINY {
        return 0.0;
    }
    let inverse = -top / extreme;
    let mut levels: [f32; N] = std::array::from_fn(|i| clamp(nearest(inverse * x[i]), -top, top - 1.0));
    let [mut qx, mut qq] = lanes::<N, 2>(|i| {
        let wq = x[i] * x[i] * levels[i];
        [wq * x[i], wq * levels[i]]
    });
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
pub(super) fn affine<const N: usize>(x: &[f32; N], weights: &[f32; N], trials: &Trials) -> (f32, f32) {
    let Trials { top, first, steps, absolute } = *trials;
    let low = x.iter().fold(0f32, |low, &x| if x < low { x } else { low });
    let high = x.iter().fold(x[0], |high, &x| if x > high { x } else { high });
    if high <= low {
        return (0.0, -low);
    }
    let error = |inverse: f32, origin: f32, scale: f32, offset: f32| {
        let [sum] = lanes::<N, 1>(|i| {
            let q = clamp(nearest(inverse * (x[i] - origin)), 0.0, top);
            let difference = scale * q + offset - x[i];
            [weights[i] * if absolute { difference.abs() } else { difference * difference }]
        });
        sum
    };
    let [w, wx] = lanes::<N, 2>(|i| [weights[i], weights[i] * x[i]]);
    let mut best = ((high - low) / top, low);
    let mut least = error(top / (high - low), low, best.0, best.1);
    for step in 0..=steps {
        // Levels count from the best offset so far, which gives half a percent less error than from the least element.
        let origin = best.1;
        let inverse = (top + first + 0.1 * step as f32) / (high - origin);
        let [q, qq, qx] = lanes::<N, 3>(|i| {
            let q = clamp(nearest(inverse * (x[i] - origin)), 0.0, top);
            let wq = weights[i] * q;
            [wq, wq * q, wq * x[i]]
        });
        let determinant = w * qq - q * q;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut offset) = ((w * qx - wx * q) / determinant, (qq * wx - q * qx) / determinant);
        if offset > 0.0 {
            (scale, offset) = (qx / qq, 0.0);
        }
        let found = error(inverse, origin, scale, offset);
        if found < least {
            (least, best) = (found, (scale, offset));
        }
    }
    (best.0, -best.1)
}
