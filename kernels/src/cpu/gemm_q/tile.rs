//! A tile: some rows of activations times some groups of columns, over a range of `k`.

use std::sync::atomic::{Ordering, compiler_fence};

use super::super::isa::{Isa, LANES};
use super::super::pack::Format;
use super::super::quant::QuantizedBlock;
use super::layout::{Layout, PANEL_STRIDE, Unpacked, store_weights, weights, weights_of_four};
use super::{PREFETCH_BYTES, panel_bytes};

/// The f32 sums of a tile: of `R` rows with each of `G` groups. Those of more than leave registers for a block's integers
/// wait in memory between blocks: where compilers may choose, they let every weight go through memory instead, once a
/// row.
pub(super) struct Sums<I: Isa, const G: usize, const R: usize> {
    pub(super) registers: [[I::F; R]; G],
    /// `[G][R][16]`, `stride` from group to group.
    pub(super) memory: *mut f32,
    pub(super) stride: usize,
}

impl<I: Isa, const G: usize, const R: usize> Sums<I, G, R> {
    const WAIT: bool = G * R > I::SUMS_MAX;

    #[inline(always)]
    pub(super) fn place(&self, g: usize, r: usize) -> *mut f32 {
        self.memory.wrapping_add(g * self.stride + r * LANES)
    }

    #[inline(always)]
    pub(super) unsafe fn get(&self, isa: I, g: usize, r: usize) -> I::F {
        // SAFETY: whoever made this vouches for the sums of `G` groups and `R` rows.
        if Self::WAIT { unsafe { isa.load(self.place(g, r)) } } else { self.registers[g][r] }
    }

    #[inline(always)]
    pub(super) unsafe fn set(&mut self, isa: I, g: usize, r: usize, sum: I::F) {
        if Self::WAIT {
            // SAFETY: as above.
            unsafe { isa.store(self.place(g, r), sum) }
        } else {
            self.registers[g][r] = sum;
        }
    }
}

/// What a tile reads: `blocks` blocks of weights at `w`, and the rows of activations they meet.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) w: *const u8,
    pub(super) blocks: usize,
    /// The rows' first blocks, one beside the other; and how far their next ones are.
    pub(super) rows: *const QuantizedBlock,
    pub(super) rows_stride: usize,
}

/// A block of weights, and of the rows of activations it meets.
struct Block<I: Isa, const G: usize> {
    w: [*const u8; G],
    /// As [`scales`](super::layout::scales) gives them.
    scales: [(I::F, I::F); G],
    rows: *const QuantizedBlock,
}

/// Adds the products of `operands.blocks` blocks to the sums of `R` rows with `G` groups.
#[inline(always)]
pub(super) unsafe fn accumulate<I: Isa, L: Layout, const G: usize, const R: usize, const PANEL: bool>(
    isa: I,
    operands: Operands,
    sums: &mut Sums<I, G, R>,
) {
    let stride = if PANEL { PANEL_STRIDE } else { L::FORMAT.unit().0 };
    let mut unpacked = Unpacked([0; 512]);
    for block in 0..operands.blocks {
        if Sums::<I, G, R>::WAIT {
            // Or sums would be promoted to registers.
            compiler_fence(Ordering::SeqCst);
        }
        // SAFETY: the caller vouches for `blocks` blocks of weights of each of `G` groups, which if they are several lie
        // in panels, and of each of `R` rows.
        unsafe {
            let mut w = [operands.w.add(block * stride); G];
            if !PANEL {
                for line in 0..stride.div_ceil(64) {
                    isa.prefetch(w[0].wrapping_add(PREFETCH_BYTES + 64 * line));
                }
            }
            let mut scales = [(isa.zero(), isa.zero()); G];
            for g in 0..G {
                w[g] = w[g].wrapping_add(g * panel_bytes::<I>());
                scales[g] = if PANEL {
                    (isa.load(w[g].add(512).cast()), isa.load(w[g].add(512 + 4 * LANES).cast()))
                } else {
                    super::layout::scales::<I, L>(isa, w[g])
                };
            }
            let block = Block { w, scales, rows: operands.rows.add(block * operands.rows_stride) };
            accumulate_part::<I, L, G, R, PANEL, 0>(isa, &block, &mut unpacked, sums);
            if L::PARTS == 2 {
                accumulate_part::<I, L, G, R, PANEL, 1>(isa, &block, &mut unpacked, sums);
            }
        }
    }
}

