//! Products on tensor cores (`kernels/cuda/gemm.cu` and `hopper_gemm.cu`): which tiles, what memory they need besides,
//! and their launches.

use super::backend::address_of;
use super::buffer::{Activations, Buffer, Linear, Part, Vector};
use super::driver::{Address, Arg, Driver};
use super::hopper_gemm;
use super::rounded::{Rounded, Rounding};
use super::stream::Stream;
use super::weight::Form;

/// Input features that are added up by themselves.
pub(super) const SEGMENT: usize = 512;
/// Threads of a block of the kernels beside the products.
const THREADS: usize = 128;
/// What scratch memory grows by. Whenever it does, recordings are void.
const GROWTH_BYTES: usize = 4 << 20;

/// A tile of rows by output features, as the kernels have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) out: usize,
    pub(super) threads: usize,
    /// Its place in a list of kernels.
    pub(super) kernel: usize,
}

/// All tiles of `gemm.cu`, largest first.
const TILES: [Tile; 3] = [
    Tile { rows: 128, out: 128, threads: 256, kernel: 0 },
    Tile { rows: 64, out: 64, threads: 128, kernel: 1 },
    SMALLEST,
];
const SMALLEST: Tile = Tile { rows: 64, out: 32, threads: 128, kernel: 2 };

impl Tile {
    pub(super) fn blocks(self, rows: usize, features: usize) -> usize {
        rows.div_ceil(self.rows) * features.div_ceil(self.out)
    }
}

/// How a product is cut into blocks; its bits do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) tile: Tile,
    /// Segments that are computed side by side, and added up afterwards; or 1.
    pub(super) segments: usize,
}

impl Cut {
    /// The largest tile of which there are about enough to fill a device with so many multiprocessors, and that is not
    /// mostly empty.
    fn of(processors: usize, rows: usize, cols: usize, features: usize) -> Self {
        let fits = |tile: &&Tile| tile.rows < 2 * rows && tile.blocks(rows, features) >= processors * 3 / 4;
        let tile = TILES.iter().find(fits).copied().unwrap_or(SMALLEST);
        Self::by(tile, SMALLEST, processors, [rows, cols, features])
    }

    /// If even the smallest tiles are too few by half, segments too are computed side by side.
    pub(super) fn by(tile: Tile, smallest: Tile, processors: usize, [rows, cols, features]: [usize; 3]) -> Self {
        let splits = tile == smallest && 2 * tile.blocks(rows, features) <= processors;
        Self { tile, segments: if splits { cols.div_ceil(SEGMENT) } else { 1 } }
    }
}

/// Rows up to which a product of so many features is split over its input features, if at all: those of which the
/// smallest tiles are too few by half.
fn split_rows_max(smallest: Tile, processors: usize, features: usize) -> usize {
    processors / 2 / features.div_ceil(smallest.out) * smallest.rows
}

/// Bytes of the sums of segments, of a product of so many rows or fewer.
fn sums_bytes(smallest: Tile, processors: usize, [rows, cols, features]: [usize; 3]) -> usize {
    let split = rows.min(split_rows_max(smallest, processors, features));
    match cols.div_ceil(SEGMENT) {
        1 => 0,
        segments => segments * split * features * size_of::<f32>(),
    }
}

/// Names of the kernels for one form of weights, for each of [`TILES`].
type Kernels = [&'static str; 3];

/// Those of a form that tensor cores take.
const fn kernels(form: Form) -> Option<&'static Kernels> {
    macro_rules! named {
        ($suffix:literal) => {
            Some(&[
                concat!("product_large_", $suffix),
                concat!("product_medium_", $suffix),
                concat!("product_small_", $suffix),
            ])
        };
    }
    match form {
        Form::F32 => None,
        Form::F16 => named!("f16"),
        Form::BF16 => named!("bf16"),
        Form::Nibbles => named!("nibbles"),
        Form::Bytes => named!("bytes"),
        Form::FineBytes => named!("fine_bytes"),
        Form::F8 => named!("f8"),
    }
}

