//! The page of results.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{EVERY, OUTPUT_TOKENS, PROMPT_BYTES, Size, counters::Rates, machine::Machine};

/// What a cluster of one size came to. Times are in seconds.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    /// From nothing to everybody knowing everybody.
    pub(crate) up: f64,
    /// Nobody asks anything: before the first request, under load, and after it.
    pub(crate) idle: Rates,
    pub(crate) busy: Rates,
    pub(crate) rest: Rates,
    pub(crate) requests: usize,
    pub(crate) requests_per_second: f64,
    /// To the first token, median and 99th percentile.
    pub(crate) first: (f64, f64),
    /// From a job's decision to its claim.
    pub(crate) queue: (f64, f64),
    /// Prompts prefilled by prefill workers.
    pub(crate) remote: f64,
    /// Sessions opened between workers.
    pub(crate) sessions: f64,
    pub(crate) watchers: f64,
    pub(crate) frontend_bytes: f64,
    /// What etcd told its watchers when one worker came and went.
    pub(crate) events_a_change: f64,
    pub(crate) bytes_a_change: f64,
}

/// Collects sizes.
pub(crate) struct Report {
    machine: Machine,
    seconds: f64,
    measured: Vec<(Size, Figures)>,
}

impl Report {
    pub(crate) fn new(machine: Machine, seconds: f64) -> Self {
        Self { machine, seconds, measured: Vec::new() }
    }

    pub(crate) fn add(&mut self, size: Size, figures: Figures) {
        self.measured.push((size, figures));
    }

    pub(crate) fn markdown(&self) -> Result<String> {
        let mut text = String::new();
        writeln!(text, "# Scale, engine {}\n", env!("CARGO_PKG_VERSION"))?;
        writeln!(text, "- Machine: {}, shared by everything", self.machine)?;
        writeln!(
            text,
            "- Mock workers (20 ms a step, 100 µs a prompt token) in processes of {} or fewer, one etcd, one NATS, one \
             frontend",
            super::cell::WORKERS_A_PROCESS
        )?;
        writeln!(
            text,
            "- Load: a request every {} s for each decode worker, {PROMPT_BYTES} prompt tokens (prefilled remotely), \
             {OUTPUT_TOKENS} answer tokens, streamed",
            EVERY.as_secs()
        )?;
        writeln!(text, "- {} s of each: before any request, under load, and after it\n", self.seconds)?;
        let sizes: Vec<String> =
            self.measured.iter().map(|(size, _)| format!("{} + {}", size.decode, size.prefill)).collect();
        writeln!(text, "| decode + prefill workers | {} |", sizes.join(" | "))?;
        writeln!(text, "| --- |{}", " --- |".repeat(sizes.len()))?;
        let milli = |seconds: (f64, f64)| format!("{:.0} / {:.0}", seconds.0 * 1e3, seconds.1 * 1e3);
        self.row(&mut text, "until everybody knows everybody, s", |f| format!("{:.1}", f.up))?;
        self.row(&mut text, "requests/s", |f| format!("{:.1}", f.requests_per_second))?;
        self.row(&mut text, "TTFT p50 / p99, ms", |f| milli(f.first))?;
        self.row(&mut text, "job's wait for its claim p50 / p99, ms", |f| milli(f.queue))?;
        self.row(&mut text, "prompts prefilled remotely", |f| format!("{:.0} of {}", f.remote, f.requests))?;
        self.row(&mut text, "sessions between workers", |f| format!("{:.0}", f.sessions))?;
        self.row(&mut text, "etcd: watchers", |f| format!("{:.0}", f.watchers))?;
        self.row(&mut text, "etcd: events told when one worker comes and goes", |f| {
            format!("{:.0}", f.events_a_change)
        })?;
        self.row(&mut text, "etcd: KiB sent meanwhile", |f| format!("{:.0}", f.bytes_a_change / 1024.0))?;
        self.row(&mut text, "frontend: memory under load, MiB", |f| format!("{:.1}", f.frontend_bytes / 1048576.0))?;
        self.row(&mut text, "frontend: CPU a request, µs", |f| {
            format!("{:.0}", f.busy.frontend_cores / f.requests_per_second * 1e6)
        })?;
        self.rates(&mut text, "idle", |figures| &figures.idle)?;
        self.rates(&mut text, "under load", |figures| &figures.busy)?;
        self.rates(&mut text, "idle again", |figures| &figures.rest)?;
        self.reading(&mut text)?;
        Ok(text)
    }

