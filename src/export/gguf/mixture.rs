//! Which ggml type each tensor of a file gets: llama.cpp's mixtures, so that a name promises the same size and error here.

use clap::ValueEnum;

use crate::io::gguf::GgmlType;
use crate::models::Config;

/// What a file is named after: most of its matrices have this type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    #[value(name = "f32")]
    F32,
    #[value(name = "f16")]
    F16,
    #[value(name = "bf16")]
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_1")]
    Q4_1,
    #[value(name = "q5_0")]
    Q5_0,
    #[value(name = "q5_1")]
    Q5_1,
    #[value(name = "q2_k")]
    Q2K,
    #[value(name = "q3_k_s")]
    Q3KS,
    #[value(name = "q3_k_m")]
    Q3KM,
    #[value(name = "q3_k_l")]
    Q3KL,
    #[value(name = "q4_k_s")]
    Q4KS,
    #[value(name = "q4_k_m")]
    Q4KM,
    #[value(name = "q5_k_s")]
    Q5KS,
    #[value(name = "q5_k_m")]
    Q5KM,
    #[value(name = "q6_k")]
    Q6K,
}

/// Name, `general.file_type`, type of most matrices, and the KL that a file may have at most.
const TABLE: [(Quantization, &str, u32, GgmlType, f64); 17] = [
    (Quantization::F32, "F32", 0, GgmlType::F32, 1e-6),
    (Quantization::F16, "F16", 1, GgmlType::F16, 1e-3),
    (Quantization::Bf16, "BF16", 32, GgmlType::Bf16, 1e-3),
    (Quantization::Q8_0, "Q8_0", 7, GgmlType::Q8_0, 5e-3),
    (Quantization::Q4_0, "Q4_0", 2, GgmlType::Q4_0, 0.2),
    (Quantization::Q4_1, "Q4_1", 3, GgmlType::Q4_1, 0.2),
    (Quantization::Q5_0, "Q5_0", 8, GgmlType::Q5_0, 0.05),
    (Quantization::Q5_1, "Q5_1", 9, GgmlType::Q5_1, 0.05),
    (Quantization::Q2K, "Q2_K", 10, GgmlType::Q2K, 1.0),
    (Quantization::Q3KS, "Q3_K_S", 11, GgmlType::Q3K, 0.3),
    (Quantization::Q3KM, "Q3_K_M", 12, GgmlType::Q3K, 0.3),
    (Quantization::Q3KL, "Q3_K_L", 13, GgmlType::Q3K, 0.3),
    (Quantization::Q4KS, "Q4_K_S", 14, GgmlType::Q4K, 0.1),
    (Quantization::Q4KM, "Q4_K_M", 15, GgmlType::Q4K, 0.1),
    (Quantization::Q5KS, "Q5_K_S", 16, GgmlType::Q5K, 0.05),
    (Quantization::Q5KM, "Q5_K_M", 17, GgmlType::Q5K, 0.05),
    (Quantization::Q6K, "Q6_K", 18, GgmlType::Q6K, 0.02),
];

impl Quantization {
    fn row(self) -> &'static (Quantization, &'static str, u32, GgmlType, f64) {
        TABLE.iter().find(|row| row.0 == self).expect("every quantization has a row")
    }

    /// `Q4_K_M`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// `general.file_type`.
    pub fn file_type(self) -> u32 {
        self.row().2
    }

    /// The default of the largest KL between model and file, in nats a token.
    pub fn max_kl(self) -> f64 {
        self.row().4
    }

    /// The type of tensor `name` with `shape`; `tied` where the embedding is the head as well.
    pub fn tensor_type(self, name: &str, shape: &[i64], config: &Config, tied: bool) -> GgmlType {
        let base = self.row().3;
        if shape.len() < 2 || name.ends_with("_norm.weight") {
            return GgmlType::F32;
        }
        if base.block_len() == 1 {
            return base;
        }
        let columns = shape[1] as usize;
        let is_head = name == "output.weight" || tied && name == "token_embd.weight";
        let wanted = if is_head {
            match base {
                GgmlType::Q8_0 => base,
                _ if !columns.is_multiple_of(base.block_len()) => GgmlType::Q8_0,
                _ => GgmlType::Q6K,
            }
        } else {
            self.in_layer(name, config).unwrap_or(base)
        };
        fitting(wanted, columns)
    }

    /// Where a mixture departs from its base.
    fn in_layer(self, name: &str, config: &Config) -> Option<GgmlType> {
        use Quantization::{Q2K, Q3KL, Q3KM, Q4KM, Q4KS, Q5KM};
        let mut parts = name.strip_prefix("blk.")?.split('.');
        let (layer, part): (usize, &str) = (parts.next()?.parse().ok()?, parts.next()?);
        let layers = config.layers.len();
        // A quarter of the layers more than the first and the last eighth.
        let more = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        let spec = &config.layers[0].attention;
        let shared = spec.num_heads / spec.num_kv_heads;
        let found = match (part, self) {
            ("attn_v" | "attn_qkv", Q2K) => Some(if shared >= 4 { GgmlType::Q4K } else { GgmlType::Q3K }),
            ("attn_v" | "attn_qkv", Q3KM) => Some(if layer < 2 { GgmlType::Q5K } else { GgmlType::Q4K }),
            ("attn_v" | "attn_qkv", Q3KL) => Some(GgmlType::Q5K),
            ("attn_v" | "attn_qkv" | "ffn_down", Q4KM | Q5KM) if more => Some(GgmlType::Q6K),
            ("attn_v" | "attn_qkv", Q4KS) if layer < 4 => Some(GgmlType::Q5K),
            ("ffn_down" | "attn_output", Q2K) => Some(GgmlType::Q3K),
            ("ffn_down", Q3KM) => Some(if layer < layers / 16 { GgmlType::Q5K } else { GgmlType::Q4K }),
            ("attn_output", Q3KM) => Some(GgmlType::Q4K),
            ("ffn_down" | "attn_output", Q3KL) => Some(GgmlType::Q5K),
            ("ffn_down", Q4KS) if layer < layers / 8 => Some(GgmlType::Q5K),
            _ => None,
        };
        // The 70B models share one v among eight heads: more bits for it cost next to nothing.
        let of_70b =
            layers == 80 && shared > 1 && matches!(config.model_type.as_str(), "llama" | "mistral" | "qwen2");
        match (part, found.unwrap_or(self.row().3)) {
            ("attn_v" | "attn_qkv", GgmlType::Q3K | GgmlType::Q4K) if of_70b => Some(GgmlType::Q5K),
            _ => found,
        }
    }
}

/// The type, or the next one whose blocks fit rows of `columns` elements.
fn fitting(kind: GgmlType, columns: usize) -> GgmlType {
    if columns.is_multiple_of(kind.block_len()) {
        return kind;
    }
    let smaller = match kind {
        GgmlType::Q2K | GgmlType::Q3K => GgmlType::Q4_0,
        GgmlType::Q4K => GgmlType::Q5_0,
        GgmlType::Q5K => GgmlType::Q5_1,
        GgmlType::Q6K => GgmlType::Q8_0,
        _ => GgmlType::F16,
    };
    if columns.is_multiple_of(smaller.block_len()) { smaller } else { GgmlType::F16 }
}
