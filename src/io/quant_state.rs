//! What bitsandbytes stores beside a 4-bit weight `W`: `W.absmax`, `W.quant_map`, for double quantisation
//! `W.nested_absmax` and `W.nested_quant_map`, and as JSON in a uint8 tensor `W.quant_state.bitsandbytes__nf4` this:

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::Weights;
use crate::error::Error;

/// Between a weight's name and its 4-bit type.
const KEY: &str = ".quant_state.bitsandbytes__";
pub const NF4: &str = "nf4";

/// The part of a quant_state that is no tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantState {
    pub quant_type: String,
    pub blocksize: i64,
    /// Of the weight before: `bfloat16`, `float16` or `float32`.
    pub dtype: String,
    pub shape: Vec<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_blocksize: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_offset: Option<f64>,
}

/// The names of the tensors beside weight `name`.
pub struct QuantKeys {
    pub absmax: String,
    pub quant_map: String,
    pub nested_absmax: String,
    pub nested_quant_map: String,
    pub quant_state: String,
}

impl QuantKeys {
    pub fn of(name: &str) -> QuantKeys {
        QuantKeys {
            absmax: format!("{name}.absmax"),
            quant_map: format!("{name}.quant_map"),
            nested_absmax: format!("{name}.nested_absmax"),
            nested_quant_map: format!("{name}.nested_quant_map"),
            quant_state: format!("{name}{KEY}{NF4}"),
        }
    }
}

impl Weights {
    /// Whether any weight is quantised by bitsandbytes.
    pub fn is_quantized(&self) -> bool {
        self.names().any(|name| name.contains(KEY))
    }

    /// The quant_state of weight `name`, None where it is not quantised.
    ///
    /// # Errors
    /// Another type than NF4; a state that is no JSON or lacks a value. Both name the file and the tensor.
    pub fn quant_state(&self, name: &str) -> Result<Option<QuantState>> {
        let key = QuantKeys::of(name).quant_state;
        if !self.contains(&key) {
            let other =
                self.names().find(|found| found.strip_prefix(name).is_some_and(|rest| rest.starts_with(KEY)));
            if let Some(other) = other {
                let what = format!(
                    "{}: tensor {name} of type {}",
                    self.file(other)?,
                    &other[name.len() + KEY.len()..]
                );
                bail!(Error::Unsupported { what, supported: "nf4".to_string() });
            }
            return Ok(None);
        }
        let state: QuantState = self.with_bytes(&key, |bytes| {
            serde_json::from_slice(bytes)
                .map_err(|error| self.corrupt(&key, &format!("is no quant_state: {error}")).into())
        })?;
        let wrong = |what: String| Err(self.corrupt(&key, &what).into());
        if state.quant_type != NF4 {
            return wrong(format!("has quant_type {:?}, expected {NF4:?}", state.quant_type));
        }
        let legal = |size: i64| (32..=4096).contains(&size) && size & (size - 1) == 0;
        if !legal(state.blocksize) {
            return wrong(format!(
                "has blocksize {}, expected a power of two of 32 to 4096",
                state.blocksize
            ));
        }
        if self.contains(&QuantKeys::of(name).nested_absmax) {
            match (state.nested_blocksize, state.nested_offset) {
                (Some(size), Some(offset)) if legal(size) && offset.is_finite() => {}
                (size, offset) => {
                    return wrong(format!(
                        "has nested_blocksize {size:?} and nested_offset {offset:?} beside nested_absmax"
                    ));
                }
            }
        }
        Ok(Some(state))
    }
}