    fn rates(&self, text: &mut String, part: &str, rates: fn(&Figures) -> &Rates) -> Result<()> {
        let mut row = |what: &str, cell: &dyn Fn(&Rates) -> String| {
            self.row(text, &format!("{part}: {what}"), |figures| cell(rates(figures)))
        };
        row("messages/s into NATS", &|r| format!("{:.0}", r.nats_in))?;
        row("messages/s out of NATS", &|r| format!("{:.0}", r.nats_out))?;
        row("KiB/s out of NATS", &|r| format!("{:.0}", r.nats_bytes / 1024.0))?;
        row("KiB/s out of etcd", &|r| format!("{:.0}", r.etcd_bytes / 1024.0))?;
        row("cores: etcd / NATS / frontend / workers", &|r| {
            format!("{:.3} / {:.3} / {:.3} / {:.3}", r.etcd_cores, r.nats_cores, r.frontend_cores, r.mocks_cores)
        })
    }

    /// What the table says, as far as it can be computed from it.
    fn reading(&self, text: &mut String) -> Result<()> {
        let Some((size, last)) = self.measured.last() else { return Ok(()) };
        let workers = (size.decode + size.prefill) as f64;
        let session = (last.rest.mocks_cores - last.idle.mocks_cores) / last.sessions * 1e6;
        let all = (size.decode * size.prefill) as f64;
        writeln!(text, "\n## What grows with what\n")?;
        writeln!(
            text,
            "- **The workers' number, once:** watchers of etcd (two a decode worker, one a prefill worker and \
             frontend), renewals of leases, load reports (decode workers' alone, to frontends alone: 1 a second, up to \
             10 under load), looks at the queue's depth (one in two seconds, four a second while prompts are handed \
             off). Idle, {:.1} messages a second into NATS a worker.",
            last.idle.nats_in / workers
        )?;
        writeln!(
            text,
            "- **Each change of the set tells those who watch it:** one prefill worker that comes and goes is {:.0} \
             events, two for each decode worker and a few for frontends and the meter. All workers starting at once is \
             thus decode × prefill events, the one burst that etcd sees ({:.1} s until everybody knew everybody).",
            last.events_a_change, last.up
        )?;
        writeln!(
            text,
            "- **Sessions: decode × prefill at most**, opened when a pair first has a job in common and then kept: \
             {:.0} of {all:.0} pairs here. An idle one costs {session:.0} µs of CPU a second, both ends together, for \
             its signs of life; with all pairs open that is {:.1} % of a core for each worker. It is the only thing \
             that grows with the product, and what a decode worker limits (1,024 sessions).",
            last.sessions,
            session * all / workers / 1e4
        )?;
        writeln!(
            text,
            "- **Requests:** a job is a publication, a delivery and its acknowledgement in NATS ({:.1} messages a \
             request, load reports and all). Nothing about a request depends on how many workers there are but the \
             frontend's look at each of them.",
            last.busy.nats_in / last.requests_per_second
        )?;
        writeln!(
            text,
            "- **The first limit** on this machine is its two cores, most of which mocks use. Of the services NATS \
             would be it: {:.2} cores at {:.0} handoffs a second.",
            last.busy.nats_cores,
            last.remote / self.seconds
        )?;
        Ok(())
    }

    fn row(&self, text: &mut String, what: &str, cell: impl Fn(&Figures) -> String) -> Result<()> {
        let cells: Vec<String> = self.measured.iter().map(|(_, figures)| cell(figures)).collect();
        writeln!(text, "| {what} | {} |", cells.join(" | "))?;
        Ok(())
    }

    /// Writes the page under its name.
    pub(crate) fn write(&self, folder: &Path, text: &str) -> Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{}-scale.md", self.machine.page_name()?));
        std::fs::write(&path, text)?;
        Ok(path)
    }
}
