//! One suite every backend passes, for every type, head count, page size and ragged shape.
//!
//! Two kinds of demands: results are near those of the reference (and, where something is known outright, the reference
//! too is near that), and results do not depend, in a single bit, on anything they must not depend on: the other rows
//! of the batch, how a prompt was cut into chunks, which pages it lies in, how many threads there were.

mod attention;
mod linear;
mod residual;
mod rope;
mod rowwise;
mod sampling;
mod support;

/// Runs the suite for one backend.
macro_rules! suite {
    ($backend:ident, $type:ty, $ignored:tt, { $($topic:ident: $($test:ident),+;)+ }) => {
        mod $backend {
            $(mod $topic {
                $(suite!(@test $topic, $test, $type, $ignored);)+
            })+
        }
    };
    (@test $topic:ident, $test:ident, $type:ty, (always)) => {
        #[test]
        fn $test() {
            crate::$topic::$test::<$type>();
        }
    };
    (@test $topic:ident, $test:ident, $type:ty, (with $what:literal)) => {
        #[test]
        #[ignore = $what]
        fn $test() {
            crate::$topic::$test::<$type>();
        }
    };
}

/// The tests, once for each backend.
macro_rules! suites {
    ($($(#[$attribute:meta])? $backend:ident: $type:ty, $ignored:tt;)+) => {
        $($(#[$attribute])? suite!($backend, $type, $ignored, {
            attention:
                ragged_batches_match_the_reference,
                long_contexts_match_the_reference,
                batching_chunking_and_paging_change_no_bit,
                large_groups_and_contexts_of_many_partitions_match_the_reference,
                decoding_beside_others_changes_no_bit,
                the_number_of_threads_changes_no_bit,
                a_shared_prefix_reads_like_a_computed_one,
                what_earlier_owners_left_in_pages_is_never_read,
                one_key_gives_its_value_and_equal_keys_their_mean,
                a_score_far_above_the_others_takes_all;
            linear:
                float_weights_match_the_reference,
                quantized_weights_match_the_reference,
                stacked_parts_of_mixed_types_stand_one_after_the_other,
                every_row_count_gives_the_same_bits,
                wide_products_match_the_reference,
                infinities_stay_in_their_rows,
                the_number_of_threads_changes_no_bit,
                the_identity_gives_its_input_back,
                parts_of_different_widths_are_refused,
                rows_of_zeros_give_the_bias;
            residual:
                fused_operations_give_the_bits_of_those_they_stand_for,
                a_row_of_a_fused_operation_does_not_see_the_others;
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
                a_row_is_drawn_alike_alone_and_in_a_batch,
                the_number_of_threads_changes_nothing;
        });)+
    };
}

suites! {
    reference: engine_kernels::reference::ReferenceBackend, (always);
    cpu: engine_kernels::cpu::CpuBackend, (always);
    cuda_emulated: engine_cuda_emulated::EmulatedBackend, (always);
    #[cfg(feature = "cuda")]
    cuda_device: engine_kernels::cuda::CudaBackend<engine_kernels::cuda::Device>, (with "needs a CUDA device");
}
