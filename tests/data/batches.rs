//! Batches: every token once an epoch, packs that fit, and streams that go on from any cursor as if never cut.

use std::collections::BTreeSet;
use std::sync::Arc;

use ferrotune::data::{Batch, BatchOptions, BatchStream, Cursor, IGNORE_INDEX, TokenDataset};

/// `count` samples of 1 to `longest` tokens. Ids are unique, so a token found in a batch tells where it came from.
fn dataset(count: usize, longest: usize, seed: u64) -> TokenDataset {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    let mut data = TokenDataset::new();
    let mut id = 0;
    for _ in 0..count {
        let length = 1 + next() % longest;
        let ids: Vec<u32> = (0..length).map(|n| id + n as u32).collect();
        let trained: Vec<bool> = ids.iter().map(|_| next() % 3 > 0).collect();
        id += length as u32;
        data.push(&ids, &trained);
    }
    data
}

fn stream(data: &TokenDataset, batch_size: usize, packing: bool, shuffle: bool) -> BatchStream {
    let options = BatchOptions { batch_size, max_seq_length: 32, packing, shuffle, seed: 3407 };
    BatchStream::new(Arc::new(data.clone()), options).unwrap()
}

fn epoch(stream: &mut BatchStream) -> Vec<Batch> {
    std::iter::from_fn(|| stream.next_batch().unwrap()).collect()
}

fn variants() -> impl Iterator<Item = (usize, bool, bool)> {
    [1, 4]
        .into_iter()
        .flat_map(|size| [false, true].map(move |packing| (size, packing)))
        .flat_map(|(size, packing)| [false, true].map(move |shuffle| (size, packing, shuffle)))
}

#[test]
fn every_sample_once_an_epoch_unchanged() {
    let data = dataset(103, 32, 1);
    let expected: BTreeSet<(Vec<i64>, Vec<i64>)> = (0..data.len())
        .map(|sample| {
            let ids: Vec<i64> = data.ids(sample).iter().map(|id| i64::from(*id)).collect();
            let labels = ids
                .iter()
                .zip(data.trained(sample))
                .map(|(id, t)| if t { *id } else { IGNORE_INDEX })
                .collect();
            (ids, labels)
        })
        .collect();
    for (size, packing, shuffle) in variants() {
        let mut stream = stream(&data, size, packing, shuffle);
        let per_epoch = stream.batches_per_epoch();
        for _ in 0..3 {
            let batches = epoch(&mut stream);
            assert_eq!(batches.len() as u64, per_epoch, "as many batches in every epoch");
            let mut found = BTreeSet::new();
            let mut samples = 0;
            for batch in &batches {
                assert_eq!(batch.labels.len(), batch.tokens());
                assert_eq!(batch.position_ids.len(), batch.tokens());
                assert_eq!(batch.cu_seqlens.first(), Some(&0));
                assert_eq!(*batch.cu_seqlens.last().unwrap() as usize, batch.tokens());
                assert!(!packing || batch.tokens() <= size * 32);
                assert!(packing || batch.samples() <= size);
                for ends in batch.cu_seqlens.windows(2) {
                    let range = ends[0] as usize..ends[1] as usize;
                    assert!(batch.position_ids[range.clone()].iter().copied().eq(0..range.len() as i64));
                    found.insert((batch.input_ids[range.clone()].to_vec(), batch.labels[range].to_vec()));
                    samples += 1;
                }
            }
            assert_eq!(samples, data.len());
            assert_eq!(found, expected);
            let targets: usize = batches.iter().map(Batch::num_targets).sum();
            assert_eq!(targets as u64, data.num_targets());
        }
    }
}

#[test]
fn packing_wastes_little() {
    let data = dataset(500, 32, 2);
    let batches = epoch(&mut stream(&data, 1, true, true));
    assert!(batches.iter().all(|batch| batch.tokens() <= 32));
    let lower_bound = data.num_tokens().div_ceil(32);
    assert!((batches.len() as u64) <= lower_bound + lower_bound / 20, "{} of {lower_bound}", batches.len());
}

