//! The real SmolLM2-135M-Instruct (Q4_1) against its own weights dequantised to f32.

use std::ops::Range;

use engine_models::{ModelSource, OpenOptions};
use serde_json::Value;

use crate::assets::demo_model;
use crate::golden::{Goldens, reference};
use crate::runner::{Runner, cpu_backend};
use crate::stats::{Regrets, argmax, log_sum_exp};

/// A greedy choice the reference makes with less of a margin, in nats, may be made differently: rounded activations
/// move single log-probabilities.
const CLEAR_MARGIN: f64 = 1.0;

/// How much worse than its f32 weights the model may predict the text, as a part of the perplexity: what rounding
/// activations may cost (tests/reference/README.md says what it does).
const PERPLEXITY_EXCESS: f64 = 0.003;

/// Teacher-forced results over the text: log-probabilities of the true tokens, and regrets.
struct Measured {
    ours: Vec<f64>,
    theirs: Vec<f64>,
    regrets: Vec<f64>,
}

impl Measured {
    /// Ratio of perplexities less one, and regrets, at some positions.
    fn report(&self, positions: Range<usize>) -> (f64, Regrets) {
        let perplexity = |logprobs: &[f64]| (-logprobs.iter().sum::<f64>() / logprobs.len() as f64).exp();
        let (ours, theirs) = (perplexity(&self.ours[positions.clone()]), perplexity(&self.theirs[positions.clone()]));
        let regrets = Regrets::new(self.regrets[positions.clone()].to_vec());
        println!(
            "positions {positions:?}: perplexity {ours:.4}, reference {theirs:.4} ({:+.3} %); {regrets}",
            100.0 * (ours / theirs - 1.0)
        );
        (ours / theirs - 1.0, regrets)
    }
}

fn measure() -> Measured {
    let goldens = Goldens::open("demo/expected.safetensors");
    let ids = goldens.ids("ids");
    let (top_ids, top_logprobs) = (goldens.id_rows("top_ids"), goldens.rows("top_logprobs"));
    let mut runner = Runner::load(cpu_backend(), &demo_model(), ids.len(), None);
    let (mut ours, mut regrets) = (Vec::new(), Vec::new());
    runner.push(&ids[..ids.len() - 1], |i, logits| {
        ours.push(f64::from(logits[ids[i + 1] as usize]) - log_sum_exp(logits));
        // A token that is not even among the reference's likeliest makes the mean infinite.
        let rank = top_ids[i].iter().position(|&id| id as usize == argmax(logits));
        let logprob = rank.map_or(f64::NEG_INFINITY, |rank| top_logprobs[i][rank].into());
        regrets.push(f64::from(top_logprobs[i][0]) - logprob);
    });
    Measured { ours, theirs: goldens.floats("logprobs").into_iter().map(f64::from).collect(), regrets }
}

#[test]
fn the_demo_model_predicts_a_text_as_well_as_its_f32_weights() {
    let measured = measure();
    // What llama-perplexity scores with a context of 2,048; for comparison with tests/reference/README.md.
    measured.report(1024..2047);
    let (perplexity, regrets) = measured.report(0..measured.ours.len());
    assert!(perplexity.abs() <= PERPLEXITY_EXCESS, "perplexity off by {:.3} %", 100.0 * perplexity);
    assert!(regrets.mean() <= 0.02 && regrets.p99() <= 0.2, "{regrets}");
}

#[test]
fn the_demo_model_gives_the_f32_weights_answers_wherever_they_are_clear() {
    let chats: Vec<Value> = serde_json::from_slice(&std::fs::read(reference("demo/chats.json")).unwrap()).unwrap();
    let path = demo_model();
    let source = ModelSource::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
    let tokenizer = source.tokenizer().unwrap();
    let mut runner = Runner::load(cpu_backend(), &path, 256, None);
    for chat in chats {
        let list = |key: &str| serde_json::from_value::<Vec<u32>>(chat[key].clone()).unwrap();
        let (prompt, greedy) = (list("ids"), list("greedy"));
        assert_eq!(tokenizer.encode(chat["prompt"].as_str().unwrap(), true).unwrap(), prompt);
        assert_eq!(tokenizer.decode(&greedy, true), chat["text"].as_str().unwrap());

        let all = [&prompt[..], &greedy[..greedy.len() - 1]].concat();
        let margins: Vec<f64> = serde_json::from_value(chat["margins"].clone()).unwrap();
        runner.restart();
        let mut same = 0;
        runner.push(&all, |i, logits| {
            let Some(at) = (i + 1).checked_sub(prompt.len()) else { return };
            let agrees = argmax(logits) as u32 == greedy[at];
            same += usize::from(agrees);
            assert!(agrees || margins[at] < CLEAR_MARGIN, "token {at} of {}, margin {}", chat["text"], margins[at]);
        });
        println!("{same} of {} greedy tokens the same: {}", greedy.len(), chat["text"]);
    }
}
