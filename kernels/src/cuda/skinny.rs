//! Products that stream the weights (`kernels/cuda/skinny.cu`).

use super::buffer::{Activations, Linear, Vector};
use super::driver::{Address, Driver};
use super::stream::Stream;

/// Most rows they take.
pub(super) const ROWS_MAX: usize = 16;
/// Most rows of which every block takes the norm by itself.
pub(super) const NORMED_ROWS_MAX: usize = 4;
/// Threads of a block.
const THREADS: usize = 256;
/// Sets of output features of a block.
const SETS: usize = 2;
/// Blocks a multiprocessor should have, before features are taken four at a time rather than two.
const BLOCKS_A_PROCESSOR: usize = 2;

/// What becomes of sums; the kernels count alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// They are the result.
    Store = 0,
    /// They are added to what is there.
    Add = 1,
    /// Those of the first half gate those of the second.
    Gate = 2,
}

/// A product with up to [`ROWS_MAX`] rows.
pub(super) struct Skinny<'a, D: Driver> {
    pub(super) x: &'a Activations<D>,
    /// Weight and eps of a norm of `x`, of up to [`NORMED_ROWS_MAX`] rows.
    pub(super) norm: Option<(&'a Vector<D>, f32)>,
    pub(super) weight: &'a Linear<D>,
    pub(super) bias: Option<&'a Vector<D>>,
    /// With a gate, the weight is of one part.
    pub(super) then: Then,
}

impl<D: Driver> Skinny<'_, D> {
    /// Output features of a warp, 0 for two and 1 for four, and blocks.
    fn cut(features: usize, then: Then, processors: usize) -> (usize, usize) {
        let sets = if then == Then::Gate { 1 } else { SETS };
        let blocks = |features_a_warp: usize| features.div_ceil(sets * features_a_warp);
        if blocks(4) >= BLOCKS_A_PROCESSOR * processors { (1, blocks(4)) } else { (0, blocks(2)) }
    }

    pub(super) fn enqueue(&self, stream: &Stream<D>, out: &Activations<D>) {
        let Self { x, norm, weight, bias, then } = self;
        let address = |vector: Option<&Vector<D>>| vector.map_or(Address::NULL, |vector| vector.buffer.address());
        let rows = x.computed_rows();
        assert!(rows <= if norm.is_some() { NORMED_ROWS_MAX } else { ROWS_MAX }, "few rows");
        assert!(*then != Then::Gate || weight.parts.len() == 1, "gates and what they gate in one part");
        for part in &weight.parts {
            let features = if *then == Then::Gate { part.rows / 2 } else { part.rows };
            let args = [
                part.values.address().into(),
                part.scales.address().into(),
                x.address().into(),
                address(norm.map(|norm| norm.0)).into(),
                norm.map_or(0.0, |norm| norm.1).into(),
                address(*bias).into(),
                out.address().into(),
                weight.cols.into(),
                features.into(),
                out.cols.into(),
                part.first.into(),
                (*then as usize).into(),
            ];
            let (width, blocks) = Self::cut(features, *then, stream.driver().processors());
            // Rows are filled up to a power of two.
            let kernel = part.form.kernels().skinny[rows.ilog2() as usize][width];
            stream.launch(kernel, [blocks, 1, 1], THREADS, &args);
        }
    }
}
