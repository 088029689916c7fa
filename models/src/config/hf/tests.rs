use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::Architecture;

fn parse_value(value: &Value) -> Result<ModelConfig, ModelError> {
    parse(&Fields::new(Path::new("config.json"), value)?)
}

/// meta-llama/Llama-3.2-1B-Instruct.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
    })
}

/// Qwen/Qwen2.5-0.5B-Instruct.
fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
    })
}

/// Qwen/Qwen3-0.6B.
fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936
    })
}

/// HuggingFaceTB/SmolLM2-135M-Instruct.
fn smollm2() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152
    })
}

/// mistralai/Mistral-7B-Instruct-v0.3.
fn mistral() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
        "use_cache": true, "vocab_size": 32768
    })
}

fn with(mut base: Value, changes: Value) -> Value {
    let object = base.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        object.insert(key.clone(), value.clone());
    }
    base
}

#[test]
fn real_configurations_are_understood() {
    let config = parse_value(&llama()).unwrap();
    assert_eq!((config.architecture, config.kv_heads, config.head_dim), (Architecture::Llama, 8, 64));
    assert_eq!(config.parameters(), 1_235_814_400);
    let scaling =
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 };
    assert_eq!(config.rope, RopeConfig { theta: 500_000.0, scaling });

    let config = parse_value(&qwen2()).unwrap();
    assert_eq!((config.architecture, config.head_dim, config.qkv_bias), (Architecture::Qwen2, 64, true));
    assert_eq!((config.o_bias, config.parameters()), (false, 494_032_768));

    let config = parse_value(&qwen3()).unwrap();
    assert_eq!((config.architecture, config.head_dim, config.qkv_bias), (Architecture::Qwen3, 128, false));
    assert_eq!(config.parameters(), 596_049_920);

    let config = parse_value(&smollm2()).unwrap();
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.rope.theta), (9, 3, 64, 100_000.0));
    assert_eq!((config.parameters(), config.tie_word_embeddings), (134_515_008, true));
}

#[test]
fn a_mistral_is_a_llama() {
    let config = parse_value(&mistral()).unwrap();
    assert_eq!(config, parse_value(&with(mistral(), json!({"architectures": ["LlamaForCausalLM"]}))).unwrap());
    assert_eq!((config.architecture, config.parameters()), (Architecture::Llama, 7_248_023_552));
    assert_eq!(config, parse_value(&with(mistral(), json!({"architectures": null}))).unwrap());
    assert_eq!(config, parse_value(&with(mistral(), json!({"attention_bias": true}))).unwrap());
    // Mistral-Nemo-Instruct-2407 and Mistral-Small-24B-Instruct-2501 state it.
    let wide = with(mistral(), json!({"hidden_size": 5120, "head_dim": 128}));
    assert_eq!(parse_value(&wide).unwrap().head_dim, 128);

    let without = |field: &str| {
        let mut value = mistral();
        value.as_object_mut().unwrap().remove(field);
        parse_value(&value)
    };
    assert_eq!(without("num_key_value_heads").unwrap().kv_heads, 8);
    assert_eq!(parse_value(&with(mistral(), json!({"num_key_value_heads": null}))).unwrap().kv_heads, 32);
    assert_eq!(without("sliding_window").unwrap().max_position_embeddings, 4096);
}

#[test]
fn a_context_ends_where_a_window_would_begin_to_slide() {
    let context = |base: Value, changes: Value| parse_value(&with(base, changes)).unwrap().max_position_embeddings;
    // mistralai/Mistral-7B-Instruct-v0.1 and HuggingFaceH4/zephyr-7b-beta.
    assert_eq!(context(mistral(), json!({"sliding_window": 4096})), 4096);
    assert_eq!(context(mistral(), json!({"sliding_window": 32767})), 32767);
    for never in [json!(32768), json!(32769), Value::Null] {
        assert_eq!(context(mistral(), json!({"sliding_window": never})), 32768);
    }
    // Whichever layers it slides over.
    for layers in [0, 21, 24] {
        let sliding = json!({"use_sliding_window": true, "sliding_window": 4096, "max_window_layers": layers});
        assert_eq!(context(qwen2(), sliding), 4096);
    }
    let types = json!({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4096});
    assert_eq!(context(qwen3(), types), 4096);
    assert_eq!(context(qwen3(), json!({"layer_types": ["full_attention"], "sliding_window": 4096})), 40960);
    assert_eq!(context(qwen2(), json!({"use_sliding_window": true, "sliding_window": null})), 32768);
    // A window of a context that YaRN has stretched.
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
    let stretched = json!({"rope_scaling": yarn, "use_sliding_window": true, "sliding_window": 65536});
    assert_eq!(context(qwen2(), stretched), 65536);
    let error = parse_value(&with(mistral(), json!({"sliding_window": 0}))).unwrap_err().to_string();
    assert!(error.contains("`sliding_window` is 0"), "{error}");
}