/// Memory that grows as needed, which is seldom.
struct Scratch<D: Driver> {
    buffer: Option<Buffer<D>>,
    bytes: usize,
}

impl<D: Driver> Scratch<D> {
    fn new() -> Self {
        Self { buffer: None, bytes: 0 }
    }

    /// Makes room for `bytes`. Whether it lies elsewhere now.
    fn reserve(&mut self, stream: &Stream<D>, bytes: usize) -> bool {
        if bytes <= self.bytes {
            return false;
        }
        // First what there was is given back.
        self.buffer = None;
        self.bytes = bytes.next_multiple_of(GROWTH_BYTES);
        self.buffer = Some(Buffer::zeroed(stream, self.bytes));
        true
    }

    fn address(&self) -> Address {
        self.buffer.as_ref().map_or(Address::NULL, Buffer::address)
    }
}

/// What products on tensor cores need besides their operands.
pub(super) struct Products<D: Driver> {
    /// The activations of the next product, rounded.
    rounded: Scratch<D>,
    /// Sums of segments until they are added up.
    segments: Scratch<D>,
    /// Whether weights that tensor cores take as they are go by wgmma.
    wgmma: bool,
}

/// What a product is made of.
pub(super) struct Operands<'a, D: Driver> {
    pub(super) x: &'a Rounded,
    pub(super) part: &'a Part<D>,
    pub(super) bias: Arg,
    pub(super) out: &'a Activations<D>,
    /// Where the sums of segments go, if they are computed side by side.
    pub(super) segments: Address,
}

impl<D: Driver> Products<D> {
    pub(super) fn new(wgmma: bool) -> Self {
        Self { rounded: Scratch::new(), segments: Scratch::new(), wgmma }
    }

    /// Says whether products go by wgmma from now on, where they can. The bits of two devices are the same only if both
    /// do the same.
    pub(super) fn use_wgmma(&mut self, wgmma: bool) {
        self.wgmma = wgmma;
    }

    fn is_by_wgmma(&self, form: Form) -> bool {
        self.wgmma && hopper_gemm::kernels(form).is_some()
    }

    /// Makes room for products of so many rows, or fewer, with `weight`. Whether something lies elsewhere now, so that
    /// what was recorded is void.
    pub(super) fn reserve(&mut self, stream: &Stream<D>, rows: usize, weight: &Linear<D>) -> bool {
        let parts = weight.parts.iter().filter(|part| Rounding::of(part.form).is_some());
        let smallest = |part: &Part<D>| if self.is_by_wgmma(part.form) { hopper_gemm::SMALLEST } else { SMALLEST };
        let processors = stream.driver().processors();
        let sums = parts.map(|part| sums_bytes(smallest(part), processors, [rows, weight.cols, part.rows]));
        let Some(sums) = sums.max() else { return false };
        // Not short-circuited: both have to grow.
        self.rounded.reserve(stream, Rounded::bytes(rows, weight.cols)) | self.segments.reserve(stream, sums)
    }

    /// Where the next product's activations go. Room was made first.
    pub(super) fn next(&self, rounding: Rounding, rows: usize, cols: usize) -> Rounded {
        Rounded::at(self.rounded.address(), rounding, rows, cols)
    }

    /// Enqueues the product of `x` with one part of a weight that takes it. Room was made first.
    pub(super) fn multiply(
        &self,
        stream: &Stream<D>,
        x: &Rounded,
        part: &Part<D>,
        bias: Option<&Vector<D>>,
        out: &Activations<D>,
    ) {
        assert!(Rounding::of(part.form) == Some(x.rounding), "what was rounded for these weights");
        let Some(kernels) = kernels(part.form) else { return };
        let segments = self.segments.address();
        let operands = Operands { x, part, bias: address_of(bias), out, segments };
        let count = match hopper_gemm::kernels(part.form) {
            Some(kernels) if self.wgmma => hopper_gemm::multiply(stream, kernels, &operands),
            _ => multiply(stream, kernels, &operands),
        };
        if count > 1 {
            let args = [
                segments.into(),
                x.scales.into(),
                operands.bias,
                out.address().into(),
                x.rows.into(),
                count.into(),
                part.rows.into(),
                out.cols.into(),
                part.first.into(),
            ];
            stream.launch("add_segments", [part.rows.div_ceil(THREADS), x.rows, 1], THREADS, &args);
        }
    }
}

