//! What the kernels on tensor cores promise beyond the conformance suite: that fragments lie where they should, that no
//! size of tiles changes a bit, and that numbers beyond the range of 16 bits come out right.

use engine_kernels::cuda::{Address, Arg, Boxes, Driver, Launch, Memory, Start, TensorMap};
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{AttentionShape, Backend, Batch, DType, KvDType, KvLayout, Matrix, RopeTable};
use half::{bf16, f16};

use crate::support::{Random, assert_same_bits};
use crate::{OnDevice, Watched, watched};

/// Device memory that holds these bytes.
fn holding<D: Driver>(driver: &D, bytes: &[u8]) -> D::Memory {
    let memory = driver.allocate(bytes.len().max(16)).unwrap();
    driver.write(bytes, memory.address()).unwrap();
    memory
}

fn floats<D: Driver>(driver: &D, from: Address, len: usize) -> Vec<f32> {
    let mut bytes = vec![0; len * 4];
    driver.read(from, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

pub(crate) fn fragments_lie_where_the_ptx_isa_says<D: Start>() {
    let driver = Watched::<D>::start();
    let mut random = Random::new(1);
    // Small whole numbers: every sum is exact, in whichever order.
    let mut numbers = |len: usize| (0..len).map(|_| (random.bits() % 33) as f32 - 16.0).collect::<Vec<_>>();
    let (a, b) = (numbers(256), numbers(128));
    let transposed: Vec<f32> = (0..128).map(|i| b[i % 16 * 8 + i / 16]).collect();
    let product = |i: usize| (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum::<f32>();
    let want: Vec<f32> = (0..128).map(product).collect();
    for (kernel, b, dtype) in [
        ("mma_check_f16", &transposed, DType::F16),
        ("mma_check_bf16", &transposed, DType::BF16),
        ("mma_check_f16_transposed", &b, DType::F16),
        ("mma_check_bf16_transposed", &b, DType::BF16),
    ] {
        let [a, b] = [&a, b].map(|x| holding(&driver, &bytes_of(x, dtype)));
        let out = driver.allocate(128 * 4).unwrap();
        let args = [&a, &b, &out].map(|memory| Arg::from(memory.address()));
        driver.launch(&Launch { kernel, grid: [1, 1, 1], block: 32, args: &args, ..Launch::default() }).unwrap();
        assert_eq!(floats(&driver, out.address(), 128), want, "{kernel}");
        watched::held();
    }
}

/// Sizes of tiles of `kernels/cuda/gemm.cu`.
const TILES: [(&str, usize, usize, usize); 3] =
    [("large", 128, 128, 256), ("medium", 64, 64, 128), ("small", 64, 32, 128)];

pub(crate) fn no_tile_and_no_split_changes_a_bit<D: Start>() {
    let driver = Watched::<D>::start();
    // Three segments, the last of them short; features and rows that fill no tile; rows of the output that start askew.
    let (rows, cols, features, width, first) = (70, 1096usize, 45, 50usize, 3usize);
    let segments = cols.div_ceil(512);
    let mut random = Random::new(2);
    let mut numbers = |len: usize| (0..len).map(|_| random.signed()).collect::<Vec<_>>();
    let (x, weight) = (numbers(rows * cols), numbers(features * cols));
    let x_scales = holding(&driver, &bytes_of(&vec![4.0; rows], DType::F32));
    let bias = holding(&driver, &bytes_of(&numbers(width), DType::F32));
    let any: Vec<u8> = numbers(features * cols).iter().map(|x| (x * 120.0) as i8 as u8).collect();
    // For 16 elements each, more than enough for all; half of them serve for 32.
    let small = |x: &f32| f16::from_f32(x / 64.0).to_le_bytes();
    let scales = holding(&driver, &numbers(features * cols / 8).iter().flat_map(small).collect::<Vec<_>>());
    let single_scales = holding(&driver, &bytes_of(&numbers(features * cols / 128 + 1), DType::F32));
    for (suffix, dtype) in [
        ("f16", DType::F16),
        ("bf16", DType::BF16),
        ("nibbles", DType::F16),
        ("bytes", DType::F16),
        ("fine_bytes", DType::F16),
        ("f8", DType::F16),
    ] {
        let scales = if suffix == "f8" { &single_scales } else { &scales };
        let floats_of_weight = bytes_of(&weight, dtype);
        let values = if suffix.ends_with("16") { &floats_of_weight } else { &any };
        let (x, values) = (holding(&driver, &bytes_of(&x, dtype)), holding(&driver, values));
        let launch = |kernel: &str, grid: [usize; 3], block: usize, args: &[Arg]| {
            driver.launch(&Launch { kernel, grid, block, args, ..Launch::default() }).unwrap();
        };
        let run = |(size, tile_rows, tile_out, threads): (&str, usize, usize, usize), split: bool| {
            let sums = driver.allocate(segments * rows * features * 4).unwrap();
            let out = driver.allocate(rows * width.next_multiple_of(8) * 4).unwrap();
            let behind = [Arg::from(x_scales.address()), bias.address().into(), out.address().into()];
            let sizes = [features.into(), width.into(), first.into()];
            let args = [
                &[values.address().into(), scales.address().into(), x.address().into()],
                &behind[..],
                &[sums.address().into(), rows.into(), cols.into()],
                &sizes,
            ];
            let grid = [rows.div_ceil(tile_rows) * features.div_ceil(tile_out), 1, if split { segments } else { 1 }];
            launch(&format!("product_{size}_{suffix}"), grid, threads, &args.concat());
            if split {
                let args = [&[Arg::from(sums.address())], &behind[..], &[rows.into(), segments.into()], &sizes];
                launch("add_segments", [features.div_ceil(128), rows, 1], 128, &args.concat());
            }
            floats(&driver, out.address(), rows * width.next_multiple_of(8))
        };
        let whole = run(TILES[0], false);
        assert!(whole.iter().filter(|x| **x != 0.0).count() >= rows * features, "{suffix}");
        for tile in TILES {
            for split in [false, true] {
                assert_same_bits(&run(tile, split), &whole, &format!("{} {suffix}, split: {split}", tile.0));
            }
        }
    }
}

/// Shared memory that kernels take which copy boxes of 64 columns and so many rows.
fn shared_bytes(box_rows: usize) -> usize {
    box_rows * 128 + 1008
}

fn map<D: Driver>(driver: &D, start: Address, [rows, cols]: [usize; 2], box_rows: usize) -> TensorMap {
    let row_bytes = cols.next_multiple_of(8) * 2;
    driver.tensor_map(&Boxes { start, rows, cols, row_bytes, box_rows }).unwrap()
}

pub(crate) fn boxes_are_swizzled_and_end_in_zeros<D: Start>() {
    // A box and an eighth wide: what lies behind a row, which is the next, is not to be seen.
    boxes_of_rows::<D>(72);
}

pub(crate) fn boxes_end_in_zeros_amid_sixteen_bytes<D: Start>() {
    // Rows of nine eights, the last of which is not all the matrix's: what is there is not to be seen either.
    boxes_of_rows::<D>(67);
}

fn boxes_of_rows<D: Start>(cols: usize) {
    let driver = Watched::<D>::start();
    if !driver.has_wgmma() {
        return;
    }
    let (rows, stride) = (70, cols.next_multiple_of(8));
    let elements: Vec<u16> = (0..rows * stride).map(|i| i as u16 + 1).collect();
    let matrix = holding(&driver, &elements.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>());
    let map = map(&driver, matrix.address(), [rows, cols], 64);
    let out = driver.allocate(64 * 128).unwrap();
    for (first_row, first_col) in [(0, 0), (0, 64), (64, 0), (64, 64), (3, 8)] {
        driver.write(&[0xff; 64 * 128], out.address()).unwrap();
        let args = [out.address().into(), first_row.into(), first_col.into()];
        let launch =
            Launch { kernel: "box_check", grid: [1, 1, 1], block: 128, shared: shared_bytes(64), ..Launch::default() };
        driver.launch(&Launch { maps: &[map], args: &args, ..launch }).unwrap();
        let mut bytes = vec![0; 64 * 128];
        driver.read(out.address(), &mut bytes).unwrap();
        let seen: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|two| u16::from_le_bytes(*two)).collect();
        for (i, seen) in seen.into_iter().enumerate() {
            // Sixteens of a row of 128 bytes change places by the row's number.
            let (row, chunk) = (i / 64, (i % 64 / 8) ^ (i / 64 % 8));
            let (row, col) = (first_row + row, first_col + chunk * 8 + i % 8);
            let want = if row < rows && col < cols { elements[row * stride + col] } else { 0 };
            assert_eq!(seen, want, "element {i} of the box at ({first_row}, {first_col}), which is ({row}, {col})");
        }
        watched::held();
    }
}

pub(crate) fn operands_and_sums_of_wgmma_lie_where_the_ptx_isa_says<D: Start>() {
    let driver = Watched::<D>::start();
    if !driver.has_wgmma() {
        return;
    }
    let mut random = Random::new(7);
    // Small whole numbers: every sum is exact, in whichever order.
    let mut numbers = |len: usize| (0..len).map(|_| (random.bits() % 33) as f32 - 16.0).collect::<Vec<_>>();
    for columns in [64, 128, 192] {
        let (a, b) = (numbers(64 * 64), numbers(columns * 64));
        let product = |i: usize| (0..64).map(|k| a[i / columns * 64 + k] * b[i % columns * 64 + k]).sum::<f32>();
        let want: Vec<f32> = (0..64 * columns).map(product).collect();
        for (suffix, dtype) in [("f16", DType::F16), ("bf16", DType::BF16)] {
            let [a, b] = [&a, &b].map(|x| holding(&driver, &bytes_of(x, dtype)));
            let maps = [(&a, 64), (&b, columns)].map(|(x, rows)| map(&driver, x.address(), [rows, 64], rows));
            let out = driver.allocate(64 * columns * 4).unwrap();
            let kernel = &format!("wgmma_check_{suffix}_{columns}");
            let (shared, args) = (shared_bytes(64 + columns), [out.address().into()]);
            driver.launch(&Launch { kernel, grid: [1, 1, 1], block: 128, shared, maps: &maps, args: &args }).unwrap();
            assert_eq!(floats(&driver, out.address(), want.len()), want, "{kernel}");
            watched::held();
        }
    }
}

pub(crate) fn operands_that_are_stored_or_held_or_lie_across_are_multiplied_alike<D: Start>() {
    let driver = Watched::<D>::start();
    if !driver.has_wgmma() {
        return;
    }
    let mut random = Random::new(9);
    // Small whole numbers: every sum is exact, in whichever order.
    let mut numbers = |len: usize| (0..len).map(|_| (random.bits() % 33) as f32 - 16.0).collect::<Vec<_>>();
    for columns in [64, 128, 256] {
        let (a, b) = (numbers(64 * 64), numbers(64 * columns));
        let product = |i: usize| (0..64).map(|k| a[i / columns * 64 + k] * b[k * columns + i % columns]).sum::<f32>();
        let want: Vec<f32> = (0..64 * columns).map(product).collect();
        let upright: Vec<f32> = (0..columns * 64).map(|i| b[i % 64 * columns + i / 64]).collect();
        for (suffix, dtype) in [("f16", DType::F16), ("bf16", DType::BF16)] {
            let [a, b, upright] = [&a, &b, &upright].map(|x| holding(&driver, &bytes_of(x, dtype)));
            let run = |kernel: &str, b: TensorMap, box_rows: usize| {
                let out = driver.allocate(64 * columns * 4).unwrap();
                let (shared, args) = (shared_bytes(box_rows), [a.address().into(), out.address().into()]);
                let launch = Launch { kernel, grid: [1, 1, 1], block: 128, shared, maps: &[b], args: &args };
                driver.launch(&launch).unwrap();
                assert_eq!(floats(&driver, out.address(), want.len()), want, "{kernel}");
                watched::held();
            };
            if columns == 64 {
                let upright = map(&driver, upright.address(), [64, 64], 64);
                run(&format!("wgmma_check_stored_{suffix}"), upright, 128);
            }
            let across = map(&driver, b.address(), [64, columns], 64);
            run(&format!("wgmma_check_across_{suffix}_{columns}"), across, columns.div_ceil(64) * 64);
        }
    }
}

/// Sizes of tiles of `kernels/cuda/hopper_gemm.cu`: their rows, and stages.
const HOPPER_TILES: [(&str, usize, usize); 3] = [("tall", 192, 5), ("middle", 128, 6), ("flat", 64, 4)];

pub(crate) fn no_hopper_tile_and_no_split_changes_a_bit<D: Start>() {
    let driver = Watched::<D>::start();
    if !driver.has_wgmma() {
        return;
    }
    // Three segments, the last of them short; features and rows that fill no tile but the first; rows of the output
    // that start askew.
    let (rows, cols, features, width, first) = (201, 1096usize, 150, 155usize, 3usize);
    let segments = cols.div_ceil(512);
    let mut random = Random::new(8);
    let mut numbers = |len: usize| (0..len).map(|_| random.signed()).collect::<Vec<_>>();
    let (x, weight) = (numbers(rows * cols), numbers(features * cols));
    let x_scales = holding(&driver, &bytes_of(&vec![4.0; rows], DType::F32));
    let bias = holding(&driver, &bytes_of(&numbers(width), DType::F32));
    for (suffix, dtype) in [("f16", DType::F16), ("bf16", DType::BF16)] {
        let [x, weight] = [&x, &weight].map(|values| holding(&driver, &bytes_of(values, dtype)));
        let run = |(size, tile_rows, stages): (&str, usize, usize), split: bool| {
            let sums = driver.allocate(segments * rows * features * 4).unwrap();
            let out = driver.allocate(rows * width.next_multiple_of(8) * 4).unwrap();
            let behind = [Arg::from(x_scales.address()), bias.address().into(), out.address().into()];
            let sizes = [features.into(), width.into(), first.into()];
            let maps = [(&weight, features, 128), (&x, rows, tile_rows)]
                .map(|(of, rows, box_rows)| map(&driver, of.address(), [rows, cols], box_rows));
            let args = [&behind[..], &[sums.address().into(), rows.into(), cols.into()], &sizes].concat();
            let grid = [rows.div_ceil(tile_rows) * features.div_ceil(128), 1, if split { segments } else { 1 }];
            let (kernel, shared) = (&format!("hopper_gemm_{size}_{suffix}"), stages * (128 + tile_rows) * 128 + 1008);
            driver.launch(&Launch { kernel, grid, block: 256, shared, maps: &maps, args: &args }).unwrap();
            if split {
                let args =
                    [&[Arg::from(sums.address())], &behind[..], &[rows.into(), segments.into()], &sizes].concat();
                let grid = [features.div_ceil(128), rows, 1];
                driver
                    .launch(&Launch { kernel: "add_segments", grid, block: 128, args: &args, ..Launch::default() })
                    .unwrap();
            }
            floats(&driver, out.address(), rows * width.next_multiple_of(8))
        };
        let whole = run(HOPPER_TILES[0], false);
        assert!(whole.iter().filter(|x| **x != 0.0).count() >= rows * features, "{suffix}");
        for tile in HOPPER_TILES {
            for split in [false, true] {
                assert_same_bits(&run(tile, split), &whole, &format!("{} {suffix}, split: {split}", tile.0));
            }
        }
    }
}

/// The product of rows with a weight.
fn product<B: Backend>(backend: &mut B, dtype: DType, weight: &[f32], x: &[f32], cols: usize) -> Vec<f32> {
    let bytes = bytes_of(weight, dtype);
    let features = weight.len() / cols;
    let weight = backend.linear_weight(&[Matrix::new(dtype, features, cols, &bytes).unwrap()]).unwrap();
    let rows = x.len() / cols;
    let (mut input, mut out) = (backend.activations(rows, cols), backend.activations(rows, features));
    backend.write(x, &mut input);
    backend.linear(&input, &weight, None, &mut out);
    backend.read(&out)
}

pub(crate) fn activations_of_any_magnitude_are_multiplied<D: Start>() {
    let driver = Watched::<D>::start();
    let (rows, cols, features) = (24, 72, 11);
    let mut random = Random::new(3);
    let weight: Vec<f32> = (0..features * cols).map(|_| random.signed()).collect();
    // From 2^-90 to 2^94: f16 ends at 2^16. One row is nothing but zeros.
    let magnitude = |row: usize| if row == 7 { 0.0 } else { 2f32.powi(row as i32 * 8 - 90) };
    let x: Vec<f32> = (0..rows * cols).map(|i| random.signed() * magnitude(i / cols)).collect();
    let mut backend = OnDevice::<D>::new(driver);
    for (dtype, unit) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        let ours = product(&mut backend, dtype, &weight, &x, cols);
        let want = product(&mut ReferenceBackend, dtype, &weight, &x, cols);
        for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
            let row = i / features;
            let bound = x[row * cols..][..cols].iter().map(|x| x.abs()).sum::<f32>() * unit;
            assert!(
                (ours - want).abs() <= bound,
                "{dtype:?}, row {row}: {ours:e}, should be {want:e} within {bound:e}"
            );
        }
        watched::held();
    }
}

