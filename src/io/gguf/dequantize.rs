//! Quantised blocks as f32. The layouts are those of ggml's blocks; each function says its own.

use half::{bf16, f16};

use super::GgmlType;

/// The elements of whole blocks. `values` says how many there are.
pub fn dequantize_row(kind: GgmlType, bytes: &[u8], values: &mut [f32]) {
    let blocks = |values: &mut [f32], one: fn(&[u8], &mut [f32])| {
        let (length, size) = (kind.block_len(), kind.block_bytes());
        values.chunks_mut(length).zip(bytes.chunks(size)).for_each(|(values, block)| one(block, values));
    };
    match kind {
        GgmlType::F32 => scalars(bytes, values, f32::from_le_bytes),
        GgmlType::F16 => scalars(bytes, values, |bytes: [u8; 2]| f16::from_le_bytes(bytes).to_f32()),
        GgmlType::Bf16 => scalars(bytes, values, |bytes: [u8; 2]| bf16::from_le_bytes(bytes).to_f32()),
        GgmlType::Q4_0 => blocks(values, q4_0),
        GgmlType::Q4_1 => blocks(values, q4_1),
        GgmlType::Q5_0 => blocks(values, q5_0),
        GgmlType::Q5_1 => blocks(values, q5_1),
        GgmlType::Q8_0 => blocks(values, q8_0),
        GgmlType::Q2K => blocks(values, q2_k),
        GgmlType::Q3K => blocks(values, q3_k),
        GgmlType::Q4K => blocks(values, q4_k),
        GgmlType::Q5K => blocks(values, q5_k),
        GgmlType::Q6K => blocks(values, q6_k),
    }
}

fn scalars<const N: usize>(bytes: &[u8], values: &mut [f32], one: impl Fn([u8; N]) -> f32) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = one(*bytes);
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// `d, q[16]`: d (q - 8); low nibbles are the first 16 elements.
fn q4_0(block: &[u8], values: &mut [f32]) {
    let d = half(block);
    for (i, &byte) in block[2..18].iter().enumerate() {
        values[i] = (f32::from(byte & 15) - 8.0) * d;
        values[i + 16] = (f32::from(byte >> 4) - 8.0) * d;
    }
}

/// `d, m, q[16]`: d q + m.
fn q4_1(block: &[u8], values: &mut [f32]) {
    let (d, m) = (half(block), half(&block[2..]));
    for (i, &byte) in block[4..20].iter().enumerate() {
        values[i] = f32::from(byte & 15) * d + m;
        values[i + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// The fifth bits of 32 elements, element i in bit i, and their nibbles: the levels, in order.
fn five_bits(high: &[u8], nibbles: &[u8]) -> [f32; 32] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    std::array::from_fn(|i| {
        let low = if i < 16 { nibbles[i] & 15 } else { nibbles[i - 16] >> 4 };
        (u32::from(low) | (high >> i & 1) << 4) as f32
    })
}

/// `d, high bits, q[16]`: d (q - 16).
fn q5_0(block: &[u8], values: &mut [f32]) {
    let d = half(block);
    let levels = five_bits(&block[2..6], &block[6..22]);
    values.iter_mut().zip(levels).for_each(|(value, level)| *value = (level - 16.0) * d);
}

/// `d, m, high bits, q[16]`: d q + m.
fn q5_1(block: &[u8], values: &mut [f32]) {
    let (d, m) = (half(block), half(&block[2..]));
    let levels = five_bits(&block[4..8], &block[8..24]);
    values.iter_mut().zip(levels).for_each(|(value, level)| *value = level * d + m);
}

/// `d, i8 q[32]`: d q.
fn q8_0(block: &[u8], values: &mut [f32]) {
    let d = half(block);
    values.iter_mut().zip(&block[2..34]).for_each(|(value, &q)| *value = f32::from(q as i8) * d);
}

/// `scales[16], q[64], d, dmin`: runs of 16 elements with scale and minimum in the nibbles of a byte; the 2-bit levels of elements
/// 32 apart share a byte.
fn q2_k(block: &[u8], values: &mut [f32]) {
    let (d, dmin) = (half(&block[80..]), half(&block[82..]));
    for (i, value) in values.iter_mut().enumerate() {
        let (part, within) = (i / 128, i % 128);
        let q = block[16 + 32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let scale = block[i / 16];
        *value = d * f32::from(scale & 15) * f32::from(q) - dmin * f32::from(scale >> 4);
    }
}

/// `high bits[32], q[64], scales[12], d`: d (s - 32) (q - 4), runs of 16 elements.
fn q3_k(block: &[u8], values: &mut [f32]) {
    let (high, low, packed, d) = (&block[..32], &block[32..96], &block[96..108], half(&block[108..]));
    for (i, value) in values.iter_mut().enumerate() {
        let (part, within) = (i / 128, i % 128);
        let q = low[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let bit = high[within % 32] >> (4 * part + within / 32) & 1;
        let level = f32::from(q | bit << 2) - 4.0;
        *value = d * (f32::from(six_bit_scale(packed, i / 16)) - 32.0) * level;
    }
}

/// Scale j of Q3_K: its low nibbles stand in 8 bytes, the two bits above in the last four.
fn six_bit_scale(packed: &[u8], j: usize) -> u8 {
    let low = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
    low | (packed[8 + j % 4] >> (2 * (j / 4)) & 3) << 4
}

/// Scale and minimum j of Q4_K and Q5_K, 6 bits each.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `d, dmin, scales[12], q[128]`: d s q - dmin m; of each 64 elements the low nibbles are the first 32.
fn q4_k(block: &[u8], values: &mut [f32]) {
    let (d, dmin) = (half(block), half(&block[2..]));
    for (j, run) in values.chunks_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let bytes = &block[16 + 32 * (j / 2)..][..32];
        for (value, byte) in run.iter_mut().zip(bytes) {
            *value = scale * f32::from(byte >> (4 * (j % 2)) & 15) - min;
        }
    }
}

/// `d, dmin, scales[12], high bits[32], q[128]`: as Q4_K with a fifth bit, of run j in bit j.
fn q5_k(block: &[u8], values: &mut [f32]) {
    let (d, dmin) = (half(block), half(&block[2..]));
    for (j, run) in values.chunks_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let bytes = &block[48 + 32 * (j / 2)..][..32];
        for ((value, byte), high) in run.iter_mut().zip(bytes).zip(&block[16..48]) {
            let level = byte >> (4 * (j % 2)) & 15 | (high >> j & 1) << 4;
            *value = scale * f32::from(level) - min;
        }
    }
}

/// `low nibbles[128], high bits[64], i8 scales[16], d`: d s (q - 32), runs of 16 elements.
fn q6_k(block: &[u8], values: &mut [f32]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(&block[208..]));
    for (i, value) in values.iter_mut().enumerate() {
        let (part, within) = (i / 128, i % 128);
        let nibble = low[64 * part + within % 64] >> (4 * (within / 64)) & 15;
        let bits = high[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let level = f32::from(nibble | bits << 4) - 32.0;
        *value = d * f32::from(scales[i / 16] as i8) * level;
    }
}
