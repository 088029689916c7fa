use super::*;
use crate::Architecture;
use crate::gguf::testing::GgufWriter;

fn writer() -> GgufWriter {
    let mut writer = GgufWriter::default();
    writer
        .string("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .u32("llama.context_length", 2048)
        .u32("llama.embedding_length", 64)
        .u32("llama.feed_forward_length", 128)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .f32("llama.rope.freq_base", 100_000.0)
        .tensor("token_embd.weight", &[100, 64], 1, vec![0; 100 * 64 * 2]);
    writer
}

fn parse_file(writer: &GgufWriter) -> Result<ModelConfig, ModelError> {
    parse(&[Gguf::from_bytes(writer.build()).unwrap()], Path::new("m.gguf"))
}

#[test]
fn metadata_becomes_a_configuration() {
    let config = parse_file(&writer()).unwrap();
    assert_eq!((config.architecture, config.vocab_size, config.head_dim), (Architecture::Llama, 100, 16));
    assert_eq!((config.kv_heads, config.tie_word_embeddings, config.qkv_bias), (2, true, false));
    assert_eq!(config.rope, RopeConfig { theta: 100_000.0, scaling: RopeScaling::None });

    let mut untied = writer();
    untied.u32("llama.attention.key_length", 32).tensor("output.weight", &[1], 0, vec![0; 4]);
    untied.tensor("blk.0.attn_q.bias", &[1], 0, vec![0; 4]);
    let config = parse_file(&untied).unwrap();
    assert_eq!((config.head_dim, config.tie_word_embeddings, config.qkv_bias), (32, false, true));
}

#[test]
fn frequency_factors_are_read_from_their_tensor() {
    let mut factors = writer();
    let values: Vec<u8> = (1..=8).flat_map(|i| (i as f32).to_le_bytes()).collect();
    factors.tensor("rope_freqs.weight", &[8], 0, values);
    let scaling = parse_file(&factors).unwrap().rope.scaling;
    assert_eq!(scaling, RopeScaling::PerFrequency { factors: (1..=8).map(|i| i as f32).collect() });

    // Those of a split file may be in a later part.
    let mut later = GgufWriter::default();
    later.tensor("rope_freqs.weight", &[8], 0, [0, 0, 0, 64].repeat(8));
    let parts = [writer(), later].map(|part| Gguf::from_bytes(part.build()).unwrap());
    let scaling = parse(&parts, Path::new("m.gguf")).unwrap().rope.scaling;
    assert_eq!(scaling, RopeScaling::PerFrequency { factors: vec![2.0; 8] });

    let mut both = writer();
    both.f32("llama.rope.scaling.factor", 1.0).tensor("rope_freqs.weight", &[8], 0, [0, 0, 0, 64].repeat(8));
    assert_eq!(parse_file(&both).unwrap().rope.scaling, RopeScaling::PerFrequency { factors: vec![2.0; 8] });
    let mut both = writer();
    both.f32("llama.rope.scaling.factor", 2.0).tensor("rope_freqs.weight", &[8], 0, [0, 0, 0, 64].repeat(8));
    let error = parse_file(&both).unwrap_err().to_string();
    assert!(error.contains("`rope_freqs.weight` together with `llama.rope.scaling` is not supported"), "{error}");

    let mut wrong = writer();
    wrong.tensor("rope_freqs.weight", &[4], 0, vec![0; 16]);
    assert!(parse_file(&wrong).unwrap_err().to_string().contains("`rope_freqs.weight` has shape [4]"));
    let mut negative = writer();
    negative.tensor("rope_freqs.weight", &[8], 0, vec![0; 32]);
    assert!(parse_file(&negative).unwrap_err().to_string().contains("frequency factor 0"));
}

#[test]
fn a_factor_is_read_as_llama_cpp_reads_it() {
    let (new, old) = ("llama.rope.scaling.factor", "llama.rope.scale_linear");
    let scaling = |kind: Option<&str>, factors: &[(&str, f32)]| {
        let mut scaled = writer();
        for &(key, factor) in factors {
            scaled.f32(key, factor);
        }
        if let Some(kind) = kind {
            scaled.string("llama.rope.scaling.type", kind);
        }
        parse_file(&scaled).unwrap().rope.scaling
    };
    let linear = |factor| RopeScaling::Linear { factor };
    assert_eq!(scaling(None, &[(new, 4.0)]), linear(4.0));
    assert_eq!(scaling(None, &[(old, 2.0)]), linear(2.0));
    assert_eq!(scaling(Some("linear"), &[(new, 4.0), (old, 2.0)]), linear(4.0));
    assert_eq!(scaling(Some("none"), &[(new, 4.0)]), RopeScaling::None);
    assert_eq!(scaling(Some("linear"), &[]), RopeScaling::None);
    assert_eq!(scaling(None, &[(new, 1.0)]), RopeScaling::None);
    assert_eq!(scaling(Some("linear"), &[(new, 0.0), (old, 2.0)]), RopeScaling::None);
}

#[test]
fn yarn_has_llama_cpps_temperature() {
    let mut yarn = writer();
    yarn.string("llama.rope.scaling.type", "yarn")
        .f32("llama.rope.scaling.factor", 4.0)
        .u32("llama.rope.scaling.original_context_length", 512);
    let expected = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor,
        original_max_position: 512,
        truncate: true,
    };
    assert_eq!(parse_file(&yarn).unwrap().rope.scaling, expected(None));
    yarn.f32("llama.rope.scaling.attn_factor", 0.5);
    assert_eq!(parse_file(&yarn).unwrap().rope.scaling, expected(Some(0.5 * (0.1 * 4f32.ln() + 1.0))));
}

#[test]
fn what_is_wrong_is_named() {
    let changed = |key: &str, value: u32| {
        let mut changed = writer();
        changed.u32(key, value);
        parse_file(&changed).unwrap_err().to_string()
    };
    assert!(changed("llama.expert_count", 8).contains("llama with experts"));
    assert!(changed("llama.rope.dimension_count", 8).contains("`llama.rope.dimension_count`"));
    assert!(changed("llama.attention.value_length", 8).contains("`llama.attention.value_length`"));
    assert!(changed("llama.attention.key_length", 0).contains("`head_dim` is 0"));

    let error = parse_file(GgufWriter::default().string("general.architecture", "rwkv7")).unwrap_err().to_string();
    assert!(error.contains("`rwkv7`") && error.contains("llama, qwen2, qwen3"), "{error}");
    let error = parse_file(GgufWriter::default().string("general.architecture", "qwen3")).unwrap_err().to_string();
    assert!(error.contains("`qwen3.embedding_length`: is missing"), "{error}");
    let error = parse_file(&GgufWriter::default()).unwrap_err().to_string();
    assert!(error.contains("none declared"), "{error}");
}

#[test]
fn head_counts_of_each_layer_must_agree() {
    let list = |values: &[i32]| {
        let mut writer = GgufWriter::default();
        writer
            .string("general.architecture", "qwen3")
            .u32("qwen3.embedding_length", 64)
            .i32s("qwen3.attention.head_count", values);
        parse_file(&writer).unwrap_err().to_string()
    };
    assert!(list(&[4, 2]).contains("differs from layer to layer"));
    assert!(list(&[]).contains("is empty"));
    // Agreeing ones are accepted: what is missing then is the next thing.
    assert!(list(&[4, 4]).contains("token_embd.weight"));
}
