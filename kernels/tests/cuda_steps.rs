//! Steps of the CUDA backend as a whole, as far as only the emulated device shows them: how they are cut into kernels,
//! and how they fail. What they compute is in the suite.

use engine_cuda_emulated::{Emulated, EmulatedBackend, EmulatedDevice, EmulatedHopper};
use engine_kernel_suite::steps::{
    BLOCK_SIZE, BLOCKS, HIDDEN, Layer, ROWS_MAX, SHAPE, VOCABULARY, decode, draw_alike, numbers,
};
use engine_kernels::cuda::{CudaBackend, Driver};
use engine_kernels::{
    Attention, AttentionShape, Backend, Batch, DType, DrawsAhead, KernelError, KvDType, KvLayout, Matrix, Projection,
    QkNorm, Residual, RmsNorm, RopeTable, RowTask, SampleRow, Sampled, SamplingParams, SequenceId,
};

fn device() -> Layer<EmulatedBackend> {
    Layer::new(EmulatedBackend::new(Emulated::default()))
}

/// Kernels that a step takes for a layer whose weights are of this type; and those that it has enqueued when it says
/// that keys and values are stored.
fn kernels_of_a_layer(dtype: DType, batch: &Batch) -> [u64; 2] {
    const FFN: usize = 40;
    let mut backend = EmulatedBackend::new(Emulated::default());
    let mut weight = |rows: usize, cols: usize| {
        let bytes: Vec<u8> = match dtype {
            DType::F32 => numbers(rows * cols, 9).iter().flat_map(|x| x.to_le_bytes()).collect(),
            // Halves, or something near.
            _ => 0x3f00u16.to_le_bytes().repeat(rows * cols),
        };
        backend.linear_weight(&[Matrix::new(dtype, rows, cols, &bytes).unwrap()]).unwrap()
    };
    let (qkv, output) = (weight(SHAPE.qkv_width(), HIDDEN), weight(HIDDEN, SHAPE.q_width()));
    let (gate_up, down) = (weight(2 * FFN, HIDDEN), weight(HIDDEN, FFN));
    let [norm, head_norm] = [HIDDEN, SHAPE.head_dim].map(|len| backend.vector(&numbers(len, 4)));
    let rope = backend.rope(RopeTable::new(&numbers(SHAPE.head_dim / 2, 6), 1.0, 512));
    let AttentionShape { kv_heads, head_dim, .. } = SHAPE;
    let dtype = KvDType::BF16;
    let layout = KvLayout { layers: 1, kv_heads, head_dim, block_size: BLOCK_SIZE, blocks: BLOCKS, dtype };
    let mut cache = backend.kv_cache(layout).unwrap();
    let mut residual = Residual::new(&mut backend, ROWS_MAX, HIDDEN);
    let widths = [SHAPE.qkv_width(), SHAPE.q_width(), 2 * FFN, FFN];
    let [mut projected, mut mixed, mut both, mut inner] = widths.map(|cols| backend.activations(ROWS_MAX, cols));
    backend.write(&numbers(batch.tokens.len() * HIDDEN, 7), residual.start());
    backend.driver().synchronize().unwrap();
    let before = backend.driver().launches();
    backend.begin(batch);
    let rms_norm = || RmsNorm { weight: &norm, eps: 1e-6 };
    backend.norm_linear(&mut residual, rms_norm(), &qkv, None, &mut projected);
    let norm = Some(QkNorm { q: &head_norm, k: &head_norm, eps: 1e-6 });
    let [output, gate_up, down] = [&output, &gate_up, &down].map(|weight| Projection { weight, bias: None });
    let attention = Attention { shape: SHAPE, scale: 0.25, norm, rope: &rope, output };
    let launched = |backend: &EmulatedBackend| {
        backend.driver().synchronize().unwrap();
        backend.driver().launches() - before
    };
    let mut stored = Vec::new();
    backend.add_attention(&mut projected, attention, &mut cache, 0, batch, &mut mixed, &mut residual, &mut |backend| {
        stored.push(launched(backend));
    });
    assert_eq!(stored.len(), 1);
    backend.add_mlp(&mut residual, rms_norm(), gate_up, down, [&mut both, &mut inner]);
    [launched(&backend), stored[0]]
}

#[test]
fn a_layer_is_five_kernels_for_up_to_four_rows_that_decode_seven_up_to_sixteen_and_eight_beyond() {
    // Two partitions of keys: they are merged without another kernel.
    let of = |dtype| [1, 4, 5, 16, 17, ROWS_MAX].map(|rows| kernels_of_a_layer(dtype, &decode(&vec![200; rows], 0))[0]);
    assert_eq!(of(DType::F32), [5, 5, 7, 7, 8, 8]);
    // Whatever makes activations rounds them,
    assert_eq!(of(DType::BF16), [5, 5, 7, 7, 8, 8]);
    // but attention does not see the whole row that a scale of f16 is for.
    assert_eq!(of(DType::F16), [5, 5, 7, 7, 9, 9]);
}

