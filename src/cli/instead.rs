//! What stands here for flags of other servers. clap would guess by the spelling, and mislead.

use std::ffi::OsString;

use clap::{
    CommandFactory, Error,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::Cli;

/// Adds to an error about a command line what other servers' users have to know.
pub(super) fn explained(mut error: Error, line: &[OsString]) -> Error {
    match error.kind() {
        // They give a model as a word.
        ErrorKind::InvalidSubcommand => {
            suggest(&mut error, "a model is named with --model, as in engine --model Qwen/Qwen3-0.6B");
        }
        ErrorKind::UnknownArgument if of_an_engine(line) => {
            let Some(ContextValue::String(given)) = error.get(ContextKind::InvalidArg) else { return error };
            if let Some(say) = instead_of(whole(given, line)) {
                error.remove(ContextKind::SuggestedArg);
                suggest(&mut error, say);
            }
        }
        // It begins as -h does.
        ErrorKind::DisplayHelp if of_an_engine(line) && line.iter().any(|word| word == "-hf") => {
            let say = format!("unexpected argument '-hf' found: {OF_THE_HUB}");
            return Cli::command().error(ErrorKind::UnknownArgument, say);
        }
        _ => {}
    }
    error
}

fn suggest(error: &mut Error, say: &'static str) {
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![say.into()]));
}

/// Whether the line is one of those that compute a model, which have the flags that are named below.
fn of_an_engine(line: &[OsString]) -> bool {
    line.get(1).is_none_or(|word| word == "bench" || word.to_string_lossy().starts_with('-'))
}

/// The word of which clap names the beginning: of `-ngl` it reads `-n`.
fn whole<'a>(given: &'a str, line: &'a [OsString]) -> &'a str {
    if given.starts_with("--") {
        return given;
    }
    let mut words = line.iter().skip(1).filter_map(|word| word.to_str());
    words.find(|word| word.starts_with(given)).map_or(given, |word| word.split('=').next().unwrap_or(word))
}

const OF_THE_HUB: &str = "--model takes models of the hub too, as Qwen/Qwen3-0.6B-GGUF:Q8_0";

/// What to say instead of what llama-server, vLLM and Dynamo take.
fn instead_of(flag: &str) -> Option<&'static str> {
    Some(match flag {
        "--ctx-size" | "-c" => "--max-model-len is the length of a context, of each sequence",
        "--parallel" | "-np" => "--max-num-seqs says how many sequences are computed at the same time",
        "--batch-size" | "-b" | "--ubatch-size" | "-ub" => "--max-num-batched-tokens limits the tokens of a step",
        "-t" => "--threads has no short name",
        "--gpu-layers" | "--n-gpu-layers" | "-ngl" => "--device says what computes, and all layers are on it",
        "--cache-type-k" | "-ctk" | "--cache-type-v" | "-ctv" => "--kv-cache-dtype is the type of keys and values",
        "--hf-repo" => OF_THE_HUB,
        "--alias" | "-a" => "--served-model-name gives a model other names",
        "--chat-template-file" => "--chat-template takes a file",
        "--reasoning-format" => "--reasoning-parser says how thoughts are told from the rest of an answer",
        "--jinja" | "--flash-attn" | "-fa" => "leave it out: it is so always",
        "--temp" | "--temperature" | "--top-k" | "--top-p" | "--min-p" | "--repeat-penalty" | "--seed" | "-s" => {
            "requests say how they are sampled: 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed'"
        }
        "--n-predict" | "--predict" | "-n" => "requests limit their answers by 'max_tokens'",
        "--tensor-parallel-size" | "-tp" | "--pipeline-parallel-size" | "-pp" | "--data-parallel-size" | "-dp" => {
            "a model is on one device; for more of them start more workers, and a frontend"
        }
        "--dtype" | "--quantization" | "-q" => "leave it out: weights are used as they are stored",
        "--trust-remote-code" => "leave it out: no code of a model is run",
        "--disaggregation-mode" | "--kv-transfer-config" => {
            "prefill workers have --is-prefill-worker; all others are decode workers"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use crate::cli::Invocation;

    fn refused(line: &[&str]) -> String {
        Invocation::try_parse_from([&["engine"], line].concat()).unwrap_err().to_string()
    }

    #[test]
    fn who_gives_a_model_as_a_word_is_told_where_it_goes() {
        for line in [&["serve", "some/model"][..], &["some/model"], &["./model.gguf"]] {
            let refused = refused(line);
            assert!(refused.contains(line[0]) && refused.contains("--model Qwen/Qwen3-0.6B"), "{refused}");
        }
    }

    #[test]
    fn flags_of_other_servers_lead_to_those_that_are_here() {
        for (flags, instead) in [
            (&["--ctx-size", "4096"][..], "--max-model-len"),
            (&["--ctx-size=4096"], "--max-model-len"),
            (&["-c", "4096"], "--max-model-len"),
            (&["-ctk", "q8_0"], "--kv-cache-dtype"),
            (&["-ngl", "99"], "--device"),
            (&["-np", "4"], "--max-num-seqs"),
            (&["-n", "4"], "'max_tokens'"),
            (&["-hf", "some/model"], "--model takes"),
            (&["--batch-size", "2048"], "--max-num-batched-tokens"),
            (&["--tensor-parallel-size", "2"], "on one device"),
            (&["-tp=2"], "on one device"),
            (&["--temp", "0"], "'temperature'"),
            (&["--trust-remote-code"], "leave it out"),
        ] {
            for role in [&["-m", "m"][..], &["bench", "-m", "m"], &["--is-prefill-worker"]] {
                let refused = refused(&[role, flags].concat());
                assert!(refused.contains("unexpected argument") && refused.contains(instead), "{flags:?}: {refused}");
                assert!(!refused.contains("similar"), "{refused}");
            }
        }
    }

    #[test]
    fn flags_that_nobody_has_are_guessed_at() {
        assert!(refused(&["--max-num-seq", "1"]).contains("--max-num-seqs"));
        assert!(!refused(&["frontend", "--ctx-size", "1"]).contains("--max-model-len is"));
    }
}