pub(crate) fn rows_do_not_see_what_is_wrong_with_others<D: Start>() {
    let driver = Watched::<D>::start();
    let (rows, cols, features) = (40, 40, 9);
    let mut random = Random::new(4);
    let weight: Vec<f32> = (0..features * cols).map(|_| random.signed()).collect();
    let clean: Vec<f32> = (0..rows * cols).map(|_| random.signed()).collect();
    let mut spoilt = clean.clone();
    spoilt[3 * cols + 5] = f32::NAN;
    spoilt[8 * cols + 39] = f32::INFINITY;
    spoilt[39 * cols..].fill(f32::MAX);
    let mut backend = OnDevice::<D>::new(driver);
    for dtype in [DType::F16, DType::BF16] {
        let want = product(&mut backend, dtype, &weight, &clean, cols);
        let ours = product(&mut backend, dtype, &weight, &spoilt, cols);
        for row in (0..rows).filter(|row| ![3, 8, 39].contains(row)) {
            let part = row * features..(row + 1) * features;
            assert_same_bits(&ours[part.clone()], &want[part], &format!("{dtype:?}, row {row}"));
        }
        assert!(ours[3 * features..4 * features].iter().all(|x| x.is_nan()), "{dtype:?}");
        assert!(ours[8 * features..9 * features].iter().all(|x| !x.is_finite()), "{dtype:?}");
    }
}