/// Adds the products of a block, or of its `PART`-th half.
///
/// # Safety
/// `PART` is below `L::PARTS`, the blocks of `G` groups and those of `R` rows are readable, and `sums` are of as many.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "with iterators over both, two groups are as slow as one after the other"
)]
unsafe fn accumulate_part<I: Isa, L: Layout, const G: usize, const R: usize, const PANEL: bool, const PART: usize>(
    isa: I,
    block: &Block<I, G>,
    unpacked: &mut Unpacked,
    sums: &mut Sums<I, G, R>,
) {
    // A row's peak is anywhere in a block: where unpacking is much, each row takes its peak's weights from here.
    let keeps = !PANEL && R > 1 && matches!(L::FORMAT, Format::U5 | Format::U6 | Format::Iq4);
    // Of packed weights it pays only where it takes an offset off as well.
    let peak_first = I::PEAK_FIRST && !keeps && (PANEL || !L::MIN);
    // SAFETY: as the function says.
    unsafe {
        let rows: [&QuantizedBlock; R] = std::array::from_fn(|r| &*block.rows.add(r));
        let mut products = [[isa.int_zero(); R]; G];
        if peak_first {
            for r in 0..R {
                for g in 0..G {
                    products[g][r] = add_peak::<I, L, PANEL, PART>(isa, isa.int_zero(), block.w[g], rows[r]);
                }
            }
        }
        for pair in PART * 4 / L::PARTS..(PART + 1) * 4 / L::PARTS {
            let mut w = [weights::<I, L, PANEL>(isa, block.w[0], pair); G];
            for g in 1..G {
                w[g] = weights::<I, L, PANEL>(isa, block.w[g], pair);
            }
            if keeps {
                store_weights::<I, L>(isa, unpacked.0.as_mut_ptr(), pair, w[0]);
            }
            for r in 0..R {
                let a = rows[r].bytes.as_ptr().add(pair * 8);
                for g in 0..G {
                    let (product, (low, high)) = (products[g][r], w[g]);
                    products[g][r] = match L::FORMAT {
                        Format::U4 => isa.dot_u4(isa.dot_u4(product, low, a), high, a.add(4)),
                        Format::U5 | Format::U6 => isa.dot_u6(product, (low, high), a),
                        _ => isa.dot_i8(isa.dot_i8(product, low, a), high, a.add(4)),
                    };
                }
            }
        }
        for r in 0..R {
            let row = rows[r];
            for g in 0..G {
                let product = products[g][r];
                let product = if peak_first {
                    product
                } else if keeps {
                    add_peak::<I, L, true, PART>(isa, product, unpacked.0.as_ptr(), row)
                } else {
                    add_peak::<I, L, PANEL, PART>(isa, product, block.w[g], row)
                };
                let (first, second) = block.scales[g];
                let scale = if PART == 0 { first } else { second };
                let product = isa.int_to_f32(product);
                let mut sum = isa.fma(product, isa.mul(scale, isa.splat(row.scale)), sums.get(isa, g, r));
                if L::MIN {
                    sum = isa.fma(second, isa.splat(row.scaled_sum), sum);
                }
                sums.set(isa, g, r, sum);
            }
        }
    }
}

/// Adds to the products of a block's bytes, or of its `PART`-th half's, what the high bytes of the peak make with the
/// block's weights at `w`, if it lies there, and takes off what the weights are too large by.
///
/// # Safety
/// As for [`weights`].
#[inline(always)]
unsafe fn add_peak<I: Isa, L: Layout, const PANEL: bool, const PART: usize>(
    isa: I,
    products: I::I,
    w: *const u8,
    row: &QuantizedBlock,
) -> I::I {
    let products = if L::FORMAT == Format::U4 { isa.widen_u4(products) } else { products };
    // Where a peak lies cannot be foretold: a choice of addresses, no branch.
    let lies_here = L::PARTS == 1 || row.peak as usize / 4 == PART;
    let high = if lies_here { &row.peak_high } else { &[0; 4] }.as_ptr();
    // SAFETY: a peak is one of the block's eight fours.
    unsafe {
        let w = weights_of_four::<I, L, PANEL>(isa, w, row.peak);
        match L::FORMAT {
            Format::U4 | Format::U5 => isa.peak_u6(products, w, high),
            Format::U6 => isa.int_add(isa.peak_u6(products, w, high), row.less_u6[PART]),
            _ => isa.peak_i8(products, w, high, row.less),
        }
    }
}
