//! Elements a second that one core quantises to each type of GGUF blocks (in the fastest of many short pieces, so that other
//! work on the machine counts little), and the error: `cargo run --release --example measure_gguf`.
//! `scripts/check_gguf.py --speed` measures llama.cpp's quantiser on numbers of the same kind.

use std::time::Instant;

use ferrotune::io::gguf::{GgmlType, dequantize_row, quantize_row};
use rand::{Rng, SeedableRng};

const ELEMENTS: usize = 1 << 22;
const PIECE: usize = 1 << 16;

fn main() {
    let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    // Nearly normal, of the size of weights.
    let mut number = || (0..12).map(|_| generator.random::<f32>() - 0.5).sum::<f32>() * 0.02;
    let values: Vec<f32> = (0..ELEMENTS).map(|_| number()).collect();
    let norm: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
    for kind in [
        GgmlType::F16,
        GgmlType::Bf16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q5_1,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
    ] {
        let mut fastest = f64::INFINITY;
        let mut bytes = Vec::new();
        for _ in 0..3 {
            bytes = Vec::with_capacity(kind.bytes(ELEMENTS));
            for piece in values.chunks(PIECE) {
                let started = Instant::now();
                quantize_row(kind, piece, &mut bytes);
                fastest = fastest.min(started.elapsed().as_secs_f64());
            }
        }
        let mut read = vec![0f32; ELEMENTS];
        dequantize_row(kind, &bytes, &mut read);
        let error: f64 = values.iter().zip(&read).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let millions = PIECE as f64 / fastest / 1e6;
        println!(
            "{:5} {millions:7.1} M elements/s, relative error {:.5}",
            kind.name(),
            (error / norm).sqrt()
        );
    }
}
