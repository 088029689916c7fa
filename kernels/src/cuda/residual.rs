//! Operations on the residual stream, in fewer kernels than those that they stand for: products of few rows take the
//! norm before them and what follows, and what makes the activations of more rows rounds them.

use super::attention::decodes_all;
use super::backend::{CudaBackend, ROWWISE_THREADS};
use super::buffer::{Activations, KvCache, Linear, Rope, Vector};
use super::driver::{Address, Driver};
use super::rounded::{Rounded, Rounding};
use super::skinny::{self, Skinny, Then};
use crate::{Attention, Backend, Batch, Projection, Residual, RmsNorm};

/// Threads of a block of `silu_mul_f16`, which has a row to itself (`kernels/cuda/rowwise.cu`).
const ROW_THREADS: usize = 1024;

/// How so many rows are rounded for a product with `weight`, if it is all that whoever makes them has to know.
fn rounding<D: Driver>(rows: usize, weight: &Linear<D>) -> Option<Rounding> {
    Rounding::of_all(weight).filter(|_| rows > skinny::ROWS_MAX)
}

impl<D: Driver> CudaBackend<D> {
    /// The sum and its norm, if products take that by themselves; otherwise it is taken now.
    fn normed<'a>(
        &mut self,
        residual: &'a mut Residual<Activations<D>>,
        norm: RmsNorm<'a, Vector<D>>,
    ) -> Option<(&'a Activations<D>, RmsNorm<'a, Vector<D>>)> {
        if residual.is_owed || residual.sum.computed_rows() > skinny::NORMED_ROWS_MAX {
            self.norm(residual, norm);
            return None;
        }
        assert_eq!(residual.sum.cols, norm.weight.len, "columns of a norm");
        Some((&residual.sum, norm))
    }

    /// Makes room for products of so many rows with `weight`.
    pub(super) fn make_room_for(&mut self, rows: usize, weight: &Linear<D>) {
        if self.products.reserve(&self.stream, rows, weight) {
            self.graphs.clear();
        }
    }

    /// Where so many rows go, rounded for a product with `weight`: they are enqueued next, and then that.
    fn place(&mut self, rounding: Rounding, rows: usize, weight: &Linear<D>) -> Rounded {
        self.make_room_for(rows, weight);
        self.products.next(rounding, rows, weight.cols)
    }

    /// The product of what was rounded for it, `rows` of which somebody asked for.
    fn multiply(
        &self,
        x: Rounded,
        rows: usize,
        Projection { weight, bias }: Projection<'_, Linear<D>, Vector<D>>,
        out: &mut Activations<D>,
    ) {
        assert!(x.cols == weight.cols && out.cols == weight.rows, "features of the weight");
        out.set_rows(rows);
        for part in &weight.parts {
            self.products.multiply(&self.stream, &x, part, bias, out);
        }
    }

    /// `rms_norm(residual)`, rounded.
    fn round_norm(&self, residual: &mut Residual<Activations<D>>, norm: &RmsNorm<'_, Vector<D>>, to: &Rounded) {
        let Residual { sum, delta, is_owed, .. } = residual;
        assert!([sum.cols, delta.cols, to.cols] == [norm.weight.len; 3], "columns of a norm");
        let ([values, scales], weight) = (to.args(), norm.weight.buffer.address().into());
        let (grid, cols, eps) = ([to.rows, 1, 1], sum.cols.into(), norm.eps.into());
        if std::mem::take(is_owed) {
            let args = [sum.address().into(), delta.address().into(), weight, values, scales, cols, eps];
            let kernel = to.rounding.choose(["add_rms_norm_f16", "add_rms_norm_bf16"]);
            self.stream.launch(kernel, grid, ROWWISE_THREADS, &args);
        } else {
            let args = [sum.address().into(), weight, values, scales, cols, eps];
            self.stream.launch(to.rounding.choose(["rms_norm_f16", "rms_norm_bf16"]), grid, ROWWISE_THREADS, &args);
        }
    }

    /// `silu(gate) * up`, rounded.
    fn round_silu_mul(&self, gate_up: &Activations<D>, to: &Rounded) {
        assert_eq!(gate_up.cols, 2 * to.cols, "gate, then up");
        let [values, scales] = to.args();
        let args = [gate_up.address().into(), values, scales, to.cols.into()];
        match to.rounding {
            Rounding::F16 => self.stream.launch("silu_mul_f16", [to.rows, 1, 1], ROW_THREADS, &args),
            Rounding::BF16 => {
                let grid = [to.rows, to.cols.div_ceil(2 * ROWWISE_THREADS), 1];
                self.stream.launch("silu_mul_bf16", grid, ROWWISE_THREADS, &args);
            }
        }
    }

    pub(super) fn enqueue_add_linear(
        &mut self,
        x: &Activations<D>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        residual: &mut Residual<Activations<D>>,
    ) {
        if x.computed_rows() > skinny::ROWS_MAX || residual.is_owed {
            return self.linear(x, weight, bias, residual.delta());
        }
        let sum = &residual.sum;
        assert!(x.cols == weight.cols && sum.cols == weight.rows && sum.rows == x.rows, "features of the weight");
        Skinny { x, norm: None, weight, bias, then: Then::Add }.enqueue(&self.stream, sum);
    }

    pub(super) fn enqueue_norm_linear(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        out: &mut Activations<D>,
    ) {
        let rows = residual.sum.computed_rows();
        if let Some(rounding) = rounding(rows, weight) {
            let rounded = self.place(rounding, rows, weight);
            self.round_norm(residual, &norm, &rounded);
            return self.multiply(rounded, residual.sum.rows, Projection { weight, bias }, out);
        }
        let Some((x, norm)) = self.normed(residual, norm) else {
            return self.linear(&residual.normed, weight, bias, out);
        };
        assert!(x.cols == weight.cols && out.cols == weight.rows, "features of the weight");
        out.set_rows(x.rows);
        Skinny { x, norm: Some(norm), weight, bias, then: Then::Store }.enqueue(&self.stream, out);
    }

    pub(super) fn enqueue_norm_linear_silu_mul(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        gate_up: &mut Activations<D>,
        out: &mut Activations<D>,
    ) {
        if weight.parts.len() > 1 || residual.sum.computed_rows() > skinny::ROWS_MAX {
            self.norm_linear(residual, norm, weight, bias, gate_up);
            return self.silu_mul(gate_up, out);
        }
        let (x, norm) = match self.normed(residual, norm) {
            Some((x, norm)) => (x, Some(norm)),
            None => (&residual.normed, None),
        };
        assert!(x.cols == weight.cols && 2 * out.cols == weight.rows, "features of the weight");
        out.set_rows(x.rows);
        Skinny { x, norm, weight, bias, then: Then::Gate }.enqueue(&self.stream, out);
    }

    pub(super) fn enqueue_add_mlp(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        gate_up: Projection<'_, Linear<D>, Vector<D>>,
        down: Projection<'_, Linear<D>, Vector<D>>,
        [both, inner]: [&mut Activations<D>; 2],
    ) {
        let rows = residual.sum.computed_rows();
        let Some(rounding) = rounding(rows, down.weight) else {
            self.norm_linear_silu_mul(residual, norm, gate_up.weight, gate_up.bias, both, inner);
            return self.add_linear(inner, down.weight, down.bias, residual);
        };
        self.norm_linear(residual, norm, gate_up.weight, gate_up.bias, both);
        let rounded = self.place(rounding, rows, down.weight);
        self.round_silu_mul(both, &rounded);
        self.multiply(rounded, both.rows, down, residual.delta());
    }

    #[allow(clippy::too_many_arguments, reason = "as Backend::add_attention has them")]
    pub(super) fn enqueue_add_attention(
        &mut self,
        qkv: &mut Activations<D>,
        attention: Attention<'_, Linear<D>, Vector<D>, Rope<D>>,
        cache: &mut KvCache<D>,
        layer: usize,
        batch: &Batch,
        mixed: &mut Activations<D>,
        residual: &mut Residual<Activations<D>>,
        stored: &mut dyn FnMut(&Self),
    ) {
        let Attention { shape, scale, norm, rope, output } = attention;
        // Where rows read what others write, that has to be there first.
        let rotation = if self.plan.decodes() {
            Some(self.rotation(norm, rope))
        } else {
            self.rope_and_cache(qkv, shape, norm, rope, cache, layer, batch);
            stored(self);
            None
        };
        // Rows of f16 have scales, and no block of attention sees a whole row.
        let rows = qkv.computed_rows();
        let rounding = rounding(rows, output.weight)
            .filter(|&rounding| rounding == Rounding::BF16 && decodes_all(&self.plan, &cache.layout));
        let rounded = rounding.map(|rounding| self.place(rounding, rows, output.weight));
        assert!([output.weight.cols, mixed.cols] == [shape.q_width(); 2], "columns of attention's output");
        mixed.set_rows(qkv.rows);
        let out = match &rounded {
            Some(rounded) => [Address::NULL, rounded.values],
            None => [mixed.address(), Address::NULL],
        };
        self.enqueue_attention(qkv, shape, scale, rotation, cache, layer, batch, out);
        if rotation.is_some() {
            stored(self);
        }
        match rounded {
            Some(rounded) => self.multiply(rounded, qkv.rows, output, residual.delta()),
            None => self.add_linear(mixed, output.weight, output.bias, residual),
        }
    }
}
