use super::*;

/// Compares with what transformers 5.23 computes for a head of 64: some frequencies, and the factor of cos and sin.
fn check(theta: f32, scaling: RopeScaling, expected: [f32; 8], scale: f32) {
    let (frequencies, actual_scale) = frequencies(theta, 64, &scaling);
    for (pair, expected) in [0, 1, 7, 13, 16, 20, 24, 31].into_iter().zip(expected) {
        let actual = frequencies[pair];
        assert!((actual / expected - 1.0).abs() < 3e-7, "{scaling:?} pair {pair}: {actual} and {expected}");
    }
    assert!((actual_scale - scale).abs() < 1e-6, "{actual_scale} and {scale}");
}

#[test]
fn linear_scaling_agrees_with_transformers() {
    let expected =
        [0.25, 0.187_473_55, 0.033_338_036, 0.005_928_434, 0.0025, 0.000_790_569_47, 0.000_25, 3.333_803_8e-5];
    check(10_000.0, RopeScaling::Linear { factor: 4.0 }, expected, 1.0);
}

#[test]
fn llama3_scaling_agrees_with_transformers() {
    let scaling =
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 };
    let expected =
        [1.0, 0.663_601_3, 0.056_669_62, 0.004_839_421, 0.000_429_556_7, 8.570_256e-6, 1.661_967_4e-6, 9.418_306_5e-8];
    check(500_000.0, scaling, expected, 1.0);
}

#[test]
fn yarn_agrees_with_transformers_rounded_or_not() {
    let yarn = |attention_factor, truncate| RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor,
        original_max_position: 32768,
        truncate,
    };
    let rounded = [
        1.0,
        0.649_381_64,
        0.048_696_753,
        0.003_043_117_7,
        0.000_583_333_37,
        4.445_698_5e-5,
        7.905_694e-6,
        3.849_816_3e-7,
    ];
    check(1e6, yarn(None, true), rounded, 1.138_629_4);
    let mut exact = rounded;
    exact[3] = 0.003_241_635;
    exact[4] = 0.000_607_408;
    check(1e6, yarn(Some(1.024_958), false), exact, 1.024_958);
}

#[test]
fn factors_of_a_file_divide_the_frequencies() {
    let (plain, _) = frequencies(10_000.0, 4, &RopeScaling::None);
    let (divided, _) = frequencies(10_000.0, 4, &RopeScaling::PerFrequency { factors: vec![1.0, 8.0] });
    assert_eq!(plain, [1.0, 0.01]);
    assert_eq!(divided, [1.0, 0.01 / 8.0]);
}

#[test]
fn plain_frequencies_are_those_of_torch_to_the_bit() {
    let (frequencies, scale) = frequencies(100_000.0, 64, &RopeScaling::None);
    let torch: [u32; 6] = [1065353216, 1060283654, 1056527311, 1051589887, 1047712803, 1042904073];
    assert_eq!(frequencies[..6].iter().map(|f| f.to_bits()).collect::<Vec<_>>(), torch);
    assert_eq!(scale, 1.0);
}
