use crate::cpu::{CpuBackend, CpuOptions, Level};
use crate::{AttentionShape, Backend, Batch, KvDType, KvLayout, RopeTable};

const TOKENS: usize = 600;

fn noise(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 22) as f32 - 2.0).collect()
}

/// Attention of the last `query_len` of [`TOKENS`] tokens, in a cache whose other elements are all NaN, pages in
/// reverse.
fn last_queries(
    backend: &mut CpuBackend,
    shape: AttentionShape,
    dtype: KvDType,
    block_size: usize,
    query_len: usize,
) -> Vec<f32> {
    let blocks = TOKENS.div_ceil(block_size) + 2;
    let AttentionShape { kv_heads, head_dim, .. } = shape;
    let layout = KvLayout { layers: 1, kv_heads, head_dim, block_size, blocks, dtype };
    let mut cache = backend.kv_cache(layout).expect("cache");
    // SAFETY: the cache is this test's alone.
    unsafe { cache.page(0, 0, 0).0.write_bytes(0xff, layout.total_bytes()) };
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let rope = backend.rope(RopeTable::new(&[1.0, 0.1], 1.0, TOKENS));
    let width = shape.qkv_width();
    let (mut qkv, mut out) = (backend.activations(TOKENS, width), backend.activations(TOKENS, shape.q_width()));
    backend.write(&noise(TOKENS * width), &mut qkv);
    let mut batch = Batch::default();
    batch.push(&[0; TOKENS], 0, &table, 0);
    backend.rope_and_cache(&mut qkv, shape, None, &rope, &mut cache, 0, &batch);
    let queries = backend.read(&qkv)[(TOKENS - query_len) * width..].to_vec();
    backend.write(&queries, &mut qkv);
    batch.clear();
    batch.push(&vec![0; query_len], (TOKENS - query_len) as u32, &table, 0);
    backend.attention(&qkv, shape, 0.3, &cache, 0, &batch, &mut out);
    backend.read(&out)
}

fn backend(level: Level, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, level: Some(level) })
}

#[test]
fn what_was_never_written_is_never_used_and_chunks_change_no_bit() {
    for (heads, kv_heads, head_dim, block_size) in
        [(6, 2, 64, 16), (3, 3, 24, 8), (8, 1, 16, 32), (4, 2, 80, 12), (97, 1, 8, 16)]
    {
        let shape = AttentionShape { heads, kv_heads, head_dim };
        for dtype in [KvDType::F32, KvDType::F16, KvDType::BF16] {
            let mut one = backend(Level::detect(), 1);
            let all = last_queries(&mut one, shape, dtype, block_size, TOKENS);
            assert!(all.iter().all(|v| v.is_finite()), "{shape:?} {dtype:?}");
            for query_len in [1, 2, 3, 77] {
                let tail = &all[(TOKENS - query_len) * shape.q_width()..];
                assert!(last_queries(&mut one, shape, dtype, block_size, query_len) == tail, "{shape:?} {query_len}");
                let mut several = backend(Level::detect(), 3);
                assert!(last_queries(&mut several, shape, dtype, block_size, query_len) == tail, "{shape:?} split");
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 80 };
    for dtype in [KvDType::F32, KvDType::F16, KvDType::BF16] {
        for query_len in [9, 1] {
            let of = |level, threads| last_queries(&mut backend(level, threads), shape, dtype, 16, query_len);
            let expected = of(Level::Portable, 1);
            for level in [Level::Avx2, Level::Avx512] {
                assert!(!level.is_available() || of(level, 2) == expected, "{level:?} {dtype:?} {query_len}");
            }
        }
    }
}
