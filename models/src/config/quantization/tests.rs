use std::path::Path;

use serde_json::json;

use super::*;

fn parse(quantization: Value) -> Result<Option<Fp8>, ModelError> {
    let value = json!({ "quantization_config": quantization });
    Fp8::parse(&Fields::new(Path::new("config.json"), &value).unwrap())
}

/// `quantization_config` of Qwen/Qwen3-0.6B-FP8, its list shortened.
fn qwen3() -> Value {
    json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj"],
    })
}

/// That of a model by llm-compressor's scheme FP8_DYNAMIC.
fn compressed() -> Value {
    json!({
        "config_groups": {"group_0": {
            "input_activations": {"dynamic": true, "num_bits": 8, "strategy": "token", "symmetric": true,
                "type": "float"},
            "output_activations": null, "targets": ["Linear"],
            "weights": {"actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8,
                "observer": "minmax", "strategy": "channel", "symmetric": true, "type": "float"},
        }},
        "format": "float-quantized", "global_compression_ratio": null, "ignore": ["lm_head"], "kv_cache_scheme": null,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.10.2",
    })
}

/// That of a model by NVIDIA's Model Optimizer.
fn modelopt(algorithm: &str) -> Value {
    json!({
        "config_groups": {"group_0": {
            "input_activations": {"dynamic": false, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": false, "num_bits": 8, "type": "float"}, "targets": ["Linear"],
        }},
        "ignore": ["lm_head"], "quant_algo": algorithm,
        "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.37.0"}, "quant_method": "modelopt",
    })
}

#[test]
fn what_tools_write_is_understood() {
    let fp8 = parse(qwen3()).unwrap().unwrap();
    assert_eq!((fp8.block, fp8.except.len()), (Some([128, 128]), 3));
    let auto_fp8 = json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]});
    let whole = Fp8 { block: None, except: vec!["lm_head".into()] };
    assert_eq!(parse(auto_fp8).unwrap().unwrap(), whole);
    assert_eq!(parse(compressed()).unwrap().unwrap(), whole);
    for algorithm in ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"] {
        assert_eq!(parse(modelopt(algorithm)).unwrap().unwrap(), whole);
    }
    let mut blocks = compressed();
    blocks["config_groups"]["group_0"]["weights"]["strategy"] = "block".into();
    blocks["config_groups"]["group_0"]["weights"]["block_structure"] = json!([128, 128]);
    assert_eq!(parse(blocks).unwrap().unwrap().block, Some([128, 128]));
    assert_eq!(parse(Value::Null).unwrap(), None);
}

#[test]
fn projections_are_quantised_unless_they_or_what_they_are_in_is_excepted() {
    let mut fp8 = parse(qwen3()).unwrap().unwrap();
    assert!(fp8.quantizes("model.layers.0.mlp.down_proj.weight"));
    for name in
        ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    {
        assert!(!fp8.quantizes(name), "{name}");
    }
    fp8.except = vec!["model.layers.1".into()];
    assert!(fp8.quantizes("model.layers.10.mlp.up_proj.weight") && !fp8.quantizes("model.layers.1.mlp.up_proj.weight"));
}

#[test]
fn what_is_not_supported_is_named_beside_what_is() {
    let mut cases = Vec::new();
    for method in ["gptq", "awq", "bitsandbytes", "mxfp4", "fbgemm_fp8"] {
        cases.push((json!({ "quant_method": method, "bits": 4 }), format!("`{method}`")));
    }
    for algorithm in ["NVFP4", "FP8_PB_WO", "W4A8_AWQ"] {
        cases.push((modelopt(algorithm), format!("quant_algo `{algorithm}`")));
    }
    cases.push((json!({"quant_method": "modelopt"}), "quant_algo `(none)`".into()));
    cases.push((json!({}), "`(none)`".into()));
    cases.push((json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt `e5m2`".into()));
    cases.push((json!({"quant_method": "fp8", "weight_block_size": [128, 64]}), "blocks of 128 by 64".into()));
    cases.push((json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), "blocks of 0 by 128".into()));
    for (field, value, expected) in [
        ("num_bits", json!(4), "weights of 4 bits, `float`"),
        ("type", json!("int"), "weights of 8 bits, `int`"),
        ("strategy", json!("group"), "strategy `group`"),
        ("symmetric", json!(false), "not symmetric"),
    ] {
        let mut changed = compressed();
        changed["config_groups"]["group_0"]["weights"][field] = value;
        cases.push((changed, expected.into()));
    }
    for (field, value, expected) in [
        ("format", json!("nvfp4-pack-quantized"), "format `nvfp4-pack-quantized`"),
        ("format", json!("pack-quantized"), "format `pack-quantized`"),
        ("sparsity_config", json!({"format": "sparse-24-bitmask"}), "`sparse-24-bitmask`"),
        ("transform_config", json!({"config_groups": {"u": {}}}), "transform_config"),
    ] {
        let mut changed = compressed();
        changed[field] = value;
        cases.push((changed, expected.into()));
    }
    let mut mixed = compressed();
    mixed["config_groups"]["group_1"] = json!({"weights": {"num_bits": 8, "type": "float", "strategy": "block",
        "block_structure": [128, 128]}});
    cases.push((mixed, "with blocks and without".into()));
    for (value, expected) in cases {
        let error = parse(value).unwrap_err().to_string();
        assert!(error.contains(&expected) && error.contains("supported are quant_method `fp8`"), "{error}: {expected}");
    }
}

#[test]
fn what_is_malformed_is_named() {
    let mut cases = vec![
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), "`weight_block_size` is not a pair"),
        (json!({"quant_method": "fp8", "weight_block_size": [128, -1]}), "`weight_block_size` is not a pair"),
        (json!({"quant_method": "compressed-tensors"}), "`config_groups` is missing"),
        (json!({"quant_method": "compressed-tensors", "config_groups": {}}), "`config_groups` is empty"),
        (json!({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}), "`weights` is missing"),
        (json!({"quant_method": "compressed-tensors", "config_groups": {"a": null}}), "`a` is null"),
        (json!({"quant_method": 8}), "`quant_method` is 8"),
        (json!("fp8"), "`quantization_config` is \"fp8\""),
    ];
    let mut blocks = compressed();
    blocks["config_groups"]["group_0"]["weights"]["strategy"] = "block".into();
    cases.push((blocks, "`block_structure` is missing"));
    for (value, expected) in cases {
        let error = parse(value).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}: {expected}");
    }
}