#[test]
fn keys_and_values_are_said_to_be_stored_behind_the_kernel_that_stores_them() {
    // The product, and attention, which rotates what it attends to.
    assert_eq!(kernels_of_a_layer(DType::BF16, &decode(&[200; 4], 0))[1], 2);
    // With a prompt, a norm and the product, and what stores before attention reads.
    let mut batch = decode(&[200; 4], 0);
    batch.push(&[3; 5], 20, &[70, 71], 5);
    assert_eq!(kernels_of_a_layer(DType::BF16, &batch)[1], 3);
}

#[test]
fn kernels_that_are_noted_do_nothing_until_they_are_enqueued() {
    notes(Emulated::default(), &["round_rows_bf16", "product_small_bf16", "add_segments"]);
    notes(EmulatedHopper::default(), &["round_rows_bf16", "hopper_gemm_flat_bf16", "add_segments"]);
}

fn notes<D: Driver>(driver: D, kernels: &[&str]) {
    let (rows, cols) = (20, 1024);
    let mut backend = CudaBackend::new(driver);
    let weight = 0x3f00u16.to_le_bytes().repeat(cols);
    let weight = backend.linear_weight(&[Matrix::new(DType::BF16, 1, cols, &weight).unwrap()]).unwrap();
    let (mut x, mut out) = (backend.activations(rows, cols), backend.activations(rows, 1));
    backend.write(&vec![1.0; rows * cols], &mut x);
    backend.linear(&x, &weight, None, &mut out);
    backend.write(&vec![7.0; rows], &mut out);
    let noted = backend.note(&mut |backend| backend.linear(&x, &weight, None, &mut out));
    let names: Vec<&str> = noted.iter().map(|noted| noted.kernel()).collect();
    assert_eq!(names, kernels);
    assert_eq!(noted[1].grid()[2], 2, "segments side by side");
    assert_eq!(backend.read(&out), vec![7.0; rows]);
    noted.iter().for_each(|noted| backend.enqueue(noted));
    assert_eq!(backend.read(&out), vec![512.0; rows]);
}

#[test]
fn products_are_cut_for_as_many_multiprocessors_as_the_device_has() {
    fn segments<const HOPPER: bool>(processors: usize) -> usize {
        let (rows, cols, features) = (20, 1024, 384);
        let driver = EmulatedDevice::<HOPPER>::default();
        driver.set_processors(processors);
        let mut backend = CudaBackend::new(driver);
        let weight = vec![0; 2 * features * cols];
        let weight = backend.linear_weight(&[Matrix::new(DType::BF16, features, cols, &weight).unwrap()]).unwrap();
        let (mut x, mut out) = (backend.activations(rows, cols), backend.activations(rows, features));
        backend.write(&vec![1.0; rows * cols], &mut x);
        // What rounds activations, and the product.
        backend.note(&mut |backend| backend.linear(&x, &weight, None, &mut out))[1].grid()[2]
    }
    assert_eq!([4, 132].map(segments::<false>), [1, 2]);
    assert_eq!([4, 132].map(segments::<true>), [1, 2]);
}

#[test]
fn a_step_that_is_launched_waits_for_nothing_and_one_that_is_collected_for_no_other() {
    let mut layer = device();
    layer.backend.make_room(ROWS_MAX);
    let batch = decode(&[40; 3], 0);
    for _ in 0..3 {
        layer.draw(&batch, &vec![Vec::new(); 3]);
        layer.drawn(3);
    }
    layer.backend.driver().synchronize().unwrap();
    let before = layer.backend.driver().launches();
    layer.draw(&batch, &vec![Vec::new(); 3]);
    layer.draw(&batch, &vec![Vec::new(); 3]);
    assert_eq!(layer.backend.driver().launches(), before);
    layer.drawn(3);
    let one = layer.backend.driver().launches() - before;
    layer.drawn(3);
    assert_eq!(layer.backend.driver().launches(), before + 2 * one);
}

#[test]
fn steps_mark_the_ends_of_their_copies_with_the_events_of_those_before() {
    let mut layer = device();
    layer.backend.make_room(ROWS_MAX);
    let batch = decode(&[40; 3], 0);
    let mut steps = |count: usize| {
        for _ in 0..count {
            layer.draw(&batch, &vec![Vec::new(); 3]);
            layer.drawn(3);
        }
        layer.backend.driver().events()
    };
    // Whatever is copied has two turns.
    let events = steps(2);
    assert_eq!(steps(6), events);
}

#[test]
fn penalties_are_right_where_there_is_no_room_to_remember_what_they_hang_on() {
    const LISTS: usize = 64 << 20;
    let expected = draw_alike(&mut device(), &mut device());
    let (mut ahead, mut told) = (device(), device());
    [&ahead, &told].iter().for_each(|layer| layer.backend.driver().leave_no_room_for(LISTS));
    assert_eq!(draw_alike(&mut ahead, &mut told), expected);
    for layer in [&mut ahead, &mut told] {
        layer.backend.check().unwrap();
        assert!(layer.backend.driver().bytes_allocated() < LISTS);
    }
}

