use anyhow::Result;
use rayon::prelude::*;

/// Rows that are worked on at a time.
pub(super) const CHUNK: usize = 1024;

/// Works on items on all threads, chunk after chunk in their order. While a chunk is worked on, the one before is consumed
/// and the next one is read.
pub(super) fn pipeline<I: Send + Sync, T: Send>(
    mut read: impl FnMut() -> Result<Vec<I>> + Send,
    work: impl Fn(&I) -> T + Sync,
    mut consume: impl FnMut(Vec<I>, Vec<T>) -> Result<()> + Send,
) -> Result<()> {
    let mut chunk = read()?;
    let mut before = None;
    while !chunk.is_empty() {
        let (next, worked) = rayon::join(
            || {
                if let Some((items, results)) = before.take() {
                    consume(items, results)?;
                }
                read()
            },
            || chunk.par_iter().map(&work).collect::<Vec<T>>(),
        );
        // What comes first in the data is said first: an error of this chunk before one that ends the next.
        before = Some((chunk, worked));
        chunk = match next {
            Ok(next) => next,
            Err(error) => {
                if let Some((items, results)) = before.take() {
                    consume(items, results)?;
                }
                return Err(error);
            }
        };
    }
    match before {
        Some((items, results)) => consume(items, results),
        None => Ok(()),
    }
}
