//! A row of the table.

/// Operations in a millisecond: of ordinary arithmetic in f32, of mma, and of wgmma as the power of a device allows it.
pub(super) const FMA_PER_MS: f64 = 60e9;
pub(super) const MMA_PER_MS: f64 = 600e9;
pub(super) const WGMMA_PER_MS: f64 = 800e9;

/// What a measurement did at least: bytes that had to move, and operations of products.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    pub(super) bytes: usize,
    pub(super) operations: usize,
    /// How many of these a device does in a millisecond, by the instructions at hand.
    pub(super) per_ms: f64,
}

/// How long something took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Time {
    pub(super) milliseconds: f64,
    /// Whether it was recorded and replayed: the host's part is not in it.
    pub(super) is_recorded: bool,
}

/// What stands above the rows.
pub(super) fn heading(device: &str, bandwidth: f64, theoretical: Option<f64>) -> String {
    let theoretical = theoretical.map_or(String::new(), |most| format!(" (its memory's clock and width: {most:.0})"));
    format!(
        "{device}: a copy of rows moves {bandwidth:.0} GB/s, read and written{theoretical}. Times are those of \
         recordings that are replayed; where there is a †, the host launches what is measured.\n\n\
         | what | µs | MB | GB/s | Gflop | Tflop/s | floor, µs | of the time |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
}

/// One row: time, bytes and operations, the rates that these make; and the floor, which is the longer of the bytes at a
/// copy's bandwidth and the operations at the rate of an H100 or H200 (about 60 Tflop/s without tensor cores, 600 by
/// mma, 800 by wgmma), by itself and as a part of the time. What is small enough for a cache may be faster than its
/// bytes are copied.
pub(super) fn row(what: &str, time: Time, work: Work, bandwidth: f64) -> String {
    let Time { milliseconds, is_recorded } = time;
    let mark = if is_recorded { "" } else { " †" };
    let (bytes, operations) = (work.bytes as f64, work.operations as f64);
    let (rate, operations_rate) = (bytes / milliseconds / 1e6, operations / milliseconds / 1e9);
    let floor_ms = (bytes / bandwidth / 1e6).max(operations / work.per_ms);
    format!(
        "| {what}{mark} | {:.1} | {:.2} | {rate:.0} | {:.2} | {operations_rate:.1} | {:.1} | {:.0} % |",
        milliseconds * 1e3,
        bytes / 1e6,
        operations / 1e9,
        floor_ms * 1e3,
        100.0 * floor_ms / milliseconds
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(milliseconds: f64) -> Time {
        Time { milliseconds, is_recorded: true }
    }

    #[test]
    fn rows_stand_below_as_many_names() {
        let heading = heading("a device", 3000.0, Some(4900.0));
        assert!(heading.starts_with("a device: a copy of rows moves 3000 GB/s"), "{heading}");
        let columns = |line: &str| line.matches('|').count();
        let row = row("a", recorded(1.0), Work { bytes: 1, operations: 0, per_ms: MMA_PER_MS }, 1.0);
        assert!(heading.lines().skip(2).all(|line| columns(line) == columns(&row)), "{heading}{row}");
    }

    #[test]
    fn the_floor_is_bytes_or_operations_whichever_takes_longer() {
        // 3 GB in 2 ms where a copy moves 3,000 GB/s; 900 Gflop in 2 ms, and 800 by wgmma.
        let work = |bytes, operations| Work { bytes, operations, per_ms: MMA_PER_MS };
        let reading = row("a", recorded(2.0), work(3_000_000_000, 0), 3000.0);
        assert_eq!(reading, "| a | 2000.0 | 3000.00 | 1500 | 0.00 | 0.0 | 1000.0 | 50 % |");
        let launched = Time { milliseconds: 2.0, is_recorded: false };
        let computing = row("b", launched, work(3_000_000, 900_000_000_000), 3000.0);
        assert_eq!(computing, "| b † | 2000.0 | 3.00 | 2 | 900.00 | 450.0 | 1500.0 | 75 % |");
        let by_wgmma = Work { per_ms: WGMMA_PER_MS, ..work(3_000_000, 800_000_000_000) };
        assert_eq!(
            row("c", recorded(2.0), by_wgmma, 3000.0),
            "| c | 2000.0 | 3.00 | 2 | 800.00 | 400.0 | 1000.0 | 50 % |"
        );
    }
}
