//! Attention against its definition: on the CPU in f64 the formula that the kernels are held to.

use ferrotune::ops::{self, AttentionSpec, Segments, plain};
use tch::{Device, Kind, Tensor};

use crate::ops::{Op, check, random};
use crate::tolerance::{What, floor, rel};

/// Attention inside segments by its definition.
pub fn plain_attention(t: &[Tensor], cu_seqlens: &[i32], spec: &AttentionSpec) -> Tensor {
    plain::attention(&t[0], &t[1], &t[2], cu_seqlens, spec).unwrap()
}

/// Segments of equal and of other lengths, of one row, across tiles and chunks; groups of heads, head sizes with a kernel
/// and without, windows, caps. q, k and v for themselves and as columns of one joined projection.
pub fn attentions() -> Vec<Op> {
    let mixed = || vec![0, 3, 300, 301, 333];
    // Samples of one and two tokens. In one of two the gradient of q is a single difference, of which 16 bits lose much by
    // chance; in many of them chance evens out.
    let tiny = || (0..120).scan(0, |row, i| Some(std::mem::replace(row, *row + 1 + i % 2))).collect();
    let mut ops = Vec::new();
    for (cu_seqlens, heads, kv_heads, head_dim, softcap, sliding_window) in [
        (vec![0, 64, 128], 8, 2, 64, None, None),
        (vec![0, 256, 512], 8, 2, 128, None, None),
        (vec![0, 256], 4, 4, 64, None, None),
        (mixed(), 8, 2, 64, None, None),
        (mixed(), 4, 4, 128, None, None),
        (mixed(), 4, 1, 256, None, None),
        (mixed(), 6, 3, 80, None, None),
        (mixed(), 4, 2, 72, None, None),
        (mixed(), 4, 2, 33, None, None),
        (vec![0, 1, 2, 9], 4, 2, 64, None, None),
        (tiny(), 4, 2, 64, None, None),
        (vec![0, 600], 4, 2, 64, None, None),
        (vec![0, 300, 333], 8, 2, 64, None, Some(40)),
        (vec![0, 300, 600], 8, 2, 128, None, Some(40)),
        (vec![0, 300, 333], 8, 2, 64, None, Some(400)),
        (vec![0, 280, 333], 8, 2, 64, Some(30.0), Some(40)),
        (vec![0, 280, 333], 8, 2, 64, Some(30.0), None),
        (mixed(), 4, 4, 128, Some(30.0), Some(300)),
        (mixed(), 4, 2, 256, Some(50.0), None),
        (vec![0, 256, 512], 4, 2, 256, Some(50.0), Some(100)),
        (vec![0, 1, 2, 9], 4, 2, 128, Some(50.0), None),
        (mixed(), 4, 2, 40, Some(50.0), None),
    ] {
        let n = i64::from(*cu_seqlens.last().unwrap());
        let scale = 1.0 / (head_dim as f64).sqrt();
        let (num_heads, num_kv_heads) = (heads, kv_heads);
        let spec = AttentionSpec { num_heads, num_kv_heads, head_dim, scale, softcap, sliding_window };
        for joined in [true, false] {
            let (cu, cu_plain) = (cu_seqlens.clone(), cu_seqlens.clone());
            let (spec, spec_plain) = (spec.clone(), spec.clone());
            ops.push(Op {
                label: format!(
                    "attention {cu_seqlens:?}, {heads} heads of {head_dim} on {kv_heads}, softcap {softcap:?}, window \
                     {sliding_window:?}, joined {joined}"
                ),
                inputs: [heads, kv_heads, kv_heads].map(|heads| random(&[n, heads, head_dim])).into(),
                trained: 3,
                ours: Box::new(move |t| {
                    let segments = Segments::new(&cu, t[0].device()).unwrap();
                    if !joined {
                        return ops::attention(&t[0], &t[1], &t[2], &segments, &spec).unwrap();
                    }
                    let parts = Tensor::cat(t, 1).split_with_sizes([heads, kv_heads, kv_heads], 1);
                    ops::attention(&parts[0], &parts[1], &parts[2], &segments, &spec).unwrap()
                }),
                plain: Box::new(move |t| plain_attention(t, &cu_plain, &spec_plain)),
            });
        }
    }
    ops
}

#[test]
fn formula_agrees_with_its_definition() {
    for op in attentions() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            check(&op, kind, Device::Cpu);
        }
    }
}

/// A row that sees only itself: its own value, and no gradient for its query and key.
pub fn check_one_row(kind: Kind, device: Device) {
    let drawn = |heads| random(&[1, heads, 64]).to_kind(kind).to_device(device).set_requires_grad(true);
    let [q, k, v] = [4, 2, 2].map(drawn);
    let spec = |softcap| AttentionSpec {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 64,
        scale: 0.125,
        softcap,
        sliding_window: None,
    };
    for softcap in [None, Some(30.0)] {
        let y = ops::attention(&q, &k, &v, &Segments::new(&[0, 1], device).unwrap(), &spec(softcap)).unwrap();
        let near = |found: &Tensor, expected: &Tensor| rel(found, expected)[1] <= floor(kind, What::Value);
        assert!(near(&y, &v.repeat_interleave_self_int(2, 1, None).view([1, -1])), "{softcap:?}");
        let gradients = Tensor::run_backward(&[y.sum(kind)], &[&q, &k, &v], false, false);
        let largest = |t: &Tensor| t.abs().max().to_kind(Kind::Double).double_value(&[]);
        assert!(largest(&gradients[0]).max(largest(&gradients[1])) < 0.1, "{softcap:?}");
        assert!(near(&gradients[2], &Tensor::full([1, 2, 64], 2, (kind, device))), "{softcap:?}");
    }
}

#[test]
fn one_row() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        check_one_row(kind, Device::Cpu);
    }
}