#[test]
fn room_to_remember_sequences_is_made_where_some_is_left_to_others() {
    const LISTS: usize = 64 << 20;
    const SPARE: usize = 256 << 20;
    let made = |limit: &dyn Fn(&Emulated)| {
        let mut backend = EmulatedBackend::new(Emulated::default());
        limit(backend.driver());
        backend.make_room_for_penalties();
        backend.check().unwrap();
        backend.driver().bytes_allocated()
    };
    assert_eq!(made(&|device| device.leave_free(LISTS + SPARE)), LISTS);
    assert_eq!(made(&|device| device.leave_free(LISTS + SPARE - 1)), 0);
    // Although there was said to be enough.
    assert_eq!(made(&|device| device.leave_no_room_for(LISTS)), 0);
}

#[test]
fn room_to_remember_sequences_that_fails_to_be_made_is_a_failure() {
    let mut backend = EmulatedBackend::new(Emulated::default());
    backend.driver().begin_capture().unwrap();
    backend.make_room_for_penalties();
    let error = backend.check().unwrap_err().to_string();
    assert!(error.contains("a recording is under way"), "{error}");
}

#[test]
#[should_panic = "what was fetched is collected first"]
fn nothing_else_is_sampled_while_a_step_is_under_way() {
    let mut layer = device();
    layer.backend.make_room(ROWS_MAX);
    layer.draw(&decode(&[40; 3], 0), &vec![Vec::new(); 3]);
    let mut logits = layer.backend.activations(1, VOCABULARY);
    layer.backend.write(&[0.0; VOCABULARY], &mut logits);
    let params = SamplingParams::default();
    let task = RowTask::Sample { params: &params, suppress: &[], mask: None };
    let row = |_: usize| SampleRow { task, sequence: SequenceId(0), prompt: &[], output: &[], logprobs: None };
    layer.backend.sample(&mut logits, &row, &mut [Sampled::default()]);
}

#[test]
fn a_failure_is_reported_by_the_check_and_stops_everything() {
    let mut layer = device();
    let too_large = KvLayout {
        layers: 1,
        kv_heads: 1,
        head_dim: 64,
        block_size: 16,
        blocks: usize::MAX >> 16,
        dtype: KvDType::F32,
    };
    let refused = layer.backend.kv_cache(too_large);
    assert!(matches!(refused, Err(KernelError::Driver(_))), "{:?}", refused.err());
    let launched = layer.backend.driver().launches();
    layer.step(&decode(&[5], 0));
    assert_eq!(layer.backend.driver().launches(), launched);
    let error = layer.backend.check().unwrap_err().to_string();
    assert!(error.contains("lower --kv-blocks"), "{error}");
}

#[test]
fn heads_of_an_odd_width_are_refused() {
    let mut backend = EmulatedBackend::new(Emulated::default());
    for head_dim in [12, 264] {
        let layout = KvLayout { layers: 1, kv_heads: 1, head_dim, block_size: 16, blocks: 1, dtype: KvDType::F16 };
        assert!(matches!(backend.kv_cache(layout), Err(KernelError::HeadDim { .. })));
    }
}

#[test]
fn room_for_larger_products_is_made_before_steps_are_recorded_anew() {
    makes_room(Emulated::default());
    makes_room(EmulatedHopper::default());
}

fn makes_room<D: Driver>(driver: D) {
    let mut backend = CudaBackend::new(driver);
    let cols = 4096;
    // A half in bf16.
    let weight = 0x3f00u16.to_le_bytes().repeat(cols);
    let weight = backend.linear_weight(&[Matrix::new(DType::BF16, 1, cols, &weight).unwrap()]).unwrap();
    let mut batch = Batch::default();
    (0..20).for_each(|_| batch.push(&[0], 0, &[0], 0));
    let (mut x, mut out) = (backend.activations(20, cols), backend.activations(20, 1));
    let mut step = |backend: &mut CudaBackend<D>, value: f32| {
        backend.write(&vec![value; 20 * cols], &mut x);
        backend.step(&batch, &mut |backend| backend.linear(&x, &weight, None, &mut out));
        assert_eq!(backend.read(&out), [value * 2048.0; 20]);
    };
    step(&mut backend, 1.0);
    assert_eq!(backend.graphs(), 0);
    step(&mut backend, 2.0);
    assert_eq!(backend.graphs(), 1);
    // 600 rows of it are more than was allocated at first.
    let (mut larger, mut result) = (backend.activations(600, cols), backend.activations(600, 1));
    backend.write(&vec![1.0; 600 * cols], &mut larger);
    backend.linear(&larger, &weight, None, &mut result);
    assert_eq!(backend.read(&result), [2048.0; 600]);
    assert_eq!(backend.graphs(), 0, "what was recorded would read and write memory that was given back");
    step(&mut backend, 4.0);
}
