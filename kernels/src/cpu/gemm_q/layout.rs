//! How weights lie: packed, or unpacked in a panel.

use super::super::isa::{Isa, LANES};
use super::super::pack::{Format, UPPER_BITS};

/// A panel's block: 512 weights as bytes, 16 scales and 16 minimums or second scales as f32.
pub(super) const PANEL_STRIDE: usize = 512 + 2 * 4 * LANES;

/// What tells the formats apart, known when a kernel is compiled.
pub(super) trait Layout {
    const FORMAT: Format;
    /// Whether blocks have a minimum.
    const MIN: bool = matches!(Self::FORMAT, Format::U4 | Format::U5);
    /// Parts with scales of their own: blocks, or their halves.
    const PARTS: usize = if matches!(Self::FORMAT, Format::U6) { 2 } else { 1 };
    /// Whether several weights share a byte, so that they have to be unpacked.
    const PACKED: bool = !matches!(Self::FORMAT, Format::I8);

    /// Rows from which ranges and unpacking into panels pay. With fewer, unpacking each time is up to 30 % faster, but
    /// not where registers are few (AVX2) and bits lie in two places (measured on Zen 3 and Sapphire Rapids).
    fn panel_rows<I: Isa>() -> usize {
        match Self::FORMAT {
            _ if I::GROUPS_MAX > 1 => 16,
            Format::U5 | Format::U6 if I::ROWS_MAX < 8 => 12,
            _ => 33,
        }
    }
}

macro_rules! layouts {
    ($($name:ident)*) => {$(
        pub(super) struct $name;
        impl Layout for $name {
            const FORMAT: Format = Format::$name;
        }
    )*};
}

layouts! { U4 U5 U6 Iq4 I8 }

/// Weights of sixteen columns and eight consecutive `k`, the `pair`-th such eight of the block at `w`.
///
/// # Safety
/// A block of the layout, or of a panel, is readable at `w`, and `pair` is below 4.
#[inline(always)]
pub(super) unsafe fn weights<I: Isa, L: Layout, const PANEL: bool>(isa: I, w: *const u8, pair: usize) -> (I::W, I::W) {
    // SAFETY: as the function says.
    unsafe {
        if PANEL || !L::PACKED {
            return (unpacked::<I, L, PANEL>(isa, w, 2 * pair), unpacked::<I, L, PANEL>(isa, w, 2 * pair + 1));
        }
        let (low, high) = isa.load_u4(w.add(pair * 64));
        let (first, second) = (2 * pair as u32, 2 * pair as u32 + 1);
        (beyond_nibbles::<I, L>(isa, w, low, first), beyond_nibbles::<I, L>(isa, w, high, second))
    }
}

/// The weights of four `k` alone: of those from `4 × four` on.
///
/// # Safety
/// As for [`weights`], and `four` is below 8.
#[inline(always)]
pub(super) unsafe fn weights_of_four<I: Isa, L: Layout, const PANEL: bool>(isa: I, w: *const u8, four: u32) -> I::W {
    // SAFETY: as the function says.
    unsafe {
        if PANEL || !L::PACKED {
            return unpacked::<I, L, PANEL>(isa, w, four as usize);
        }
        let nibbles = isa.load_u4_half(w.add(four as usize / 2 * 64), four % 2 * 4);
        beyond_nibbles::<I, L>(isa, w, nibbles, four)
    }
}

/// The weights of four `k` where each has a byte.
#[inline(always)]
unsafe fn unpacked<I: Isa, L: Layout, const PANEL: bool>(isa: I, w: *const u8, four: usize) -> I::W {
    // SAFETY: the callers vouch for 512 weights.
    unsafe {
        match L::FORMAT {
            Format::Iq4 | Format::I8 if PANEL => isa.load_signed(w.add(four * 64)),
            Format::I8 => isa.load_i8(w.add(four * 64)),
            _ => isa.load_u8(w.add(four * 64)),
        }
    }
}

/// The weights of a block, a byte each.
#[repr(align(64))]
pub(super) struct Unpacked(pub(super) [u8; 512]);

/// Writes those of [`weights`] to where [`unpacked`] finds them.
#[inline(always)]
pub(super) unsafe fn store_weights<I: Isa, L: Layout>(isa: I, to: *mut u8, pair: usize, weights: (I::W, I::W)) {
    // SAFETY: the callers vouch for room for 512 weights.
    unsafe {
        let (first, second) = (to.add(pair * 128), to.add(pair * 128 + 64));
        if matches!(L::FORMAT, Format::Iq4 | Format::I8) {
            isa.store_signed(first, weights.0);
            isa.store_signed(second, weights.1);
        } else {
            isa.store_u8(first, weights.0);
            isa.store_u8(second, weights.1);
        }
    }
}

/// What weights are whose lowest bits, or numbers in IQ4's table, are `nibbles`.
#[inline(always)]
unsafe fn beyond_nibbles<I: Isa, L: Layout>(isa: I, w: *const u8, nibbles: I::W, four: u32) -> I::W {
    // SAFETY: the callers vouch for a block.
    unsafe {
        match L::FORMAT {
            Format::U5 => isa.raise(nibbles, isa.load_u8(w.add(UPPER_BITS)), four, 1),
            Format::U6 => isa.raise(nibbles, isa.load_u8(w.add(UPPER_BITS + four as usize / 4 * 64)), four % 4 * 2, 3),
            Format::Iq4 => isa.look_up(nibbles),
            _ => nibbles,
        }
    }
}

/// The scales of the block at `w`, and its minimums or second scales.
///
/// # Safety
/// A block of the layout is readable at `w`.
#[inline(always)]
pub(super) unsafe fn scales<I: Isa, L: Layout>(isa: I, w: *const u8) -> (I::F, I::F) {
    // SAFETY: as the function says.
    unsafe {
        let scales = w.add(L::FORMAT.scales_at());
        let second = if L::MIN || L::PARTS == 2 { isa.load_f16(scales.add(2 * LANES).cast()) } else { isa.zero() };
        (isa.load_f16(scales.cast()), second)
    }
}

/// Unpacks `count` blocks.
#[inline(always)]
pub(super) unsafe fn unpack_panel<I: Isa, L: Layout>(isa: I, packed: *const u8, count: usize, panel: *mut u8) {
    for block in 0..count {
        // SAFETY: the caller vouches for `count` blocks at both places.
        unsafe {
            let (from, to) = (packed.add(block * L::FORMAT.unit().0), panel.add(block * PANEL_STRIDE));
            for pair in 0..4 {
                store_weights::<I, L>(isa, to, pair, weights::<I, L, false>(isa, from, pair));
            }
            let (scale, second) = scales::<I, L>(isa, from);
            isa.store(to.add(512).cast(), scale);
            isa.store(to.add(512 + 4 * LANES).cast(), second);
        }
    }
}
