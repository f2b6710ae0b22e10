//! The next pass of decoding, launched before the host knows the tokens that it goes on from: so the GPU has no pause while the
//! host reads them, looks for the ends of answers and makes text of them.
//!
//! What a pass reads beside the tokens is known: where they stand, and in which pages. Sequences that turn out to have ended
//! have a row for nothing; those that come to the batch meanwhile have a pass of their own.

use std::collections::HashMap;

use anyhow::Result;
use tch::Tensor;

use super::engine::Engine;
use super::graphs::Row;
use super::request::RequestId;
use super::step::{End, Feed};
use crate::device;
use crate::models::Decoder;

/// A pass whose logits are on their way.
pub(super) struct Ahead {
    logits: Tensor,
    /// By request and sample.
    rows: HashMap<(RequestId, usize), AheadRow>,
}

struct AheadRow {
    row: usize,
    /// Of the sequence with the token that it was fed.
    length: usize,
    pages: Vec<i32>,
}

/// Logits of sequences whose pass has been launched.
pub(super) struct LaunchedRows {
    pub(super) logits: Tensor,
    pub(super) ends: Vec<End>,
}

impl Engine {
    /// Parts from `feeds` those whose pass has been launched already.
    pub(super) fn launched(&mut self, feeds: Vec<Feed>) -> (Option<(Vec<Feed>, LaunchedRows)>, Vec<Feed>) {
        let Some(Ahead { logits, rows }) = self.ahead.take() else { return (None, feeds) };
        let row = |feed: &Feed| {
            let sequence = &self.running[feed.at];
            // Read again since, with other weights or after it gave up its pages, it has others, or more to be fed.
            rows.get(&(sequence.request, sequence.sample)).filter(|row| {
                sequence.pending() == 1 && sequence.ids.len() == row.length && sequence.pages == row.pages
            })
        };
        let (mut batch, mut ends, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for feed in feeds {
            match row(&feed) {
                Some(AheadRow { row, .. }) => {
                    ends.push((feed.at, *row));
                    batch.push(feed);
                }
                None => others.push(feed),
            }
        }
        ((!batch.is_empty()).then_some((batch, LaunchedRows { logits, ends })), others)
    }

    /// Launches the pass behind `tokens` (int64 `[N]` on the GPU), drawn for the sequences of `choosing`, if it has been recorded
    /// and there are pages for it.
    pub(super) fn launch_ahead(
        &mut self,
        decoder: &Decoder,
        choosing: &[End],
        tokens: &Tensor,
    ) -> Result<()> {
        // Of the sequences that may go on: which token is theirs, and their place.
        let (mut drawn, mut places) = (Vec::new(), Vec::new());
        for (index, &(at, _)) in choosing.iter().enumerate() {
            if self.running[at].ids.len() + 1 < self.running[at].end {
                drawn.push(index as i64);
                places.push(at);
            }
        }
        let adapter = places.first().and_then(|&at| self.running[at].adapter);
        if places.is_empty() || places.iter().any(|&at| self.running[at].adapter != adapter) {
            return Ok(());
        }
        for &at in &places {
            if !self.try_reserve(Feed { at, rows: 1 })? {
                return Ok(());
            }
        }
        let running = &self.running;
        let row = |&at: &usize| Row { id: 0, length: running[at].ids.len() + 1, pages: &running[at].pages };
        let rows: Vec<Row> = places.iter().map(row).collect();
        let own = if places.len() == choosing.len() {
            tokens.shallow_clone()
        } else {
            tokens.f_index_select(0, &device::upload(&drawn, tokens.device())?)?
        };
        let Some(logits) = self.graphs.logits_of_drawn(decoder, &rows, &own, adapter)? else { return Ok(()) };
        let row = |(row, &at): (usize, &usize)| {
            let sequence = &self.running[at];
            let fed = AheadRow { row, length: sequence.ids.len() + 1, pages: sequence.pages.clone() };
            ((sequence.request, sequence.sample), fed)
        };
        self.ahead = Some(Ahead { logits, rows: places.iter().enumerate().map(row).collect() });
        Ok(())
    }
}
