//! f32 rows as blocks of one scale each, and the way into the K-quants. dequantize.rs has the layouts.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::lanes::{byte, floor};
use super::{GgmlType, k_quants};

/// Appends the blocks of `values`, which must be whole ones. F16, BF16 and Q8_0 are byte for byte what ggml writes.
pub fn quantize_row(kind: GgmlType, values: &[f32], bytes: &mut Vec<u8>) {
    match kind {
        GgmlType::F32 => values.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
        GgmlType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            halves.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        }
        GgmlType::Bf16 => {
            values.iter().for_each(|&value| bytes.extend(bf16::from_f32(value).to_le_bytes()));
        }
        GgmlType::Q4_0 => blocks(values, |x| q4_0(x, bytes)),
        GgmlType::Q4_1 => blocks(values, |x| q4_1(x, bytes)),
        GgmlType::Q5_0 => blocks(values, |x| q5_0(x, bytes)),
        GgmlType::Q5_1 => blocks(values, |x| q5_1(x, bytes)),
        GgmlType::Q8_0 => blocks(values, |x| q8_0(x, bytes)),
        GgmlType::Q2K => blocks(values, |x| k_quants::q2_k(x, bytes)),
        GgmlType::Q3K => blocks(values, |x| k_quants::q3_k(x, bytes)),
        GgmlType::Q4K => blocks(values, |x| k_quants::q4_k(x, bytes)),
        GgmlType::Q5K => blocks(values, |x| k_quants::q5_k(x, bytes)),
        GgmlType::Q6K => blocks(values, |x| k_quants::q6_k(x, bytes)),
    }
}

#[inline(always)]
fn blocks<const N: usize>(values: &[f32], one: impl FnMut(&[f32; N])) {
    values.as_chunks::<N>().0.iter().for_each(one);
}

/// Appends `value` in f16 and returns what a reader will see.
#[inline(always)]
pub(super) fn push_half(value: f32, bytes: &mut Vec<u8>) -> f32 {
    let half = f16::from_f32(value);
    bytes.extend_from_slice(&half.to_le_bytes());
    half.to_f32()
}

#[inline(always)]
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

#[inline(always)]
fn range(x: &[f32; 32]) -> (f32, f32) {
    let of_all = |f: fn(f32, f32) -> f32| {
        let mut found: [f32; 16] = std::array::from_fn(|i| f(x[i], x[i + 16]));
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                found[i] = f(found[i], found[i + half]);
            }
        }
        found[0]
    };
    (of_all(|a, b| if b < a { b } else { a }), of_all(|a, b| if b > a { b } else { a }))
}

/// The element of the largest magnitude, with its sign: the first of them.
#[inline(always)]
fn extreme(x: &[f32; 32]) -> f32 {
    let (low, high) = range(x);
    if high == -low {
        x.iter().copied().find(|x| x.abs() == high).unwrap_or(0.0)
    } else if high > -low {
        high
    } else {
        low
    }
}

/// Levels 0..=top: the integer part of `(x - low) / d + shift`, which is above 0 and below 33.
///
/// Of a float from 32 to 64 the bits 18 to 22 are the integer part less 32: no rounding, no conversion. The bits behind
/// them count 2^-18, so half of that is taken off before the sum is rounded: what is just below an integer stays below
/// it, and an integer is halfway between two sums, of which it is the even one.
#[inline(always)]
fn levels(x: &[f32; 32], low: f32, d: f32, shift: f32, top: u8) -> [u8; 32] {
    const TO_BITS: f32 = 32.0 - 1.0 / (1 << 19) as f32;
    let (inverse, top) = (inverse(d), 32.5 + f32::from(top));
    x.map(|x| {
        let level = (x - low) * inverse + shift + TO_BITS;
        let level = if level > top { top } else { level };
        (level.to_bits() >> 18) as u8 & 31
    })
}

#[inline(always)]
fn push_nibbles(levels: &[u8; 32], bytes: &mut Vec<u8>) {
    let nibbles: [u8; 16] = std::array::from_fn(|i| levels[i] & 15 | (levels[i + 16] & 15) << 4);
    bytes.extend_from_slice(&nibbles);
}

/// Bit 4 of the levels, 32 bits. Of eight at once: bit 8 i of the word times 2^(56 - 7 i) is bit 56 + i.
#[inline(always)]
fn push_fifth_bits(levels: &[u8; 32], bytes: &mut Vec<u8>) {
    bytes.extend(levels.as_chunks::<8>().0.iter().map(|eight| {
        let word = u64::from_le_bytes(*eight) >> 4 & 0x0101_0101_0101_0101;
        (word.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
    }));
}

/// The extreme element becomes level 0, so that all 16 levels are used on its side: d = -extreme / 8.
#[inline(always)]
fn q4_0(x: &[f32; 32], bytes: &mut Vec<u8>) {
    let d = extreme(x) / -8.0;
    push_half(d, bytes);
    push_nibbles(&levels(x, 0.0, d, 8.5, 15), bytes);
}

#[inline(always)]
fn q4_1(x: &[f32; 32], bytes: &mut Vec<u8>) {
    let (low, high) = range(x);
    let d = (high - low) / 15.0;
    push_half(d, bytes);
    push_half(low, bytes);
    push_nibbles(&levels(x, low, d, 0.5, 15), bytes);
}

#[inline(always)]
fn q5_0(x: &[f32; 32], bytes: &mut Vec<u8>) {
    let d = extreme(x) / -16.0;
    push_half(d, bytes);
    let levels = levels(x, 0.0, d, 16.5, 31);
    push_fifth_bits(&levels, bytes);
    push_nibbles(&levels, bytes);
}

#[inline(always)]
fn q5_1(x: &[f32; 32], bytes: &mut Vec<u8>) {
    let (low, high) = range(x);
    let d = (high - low) / 31.0;
    push_half(d, bytes);
    push_half(low, bytes);
    let levels = levels(x, low, d, 0.5, 31);
    push_fifth_bits(&levels, bytes);
    push_nibbles(&levels, bytes);
}

/// d = max |x| / 127; halves away from zero, as ggml rounds them.
#[inline(always)]
fn q8_0(x: &[f32; 32], bytes: &mut Vec<u8>) {
    let d = extreme(x).abs() / 127.0;
    push_half(d, bytes);
    let inverse = inverse(d);
    bytes.extend(x.map(|x| {
        let level = x * inverse;
        let rounded = floor(level.abs() + 0.5);
        byte(if level < 0.0 { -rounded } else { rounded })
    }));
}

#[cfg(test)]
mod tests {
    use super::levels;

    /// In the middle between two levels and one step of f32 beside it, where a rounded sum could tip over.
    #[test]
    fn levels_are_integer_parts() {
        for level in 1..32u8 {
            let edge = f32::from(level);
            let below = |x: f32| f32::from_bits(x.to_bits() - 1);
            for (x, expected) in [(edge, level), (below(edge), level - 1), (below(below(edge)), level - 1)] {
                assert_eq!(levels(&[x; 32], 0.0, 1.0, 0.0, 31), [expected; 32], "{x}");
            }
        }
        assert_eq!(levels(&[16.5; 32], 0.0, 1.0, 0.0, 15), [15; 32]);
    }
}
