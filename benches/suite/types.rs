//! One model in files of several types, and the forward pass of each: a page with the ratio and the fraction of the
//! memory ceiling by type.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::machine::{self, Machine};
use crate::offline::{self, Kind};
use crate::report::optional;

/// Measures each file of `folder` and returns the page.
pub(crate) fn page(
    folder: &Path,
    machine: &Machine,
    llama: Option<&Path>,
    rounds: usize,
    threads: usize,
) -> Result<String> {
    let files = files(folder)?;
    let bandwidth = BTreeMap::from([1, threads].map(|threads| (threads, machine::read_bandwidth(threads))));
    let model = folder.file_name().context("the folder has no name")?.to_string_lossy();
    let mut text = format!("# {model} in files of several types, engine {}\n\n", env!("CARGO_PKG_VERSION"));
    writeln!(text, "- Machine: {machine}")?;
    for (threads, bandwidth) in &bandwidth {
        writeln!(text, "- Memory read by {threads} thread(s): {:.1} GB/s", bandwidth / 1e9)?;
    }
    writeln!(text, "- Median of {rounds} rounds, engine and peer alternating, each in a process of its own")?;
    text += "- The memory ceiling of decoding: all bytes of the file read once a token, at that rate. What the\n";
    text += "  third-level cache keeps is read faster\n";
    text += "- Files as llama-quantize makes them: embeddings, which are the output's weights too, have more bits (Q6_K) in\n";
    text += "  those of four\n";
    writeln!(text, "\n## The forward pass alone (tokens/s)\n")?;
    writeln!(text, "| type | MB | | threads | engine | llama.cpp | ratio | of the memory ceiling |")?;
    writeln!(text, "| --- | --- | --- | --- | --- | --- | --- | --- |")?;
    let mut measured = false;
    for (bytes, path) in files {
        let bytes = bytes as f64;
        let name = path.file_stem().context("a file has no name")?.to_string_lossy();
        eprintln!("{name}:");
        let rows = match offline::compare(&path, llama, rounds, threads, &[512]) {
            Ok(rows) => rows,
            Err(error) => {
                // The other types' figures are worth having.
                eprintln!("{name}: {error:#}");
                writeln!(text, "| {name} | {:.0} | failed | | | | | |", bytes / 1e6)?;
                continue;
            }
        };
        measured = true;
        for row in rows {
            let ceiling = match row.kind {
                Kind::Prefill(_) => None,
                Kind::Decode(_) => Some(bandwidth[&row.threads] / bytes),
            };
            writeln!(
                text,
                "| {name} | {:.0} | {} | {} | {:.1} | {} | {} | {} |",
                bytes / 1e6,
                row.kind,
                row.threads,
                row.engine,
                optional(row.peer, |peer| format!("{peer:.1}")),
                optional(row.peer, |peer| format!("{:.2}×", row.engine / peer)),
                optional(ceiling, |ceiling| format!("{:.0} %", row.engine / ceiling * 100.0)),
            )?;
        }
    }
    ensure!(measured, "no type could be measured");
    Ok(text)
}

/// The GGUF files of a folder and their bytes, the smallest first.
fn files(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "gguf") {
            files.push((std::fs::metadata(&path)?.len(), path));
        }
    }
    ensure!(!files.is_empty(), "{} has no GGUF files", folder.display());
    files.sort();
    Ok(files)
}
