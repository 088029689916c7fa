//! Norm, rotation and the way into the cache.

use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{AttentionShape, Batch, KvDType, KvLayout, QkNorm, RopeTable};

use crate::support::{Random, Subject, assert_near, assert_same_bits};

/// Rotation angles of one position after another, for `pairs` pairs.
pub(crate) fn table(pairs: usize, positions: usize) -> RopeTable {
    let inverse: Vec<f32> = (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect();
    RopeTable::new(&inverse, 1.0, positions)
}

/// Query heads after `rope_and_cache` of one sequence that starts at `start`, `[tokens, heads × head_dim]`.
fn run<B: Subject>(
    shape: AttentionShape,
    rope: RopeTable,
    norms: Option<(&[f32], &[f32])>,
    qkv: &[f32],
    start: u32,
) -> Vec<f32> {
    let mut backend = B::any();
    let rows = qkv.len() / shape.qkv_width();
    let layout = KvLayout {
        layers: 1,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        block_size: 16,
        blocks: (start as usize + rows).div_ceil(16),
        dtype: KvDType::F32,
    };
    let mut cache = backend.kv_cache(layout).unwrap();
    let blocks: Vec<u32> = (0..layout.blocks as u32).collect();
    let mut batch = Batch::default();
    batch.push(&vec![0; rows], start, &blocks, 0);
    let rope = backend.rope(rope);
    let norms = norms.map(|(q, k)| (backend.vector(q), backend.vector(k)));
    let norm = norms.as_ref().map(|(q, k)| QkNorm { q, k, eps: 1e-6 });
    let mut x = backend.filled(qkv, shape.qkv_width());
    backend.begin(&batch);
    backend.rope_and_cache(&mut x, shape, norm, &rope, &mut cache, 0, &batch);
    let all = backend.read(&x);
    all.chunks_exact(shape.qkv_width()).flat_map(|row| &row[..shape.q_width()]).copied().collect()
}

const SHAPES: [(usize, usize, usize); 6] = [(1, 1, 8), (3, 1, 16), (4, 4, 64), (7, 1, 80), (6, 3, 128), (2, 2, 24)];

pub(crate) fn queries_match_the_reference<B: Subject>() {
    // Keys and values show only through attention: its tests cover that half.
    let mut random = Random::new(21);
    for (heads, kv_heads, head_dim) in SHAPES {
        let shape = AttentionShape { heads, kv_heads, head_dim };
        for (rows, start) in [(1, 0), (1, 77), (5, 3), (33, 100)] {
            let mut qkv = random.normals(rows * shape.qkv_width());
            // Now and then so small that what is added to their mean square counts.
            let size = if rows == 1 { 1e-3 } else { 1.0 };
            qkv.iter_mut().for_each(|x| *x *= size);
            let (q, k) = (random.normals(head_dim), random.normals(head_dim));
            for norms in [None, Some((q.as_slice(), k.as_slice()))] {
                let ours = run::<B>(shape, table(head_dim / 2, 200), norms, &qkv, start);
                let want = run::<ReferenceBackend>(shape, table(head_dim / 2, 200), norms, &qkv, start);
                // Two products and a sum of values of a few units.
                assert_near(&ours, &want, |_| 1e-5, &format!("{shape:?}, {rows} rows from {start}"));
            }
        }
    }
}

pub(crate) fn position_zero_rotates_nothing<B: Subject>() {
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 64 };
    let qkv = Random::new(22).normals(shape.qkv_width());
    assert_same_bits(&run::<B>(shape, table(32, 4), None, &qkv, 0), &qkv[..128], "queries");
}

pub(crate) fn elements_beyond_the_rotary_dimension_stay<B: Subject>() {
    let shape = AttentionShape { heads: 3, kv_heads: 1, head_dim: 64 };
    let qkv = Random::new(23).normals(2 * shape.qkv_width());
    let out = run::<B>(shape, table(12, 40), None, &qkv, 30);
    let want = run::<ReferenceBackend>(shape, table(12, 40), None, &qkv, 30);
    assert_near(&out, &want, |_| 1e-5, "queries");
    for row in 0..2 {
        for head in 0..3 {
            let (rotated, given) = (&out[(row * 3 + head) * 64..][..64], &qkv[row * 320 + head * 64..][..64]);
            assert_same_bits(&rotated[24..], &given[24..], "the unrotated part");
            let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
            assert!((norm(rotated) / norm(given) - 1.0).abs() < 1e-5, "a rotation keeps lengths");
        }
    }
}
