//! The scheduler against a model of the KV cache, under random arrivals, lengths, cancellations, loans and too few
//! pages.

mod simulation;

use proptest::prelude::*;
use simulation::{Action, Arrival, End, MAX_LEN, Shape, Simulation};

fn arrival() -> impl Strategy<Value = Arrival> {
    (0..3u32, 0..40usize, 1..12usize, 1..12usize, prop::bool::weighted(0.15)).prop_map(
        |(family, common, own, max_tokens, score)| {
            // A fifth of the prompts are common from end to end.
            let own = if own > 9 && common > 0 { 0 } else { own };
            Arrival { family, common, own, max_tokens, score }
        },
    )
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => arrival().prop_map(Action::Arrive),
        4 => Just(Action::Step),
        1 => any::<prop::sample::Index>().prop_map(Action::Cancel),
        2 => (any::<prop::sample::Index>(), end()).prop_map(|(index, end)| Action::EndLoan(index, end)),
        1 => any::<prop::sample::Index>().prop_map(Action::EndQuarantine),
        1 => any::<prop::sample::Index>().prop_map(Action::Release),
        1 => (1..20usize).prop_map(Action::CutChunks),
    ]
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        3 => Just(End::Completed),
        1 => Just(End::NeverGranted),
        1 => Just(End::Failed),
        1 => Just(End::Lost),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    let sizes = (1..9usize, 0..20usize, 1..9usize, 0..40usize, any::<bool>(), prop::bool::weighted(0.8));
    sizes.prop_map(|(block_size, spare_pages, max_num_seqs, spare_tokens, ahead, keeps)| Shape {
        block_size,
        spare_pages,
        max_num_seqs,
        spare_tokens,
        threshold: None,
        prefill_only: false,
        ahead,
        keeps,
    })
}

fn run(shape: Shape, actions: &[Action]) {
    let mut simulation = Simulation::new(shape);
    actions.iter().for_each(|action| simulation.act(action));
    simulation.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everybody_finishes_and_nobody_reads_anothers_pages(
        shape in shape(),
        actions in prop::collection::vec(action(), 1..80),
    ) {
        run(shape, &actions);
    }

    #[test]
    fn nor_when_other_workers_prefill_and_fail_to(
        shape in shape(),
        threshold in 0..30usize,
        actions in prop::collection::vec(action(), 1..80),
    ) {
        run(Shape { threshold: Some(threshold), ..shape }, &actions);
    }

    #[test]
    fn pages_computed_for_another_worker_stay_until_they_are_read(
        shape in shape(),
        actions in prop::collection::vec(action(), 1..80),
    ) {
        run(Shape { prefill_only: true, ..shape }, &actions);
    }

    #[test]
    fn with_pages_for_all_a_common_prompt_is_computed_once(
        block_size in 1..9usize,
        spare_tokens in 0..40usize,
        common in 1..40usize,
        copies in 2..8usize,
        ahead in any::<bool>(),
    ) {
        let shape = Shape {
            block_size,
            spare_pages: 8 * MAX_LEN,
            max_num_seqs: 8,
            spare_tokens,
            threshold: None,
            prefill_only: false,
            ahead,
            keeps: true,
        };
        let mut simulation = Simulation::new(shape);
        let arrival = Arrival { family: 0, common, own: 0, max_tokens: 1, score: false };
        (0..copies).for_each(|_| simulation.arrive(&arrival));
        simulation.finish();
        let shared = (common - 1) / block_size * block_size;
        prop_assert_eq!(simulation.computed, common + (copies - 1) * (common - shared));
    }
}
