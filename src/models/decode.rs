//! The decoder behind what it has read: new rows of several sequences over paged keys and values.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::Decoder;
use crate::device;
use crate::nn::{KvPages, PAGE_SIZE, RopeTables};
use crate::ops::{self, BlockInput, DecodeInput, DecodeStack, Keys, LoraRun, PagedBatch, Pass};

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct NewRows<'a> {
    /// The tokens, at positions `past..`.
    pub input_ids: &'a [i64],
    /// Tokens before them, whose keys and values are in the pages.
    pub past: usize,
    /// Tokens of the sequence in the end: where a rope depends on the length, it is this one. Cached keys must have been
    /// turned in the same [`regime`](Decoder::rope_regime).
    pub length: usize,
    /// The sequence's pages in its order, as many as `past` and the new tokens need.
    pub pages: &'a [i32],
}

/// One new token of each of N sequences, on the device: what is recorded on these tensors decodes what they hold when it is
/// replayed.
#[derive(Debug)]
pub struct DeviceRows {
    /// int64 `[N]`.
    pub input_ids: Tensor,
    /// int64 `[N]`: where they stand in their sequences.
    pub positions: Tensor,
    /// int64 `[N]`: tokens with the new one, or 0 for a row that belongs to no sequence.
    pub lengths: Tensor,
    /// int64 `[N, width]`: the pages of each sequence in its order.
    pub tables: Tensor,
    /// No length is over it; at most `width * PAGE_SIZE`.
    pub longest: usize,
}

impl Decoder {
    /// The dtype of the rows that decoding works on: the decoder's, but f32 beside 16-bit weights on a CPU, whose kernels read those as they are.
    pub fn decode_kind(&self) -> Kind {
        let widens = self.device == Device::Cpu
            && matches!(self.kind, Kind::BFloat16 | Kind::Half)
            && device::has_cpu_kernels();
        if widens { Kind::Float } else { self.kind }
    }

    /// A pool of `pages` pages for this decoder.
    pub fn kv_pages(&self, pages: usize) -> Result<KvPages> {
        let spec = &self.config.layers[0].attention;
        KvPages::new(self.layers.len(), spec.num_kv_heads, spec.head_dim, pages, self.kind, self.device)
    }

    /// Bytes of the keys and values of a token.
    pub fn kv_bytes_per_token(&self) -> usize {
        let spec = &self.config.layers[0].attention;
        2 * self.layers.len() * (spec.num_kv_heads * spec.head_dim) as usize * self.kind.elt_size_in_bytes()
    }

    /// Equal for two lengths exactly if every rope turns keys alike in both.
    pub fn rope_regime(&self, length: usize) -> Vec<i64> {
        self.config.ropes.iter().map(|rope| rope.regime(length as i64)).collect()
    }