/// Attention over the whole of one sequence, in chunks.
struct Sequence {
    shape: AttentionShape,
    dtype: KvDType,
    block_size: usize,
    qkv: Vec<f32>,
}

impl Sequence {
    fn rows<B: Backend>(&self, backend: &mut B, chunks: &[usize]) -> Vec<f32> {
        let Self { shape, dtype, block_size, .. } = *self;
        let (width, tokens) = (shape.qkv_width(), self.qkv.len() / shape.qkv_width());
        let blocks = tokens.div_ceil(block_size);
        let layout =
            KvLayout { layers: 1, kv_heads: shape.kv_heads, head_dim: shape.head_dim, block_size, blocks, dtype };
        let mut cache = backend.kv_cache(layout).unwrap();
        // A rotation by nothing.
        let rope = backend.rope(RopeTable::new(&vec![0.0; shape.head_dim / 2], 1.0, tokens));
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let (mut all, mut done) = (Vec::new(), 0);
        for &chunk in chunks {
            let mut batch = Batch::default();
            batch.push(&vec![0; chunk], done as u32, &table, 0);
            let (mut qkv, mut out) = (backend.activations(chunk, width), backend.activations(chunk, shape.q_width()));
            backend.write(&self.qkv[done * width..(done + chunk) * width], &mut qkv);
            backend.begin(&batch);
            backend.rope_and_cache(&mut qkv, shape, None, &rope, &mut cache, 0, &batch);
            backend.attention(&qkv, shape, 1.0 / (shape.head_dim as f32).sqrt(), &cache, 0, &batch, &mut out);
            all.extend(backend.read(&out));
            done += chunk;
        }
        assert_eq!(done, tokens, "all tokens are in a chunk");
        backend.check().unwrap();
        all
    }
}

