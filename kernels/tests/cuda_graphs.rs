//! Steps of the CUDA backend that are recorded and replayed, on the emulated device: when they are, that results are
//! the same, and what happens if it fails.

mod layer;

use engine_cuda_emulated::{Emulated, EmulatedBackend, Refusal};
use engine_kernels::cuda::{CudaBackend, Driver};
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Backend, Batch};

use layer::{BLOCKS, Layer, ROWS_MAX, assert_near, decode, device, prompt};

/// Positions of the layer's rotation table.
const CONTEXT_MAX: u32 = 512;

fn replayed_steps_match_the_reference<D: Driver>(driver: D) {
    let (mut layer, mut reference) = (Layer::new(CudaBackend::new(driver)), Layer::new(ReferenceBackend));
    for batch in [prompt(20), prompt(17)] {
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!(layer.backend.graphs(), 0, "prompts are not recorded");
    // Different numbers of sequences of the same bucket, at contexts that grow, then others.
    for turn in 0..4 {
        for sequences in [1, 3, 4] {
            let contexts: Vec<u32> = (0..sequences).map(|i| 17 + turn + i).collect();
            let batch = decode(&contexts, turn);
            assert_near(&layer.step(&batch), &reference.step(&batch));
        }
    }
    assert_eq!(layer.backend.graphs(), 2, "one for a sequence, one for three or four");
}

#[test]
fn steps_that_are_replayed_compute_what_the_reference_does() {
    replayed_steps_match_the_reference(Emulated::default());
}

fn rehearsed_steps_match_the_reference<D: Driver>(driver: D) {
    let (mut layer, mut reference) = (Layer::new(CudaBackend::new(driver)), Layer::new(ReferenceBackend));
    let recorded = rehearse(&mut layer);
    assert!(recorded > 10, "{recorded}");
    for batch in all_kinds().step_by(3) {
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    layer.backend.check().unwrap();
    assert_eq!(layer.backend.graphs(), recorded);
}

#[test]
fn steps_that_were_rehearsed_compute_what_the_reference_does() {
    rehearsed_steps_match_the_reference(Emulated::default());
}

#[cfg(feature = "cuda")]
mod cuda_device {
    use engine_kernels::cuda::Device;

    #[test]
    #[ignore = "needs a CUDA device"]
    fn steps_that_are_replayed_compute_what_the_reference_does() {
        super::replayed_steps_match_the_reference(Device::new(0).unwrap());
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn steps_that_were_rehearsed_compute_what_the_reference_does() {
        super::rehearsed_steps_match_the_reference(Device::new(0).unwrap());
    }
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
fn a_block_table_that_outgrows_its_place_is_recorded_anew() {
    let (mut layer, mut reference) = (device(), Layer::new(ReferenceBackend));
    for turn in 0..3 {
        layer.step(&decode(&[20; 2], turn));
        reference.step(&decode(&[20; 2], turn));
    }
    assert_eq!(layer.backend.graphs(), 1);
    // 24 sequences with tables of 32 pages: more than the first 4 KiB.
    let batch = decode(&[500; ROWS_MAX], 0);
    let mut long = Batch::default();
    for sequence in 0..ROWS_MAX {
        let at = batch.sequences[sequence].table_start as usize;
        long.push(&[3], 20, &batch.block_tables[at..at + 32].repeat(2), 0);
    }
    layer.step(&long);
    assert_eq!(layer.backend.graphs(), 0);
    reference.step(&long);
    for turn in 3..6 {
        let batch = decode(&[20; 2], turn);
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!(layer.backend.graphs(), 1);
}

#[test]
fn contexts_of_several_partitions_are_split_replayed_and_merged() {
    let (mut layer, mut reference) = (device(), Layer::new(ReferenceBackend));
    for turn in 0..3 {
        let batch = decode(&[390 + turn], turn);
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!(layer.backend.graphs(), 1);
}

/// A layer that records so many steps at most.
fn device_with(graphs_max: usize) -> Layer<EmulatedBackend> {
    Layer::new(EmulatedBackend::new(Emulated::default()).with_graphs_max(graphs_max))
}

/// Rehearses all that the layer can compute; how many steps were recorded.
fn rehearse<D: Driver>(layer: &mut Layer<CudaBackend<D>>) -> usize {
    let mut largest = Batch::default();
    largest.push(&[0; ROWS_MAX], 0, &[0; ROWS_MAX * BLOCKS], 0);
    let mut recorded = layer.rehearse(&largest).recorded;
    for size in layer.backend.rehearsed(ROWS_MAX) {
        recorded += layer.rehearse(&decode(&vec![CONTEXT_MAX; size], 0)).recorded;
    }
    recorded
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Steps of sizes in each bucket, with contexts of all lengths, prompts in between; the same every time.
fn all_kinds() -> impl Iterator<Item = Batch> {
    [1, 2, 3, 6, 9, 16, 17, ROWS_MAX].into_iter().flat_map(|sequences| {
        let long = vec![CONTEXT_MAX; sequences];
        let turn = sequences as u32;
        let mixed: Vec<u32> = (0..turn).map(|i| 1 + (i * 97 + turn * 31) % CONTEXT_MAX).collect();
        let short = vec![turn; sequences];
        [decode(&short, turn), prompt(turn.max(2)), decode(&mixed, turn), decode(&long, turn)]
    })
}

#[test]
fn after_a_rehearsal_nothing_is_recorded_and_results_are_those_without() {
    let (mut rehearsed, mut eager) = (device(), device_with(0));
    let recorded = rehearse(&mut rehearsed);
    assert_eq!(rehearsed.backend.graphs(), recorded);
    assert!(recorded > 10, "{recorded}");
    let asked_for = rehearsed.backend.driver().recordings();
    for batch in all_kinds() {
        let (ours, theirs) = (rehearsed.step(&batch), eager.step(&batch));
        // That no page was touched shows here too.
        assert_eq!(bits(&ours), bits(&theirs), "{:?}", batch.sequences);
    }
    assert_eq!(rehearsed.backend.driver().recordings(), asked_for);
    assert_eq!(rehearsed.backend.graphs(), recorded, "nothing was recorded in vain");
    assert_eq!(eager.backend.driver().recordings(), 0);
    assert_eq!(rehearse(&mut rehearsed), 0, "what is there is not recorded again");
}

#[test]
fn whoever_wants_no_recordings_has_nothing_to_rehearse() {
    let mut eager = device_with(0);
    assert_eq!(eager.backend.rehearsed(ROWS_MAX), []);
    assert_eq!(rehearse(&mut eager), 0);
    assert_eq!(device().backend.rehearsed(40), [1, 2, 4, 8, 16, 32, 40]);
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
fn a_rehearsal_that_records_nothing_fails_nothing() {
    for refusal in [Refusal::AtBegin, Refusal::Amid, Refusal::AtEnd] {
        let (mut layer, mut eager) = (device(), device_with(0));
        layer.backend.driver().refuse_recordings(Some(refusal));
        assert_eq!(rehearse(&mut layer), 0);
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
    assert_eq!(rehearse(&mut layer), 2);
    assert_eq!(layer.backend.graphs(), 2);
}
