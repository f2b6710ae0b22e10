//! The K-quants: 256 elements in runs of 16 or 32, the scales of the runs themselves quantised. dequantize.rs has the layouts.
//!
//! Each follows the same steps: the best scale (and minimum) of each run; these in a few bits below one f16 factor of the
//! block; and the levels again, for what a reader will see of the scales.

use super::blocks::push_half;
use super::lanes::{LANES, Lanes, byte, clamp, nearest};
use super::search::{Trials, affine, symmetric, symmetric_by_moves};

const BLOCK: usize = 256;
/// Below this a block counts as zeros.
const TINY: f32 = 1e-15;

/// Runs of a block as arrays.
#[inline(always)]
fn runs<const N: usize>(x: &[f32; BLOCK]) -> &[[f32; N]] {
    x.as_chunks::<N>().0
}

/// Eight runs from run `first` on, one in a lane.
#[inline(always)]
fn lanes<const N: usize>(x: &[f32; BLOCK], first: usize) -> [Lanes; N] {
    let runs = &runs::<N>(x)[first..first + LANES];
    std::array::from_fn(|i| Lanes(std::array::from_fn(|lane| runs[lane][i])))
}

#[inline(always)]
fn level(x: f32, inverse: f32, low: f32, high: f32) -> u8 {
    byte(clamp(nearest(x * inverse), low, high) - low)
}

/// Scales of runs as levels 0..=top below one factor: the factor, and the levels.
#[inline(always)]
fn below<const RUNS: usize>(scales: &[f32; RUNS], top: f32) -> (f32, [u8; RUNS]) {
    let largest = scales.iter().fold(0f32, |largest, &scale| largest.max(scale));
    if largest <= 0.0 {
        return (0.0, [0; RUNS]);
    }
    let inverse = top / largest;
    (largest / top, scales.map(|scale| level(scale.max(0.0), inverse, 0.0, top)))
}

/// The levels 0..=top of a block whose runs have `scale q - min`.
#[inline(always)]
fn affine_levels<const N: usize>(
    x: &[f32; BLOCK],
    top: f32,
    run_factors: impl Fn(usize) -> (f32, f32),
) -> [u8; BLOCK] {
    let mut levels = [0u8; BLOCK];
    for (j, (run, levels)) in runs::<N>(x).iter().zip(levels.chunks_mut(N)).enumerate() {
        let (scale, min) = run_factors(j);
        if scale == 0.0 {
            continue;
        }
        let inverse = 1.0 / scale;
        for (x, found) in run.iter().zip(levels) {
            *found = level(x + min, inverse, 0.0, top);
        }
    }
    levels
}

/// The best scale and minimum of each run: weights `|x|`, or with `spread` `|x| + rms(run)`, so that small elements count as well.
#[inline(always)]
fn affine_runs<const N: usize, const RUNS: usize>(
    x: &[f32; BLOCK],
    spread: bool,
    trials: &Trials,
) -> ([f32; RUNS], [f32; RUNS]) {
    let (mut scales, mut mins) = ([0f32; RUNS], [0f32; RUNS]);
    for first in (0..RUNS).step_by(LANES) {
        let x = lanes::<N>(x, first);
        let mean = x.iter().fold(Lanes::all(0.0), |sum, &x| sum + x * x).map(|sum| sum / N as f32);
        let base = if spread { mean.map(f32::sqrt) } else { Lanes::all(0.0) };
        let weights = x.map(|x| base + x.map(f32::abs));
        let (scale, min) = affine(&x, &weights, trials);
        scales[first..first + LANES].copy_from_slice(&scale.0);
        mins[first..first + LANES].copy_from_slice(&min.0);
    }
    (scales, mins)
}

/// Two bits of each level at `shift`: elements 32 apart share a byte.
#[inline(always)]
fn push_pairs(levels: &[u8; BLOCK], bytes: &mut Vec<u8>) {
    for part in levels.chunks(128) {
        bytes.extend((0..32).map(|i| (0..4).fold(0, |byte, j| byte | (part[32 * j + i] & 3) << (2 * j))));
    }
}

/// Low nibbles: of each 64 elements the first 32 and the last 32 share bytes.
#[inline(always)]
fn push_nibbles(levels: &[u8; BLOCK], bytes: &mut Vec<u8>) {
    for part in levels.chunks(64) {
        bytes.extend((0..32).map(|i| part[i] & 15 | (part[i + 32] & 15) << 4));
    }
}

#[inline(always)]
pub(super) fn q2_k(x: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let trials = Trials { top: 3.0, first: -0.5, steps: 15, absolute: true };
    let (scales, mins) = affine_runs::<16, 16>(x, false, &trials);
    let ((d, scales), (dmin, mins)) = (below(&scales, 15.0), below(&mins, 15.0));
    bytes.extend((0..16).map(|j| scales[j] | mins[j] << 4));
    let place = bytes.len();
    // The factors stand behind the levels, which need them rounded.
    let mut factors = Vec::with_capacity(4);
    let (d, dmin) = (push_half(d, &mut factors), push_half(dmin, &mut factors));
    let levels = affine_levels::<16>(x, 3.0, |j| (d * f32::from(scales[j]), dmin * f32::from(mins[j])));
    push_pairs(&levels, bytes);
    debug_assert_eq!(bytes.len() - place, 64);
    bytes.extend(factors);
}

