//! The page.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::answers::Alike;
use crate::handoffs::{self, PHASES};
use crate::machine::Machine;
use crate::stats::{median, percentile};
use crate::streams::{STREAMS, Seen};

/// One of the measurements of a row.
type Values = fn(&handoffs::Row) -> &Vec<f64>;

/// The page, each section of which is printed as soon as it is known.
pub(crate) struct Report {
    machine: Machine,
    device: Option<String>,
    text: String,
}

impl Report {
    pub(crate) fn new(machine: Machine, device: Option<String>) -> Self {
        let mut report = Self { machine, device, text: String::new() };
        report.add(|report, text| report.write_head(text));
        report
    }

    pub(crate) fn answers(&mut self, alike: &Alike) {
        self.add(|_, text| write_answers(text, alike));
    }

    pub(crate) fn handoffs(&mut self, rows: &[handoffs::Row]) {
        self.add(|report, text| report.write_handoffs(text, rows));
    }

    pub(crate) fn streams(&mut self, seen: &Seen) {
        self.add(|_, text| write_streams(text, seen));
    }

    fn add(&mut self, write: impl FnOnce(&Self, &mut String) -> std::fmt::Result) {
        let mut section = String::new();
        // Writing to a string cannot fail.
        let _ = write(self, &mut section);
        print!("{section}");
        self.text.push_str(&section);
    }

    fn write_head(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "# Disaggregation, engine {}\n", env!("CARGO_PKG_VERSION"))?;
        writeln!(text, "- Machine: {}", self.machine)?;
        match &self.device {
            Some(device) => writeln!(text, "- All workers compute on {device}, each in a process of its own"),
            None => writeln!(
                text,
                "- Every worker is held to its cores (taskset) and has one computing thread on each; etcd, \
                 nats-server\n  and the clients run on whichever core is free"
            ),
        }
    }

    fn write_handoffs(&self, text: &mut String, rows: &[handoffs::Row]) -> std::fmt::Result {
        let workers = match self.device {
            Some(_) => "decode worker and prefill worker on one device",
            None => "decode worker on core 0, prefill worker on core 1",
        };
        writeln!(
            text,
            "\n## What a handoff costs\n\n\
             One at a time, {workers}, both idle otherwise. Milliseconds,\n\
             p50 / p99. *Overhead* is the time to the first token at the client, less the prefill worker's\n\
             computing: HTTP, queue, messages, transfer, and the step that computes the last prompt token. *Added* is\n\
             the time to the first token less the median of one process with the same prompts.\n"
        )?;
        if self.device.is_some() {
            writeln!(
                text,
                "A prefill worker only tells its device what to compute: the time that takes is in *transfer*, not in\n\
                 *compute*, and in *overhead*.\n"
            )?;
        }
        self.write_table(text, rows)
    }

    fn write_table(&self, text: &mut String, rows: &[handoffs::Row]) -> std::fmt::Result {
        write!(text, "| |")?;
        for row in rows {
            write!(text, " {} tokens, {} (n = {}) |", row.tokens, row.transport, row.first_token.len())?;
        }
        writeln!(text, " |\n| --- |{} --- |", " --- |".repeat(rows.len()))?;
        for (at, (phase, what)) in PHASES.iter().enumerate() {
            write_row(text, rows, phase, what, |row| &row.phases[at])?;
        }
        let totals: [(&str, &str, Values); 4] = [
            ("**overhead**", "time to the first token − compute", |row| &row.overhead),
            ("time to the first token", "at the client", |row| &row.first_token),
            ("the same, one process", if self.device.is_some() { "on the device" } else { "on one core" }, |row| {
                &row.local
            }),
            ("**added**", "by the handoff", |row| &row.added),
        ];
        totals.into_iter().try_for_each(|(name, what, values)| write_row(text, rows, name, what, values))
    }

    /// Writes the page to `folder`, named after the day and the processor.
    pub(crate) fn write(&self, folder: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{}-disaggregation.md", self.machine.page_name()?));
        std::fs::write(&path, &self.text)?;
        Ok(path)
    }
}

fn write_answers(text: &mut String, alike: &Alike) -> std::fmt::Result {
    let Alike { answers, tokens, equal, margin_max } = alike;
    writeln!(
        text,
        "\n## The same tokens\n\n\
         {equal} of {answers} greedy answers of {tokens} tokens, to prompts that were handed off, are those of one \
         process,\ntoken for token. Where one parts, the two tokens were {margin_max:.4} nat apart at most."
    )
}

fn write_row(
    text: &mut String,
    rows: &[handoffs::Row],
    name: &str,
    what: &str,
    values: impl Fn(&handoffs::Row) -> &Vec<f64>,
) -> std::fmt::Result {
    write!(text, "| {name} |")?;
    for row in rows {
        let values = values(row);
        write!(text, " {:.2} / {:.2} |", median(values) * 1e3, percentile(values, 99.0) * 1e3)?;
    }
    writeln!(text, " {what} |")
}

fn write_streams(text: &mut String, seen: &Seen) -> std::fmt::Result {
    writeln!(text, "\n## {STREAMS} answers while prompts of {} tokens arrive: {}\n", seen.prompt, seen.model)?;
    writeln!(
        text,
        "A prompt takes {:.3} s where nothing else runs, and one arrives every {:.2} s.",
        seen.alone, seen.interval
    )?;
    writeln!(text, "All rounds together; ITL is the time between two tokens of an answer, in milliseconds.\n")?;
    writeln!(
        text,
        "| | ITL p50 / p99 / max, no prompts | ITL p50 / p99 / max, prompts arriving | tokens/s of the {STREAMS} \
         | TTFT of the prompts, p50 / max, s | handed off |"
    )?;
    writeln!(text, "| --- | --- | --- | --- | --- | --- |")?;
    let spread = |gaps: &[f64]| {
        let [p50, p99, max] = [50.0, 99.0, 100.0].map(|percent| percentile(gaps, percent) * 1e3);
        format!("{p50:.2} / {p99:.2} / {max:.2}")
    };
    for (setup, figures) in &seen.setups {
        writeln!(
            text,
            "| {} | {} | {} | {:.0} | {:.3} / {:.3} | {} of {} |",
            setup.name(),
            spread(&figures.quiet),
            spread(&figures.busy),
            median(&figures.tokens_per_second),
            median(&figures.first_token),
            percentile(&figures.first_token, 100.0),
            figures.handed_off,
            figures.first_token.len(),
        )?;
    }
    Ok(())
}