/// Backends for attention, and whether it is the first: another does without wgmma, where a device has it.
fn backends<D: Start>() -> impl Iterator<Item = (OnDevice<D>, bool)> {
    [true, false].into_iter().filter_map(|is_first| {
        let mut backend = OnDevice::<D>::new(Watched::start());
        let is_another = is_first || backend.driver().has_wgmma();
        backend.use_wgmma(is_first);
        is_another.then_some((backend, is_first))
    })
}

pub(crate) fn no_place_in_a_tile_changes_a_bit<D: Start>() {
    for (mut backend, is_first) in backends::<D>() {
        let mut random = Random::new(5);
        for (heads, kv_heads, head_dim, block_size, dtype) in [
            (2, 1, 64, 16, KvDType::F16),
            (3, 3, 96, 32, KvDType::BF16),
            (1, 1, 96, 64, KvDType::F16),
            (7, 1, 128, 64, KvDType::BF16),
            (2, 1, 128, 128, KvDType::F16),
            (1, 1, 256, 16, KvDType::F16),
            (2, 1, 256, 128, KvDType::BF16),
            (4, 1, 64, 32, KvDType::F8),
            (2, 2, 96, 16, KvDType::F8),
            (3, 1, 128, 64, KvDType::F8),
            (1, 1, 256, 32, KvDType::F8),
        ] {
            let shape = AttentionShape { heads, kv_heads, head_dim };
            let qkv = (0..150 * shape.qkv_width()).map(|_| 2.0 * random.signed()).collect();
            if !is_first && dtype == KvDType::F8 {
                continue;
            }
            let sequence = Sequence { shape, dtype, block_size, qkv };
            // The same row first in its tile, last, and anywhere; tiles of one, two and many rows of a fragment.
            let whole = sequence.rows(&mut backend, &[150]);
            let want = sequence.rows(&mut ReferenceBackend, &[150]);
            // Keys, queries and weights off by half a unit in the last place of 11 or 8 bits each, of values up to 2.
            // (Those of 8 bits are multiplied as f16.)
            let tolerance = if dtype == KvDType::BF16 { 2.4e-2 } else { 3e-3 };
            for (i, (ours, want)) in whole.iter().zip(&want).enumerate() {
                let is_near = (ours - want).abs() <= tolerance;
                assert!(is_near, "{shape:?} {dtype:?}: element {i} is {ours}, should be {want}");
            }
            let chunks = [&[128, 22][..], &[65, 85], &[2; 75], &[3, 61, 64, 22], &[63, 16, 17, 2, 52], &[30, 120]];
            for chunks in &chunks[..if is_first { 6 } else { 2 }] {
                let ours = sequence.rows(&mut backend, chunks);
                assert_same_bits(&ours, &whole, &format!("{shape:?} {dtype:?}, chunks of {chunks:?}"));
            }
        }
    }
}

pub(crate) fn a_score_far_above_the_others_takes_all<D: Start>() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 64 };
    let mut random = Random::new(6);
    // Whole numbers, which both types hold. Scores far beyond what exp can hold, in both directions; that of token 70
    // is the highest from its place on.
    let row = |token: usize| {
        let mut row = vec![0.0; 192];
        row[0] = 1024.0;
        row[64] = if token == 70 { 64.0 } else { -(token as f32) };
        row[128..].fill_with(|| (random.bits() % 100) as f32);
        row
    };
    let qkv: Vec<f32> = (0..140).flat_map(row).collect();
    for (mut backend, _) in backends::<D>() {
        for dtype in [KvDType::F16, KvDType::BF16] {
            let sequence = Sequence { shape, dtype, block_size: 16, qkv: qkv.clone() };
            let out = sequence.rows(&mut backend, &[140]);
            for token in 0..140 {
                let winner = if token < 70 { 0 } else { 70 };
                assert_eq!(out[token * 64..][..64], qkv[winner * 192 + 128..][..64], "{dtype:?}, token {token}");
            }
        }
    }
}
