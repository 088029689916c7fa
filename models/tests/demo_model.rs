//! The real SmolLM2-135M-Instruct (Q4_1) on the reference backend.

#[path = "../../tests/support/assets.rs"]
mod assets;

use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Backend, Batch, DType, KvDType, KvLayout};
use engine_models::gguf::Gguf;
use engine_models::{Architecture, ForwardLimits, ModelSource, OpenOptions};

#[test]
fn the_demo_model_knows_the_capital_of_france() {
    let path = assets::demo_model();
    let source = ModelSource::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
    let config = source.config();
    assert_eq!((config.architecture, config.layers, config.vocab_size), (Architecture::Llama, 30, 49_152));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert!(config.tie_word_embeddings);
    assert_eq!(config.max_position_embeddings, 8192);
    assert_eq!(source.generation_defaults().eos_token_ids, [0, 2]);
    let template = source.chat_template().unwrap();
    assert!(template.source.contains("<|im_start|>"));
    assert_eq!(template.eos_token.as_deref(), Some("<|im_end|>"));
    assert_eq!(source.name(), "SmolLM2-135M-Instruct.Q4_1");

    // Tokens by their text in the file, Ġ for a leading space: no tokenizer is needed for whole words.
    let file = Gguf::open(&path).unwrap();
    let texts: Vec<_> = file.array("tokenizer.ggml.tokens").unwrap().unwrap().strings().unwrap().collect();
    let id = |text: &str| texts.iter().position(|&token| token == text).unwrap() as u32;
    let prompt = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"].map(id);

    let mut backend = ReferenceBackend;
    let limits = ForwardLimits { max_tokens: 8, max_logit_rows: 1, max_positions: 16 };
    let mut loaded = source.load(&mut backend, limits).unwrap();
    let report = &loaded.report;
    assert_eq!((report.parameters, report.unused_tensors, loaded.kv_dtype), (134_515_008, 0, KvDType::F16));
    assert_eq!(
        report.dtypes.iter().map(|(dtype, _)| *dtype).collect::<Vec<_>>(),
        [DType::Q4_1, DType::Q8_0, DType::F32]
    );

    let layout = KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_size: 16,
        blocks: 1,
        dtype: loaded.kv_dtype,
    };
    let mut cache = backend.kv_cache(layout).unwrap();
    let mut batch = Batch::default();
    batch.push(&prompt, 0, &[0], prompt.len() - 1);
    loaded.model.forward(&mut backend, &mut cache, &batch, &mut |_| ());
    let logits = loaded.model.logits(&mut backend, &batch.logit_rows);
    let logits = backend.read(logits);
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    assert_eq!(texts[best], "ĠParis");
}
