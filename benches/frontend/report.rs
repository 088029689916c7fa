//! The page of results.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{CLIENTS, OUTPUT_TOKENS, Options, PROMPT_BYTES, Who, machine::Machine, stack::Pace, stats::median};

/// What one burst of load came to. Times are in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) requests_per_second: f64,
    /// From sending a request to the first token, through the frontend.
    pub(crate) first_p50: f64,
    pub(crate) first_p99: f64,
    /// Over what a worker asked directly takes, median against median.
    pub(crate) added_first: Option<f64>,
    pub(crate) frontend_cpu_per_request: f64,
    pub(crate) frontend_cpu_per_token: f64,
    pub(crate) workers_cpu_per_token: f64,
    /// Cores that the frontend kept busy.
    pub(crate) frontend_cores: f64,
}

/// Collects rounds.
pub(crate) struct Report {
    machine: Machine,
    rounds: usize,
    seconds: f64,
    with_peer: bool,
    measured: Vec<(Who, Pace, usize, Figures)>,
}

impl Report {
    pub(crate) fn new(machine: Machine, options: &Options) -> Self {
        let Options { rounds, seconds, dynamo, .. } = options;
        Self { machine, rounds: *rounds, seconds: *seconds, with_peer: dynamo.is_some(), measured: Vec::new() }
    }

    pub(crate) fn add(&mut self, who: Who, pace: Pace, clients: usize, figures: Figures) {
        self.measured.push((who, pace, clients, figures));
    }

    /// The median over the rounds of one figure; NaN where there is none.
    fn median(&self, who: Who, pace: Pace, clients: usize, figure: impl Fn(&Figures) -> Option<f64>) -> f64 {
        let of = |measured: &&(Who, Pace, usize, Figures)| (measured.0, measured.1, measured.2) == (who, pace, clients);
        let values: Vec<f64> = self.measured.iter().filter(of).filter_map(|measured| figure(&measured.3)).collect();
        median(&values)
    }

    pub(crate) fn markdown(&self) -> Result<String> {
        let mut text = String::new();
        writeln!(text, "# The frontend, engine {}\n", env!("CARGO_PKG_VERSION"))?;
        writeln!(text, "- Machine: {}, shared by clients, frontend and workers", self.machine)?;
        writeln!(
            text,
            "- Streamed completions of {OUTPUT_TOKENS} tokens after prompts of {PROMPT_BYTES} bytes, over two workers \
             that only pretend to compute; clients keep their connections"
        )?;
        writeln!(
            text,
            "- Median of {} rounds of {} s each, {}; etcd and NATS beside each",
            self.rounds,
            self.seconds,
            if self.with_peer {
                "engine and Dynamo 1.6.1 (round robin, no migration) alternating"
            } else {
                "the engine alone"
            }
        )?;
        for (pace, title) in [(Pace::Unbounded, "As fast as it goes"), (Pace::Model, "Paced: a token every 7 ms or so")]
        {
            writeln!(text, "\n## {title}\n")?;
            writeln!(
                text,
                "| clients | | requests/s | TTFT p50 / p99, ms | added to a worker's own, ms | frontend CPU a request, \
                 µs | a token, µs | workers' CPU a token, µs | frontend, cores |"
            )?;
            writeln!(text, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |")?;
            for clients in CLIENTS {
                self.rows(&mut text, pace, clients)?;
            }
        }
        Ok(text)
    }

    fn rows(&self, text: &mut String, pace: Pace, clients: usize) -> Result<()> {
        for (who, name) in [(Who::Engine, "engine"), (Who::Dynamo, "Dynamo")] {
            if who == Who::Dynamo && !self.with_peer {
                continue;
            }
            let median = |figure: fn(&Figures) -> f64| self.median(who, pace, clients, |figures| Some(figure(figures)));
            let added = self.median(who, pace, clients, |figures| figures.added_first);
            let added = if added.is_nan() { "–".to_owned() } else { format!("{:.2}", added * 1e3) };
            writeln!(
                text,
                "| {clients} | {name} | {:.0} | {:.2} / {:.2} | {added} | {:.0} | {:.2} | {:.2} | {:.2} |",
                median(|figures| figures.requests_per_second),
                median(|figures| figures.first_p50) * 1e3,
                median(|figures| figures.first_p99) * 1e3,
                median(|figures| figures.frontend_cpu_per_request) * 1e6,
                median(|figures| figures.frontend_cpu_per_token) * 1e6,
                median(|figures| figures.workers_cpu_per_token) * 1e6,
                median(|figures| figures.frontend_cores),
            )?;
        }
        if self.with_peer {
            let ratio = |figure: fn(&Figures) -> f64| {
                let of = |who| self.median(who, pace, clients, |figures| Some(figure(figures)));
                of(Who::Engine) / of(Who::Dynamo)
            };
            let rate = match pace {
                Pace::Unbounded => format!("**{:.1}×** (floor 3)", ratio(|figures| figures.requests_per_second)),
                // The workers set it.
                Pace::Model => "–".to_owned(),
            };
            writeln!(
                text,
                "| {clients} | **ratio** | {rate} | {:.2}× / {:.2}× | | {:.2}× | **{:.2}×** (floor 0.33) | {:.2}× | |",
                ratio(|figures| figures.first_p50),
                ratio(|figures| figures.first_p99),
                ratio(|figures| figures.frontend_cpu_per_request),
                ratio(|figures| figures.frontend_cpu_per_token),
                ratio(|figures| figures.workers_cpu_per_token),
            )?;
        }
        Ok(())
    }

    /// Writes the page under its name.
    pub(crate) fn write(&self, folder: &Path, text: &str) -> Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{}-frontend.md", self.machine.page_name()?));
        std::fs::write(&path, text)?;
        Ok(path)
    }
}
