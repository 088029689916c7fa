//! What every backend has to pass, for every type, head count, page size and ragged shape: the one copy of it, which
//! the tests run for all backends (`kernels/tests`), and `engine doctor --gpu` on the device at hand.
//!
//! Two kinds of demands: results are near those of the reference (and, where something is known outright, the reference
//! too is near that), and results do not depend, in a single bit, on anything they must not depend on: the other rows
//! of the batch, how a prompt was cut into chunks, which pages it lies in, how many threads there were.
//!
//! Checks are tests: they panic where a demand is not met. [`Check::run`] turns that into an answer.

mod attention;
mod check;
mod linear;
mod residual;
mod rope;
mod rowwise;
mod sampling;
pub mod steps;
mod support;
mod tiles;
mod watched;

pub use check::{Check, Failure};
pub use support::Subject;
pub use watched::{Watched, kernels_run};

use engine_kernels::cuda::{CudaBackend, Start};

/// Hands the checks that every backend passes to a macro, behind what the macro is given.
#[macro_export]
macro_rules! of_every_backend {
    ($with:ident! { $($given:tt)* }) => {
        $with! { $($given)*
            attention:
                ragged_batches_match_the_reference,
                long_contexts_match_the_reference,
                batching_chunking_and_paging_change_no_bit,
                large_groups_and_contexts_of_many_partitions_match_the_reference,
                decoding_with_every_group_head_and_type_matches_the_reference,
                decoding_beside_others_changes_no_bit,
                the_number_of_threads_changes_no_bit,
                a_shared_prefix_reads_like_a_computed_one,
                what_earlier_owners_left_in_pages_is_never_read,
                one_key_gives_its_value_and_equal_keys_their_mean,
                a_cache_of_eight_bits_holds_every_number_that_they_make,
                a_score_far_above_the_others_takes_all;
            linear:
                float_weights_match_the_reference,
                quantized_weights_match_the_reference,
                eight_bit_floats_of_any_width_match_the_reference,
                eight_bit_floats_with_small_and_large_scales_match_the_reference,
                stacked_parts_of_mixed_types_stand_one_after_the_other,
                every_row_count_gives_the_same_bits,
                wide_products_match_the_reference,
                products_that_fill_a_device_match_the_reference,
                infinities_stay_in_their_rows,
                the_number_of_threads_changes_no_bit,
                the_identity_gives_its_input_back,
                parts_of_different_widths_are_refused,
                a_row_may_have_its_largest_element_anywhere,
                rows_of_zeros_give_the_bias;
            residual:
                fused_operations_give_the_bits_of_those_they_stand_for,
                a_row_of_a_fused_operation_does_not_see_the_others,
                attention_that_is_added_gives_the_bits_of_its_parts,
                decoding_with_every_group_head_and_type_rotates_where_it_attends;
            rope:
                queries_match_the_reference,
                position_zero_rotates_nothing,
                elements_beyond_the_rotary_dimension_stay;
            rowwise:
                embeddings_are_the_rows_of_every_type,
                rms_norms_match_the_reference,
                silu_mul_matches_the_reference,
                selecting_and_copying_rows_is_exact,
                rows_do_not_see_each_other,
                the_number_of_threads_changes_no_bit;
            sampling:
                mixed_rows_match_the_reference,
                every_cut_matches_the_reference,
                masked_rows_match_the_reference,
                a_row_is_drawn_alike_alone_and_in_a_batch,
                what_is_remembered_of_sequences_changes_nothing,
                contexts_of_very_many_tokens_are_looked_at_whole,
                the_number_of_threads_changes_nothing;
        }
    };
}

/// The same for what CUDA devices promise beyond that. The first ones say whether what tensor cores multiply
/// lies where the kernels look for it.
#[macro_export]
macro_rules! of_every_device {
    ($with:ident! { $($given:tt)* }) => {
        $with! { $($given)*
            tiles:
                fragments_lie_where_the_ptx_isa_says,
                boxes_are_swizzled_and_end_in_zeros,
                boxes_end_in_zeros_amid_sixteen_bytes,
                operands_and_sums_of_wgmma_lie_where_the_ptx_isa_says,
                operands_that_are_stored_or_held_or_lie_across_are_multiplied_alike,
                no_hopper_tile_and_no_split_changes_a_bit,
                no_tile_and_no_split_changes_a_bit,
                activations_of_any_magnitude_are_multiplied,
                rows_do_not_see_what_is_wrong_with_others,
                no_place_in_a_tile_changes_a_bit,
                a_score_far_above_the_others_takes_all;
            steps:
                steps_that_are_replayed_compute_what_the_reference_does,
                steps_that_were_warmed_up_for_compute_what_others_do,
                warmed_up_steps_of_whole_layers_compute_what_others_do,
                tokens_drawn_ahead_are_what_the_next_step_reads,
                contexts_of_several_partitions_are_split_replayed_and_merged,
                a_block_table_that_outgrows_its_place_is_recorded_anew,
                how_attention_is_cut_changes_no_bit;
        }
    };
}

macro_rules! list {
    ({ $of:ty } $($topic:ident: $($name:ident),+;)+) => {
        vec![$($(Check::new(stringify!($topic), stringify!($name), $topic::$name::<$of>)),+),+]
    };
}

/// What every backend has to pass.
pub fn backend_checks<B: Subject>() -> Vec<Check> {
    of_every_backend!(list! { { B } })
}

/// What a CUDA device has to pass, beyond what its backend has to.
pub fn device_checks<D: Start>() -> Vec<Check> {
    of_every_device!(list! { { D } })
}

/// A backend on a device that is watched.
pub type OnDevice<D> = CudaBackend<Watched<D>>;
