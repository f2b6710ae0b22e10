//! A batch where the decoder is: all that a forward pass reads beside the weights.

use anyhow::{Result, bail};
use tch::Tensor;

use super::decoder::{Decoder, Input};
use crate::device;
use crate::nn::Rope;
use crate::ops::{Segments, Targets};

/// An [`Input`] on the decoder's device.
pub struct DeviceInput {
    /// int64 `[N]`.
    pub(super) input_ids: Tensor,
    /// Their rows of an embedding that is in the host's memory, `[N, C]`.
    pub(super) embedded: Option<Tensor>,
    /// cos and sin of each of the config's ropes, f32 `[N, R/2]`.
    pub(super) angles: Vec<(Tensor, Tensor)>,
    pub(super) cu_seqlens: Vec<i32>,
    pub(super) prefixes: Vec<i32>,
    pub(super) segments: Segments,
}

/// A batch to train on.
pub struct DeviceBatch {
    pub(super) input: DeviceInput,
    /// The tokens that the rows predict.
    pub(super) targets: Targets,
    /// What the objective reads beside them, of shapes that follow from the batch's.
    pub extra: Vec<Tensor>,
}

impl Decoder {
    /// Checks and enqueues the upload of `input`; the calling thread does not wait for the device.
    pub fn upload_input(&self, input: Input) -> Result<DeviceInput> {
        let n = input.input_ids.len();
        if n == 0 || input.position_ids.len() != n {
            bail!(
                "{n} token ids and {} position ids, expected the same number, at least 1",
                input.position_ids.len()
            );
        }
        self.check_ids(input.input_ids)?;
        let positions = device::upload(input.position_ids, self.device)?;
        let angles = self.config.ropes.iter().map(|rope| rope_angles(rope, &positions, input));
        let embedded = self
            .offloads_embedding
            .then(|| device::upload_rows(&self.embed_tokens, input.input_ids, self.device))
            .transpose()?;
        Ok(DeviceInput {
            embedded,
            input_ids: device::upload(input.input_ids, self.device)?,
            angles: angles.collect::<Result<_>>()?,
            cu_seqlens: input.cu_seqlens.to_vec(),
            prefixes: input.prefixes.to_vec(),
            segments: Segments::sharing(input.cu_seqlens, input.prefixes, self.device)?,
        })
    }

    /// As [`upload_input`](Decoder::upload_input), with `labels[n]` the label of token n: inside each segment token n
    /// predicts label n + 1.
    pub fn upload(&self, input: Input, labels: &[i64]) -> Result<DeviceBatch> {
        let targets = Targets::new(&shift_labels(labels, input.cu_seqlens), self.device)?;
        Ok(DeviceBatch { input: self.upload_input(input)?, targets, extra: Vec::new() })
    }
}

/// What the sizes of a step's kernels depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BatchShape {
    cu_seqlens: Vec<i32>,
    prefixes: Vec<i32>,
    num_targets: i64,
}

impl BatchShape {
    pub fn new(cu_seqlens: &[i32], prefixes: &[i32], num_targets: i64) -> BatchShape {
        BatchShape { cu_seqlens: cu_seqlens.to_vec(), prefixes: prefixes.to_vec(), num_targets }
    }
}

impl DeviceBatch {
    /// Segments, those that samples share among them.
    pub fn segments(&self) -> i64 {
        self.input.cu_seqlens.len() as i64 - 1
    }

    pub fn shape(&self) -> BatchShape {
        BatchShape::new(&self.input.cu_seqlens, &self.input.prefixes, self.targets.count())
    }

    /// Copies `other`, of the same shape, into these tensors.
    pub fn assign(&mut self, other: &DeviceBatch) -> Result<()> {
        debug_assert_eq!(self.shape(), other.shape());
        self.input.input_ids.f_copy_(&other.input.input_ids)?;
        if let (Some(rows), Some(new)) = (&mut self.input.embedded, &other.input.embedded) {
            rows.f_copy_(new)?;
        }
        self.targets.assign(&other.targets)?;
        for (tensor, new) in self.extra.iter_mut().zip(&other.extra) {
            tensor.f_copy_(new)?;
        }
        for ((cos, sin), (new_cos, new_sin)) in self.input.angles.iter_mut().zip(&other.input.angles) {
            cos.f_copy_(new_cos)?;
            sin.f_copy_(new_sin)?;
        }
        Ok(())
    }
}

/// cos and sin of all rows. Where the scaling depends on the length, each segment has that of its own length, so that a
/// sample does not depend on what it is packed with.
fn rope_angles(rope: &Rope, positions: &Tensor, input: Input) -> Result<(Tensor, Tensor)> {
    let segments = || input.cu_seqlens.windows(2).map(|s| (i64::from(s[0]), i64::from(s[1])));
    let length = |(start, end): (i64, i64)| {
        input.position_ids[start as usize..end as usize].iter().max().map_or(1, |last| last + 1)
    };
    let longest = segments().map(length).max().unwrap_or(1);
    if segments().all(|segment| rope.regime(length(segment)) == rope.regime(longest)) {
        return rope.cos_sin(positions, longest);
    }
    let (cos, sin): (Vec<_>, Vec<_>) = segments()
        .map(|(start, end)| rope.cos_sin(&positions.f_narrow(0, start, end - start)?, length((start, end))))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .unzip();
    Ok((Tensor::f_cat(&cos, 0)?, Tensor::f_cat(&sin, 0)?))
}

/// `shifted[n] = labels[n + 1]` inside each segment, -100 at its last token.
fn shift_labels(labels: &[i64], cu_seqlens: &[i32]) -> Vec<i64> {
    let mut shifted = vec![-100; labels.len()];
    for segment in cu_seqlens.windows(2) {
        let (start, end) = (segment[0] as usize, segment[1] as usize);
        if end > start + 1 {
            shifted[start..end - 1].copy_from_slice(&labels[start + 1..end]);
        }
    }
    shifted
}
