use proptest::prelude::*;

use super::*;
use crate::SequenceId;
use crate::reference::sample::sample_row as reference_row;

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..SamplingParams::default() }
}

fn row<'a>(params: &'a SamplingParams, output: &'a [u32]) -> SampleRow<'a> {
    let task = RowTask::Sample { params, suppress: &[], mask: None };
    SampleRow { task, sequence: SequenceId(0), prompt: &[], output, logprobs: None }
}

fn draw_one(logits: &[f32], row: &SampleRow<'_>) -> Sampled {
    sample_row(&mut logits.to_vec(), row, &mut SampleScratch::new(logits.len()))
}

/// Logits with the shape of a model's: mostly a bulk, some that stand out. `spread` is the bulk's standard deviation.
fn random_logits(vocab: usize, spread: f32, seed: u64) -> Vec<f32> {
    let normal = |i: u64| {
        let (a, b) = (uniform(seed, 2 * i), uniform(seed, 2 * i + 1));
        ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    };
    (0..vocab as u64).map(|i| normal(i) * spread + if i % 97 == 0 { 3.0 } else { 0.0 }).collect()
}

/// How often each token is drawn at the positions `0..draws`.
fn histogram(logits: &[f32], params: &SamplingParams, draws: usize) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    // The position is all that differs: the tokens themselves are looked at by penalties only.
    let output = vec![0; draws];
    let mut scratch = SampleScratch::new(logits.len());
    for position in 0..draws {
        let drawn = sample_row(&mut logits.to_vec(), &row(params, &output[..position]), &mut scratch);
        counts[drawn.token as usize] += 1;
    }
    counts
}

/// Pearson's statistic of counts against probabilities. All probabilities must be large enough to expect a few counts.
fn chi_square(counts: &[usize], probabilities: &[f64]) -> f64 {
    let draws = counts.iter().sum::<usize>() as f64;
    let term = |(&count, &p): (&usize, &f64)| (count as f64 - draws * p).powi(2) / (draws * p);
    counts.iter().zip(probabilities).map(term).sum()
}

#[test]
fn draws_follow_the_softmax_at_every_temperature() {
    let logits: Vec<f32> = (0..20).map(|i| (i as f32 * 1.7).sin() * 1.5).collect();
    for (temperature, seed) in [(0.7, 1), (1.0, 2), (1.6, 3)] {
        let params = SamplingParams { temperature, seed, ..params() };
        let weights: Vec<f64> = logits.iter().map(|&x| (x as f64 / temperature as f64).exp()).collect();
        let total: f64 = weights.iter().sum();
        let probabilities: Vec<f64> = weights.iter().map(|w| w / total).collect();
        // 43.8 is what 19 degrees of freedom exceed once in a thousand.
        assert!(chi_square(&histogram(&logits, &params, 20_000), &probabilities) < 43.8);
    }
}

#[test]
fn draws_of_different_seeds_are_independent() {
    let logits = [0.0; 4];
    let (a, b) = (SamplingParams { seed: 1, ..params() }, SamplingParams { seed: 2, ..params() });
    let mut pairs = [0; 16];
    let output = vec![0; 20_000];
    for position in 0..output.len() {
        let first = draw_one(&logits, &row(&a, &output[..position])).token;
        let second = draw_one(&logits, &row(&b, &output[..position])).token;
        pairs[(first * 4 + second) as usize] += 1;
    }
    // 37.7: 15 degrees of freedom, once in a thousand.
    assert!(chi_square(&pairs, &[1.0 / 16.0; 16]) < 37.7);
}

