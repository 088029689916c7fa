//! A row of the table.

/// Operations of mma in a millisecond, and of wgmma as the power of a device allows it.
pub(super) const MMA_PER_MS: f64 = 600e9;
pub(super) const WGMMA_PER_MS: f64 = 800e9;

/// What a measurement did at least: bytes that had to move, and operations of products.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    pub(super) bytes: usize,
    pub(super) operations: usize,
    /// How many of these tensor cores do in a millisecond, by the instructions at hand.
    pub(super) per_ms: f64,
}

/// What stands above the rows.
pub(super) fn heading(device: &str, bandwidth: f64) -> String {
    format!(
        "{device}: a copy of rows moves {bandwidth:.0} GB/s, read and written\n\n\
         | what | µs | MB | GB/s | of a copy | Tflop/s | floor of the time |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n"
    )
}

/// One row: time, bytes, the part of the copy's bandwidth that makes, and the rate of operations; and the floor, which is
/// the longer of the bytes at that bandwidth and the operations at the rate of tensor cores on an H100 or H200 (by mma
/// about 600 Tflop/s, by wgmma about 800), as a part of the time.
pub(super) fn row(what: &str, milliseconds: f64, work: Work, bandwidth: f64) -> String {
    let (bytes, operations) = (work.bytes as f64, work.operations as f64);
    let rate = bytes / milliseconds / 1e6;
    let floor_ms = (bytes / bandwidth / 1e6).max(operations / work.per_ms);
    format!(
        "| {what} | {:.1} | {:.2} | {rate:.0} | {:.0} % | {:.1} | {:.0} % |",
        milliseconds * 1e3,
        bytes / 1e6,
        100.0 * rate / bandwidth,
        operations / milliseconds / 1e9,
        100.0 * floor_ms / milliseconds
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_below_as_many_names() {
        let heading = heading("a device", 3000.0);
        assert!(heading.starts_with("a device: a copy of rows moves 3000 GB/s"), "{heading}");
        let columns = |line: &str| line.matches('|').count();
        let row = row("a", 1.0, Work { bytes: 1, operations: 0, per_ms: MMA_PER_MS }, 1.0);
        assert!(heading.lines().skip(2).all(|line| columns(line) == columns(&row)), "{heading}{row}");
    }

    #[test]
    fn the_floor_is_bytes_or_operations_whichever_takes_longer() {
        // 3 GB in 2 ms where a copy moves 3,000 GB/s; 600 Gflop in 2 ms.
        let work = |bytes, operations| Work { bytes, operations, per_ms: MMA_PER_MS };
        let reading = row("a", 2.0, work(3_000_000_000, 0), 3000.0);
        assert_eq!(reading, "| a | 2000.0 | 3000.00 | 1500 | 50 % | 0.0 | 50 % |");
        let computing = row("b", 2.0, work(3_000_000, 900_000_000_000), 3000.0);
        assert_eq!(computing, "| b | 2000.0 | 3.00 | 2 | 0 % | 450.0 | 75 % |");
    }
}
