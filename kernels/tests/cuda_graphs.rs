//! Steps of the CUDA backend that are recorded and replayed, on the emulated device: when they are, that results are
//! the same, and what happens if it fails.

use engine_cuda_emulated::{Emulated, EmulatedBackend, Refusal};
use engine_kernel_suite::steps::{Layer, ROWS_MAX, all_kinds, assert_near, decode};
use engine_kernels::Backend;
use engine_kernels::reference::ReferenceBackend;

fn device() -> Layer<EmulatedBackend> {
    Layer::new(EmulatedBackend::new(Emulated::default()))
}

#[test]
fn a_recorded_step_enqueues_what_the_step_itself_does() {
    let mut layer = device();
    let batch = decode(&[30, 40, 50], 1);
    let mut launches = Vec::new();
    let mut results = Vec::new();
    for _ in 0..3 {
        let before = layer.backend.driver().launches();
        results.push(layer.step(&batch));
        launches.push(layer.backend.driver().launches() - before);
    }
    assert_eq!(launches, [launches[0]; 3]);
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
    assert_eq!(layer.backend.graphs(), 1);
}

#[test]
fn a_step_without_logits_is_neither_recorded_nor_replayed() {
    // A model does less in one than in a step of the same shape that decodes.
    let (mut layer, mut eager) = (device(), device_with(0));
    let batch = decode(&[30, 40, 50], 1);
    let mut without = decode(&[30, 40, 50], 1);
    without.logit_rows.clear();
    for _ in 0..3 {
        layer.step(&without);
        eager.step(&without);
    }
    assert_eq!((layer.backend.graphs(), layer.backend.driver().recordings()), (0, 0));
    for _ in 0..3 {
        assert_eq!(bits(&layer.step(&batch)), bits(&eager.step(&batch)));
    }
    assert_eq!(layer.backend.graphs(), 1);
    let mut called = false;
    layer.backend.step(&without, &mut |_| called = true);
    assert!(called, "what was recorded is not what this step does");
}

/// A layer that records so many steps at most.
fn device_with(graphs_max: usize) -> Layer<EmulatedBackend> {
    Layer::new(EmulatedBackend::new(Emulated::default()).with_graphs_max(graphs_max))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn after_a_warm_up_nothing_is_recorded_and_results_are_those_without() {
    let (mut warm, mut eager) = (device(), device_with(0));
    let recorded = warm.warm_up();
    assert_eq!(warm.backend.graphs(), recorded);
    assert!(recorded > 10, "{recorded}");
    let asked_for = warm.backend.driver().recordings();
    for batch in all_kinds() {
        let (ours, theirs) = (warm.step(&batch), eager.step(&batch));
        // That no page was touched shows here too.
        assert_eq!(bits(&ours), bits(&theirs), "{:?}", batch.sequences);
    }
    assert_eq!(warm.backend.driver().recordings(), asked_for);
    assert_eq!(warm.backend.graphs(), recorded, "nothing was recorded in vain");
    assert_eq!(eager.backend.driver().recordings(), 0);
    assert_eq!(warm.warm_up(), 0, "what is there is not recorded again");
}

#[test]
fn whoever_wants_no_recordings_has_nothing_to_warm_up() {
    let mut eager = device_with(0);
    assert_eq!(eager.backend.warm_up_sizes(ROWS_MAX), []);
    assert_eq!(eager.warm_up(), 0);
    assert_eq!(device().backend.warm_up_sizes(40), [1, 2, 4, 8, 16, 32, 40]);
}

#[test]
fn a_step_that_cannot_be_recorded_is_enqueued_and_is_not_tried_again() {
    for refusal in [Refusal::AtBegin, Refusal::Amid, Refusal::AtEnd] {
        let (mut layer, mut reference) = (device(), Layer::new(ReferenceBackend));
        layer.backend.driver().refuse_recordings(Some(refusal));
        for turn in 0..4 {
            let batch = decode(&[30 + turn, 40], turn);
            assert_near(&layer.step(&batch), &reference.step(&batch));
        }
        layer.backend.check().unwrap();
        assert_eq!((layer.backend.graphs(), layer.backend.driver().recordings()), (0, 1), "{refusal:?}");
        // Steps of another shape are, as soon as they can be.
        layer.backend.driver().refuse_recordings(None);
        for turn in 0..3 {
            for contexts in [&[50 + turn][..], &[60, 70 + turn]] {
                let batch = decode(contexts, turn);
                assert_near(&layer.step(&batch), &reference.step(&batch));
            }
        }
        assert_eq!((layer.backend.graphs(), layer.backend.driver().recordings()), (1, 2), "{refusal:?}");
    }
}

#[test]
fn a_warm_up_that_records_nothing_fails_nothing() {
    for refusal in [Refusal::AtBegin, Refusal::Amid, Refusal::AtEnd] {
        let (mut layer, mut eager) = (device(), device_with(0));
        layer.backend.driver().refuse_recordings(Some(refusal));
        assert_eq!(layer.warm_up(), 0);
        let asked_for = layer.backend.driver().recordings();
        assert!(asked_for > 10);
        for batch in all_kinds().step_by(5) {
            assert_eq!(bits(&layer.step(&batch)), bits(&eager.step(&batch)));
        }
        layer.backend.check().unwrap();
        assert_eq!(layer.backend.driver().recordings(), asked_for, "{refusal:?}");
    }
}

#[test]
fn a_recording_that_fails_hides_no_failure_of_the_device() {
    for refusal in [None, Some(Refusal::AtBegin), Some(Refusal::Amid), Some(Refusal::AtEnd)] {
        let mut layer = device();
        let batch = decode(&[30, 40], 0);
        layer.step(&batch);
        layer.backend.driver().refuse_recordings(refusal);
        layer.backend.driver().break_down();
        layer.step(&batch);
        let error = layer.backend.check().unwrap_err().to_string();
        assert!(error.contains("the device is broken"), "{error}");
    }
}

#[test]
fn no_more_steps_are_recorded_than_there_is_room_for() {
    let (mut layer, mut reference) = (device_with(2), Layer::new(ReferenceBackend));
    for turn in 0..3 {
        for contexts in [&[20][..], &[20, 30], &[20, 30, 40]] {
            let batch = decode(contexts, turn);
            assert_near(&layer.step(&batch), &reference.step(&batch));
        }
    }
    assert_eq!((layer.backend.graphs(), layer.backend.driver().recordings()), (2, 2));
    let mut layer = device_with(2);
    assert_eq!(layer.warm_up(), 2);
    assert_eq!(layer.backend.graphs(), 2);
}

#[test]
fn recordings_leave_some_of_the_device_s_memory_to_others() {
    let mut layer = device();
    layer.backend.driver().leave_free(64 << 20);
    assert_eq!(layer.warm_up(), 0);
    let mut reference = Layer::new(ReferenceBackend);
    for turn in 0..4 {
        let batch = decode(&[30 + turn, 40], turn);
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!((layer.backend.graphs(), layer.backend.driver().recordings()), (0, 0));
}