#[test]
fn filters_leave_exactly_the_tokens_they_say() {
    // Probabilities 0.4, 0.2, 0.2, 0.1, 0.1 in the order of ids 4, 1, 2, 0, 3.
    let logits = [1.0f32, 2.0, 2.0, 1.0, 4.0].map(f32::ln);
    let kept = |params: SamplingParams| -> Vec<usize> {
        let counts = histogram(&logits, &params, 2000);
        (0..5).filter(|&id| counts[id] > 0).collect()
    };
    assert_eq!(kept(params()), [0, 1, 2, 3, 4]);
    assert_eq!(kept(SamplingParams { top_k: 2, ..params() }), [1, 4], "a tie at the edge goes to the lower id");
    assert_eq!(kept(SamplingParams { top_k: 9, ..params() }), [0, 1, 2, 3, 4]);
    assert_eq!(kept(SamplingParams { top_p: 0.5, ..params() }), [1, 4]);
    assert_eq!(kept(SamplingParams { top_p: 0.7, ..params() }), [1, 2, 4]);
    assert_eq!(kept(SamplingParams { top_p: 0.01, ..params() }), [4]);
    assert_eq!(kept(SamplingParams { min_p: 0.4, ..params() }), [1, 2, 4]);
    assert_eq!(kept(SamplingParams { min_p: 1.0, ..params() }), [4]);
    // top_p looks at what top_k left: 0.4 and 0.2 are all there is, and 0.6 of them is the first alone.
    assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.6, ..params() }), [4]);
    assert_eq!(kept(SamplingParams { top_k: 4, top_p: 0.8, min_p: 0.45, ..params() }), [1, 2, 4]);
}

#[test]
fn top_p_stops_where_it_is_reached_exactly() {
    // With equal weights all sums are exact.
    for vocab in [4, 64, 1024, 4096, 16_384] {
        let logits = vec![-2.5; vocab];
        let counts = histogram(&logits, &SamplingParams { top_p: 0.5, seed: 5, ..params() }, 4 * vocab.min(200));
        let last = counts.iter().rposition(|&count| count > 0).unwrap();
        assert!(last < vocab / 2, "{last} of {vocab} was drawn");
        assert!(last >= vocab / 4);
    }
}

#[test]
fn of_equal_logits_greedy_takes_the_first() {
    let greedy = SamplingParams::default();
    for vocab in [1, 7, 256, 300, 5000] {
        let mut logits = vec![1.0; vocab];
        assert_eq!(draw_one(&logits, &row(&greedy, &[])).token, 0);
        logits[vocab - 1] = 2.0;
        logits[vocab / 2] = 2.0;
        assert_eq!(draw_one(&logits, &row(&greedy, &[])).token as usize, vocab / 2);
    }
}

#[test]
fn a_row_without_a_possible_token_says_so_whatever_is_asked_of_it() {
    let (drawn, greedy) = (params(), SamplingParams::default());
    let plain = row(&drawn, &[]);
    let suppressed = SampleRow { task: RowTask::Sample { params: &drawn, suppress: &[0, 1], mask: None }, ..plain };
    for (logits, ask) in [
        (vec![f32::NAN; 300], plain),
        (vec![f32::NAN; 300], row(&greedy, &[])),
        (vec![f32::NEG_INFINITY; 300], SampleRow { logprobs: Some(3), ..plain }),
        (vec![f32::NAN; 300], SampleRow { task: RowTask::Score { token: 7 }, ..plain }),
        (vec![1.0, 2.0], suppressed),
        (vec![1.0, 2.0], SampleRow { logprobs: Some(2), ..suppressed }),
    ] {
        assert!(draw_one(&logits, &ask).impossible, "{ask:?}");
        assert!(reference_row(&logits, &ask).impossible, "{ask:?}");
    }
    assert!(!draw_one(&[f32::NAN, -1e30], &plain).impossible);
}

#[test]
fn impossible_tokens_are_never_drawn() {
    let mut logits = vec![f32::NEG_INFINITY; 1000];
    (logits[300], logits[900], logits[901]) = (-50.0, -50.0, f32::NAN);
    let counts = histogram(&logits, &SamplingParams { temperature: 2.0, ..params() }, 400);
    assert_eq!(counts[300] + counts[900], 400);
    assert!(counts[300] > 100 && counts[900] > 100);
}