#[test]
fn order_is_the_data_s_or_shuffled_by_seed_and_epoch() {
    let data = dataset(50, 8, 3);
    let plain = epoch(&mut stream(&data, 1, false, false));
    assert!(plain.iter().map(|batch| batch.input_ids[0]).is_sorted());
    let mut shuffled = stream(&data, 1, false, true);
    let (first, second) = (epoch(&mut shuffled), epoch(&mut shuffled));
    assert!(first != plain && first != second);
    assert_eq!(first, epoch(&mut stream(&data, 1, false, true)), "one seed, one order");
    let options = BatchOptions { batch_size: 1, max_seq_length: 32, packing: false, shuffle: true, seed: 1 };
    assert_ne!(first, epoch(&mut BatchStream::new(Arc::new(data), options).unwrap()));
}

/// The order is part of what a checkpoint promises: it may not change with a version of this program or its crates.
#[test]
fn order_is_stable() {
    let mut data = TokenDataset::new();
    (0..10).for_each(|id| data.push(&[id, 100], &[false, true]));
    let batches = epoch(&mut stream(&data, 1, false, true));
    let order: Vec<i64> = batches.iter().map(|batch| batch.input_ids[0]).collect();
    assert_eq!(order, [8, 9, 6, 7, 1, 4, 0, 5, 3, 2]);
}

#[test]
fn any_cut_resumes_exactly() {
    let data = dataset(23, 32, 4);
    for (size, packing, shuffle) in variants() {
        let mut whole = stream(&data, size, packing, shuffle);
        let mut steps = Vec::new();
        for _ in 0..2 * (whole.batches_per_epoch() + 1) + 3 {
            let cursor = whole.cursor();
            steps.push((cursor, whole.next_batch().unwrap()));
        }
        for cut in 0..steps.len() {
            // As a checkpoint keeps it.
            let text = serde_json::to_string(&steps[cut].0).unwrap();
            let cursor: Cursor = serde_json::from_str(&text).unwrap();
            let mut resumed = stream(&data, size, packing, shuffle);
            resumed.seek(&cursor).unwrap();
            for (cursor, batch) in &steps[cut..] {
                assert_eq!(resumed.cursor(), *cursor);
                assert_eq!(resumed.next_batch().unwrap(), *batch);
            }
        }
    }
}

#[test]
fn other_data_are_refused() {
    let cursor = stream(&dataset(10, 8, 5), 2, false, true).cursor();
    let mut data = dataset(10, 8, 5);
    data.push(&[1, 2], &[false, true]);
    let error = stream(&data, 2, false, true).seek(&cursor).unwrap_err().to_string();
    assert!(error.contains("not the one that the checkpoint was made with"), "{error}");
    let mut masked = TokenDataset::new();
    masked.push(&[1, 2, 3], &[false, true, true]);
    let mut other = TokenDataset::new();
    other.push(&[1, 2, 3], &[false, false, true]);
    assert_ne!(masked.fingerprint(), other.fingerprint(), "the mask counts");
}

#[test]
fn nonsense_is_refused() {
    let options = BatchOptions { batch_size: 1, max_seq_length: 4, packing: true, shuffle: false, seed: 0 };
    let error =
        |data: TokenDataset, options| BatchStream::new(Arc::new(data), options).unwrap_err().to_string();
    assert!(error(TokenDataset::new(), options).contains("no samples"));
    assert!(error(dataset(20, 9, 6), options).contains("does not fit"));
    assert!(error(dataset(5, 3, 6), BatchOptions { batch_size: 0, ..options }).contains("batch size"));
}

#[test]
fn split_is_disjoint_complete_and_of_its_seed() {
    let data = dataset(40, 8, 7);
    let (training, evaluation) = data.split(0.1, 1);
    assert_eq!((training.len(), evaluation.len()), (36, 4));
    assert_eq!(data.split(0.1, 1), (training.clone(), evaluation.clone()));
    assert_ne!(data.split(0.1, 2).1, evaluation);
    let mut ids: Vec<u32> = Vec::new();
    for part in [&training, &evaluation] {
        (0..part.len()).for_each(|sample| ids.extend(part.ids(sample)));
    }
    ids.sort();
    assert!(ids.into_iter().eq(0..data.num_tokens() as u32));
    // However small the share or the data, both parts have something.
    assert_eq!(dataset(2, 8, 8).split(0.001, 0).1.len(), 1);
    assert_eq!(dataset(2, 8, 8).split(1.0, 0).0.len(), 1);
}
