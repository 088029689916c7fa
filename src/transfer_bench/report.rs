//! What was measured, for people and for programs.

use serde::Serialize;

use super::Pages;
use crate::transfer::Transport;

/// One page size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    transport: &'static str,
    page_bytes: usize,
    pages: usize,
    rounds: usize,
    gigabytes_per_second: f64,
    gigabytes_per_second_min: f64,
    gigabytes_per_second_max: f64,
    latency_microseconds: f64,
    latency_microseconds_min: f64,
    latency_microseconds_max: f64,
    /// Of one copy of as many bytes within the device: with that of pages on a device alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    copy_gigabytes_per_second: Option<f64>,
}

impl Row {
    /// From the seconds that rounds of all pages, and of one, have taken, and copies of all. There is a round of each
    /// at least.
    pub(super) fn new(transport: Transport, pages: Pages, all: &[f64], one: &[f64], copies: &[f64]) -> Self {
        let gigabytes = (pages.count() * pages.page_bytes()) as f64 / 1e9;
        let ([fastest, median, slowest], [least, middle, most]) = (spread(all), spread(one));
        Self {
            transport: transport.name(),
            page_bytes: pages.page_bytes(),
            pages: pages.count(),
            rounds: all.len(),
            gigabytes_per_second: gigabytes / median,
            gigabytes_per_second_min: gigabytes / slowest,
            gigabytes_per_second_max: gigabytes / fastest,
            latency_microseconds: middle * 1e6,
            latency_microseconds_min: least * 1e6,
            latency_microseconds_max: most * 1e6,
            copy_gigabytes_per_second: (!copies.is_empty()).then(|| gigabytes / spread(copies)[1]),
        }
    }

    /// One JSON object.
    pub(super) fn json(&self) -> String {
        // Numbers and a name: there is nothing that could fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The lines above a table of rows like this one.
    pub(super) fn header(&self) -> String {
        let Self { transport, pages, rounds, .. } = self;
        let copy = self.copy_gigabytes_per_second.map_or("", |_| "  of a copy within the device");
        format!(
            "{transport}: {pages} pages a round, no two adjacent, and the word behind them; median of {rounds} rounds \
             (least to most)\n\n{:>12}  {:>24}  {:>28}{copy}",
            "page", "GB/s", "one page and its word, µs"
        )
    }

    /// A line of that table.
    pub(super) fn text(&self) -> String {
        let page = match self.page_bytes {
            bytes if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
            bytes if bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
            bytes => format!("{bytes} bytes"),
        };
        let speed = format!(
            "{:.2} ({:.2} to {:.2})",
            self.gigabytes_per_second, self.gigabytes_per_second_min, self.gigabytes_per_second_max
        );
        let latency = format!(
            "{:.1} ({:.1} to {:.1})",
            self.latency_microseconds, self.latency_microseconds_min, self.latency_microseconds_max
        );
        let copy = self.copy_gigabytes_per_second.map_or(String::new(), |copy| {
            format!("  {:>26}", format!("{:.0} % of {copy:.1} GB/s", 100.0 * self.gigabytes_per_second / copy))
        });
        format!("{page:>12}  {speed:>24}  {latency:>28}{copy}")
    }
}

/// Least, median, most.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_median_and_what_is_around_it() {
        let pages = Pages::new(1000, 1_000_000).unwrap();
        let row = Row::new(Transport::Tcp, pages, &[0.5, 0.25, 1.0], &[3e-6, 1e-6, 2e-6], &[]);
        let json: serde_json::Value = serde_json::from_str(&row.json()).unwrap();
        assert_eq!(json["transport"], "tcp");
        assert_eq!((json["page_bytes"].as_u64(), json["pages"].as_u64()), (Some(1_000_000), Some(1000)));
        assert_eq!(json["rounds"], 3);
        let number = |name: &str| json[name].as_f64().unwrap();
        assert_eq!(number("gigabytes_per_second"), 2.0);
        assert_eq!((number("gigabytes_per_second_min"), number("gigabytes_per_second_max")), (1.0, 4.0));
        assert!((number("latency_microseconds") - 2.0).abs() < 1e-9);
        assert!(
            row.text().ends_with("2.0 (1.0 to 3.0)") && row.text().contains("2.00 (1.00 to 4.00)"),
            "{}",
            row.text()
        );
        assert!(json["copy_gigabytes_per_second"].is_null() && !row.header().contains("a copy"), "{json}");
    }

    #[test]
    fn pages_on_a_device_are_compared_with_a_copy_there() {
        let pages = Pages::new(1000, 1_000_000).unwrap();
        let row = Row::new(Transport::CudaIpc, pages, &[0.5], &[1e-6], &[0.1, 0.25, 0.4]);
        assert!(row.header().ends_with("of a copy within the device"));
        assert!(row.text().ends_with("50 % of 4.0 GB/s"), "{}", row.text());
    }
}
