//! Products that stream the weights (`kernels/cuda/skinny.cu`).

use super::buffer::{Activations, Linear, Vector};
use super::driver::{Address, Driver};
use super::stream::Stream;
use crate::RmsNorm;

/// Most rows they take.
pub(super) const ROWS_MAX: usize = 16;
/// Most rows of which every block takes the norm by itself.
pub(super) const NORMED_ROWS_MAX: usize = 4;
/// Threads of a block.
const THREADS: usize = 256;
/// Sets of output features of a block.
const SETS: usize = 2;

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
    /// A norm of `x`, of up to [`NORMED_ROWS_MAX`] rows.
    pub(super) norm: Option<RmsNorm<'a, Vector<D>>>,
    pub(super) weight: &'a Linear<D>,
    pub(super) bias: Option<&'a Vector<D>>,
    /// With a gate, the weight is of one part.
    pub(super) then: Then,
}

impl<D: Driver> Skinny<'_, D> {
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
                address(norm.as_ref().map(|norm| norm.weight)).into(),
                norm.as_ref().map_or(0.0, |norm| norm.eps).into(),
                address(*bias).into(),
                out.address().into(),
                weight.cols.into(),
                features.into(),
                out.cols.into(),
                part.first.into(),
                (*then as usize).into(),
            ];
            // Rows are filled up to a power of two.
            let kernels = part.form.kernels().skinny[rows.ilog2() as usize];
            let sets = if *then == Then::Gate { 1 } else { SETS };
            let (kernel, blocks) = cut(kernels.len(), features.div_ceil(sets), stream.driver().processors());
            stream.launch(kernels[kernel], [blocks, 1, 1], THREADS, &args);
        }
    }
}

/// Which of the kernels for 2, 4, 8, ... features a warp, and how many blocks: the more a warp takes, the more of its
/// loads are under way together, as long as there are about enough blocks for all multiprocessors to have one and a
/// half.
fn cut(kernels: usize, features: usize, processors: usize) -> (usize, usize) {
    let blocks = |kernel: usize| features.div_ceil(2 << kernel);
    let kernel = (1..kernels).rev().find(|&kernel| 2 * blocks(kernel) >= 3 * processors).unwrap_or(0);
    (kernel, blocks(kernel))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warps_take_as_many_features_as_leave_enough_blocks() {
        // An H100 and the products of Qwen3-0.6B: q, k and v; output and down; gate and up.
        assert_eq!(cut(3, 4096 / 2, 132), (2, 256));
        assert_eq!(cut(3, 1024 / 2, 132), (0, 256));
        assert_eq!(cut(3, 3072, 132), (2, 384));
        assert_eq!(cut(2, 3072, 132), (1, 768));
        // A feature is never left over.
        assert_eq!(cut(3, 1, 132), (0, 1));
        assert_eq!(cut(3, 1001, 4), (2, 126));
    }
}
