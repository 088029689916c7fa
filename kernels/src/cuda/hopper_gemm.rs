//! Products by wgmma (`kernels/cuda/hopper_gemm.cu`), for weights that it takes as they are: which tiles, and their
//! launches.

use super::driver::{Address, Boxes, Driver, Launch};
use super::gemm::{Cut, Operands, Tile};
use super::stream::Stream;
use super::weight::Form;

/// Output features of a tile.
const OUT: usize = 128;
const THREADS: usize = 256;
/// Bytes of a row of a tile that are in shared memory at a time, in each stage.
const ROW_BYTES: usize = 128;
/// What it may take until a stage can begin.
const ALIGNMENT_BYTES: usize = 1024 - 16;

/// All tiles, smallest first, and their stages.
const TILES: [Tile; 3] = [
    SMALLEST,
    Tile { rows: 128, out: OUT, threads: THREADS, kernel: 1 },
    Tile { rows: 192, out: OUT, threads: THREADS, kernel: 2 },
];
const STAGES: [usize; 3] = [4, 6, 5];
pub(super) const SMALLEST: Tile = Tile { rows: 64, out: OUT, threads: THREADS, kernel: 0 };

/// Names of the kernels for one form of weights, for each of the tiles.
pub(super) type Kernels = [&'static str; 3];

/// Those of a form that wgmma takes as it is.
pub(super) const fn kernels(form: Form) -> Option<&'static Kernels> {
    match form {
        Form::F16 => Some(&["hopper_gemm_flat_f16", "hopper_gemm_middle_f16", "hopper_gemm_tall_f16"]),
        Form::BF16 => Some(&["hopper_gemm_flat_bf16", "hopper_gemm_middle_bf16", "hopper_gemm_tall_bf16"]),
        Form::F32 | Form::Nibbles | Form::Bytes | Form::FineBytes | Form::F8 => None,
    }
}

/// The tile whose blocks are over first on a device with so many multiprocessors, the smallest among equals: a block of
/// it takes the longer the more rows it has, and reading its weights from shared memory takes as long as 85 rows do.
pub(super) fn cut(processors: usize, rows: usize, cols: usize, features: usize) -> Cut {
    let time = |tile: &Tile| tile.blocks(rows, features).div_ceil(processors) * (tile.rows + 85);
    let tile = TILES.into_iter().min_by_key(time).unwrap_or(SMALLEST);
    Cut::by(tile, SMALLEST, processors, [rows, cols, features])
}

/// Enqueues a product. How many segments are left to be added up, if not 1.
pub(super) fn multiply<D: Driver>(stream: &Stream<D>, kernels: &Kernels, operands: &Operands<'_, D>) -> usize {
    let Operands { x, part, bias, out, segments } = *operands;
    let (rows, cols) = (x.rows, x.cols);
    let Cut { tile, segments: count } = cut(stream.driver().processors(), rows, cols, part.rows);
    let map = |start: Address, rows: usize, box_rows: usize| {
        let row_bytes = cols.next_multiple_of(8) * size_of::<u16>();
        stream.attempt(|driver| driver.tensor_map(&Boxes { start, rows, cols, row_bytes, box_rows }))
    };
    let weights = map(part.values.address(), part.rows, OUT);
    let (Some(weights), Some(boxes)) = (weights, map(x.values, rows, tile.rows)) else { return count };
    stream.enqueue(&Launch {
        kernel: kernels[tile.kernel],
        grid: [tile.blocks(rows, part.rows), 1, count],
        block: tile.threads,
        shared: STAGES[tile.kernel] * (OUT + tile.rows) * ROW_BYTES + ALIGNMENT_BYTES,
        maps: &[weights, boxes],
        args: &[
            x.scales.into(),
            bias,
            out.address().into(),
            segments.into(),
            rows.into(),
            cols.into(),
            part.rows.into(),
            out.cols.into(),
            part.first.into(),
        ],
    });
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiprocessors of an H100.
    const H100: usize = 132;

    fn chosen(processors: usize, rows: usize, cols: usize, features: usize) -> (usize, usize) {
        let Cut { tile, segments } = cut(processors, rows, cols, features);
        (tile.rows, segments)
    }

    #[test]
    fn many_rows_take_tall_tiles_and_few_flat_ones() {
        assert_eq!(chosen(H100, 2048, 4096, 24_576), (192, 1));
        assert_eq!(chosen(H100, 8192, 4096, 4096), (192, 1));
        // As many blocks as multiprocessors, or a few less.
        assert_eq!(chosen(H100, 512, 4096, 4096), (128, 1));
        assert_eq!(chosen(H100, 2048, 2048, 1024), (128, 1));
        assert_eq!(chosen(H100, 192, 4096, 6144), (128, 1));
        assert_eq!(chosen(H100, 64, 4096, 24_576), (64, 1));
    }

    #[test]
    fn a_product_too_small_for_the_device_is_split_over_its_input_features() {
        assert_eq!(chosen(H100, 64, 4096, 4096), (64, 8));
        assert_eq!(chosen(H100, 17, 513, 1024), (64, 2));
        assert_eq!(chosen(H100, 17, 512, 1024), (64, 1));
        assert_eq!(chosen(H100, 128, 3072, 1024), (64, 6));
        assert_eq!(chosen(H100, 1024, 3072, 1024), (64, 1));
    }

    #[test]
    fn a_device_with_fewer_multiprocessors_is_filled_by_fewer_and_taller_tiles() {
        // An H100 for PCIe: 128 tiles of the middle size would be two rounds, and 96 tall ones are one.
        assert_eq!(chosen(114, 512, 4096, 4096), (192, 1));
        // 48 tiles are too few for an H100 by half, and nearly enough for 60 multiprocessors.
        assert_eq!(chosen(H100, 64, 4096, 6144), (64, 8));
        assert_eq!(chosen(60, 64, 4096, 6144), (64, 1));
    }
}
