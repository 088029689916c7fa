//! The report: one page of Markdown, with the machine, the floors and the ratios.

use std::fmt::Write as _;
use std::path::Path;

use crate::machine::Machine;
use crate::offline::{Kind, Row as OfflineRow};
use crate::serving::{Figures, Row as ServingRow};

/// Everything measured.
pub(crate) struct Report {
    model: String,
    /// Bytes of the model file. With tied embeddings, all of them but the header are read for each token.
    model_bytes: u64,
    machine: Machine,
    rounds: usize,
    threads: usize,
    bandwidth: Vec<(usize, f64)>,
    offline: Vec<OfflineRow>,
    serving: Vec<ServingRow>,
}

impl Report {
    /// An empty report on `model`.
    pub(crate) fn new(model: &Path, machine: Machine, rounds: usize, threads: usize) -> Self {
        let name = model.file_name().map_or_else(|| model.display().to_string(), |n| n.to_string_lossy().into_owned());
        let model_bytes = std::fs::metadata(model).map_or(0, |file| file.len());
        let (bandwidth, offline, serving) = Default::default();
        Self { model: name, model_bytes, machine, rounds, threads, bandwidth, offline, serving }
    }

    /// Adds the memory read bandwidth of `threads` threads, in bytes per second.
    pub(crate) fn bandwidth(&mut self, threads: usize, bytes_per_second: f64) {
        self.bandwidth.push((threads, bytes_per_second));
    }

    /// Adds the forward pass alone.
    pub(crate) fn offline(&mut self, rows: Vec<OfflineRow>) {
        self.offline = rows;
    }

    /// Adds the servers.
    pub(crate) fn serving(&mut self, rows: Vec<ServingRow>) {
        self.serving = rows;
    }

    /// Tokens per second that reading the whole model for each token allows.
    fn ceiling(&self, threads: usize) -> Option<f64> {
        let (_, bandwidth) = self.bandwidth.iter().find(|(t, _)| *t == threads)?;
        Some(bandwidth / self.model_bytes as f64)
    }

    /// The whole page.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_markdown(&mut text);
        text
    }

    fn write_markdown(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "# {}, engine {}\n", self.model, env!("CARGO_PKG_VERSION"))?;
        writeln!(text, "- Machine: {}", self.machine)?;
        for (threads, bandwidth) in &self.bandwidth {
            writeln!(
                text,
                "- Memory read by {threads} thread(s): {:.1} GB/s; at {:.1} MB of weights a token no more than \
                 {:.0} tokens/s at batch 1",
                bandwidth / 1e9,
                self.model_bytes as f64 / 1e6,
                bandwidth / self.model_bytes as f64,
            )?;
        }
        writeln!(
            text,
            "- Median of {} rounds, engine and peer alternating, each in a process of its own",
            self.rounds
        )?;
        if !self.offline.is_empty() {
            writeln!(text, "\n## The forward pass alone (tokens/s)\n")?;
            writeln!(text, "| | threads | engine | llama.cpp | ratio | of the memory ceiling |")?;
            writeln!(text, "| --- | --- | --- | --- | --- | --- |")?;
            for row in &self.offline {
                let ceiling = match row.kind {
                    Kind::Prefill(_) => None,
                    Kind::Decode(_) => self.ceiling(row.threads).map(|ceiling| row.engine / ceiling * 100.0),
                };
                writeln!(
                    text,
                    "| {} | {} | {:.0} | {} | {} | {} |",
                    row.kind,
                    row.threads,
                    row.engine,
                    optional(row.peer, |peer| format!("{peer:.0}")),
                    optional(row.peer, |peer| format!("{:.2}×", row.engine / peer)),
                    optional(ceiling, |percent| format!("{percent:.0} %")),
                )?;
            }
        }
        if !self.serving.is_empty() {
            writeln!(
                text,
                "\n## Serving over HTTP: {} prompt tokens, {} answer tokens, {} threads\n",
                crate::load::PROMPT_TOKENS,
                crate::load::OUTPUT_TOKENS,
                self.threads
            )?;
            writeln!(text, "| clients | | output tokens/s | TTFT p50 / p99, ms | ITL p50 / p99, ms |")?;
            writeln!(text, "| --- | --- | --- | --- | --- |")?;
            for row in &self.serving {
                figures(text, row.clients, "engine", &row.engine)?;
                if let Some(peer) = &row.peer {
                    figures(text, row.clients, "llama.cpp", peer)?;
                    let ratio = row.engine.tokens_per_second / peer.tokens_per_second;
                    writeln!(text, "| {} | **ratio** | **{ratio:.2}×** | | |", row.clients)?;
                }
            }
        }
        Ok(())
    }
}

fn figures(text: &mut String, clients: usize, name: &str, figures: &Figures) -> std::fmt::Result {
    let ms = |(median, high): (f64, f64)| format!("{:.1} / {:.1}", median * 1e3, high * 1e3);
    writeln!(
        text,
        "| {clients} | {name} | {:.1} | {} | {} |",
        figures.tokens_per_second,
        ms(figures.first_token),
        ms(figures.inter_token)
    )
}

/// What a cell of a table says of a value that may not be there.
pub(crate) fn optional(value: Option<f64>, format: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "–".to_string(), format)
}