    /// Hidden states `[N, C]` after the final norm, of the new rows of `sequences`, one sequence after another; writes their
    /// keys and values into the pages. In [`decode_kind`](Self::decode_kind). On the CPU in f32, up to 64 rows, those of a sequence are the same to the bit
    /// whatever else is in the batch and however the sequence was cut into calls.
    pub fn decode(
        &self,
        sequences: &[NewRows],
        pages: &KvPages,
        ropes: &mut RopeTables,
        lora: &[LoraRun],
    ) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut rows, mut past, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in sequences {
            let NewRows { input_ids, past: before, length, pages } = *sequence;
            let end = before + input_ids.len();
            if input_ids.is_empty() || end > length || pages.len() != end.div_ceil(PAGE_SIZE) {
                bail!(
                    "decode: {} tokens behind {before} of {length} in {} pages",
                    input_ids.len(),
                    pages.len()
                );
            }
            ids.extend_from_slice(input_ids);
            positions.extend(before as i64..end as i64);
            rows.push(input_ids.len() as i64);
            past.push(before as i64);
            tables.extend_from_slice(pages);
        }
        self.check_ids(&ids)?;
        let batch = PagedBatch::new(&rows, &past, &tables, PAGE_SIZE as i64)?;
        let angles = self.paged_angles(sequences, &positions, ropes)?;
        let embedded =
            self.offloads_embedding.then(|| device::upload_rows(&self.embed_tokens, &ids, self.device));
        // What was uploaded goes with this line: x is nobody else's.
        let ids = device::upload(&ids, self.device)?;
        let x = self.embed(&ids, embedded.transpose()?.as_ref(), self.decode_kind())?;
        let pass = Pass { lora, ..Pass::INFERENCE };
        if self.device == Device::Cpu
            && let Some(y) = self.all_layers(DecodeInput::Rows(&x), &batch, pages, &angles, pass)?
        {
            return Ok(y);
        }
        self.each_layer(x, &batch, pages, &angles, pass)
    }

    /// Hidden states `[N, C]` after the final norm, as [`Decoder::decode`] gives them, without a look at the rows by the host.
    /// `angles` are cos and sin of all positions below `rows.longest`, for each of the config's ropes.
    ///
    /// # Errors
    /// Not on a GPU, an embedding in the host's memory, or attention that no kernel does over pages.
    pub fn decode_on_device(
        &self,
        rows: &DeviceRows,
        pages: &KvPages,
        angles: &[(Tensor, Tensor)],
        lora: &[LoraRun],
    ) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        if !self.device.is_cuda() || self.offloads_embedding {
            bail!("decoding on the device needs a GPU that has the embedding");
        }
        let batch =
            PagedBatch::on_device(&rows.tables, &rows.lengths, rows.longest, pages.pages(), PAGE_SIZE)?;
        let pass = Pass { lora, ..Pass::INFERENCE };
        if self.config.embedding_scale.is_none() && self.embed_tokens.kind() == self.kind {
            let tokens = DecodeInput::Tokens { embedding: &self.embed_tokens, ids: &rows.input_ids };
            if let Some(y) = self.all_layers(tokens, &batch, pages, angles, pass)? {
                return Ok(y);
            }
        }
        let at_positions = |table: &Tensor| table.f_index_select(0, &rows.positions);
        let angles = angles
            .iter()
            .map(|(cos, sin)| Ok((at_positions(cos)?, at_positions(sin)?)))
            .collect::<Result<Vec<_>>>()?;
        let x = self.embed(&rows.input_ids, None, self.kind)?;
        if let Some(y) = self.all_layers(DecodeInput::Rows(&x), &batch, pages, &angles, pass)? {
            return Ok(y);
        }
        self.each_layer(x, &batch, pages, &angles, pass)
    }

    /// The layers one by one and the final norm on x, which is nobody else's.
    fn each_layer(
        &self,
        mut x: Tensor,
        batch: &PagedBatch,
        pages: &KvPages,
        angles: &[(Tensor, Tensor)],
        pass: Pass,
    ) -> Result<Tensor> {
        for index in 0..self.layers.len() {
            let keys = Keys::Pages(batch, pages.layer(index));
            x = self.layer_output(index, BlockInput::Given(x), angles, keys, pass)?;
        }
        ops::rms_norm(&x, &self.norm)
    }

    /// All layers and the final norm, where one launch or loop can take the layers.
    fn all_layers(
        &self,
        input: DecodeInput,
        batch: &PagedBatch,
        pages: &KvPages,
        angles: &[(Tensor, Tensor)],
        pass: Pass,
    ) -> Result<Option<Tensor>> {
        let mut stack = DecodeStack::new(input)?;
        for index in 0..self.layers.len() {
            let (attention, mlp) = self.blocks(index);
            let rows = self.rows(index, angles, Keys::Pages(batch, pages.layer(index)));
            if !stack.push(&attention, &rows, &mlp, pass)? {
                return Ok(None);
            }
        }
        stack.run(&self.norm)
    }

    /// cos and sin of all rows for each rope.
    fn paged_angles(
        &self,
        sequences: &[NewRows],
        positions: &[i64],
        tables: &mut RopeTables,
    ) -> Result<Vec<(Tensor, Tensor)>> {
        let positions = device::upload(positions, self.device)?;
        let end =
            sequences.iter().map(|sequence| sequence.past + sequence.input_ids.len()).max().unwrap_or(0);
        let angles = self.config.ropes.iter().enumerate().map(|(index, rope)| {
            let length = |sequence: &NewRows| sequence.length as i64;
            let first = sequences.first().map_or(0, length);
            if sequences.iter().all(|sequence| rope.regime(length(sequence)) == rope.regime(first)) {
                return tables.cos_sin(index, rope, &positions, end, first);
            }
            let mut row = 0;
            let mut apart = Vec::new();
            for sequence in sequences {
                let count = sequence.input_ids.len() as i64;
                let own = positions.f_narrow(0, row, count)?;
                apart.push(tables.cos_sin(index, rope, &own, end, length(sequence))?);
                row += count;
            }
            let (cos, sin): (Vec<_>, Vec<_>) = apart.into_iter().unzip();
            Ok((Tensor::f_cat(&cos, 0)?, Tensor::f_cat(&sin, 0)?))
        });
        angles.collect()
    }
}