#[inline(always)]
pub(super) fn q3_k(x: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let mut scales = [0f32; 16];
    for (scale, run) in scales.iter_mut().zip(runs::<16>(x)) {
        *scale = symmetric_by_moves(run, 4.0);
    }
    let largest = scales.iter().fold(0f32, |most, &s| if s.abs() > most.abs() { s } else { most });
    let (factor, inverse) = if largest == 0.0 { (0.0, 0.0) } else { (largest / -32.0, -32.0 / largest) };
    let packed = scales.map(|scale| level(scale, inverse, -32.0, 31.0));
    let mut factors = Vec::with_capacity(2);
    let d = push_half(factor, &mut factors);
    let mut levels = [0u8; BLOCK];
    for (j, (run, levels)) in runs::<16>(x).iter().zip(levels.chunks_mut(16)).enumerate() {
        let scale = d * (f32::from(packed[j]) - 32.0);
        // Level 4 means zero.
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (x, found) in run.iter().zip(levels) {
            *found = level(*x, inverse, -4.0, 3.0);
        }
    }
    bytes.extend((0..32).map(|i| (0..8).fold(0, |byte, j| byte | (levels[32 * j + i] >> 2) << j)));
    push_pairs(&levels, bytes);
    bytes.extend((0..8).map(|j| packed[j] & 15 | (packed[j + 8] & 15) << 4));
    bytes.extend((0..4).map(|j| (0..4).fold(0, |byte, k| byte | (packed[j + 4 * k] >> 4) << (2 * k))));
    bytes.extend(factors);
}

/// Six bits of eight scales and eight minima in 12 bytes.
#[inline(always)]
fn push_scales_and_mins(scales: &[u8; 8], mins: &[u8; 8], bytes: &mut Vec<u8>) {
    bytes.extend((0..4).map(|j| scales[j] | scales[j + 4] >> 4 << 6));
    bytes.extend((0..4).map(|j| mins[j] | mins[j + 4] >> 4 << 6));
    bytes.extend((4..8).map(|j| scales[j] & 15 | (mins[j] & 15) << 4));
}

/// The part that Q4_K and Q5_K share: factors and packed scales are appended, the levels returned.
#[inline(always)]
fn scales_of_eight(x: &[f32; BLOCK], trials: &Trials, bytes: &mut Vec<u8>) -> [u8; BLOCK] {
    let (scales, mins) = affine_runs::<32, 8>(x, true, trials);
    let ((d, scales), (dmin, mins)) = (below(&scales, 63.0), below(&mins, 63.0));
    let (d, dmin) = (push_half(d, bytes), push_half(dmin, bytes));
    push_scales_and_mins(&scales, &mins, bytes);
    affine_levels::<32>(x, trials.top, |j| (d * f32::from(scales[j]), dmin * f32::from(mins[j])))
}

#[inline(always)]
pub(super) fn q4_k(x: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let trials = Trials { top: 15.0, first: -1.0, steps: 20, absolute: false };
    let levels = scales_of_eight(x, &trials, bytes);
    push_nibbles(&levels, bytes);
}

#[inline(always)]
pub(super) fn q5_k(x: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let trials = Trials { top: 31.0, first: -0.5, steps: 15, absolute: false };
    let levels = scales_of_eight(x, &trials, bytes);
    bytes.extend((0..32).map(|i| (0..8).fold(0, |byte, j| byte | (levels[32 * j + i] >> 4) << j)));
    push_nibbles(&levels, bytes);
}

#[inline(always)]
pub(super) fn q6_k(x: &[f32; BLOCK], bytes: &mut Vec<u8>) {
    let mut scales = [0f32; 16];
    for first in (0..16).step_by(LANES) {
        scales[first..first + LANES].copy_from_slice(&symmetric(&lanes::<16>(x, first), 32.0).0);
    }
    let largest = scales.iter().fold(0f32, |most, &s| if s.abs() > most.abs() { s } else { most });
    if largest.abs() < TINY {
        bytes.extend([0; 210]);
        return;
    }
    let inverse = -128.0 / largest;
    let packed: [i8; 16] = scales.map(|scale| nearest(scale * inverse).min(127.0) as i8);
    let mut factors = Vec::with_capacity(2);
    let d = push_half(1.0 / inverse, &mut factors);
    let mut levels = [0u8; BLOCK];
    for (j, (run, levels)) in runs::<16>(x).iter().zip(levels.chunks_mut(16)).enumerate() {
        let scale = d * f32::from(packed[j]);
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (x, found) in run.iter().zip(levels) {
            *found = level(*x, inverse, -32.0, 31.0);
        }
    }
    for part in levels.chunks(128) {
        bytes.extend((0..64).map(|i| part[i] & 15 | (part[i + 64] & 15) << 4));
    }
    for part in levels.chunks(128) {
        bytes.extend((0..32).map(|i| (0..4).fold(0, |byte, j| byte | (part[32 * j + i] >> 4) << (2 * j))));
    }
    bytes.extend(packed.map(|scale| scale as u8));
    bytes.extend(factors);
}