#[test]
fn bias_and_suppression_decide() {
    let logits = random_logits(500, 2.0, 1);
    let force = SamplingParams { logit_bias: vec![(77, 100.0)], ..params() };
    assert_eq!(draw_one(&logits, &row(&force, &[])).token, 77);
    let ban =
        SamplingParams { logit_bias: (0..500).filter(|&id| id != 13).map(|id| (id, -100.0)).collect(), ..params() };
    assert_eq!(draw_one(&logits, &row(&ban, &[])).token, 13);
    let all_but_one: Vec<u32> = (0..500).filter(|&id| id != 42).collect();
    let params = params();
    for seed in 0..20 {
        let task =
            RowTask::Sample { params: &SamplingParams { seed, ..params.clone() }, suppress: &all_but_one, mask: None };
        assert_eq!(draw_one(&logits, &SampleRow { task, ..row(&params, &[]) }).token, 42);
    }
}

#[test]
fn penalties_turn_away_from_what_was_seen() {
    let logits = [3.0, 2.9, 2.8, 2.7];
    let greedy = |change: fn(&mut SamplingParams), prompt: &[u32], output: &[u32]| {
        let mut params = SamplingParams::default();
        change(&mut params);
        draw_one(&logits, &SampleRow { prompt, ..row(&params, output) }).token
    };
    assert_eq!(greedy(|_| (), &[0], &[0]), 0);
    assert_eq!(greedy(|p| p.repetition_penalty = 1.5, &[0], &[1, 1]), 2);
    assert_eq!(greedy(|p| p.presence_penalty = 0.15, &[0], &[]), 0, "presence does not look at the prompt");
    assert_eq!(greedy(|p| p.presence_penalty = 0.15, &[], &[0, 0, 0]), 1);
    assert_eq!(greedy(|p| p.presence_penalty = 0.15, &[], &[0, 1]), 0, "2.85 is still above 2.8");
    assert_eq!(greedy(|p| p.frequency_penalty = 0.15, &[], &[0, 0, 1]), 2, "2.7, 2.75, 2.8");
}

#[test]
fn logprobs_are_of_the_models_own_distribution() {
    for (vocab, spread) in [(1, 1.0), (300, 4.0), (50_000, 2.0)] {
        let logits = random_logits(vocab, spread, 3);
        let params = SamplingParams { logit_bias: vec![(0, 100.0)], presence_penalty: 1.0, ..params() };
        let ask = SampleRow { logprobs: Some(20), ..row(&params, &[0]) };
        let sampled = draw_one(&logits, &ask);
        let sum: f64 = logits.iter().map(|&x| (x as f64).exp()).sum();
        assert_eq!(sampled.token, 0, "the bias decides");
        assert!((sampled.logprob as f64 - (logits[0] as f64 - sum.ln())).abs() < 1e-5);
        assert_eq!(sampled.top_len as usize, vocab.min(20));
        for (id, logprob) in &sampled.top[..sampled.top_len as usize] {
            assert!((*logprob as f64 - (logits[*id as usize] as f64 - sum.ln())).abs() < 1e-5);
        }
        let scored: f64 = (0..vocab.min(300) as u32)
            .map(|token| draw_one(&logits, &SampleRow { task: RowTask::Score { token }, ..ask }).logprob as f64)
            .map(f64::exp)
            .sum();
        assert!(if vocab <= 300 { (scored - 1.0).abs() < 1e-5 } else { scored < 1.0 });
    }
}

#[test]
fn scratch_left_by_other_rows_changes_nothing() {
    let mut scratch = SampleScratch::new(2000);
    for seed in 0..50 {
        let logits = random_logits(2000, 2.0, seed);
        let params = SamplingParams { top_p: 0.8, frequency_penalty: 0.5, repetition_penalty: 1.2, seed, ..params() };
        let output: Vec<u32> = (0..40).map(|i| (i * 37 + seed as u32) % 2000).collect();
        let ask = SampleRow { prompt: &[5, 5, 6], logprobs: Some(5), ..row(&params, &output) };
        assert_eq!(sample_row(&mut logits.clone(), &ask, &mut scratch), draw_one(&logits, &ask));
    }
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let filters = (
        prop_oneof![Just(0u32), 1u32..60, Just(300), Just(5000)],
        prop_oneof![Just(1.0f32), 0.01f32..1.0],
        prop_oneof![Just(0.0f32), 0.0f32..0.5],
    );
    let penalties = (
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
    );
    let bias = prop::collection::vec((0u32..20, -100.0f32..100.0), 0..4);
    let temperature = prop_oneof![Just(0.0f32), 0.05f32..2.0];
    (temperature, filters, penalties, bias, any::<u64>()).prop_map(|(temperature, filters, penalties, bias, seed)| {
        SamplingParams {
            temperature,
            top_k: filters.0,
            top_p: filters.1,
            min_p: filters.2,
            repetition_penalty: penalties.0,
            presence_penalty: penalties.1,
            frequency_penalty: penalties.2,
            logit_bias: bias,
            seed,
        }
    })
}