/// Enqueues a product by the kernels of `gemm.cu`. How many segments are left to be added up, if not 1.
fn multiply<D: Driver>(stream: &Stream<D>, kernels: &Kernels, operands: &Operands<'_, D>) -> usize {
    let Operands { x, part, bias, out, segments } = *operands;
    let cut = Cut::of(stream.driver().processors(), x.rows, x.cols, part.rows);
    let args = [
        part.values.address().into(),
        part.scales.address().into(),
        x.values.into(),
        x.scales.into(),
        bias,
        out.address().into(),
        segments.into(),
        x.rows.into(),
        x.cols.into(),
        part.rows.into(),
        out.cols.into(),
        part.first.into(),
    ];
    let grid = [cut.tile.blocks(x.rows, part.rows), 1, cut.segments];
    stream.launch(kernels[cut.tile.kernel], grid, cut.tile.threads, &args);
    cut.segments
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiprocessors of an H100, and of others.
    const H100: usize = 132;
    const DEVICES: [usize; 4] = [4, 60, H100, 189];

    fn cut(rows: usize, cols: usize, features: usize) -> (usize, usize, usize) {
        let Cut { tile, segments } = Cut::of(H100, rows, cols, features);
        (tile.rows, tile.out, segments)
    }

    #[test]
    fn many_rows_take_large_tiles_and_few_small_ones() {
        assert_eq!(cut(2048, 4096, 24_576), (128, 128, 1));
        assert_eq!(cut(2048, 2048, 1024), (128, 128, 1));
        assert_eq!(cut(512, 1024, 4096), (128, 128, 1));
        // Half of a large tile would be empty.
        assert_eq!(cut(64, 4096, 24_576), (64, 64, 1));
        assert_eq!(cut(32, 4096, 4096), (64, 32, 1));
    }

    #[test]
    fn room_for_many_rows_is_room_for_fewer() {
        type Cutting = fn(usize, usize, usize, usize) -> Cut;
        let ways = [(SMALLEST, Cut::of as Cutting), (hopper_gemm::SMALLEST, hopper_gemm::cut)];
        for (processors, (smallest, cut)) in DEVICES.into_iter().flat_map(|device| ways.map(|way| (device, way))) {
            let mut splits = 0;
            for features in [1, 32, 33, 512, 1024, 1536, 2112, 2113, 4096] {
                for cols in [512, 513, 4096] {
                    let needed = |rows: usize| match cut(processors, rows, cols, features).segments {
                        1 => 0,
                        segments => segments * rows * features * 4,
                    };
                    let mut most = 0;
                    for rows in 1..=4500 {
                        most = most.max(needed(rows));
                        let room = sums_bytes(smallest, processors, [rows, cols, features]);
                        assert_eq!(room, most, "{processors} processors, {rows} rows, {cols} to {features}");
                    }
                    splits += usize::from(most > 0);
                }
            }
            match processors {
                // All but the widest.
                H100 => assert_eq!(splits, 2 * if smallest == SMALLEST { 7 } else { 9 }),
                _ => assert!(splits > 0, "{processors} processors"),
            }
        }
    }

    #[test]
    fn a_product_too_small_for_the_device_is_split_over_its_input_features() {
        assert_eq!(cut(64, 3072, 1024), (64, 32, 6));
        assert_eq!(cut(17, 2048, 1024), (64, 32, 4));
        assert_eq!(cut(17, 513, 1024), (64, 32, 2));
        assert_eq!(cut(17, 512, 1024), (64, 32, 1));
        assert_eq!(cut(256, 3072, 1024), (64, 32, 1));
    }
}