#[test]
fn rope_parameters_of_transformers_5_are_read() {
    let mut value = with(llama(), json!({"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}));
    value.as_object_mut().unwrap().remove("rope_theta");
    value.as_object_mut().unwrap().remove("rope_scaling");
    let config = parse_value(&value).unwrap();
    assert_eq!(config.rope, RopeConfig { theta: 250_000.0, scaling: RopeScaling::None });
}

#[test]
fn dynamic_scaling_is_none_within_the_context() {
    let config = parse_value(&with(llama(), json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}))).unwrap();
    assert_eq!((config.rope.scaling, config.max_position_embeddings), (RopeScaling::None, 131_072));
}

#[test]
fn yarn_takes_its_temperature_from_wherever_it_is_given() {
    let yarn = |extra: Value| {
        let scaling = with(json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}), extra);
        parse_value(&with(qwen3(), json!({"rope_scaling": scaling}))).unwrap()
    };
    let config = yarn(json!({}));
    assert_eq!(config.max_position_embeddings, 131_072);
    let attention = |config: &ModelConfig| match &config.rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => *attention_factor,
        other => panic!("{other:?}"),
    };
    assert_eq!(attention(&config), None);
    assert_eq!(attention(&yarn(json!({"attention_factor": 0.5}))), Some(0.5));
    let quotient = attention(&yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.8}))).unwrap();
    assert!((quotient - 1.024_958).abs() < 1e-6);
}

#[test]
fn keys_a_rope_type_has_no_use_for_are_found() {
    let ignored = |kind: &str, value: Value| {
        let fields = Fields::new(Path::new("config.json"), &value).unwrap();
        ignored_keys(&fields, kind).join(" ")
    };
    // deepseek-ai/DeepSeek-R1-0528-Qwen3-8B.
    let yarn = json!({"attn_factor": 0.8782488562869419, "factor": 4.0, "original_max_position_embeddings": 32768,
        "rope_type": "yarn"});
    assert_eq!(ignored("yarn", yarn.clone()), "attn_factor");
    let config = parse_value(&with(qwen3(), json!({"rope_scaling": yarn}))).unwrap();
    assert!(matches!(config.rope.scaling, RopeScaling::Yarn { attention_factor: None, .. }));
    assert_eq!(ignored("llama3", llama()["rope_scaling"].clone()), "");
    assert_eq!(ignored("linear", json!({"type": "linear", "factor": 2.0, "beta_fast": 32})), "beta_fast");
    assert_eq!(ignored("default", json!({"rope_type": "default", "rope_theta": 1e6})), "");
}

#[test]
fn qwen3_heads_are_128_wide_where_nothing_is_said() {
    let value = with(qwen3(), json!({"head_dim": null, "hidden_size": 2560, "num_attention_heads": 32}));
    assert_eq!(parse_value(&value).unwrap().head_dim, 128);
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        (json!({"architectures": ["MambaForCausalLM"]}), "`MambaForCausalLM`"),
        (json!({"architectures": null, "model_type": "gpt2"}), "`gpt2`"),
        (json!({"architectures": "LlamaForCausalLM"}), "`architectures`"),
        (json!({"hidden_size": null}), "`hidden_size` is missing"),
        (json!({"hidden_size": "2048"}), "`hidden_size` is \"2048\""),
        (json!({"hidden_size": -1}), "`hidden_size` is -1"),
        (json!({"hidden_size": 0}), "`hidden_size` is 0"),
        (json!({"vocab_size": 1u64 << 40}), "`vocab_size`"),
        (json!({"num_hidden_layers": 1e18}), "`num_hidden_layers`"),
        (json!({"max_position_embeddings": (1 << 24) + 1}), "`max_position_embeddings` is 16777217"),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 1e9, "original_max_position_embeddings": 8192}}),
            "`max_position_embeddings`",
        ),
        (json!({"num_attention_heads": 0, "head_dim": null}), "`num_attention_heads` is 0"),
        (json!({"num_attention_heads": 7, "head_dim": null}), "`head_dim`"),
        (json!({"num_key_value_heads": 0}), "`num_key_value_heads` is 0"),
        (json!({"num_key_value_heads": 3}), "`num_key_value_heads` is 3, which does not divide"),
        (json!({"head_dim": 63}), "`head_dim` is 63"),
        (json!({"rms_norm_eps": 1e300}), "`rms_norm_eps`"),
        (json!({"rope_theta": 0.0}), "`rope_theta`"),
        (json!({"hidden_act": "gelu"}), "hidden_act `gelu`"),
        (json!({"layer_types": ["full_attention", "chunked_attention"]}), "`chunked_attention`"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), "`longrope`"),
        (json!({"rope_scaling": {"rope_type": "linear"}}), "`factor` is missing"),
        (json!({"rope_scaling": {"type": "dynamic"}}), "`factor` is missing"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), "factor 0"),
    ];
    for (change, expected) in cases {
        let error = parse_value(&with(llama(), change)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    }
}

proptest! {
    #[test]
    fn no_value_of_any_field_makes_parsing_panic(
        field in prop::sample::select(vec![
            "architectures", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "num_hidden_layers", "rope_scaling", "rope_theta", "rms_norm_eps", "max_position_embeddings",
            "vocab_size", "intermediate_size",
        ]),
        value in prop_oneof![
            Just(Value::Null), Just(json!([])), Just(json!({})), Just(json!([["x"]])), Just(json!("x")),
            Just(json!(true)), any::<i64>().prop_map(|n| json!(n)), any::<u64>().prop_map(|n| json!(n)),
            any::<f64>().prop_map(|x| json!(x)),
            any::<f32>().prop_map(|x| json!({"rope_type": "yarn", "factor": x, "original_max_position_embeddings": 0})),
            any::<u64>().prop_map(|n| json!({"type": "llama3", "factor": n, "original_max_position_embeddings": n})),
        ],
    ) {
        let mut config = llama();
        config[field] = value;
        if let Ok(config) = parse_value(&config) {
            let _ = config.parameters();
        }
    }
}