/// Single precision weights differ from the oracle's double precision ones in the seventh digit: where the two may
/// differ, the oracle's own draw changes when its random number is moved by that much. It has no such handle, so a draw
/// next to a border would be a false alarm; at these many cases none is, and the seed is fixed.
#[test]
fn every_combination_draws_what_the_reference_draws() {
    let config = ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() };
    let rng = prop::test_runner::TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha);
    let mut runner = prop::test_runner::TestRunner::new_with_rng(config, rng);
    let cases = (
        any_params(),
        prop_oneof![Just(20usize), Just(255), Just(700), Just(3000), Just(8191)],
        0.1f32..6.0,
        prop::collection::vec(0u32..20, 0..12),
        prop::collection::vec(0u32..20, 0..6),
        prop::option::of(0u32..=20),
    );
    runner
        .run(&cases, |(params, vocab, spread, output, suppress, logprobs)| {
            let logits = random_logits(vocab, spread, params.seed ^ 1);
            let task =
                RowTask::Sample { params: &params, suppress: &suppress[..suppress.len().min(vocab / 2)], mask: None };
            let ask = SampleRow { task, sequence: SequenceId(0), prompt: &[1, 2, 3], output: &output, logprobs };
            let (ours, oracle) = (draw_one(&logits, &ask), reference_row(&logits, &ask));
            prop_assert_eq!(ours.token, oracle.token);
            prop_assert_eq!(ours.top_len, oracle.top_len);
            if logprobs.is_some() {
                prop_assert!((ours.logprob - oracle.logprob).abs() < 1e-5);
            }
            for (ours, oracle) in ours.top.iter().zip(&oracle.top) {
                prop_assert_eq!(ours.0, oracle.0);
                prop_assert!((ours.1 - oracle.1).abs() < 1e-5);
            }
            Ok(())
        })
        .unwrap();
}

fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -20.0f32..20.0,
        1 => prop_oneof![
            Just(f32::NAN), Just(-f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(f32::MAX), Just(f32::MIN),
            Just(1e30f32), Just(-1e30f32), Just(0.0f32), Just(-0.0f32), Just(1e-45f32), Just(3.0f32)
        ],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_logits_make_it_panic_hang_or_draw_the_impossible(
        logits in prop_oneof![prop::collection::vec(any_logit(), 20..700), (20usize..600, any_logit()).prop_map(|(n, x)| vec![x; n])],
        params in any_params(),
        temperature in prop_oneof![0.0f32..2.0, Just(1e-45f32), Just(1e-30f32), Just(1e30f32)],
        logprobs in prop::option::of(0u32..=20),
    ) {
        let params = SamplingParams { temperature, ..params };
        let task = RowTask::Sample { params: &params, suppress: &[7], mask: None };
        let ask = SampleRow { task, sequence: SequenceId(0), prompt: &[3, 4], output: &[4, 5, 5], logprobs };
        let sampled = draw_one(&logits, &ask);
        prop_assert!((sampled.token as usize) < logits.len());
        let possible = |id: usize| logits[id] > f32::NEG_INFINITY && id != 7;
        let any = (0..logits.len()).any(possible);
        prop_assert_eq!(sampled.impossible, !any);
        prop_assert!(!any || possible(sampled.token as usize), "{:?}", sampled);
        if logprobs.is_some() {
            prop_assert!(sampled.logprob <= 1e-5, "{:?}", sampled);
        }
        prop_assert_eq!(sampled, draw_one(&logits, &ask));
        // The oracle must stand it too.
        let oracle = reference_row(&logits, &ask);
        prop_assert_eq!(oracle.impossible, !any);
        prop_assert!(!any || possible(oracle.token as usize));
    }
}
