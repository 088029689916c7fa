//! The products of a layer, by themselves and with what is done in the same kernel when there are few rows.

use anyhow::Result;
use engine_kernels::cuda::Driver;
use engine_kernels::{Backend, Residual, RmsNorm};

use super::Shape;
use super::clock::{Clock, filled, values};
use super::model::{Model, Weights};
use super::row::{MMA_PER_MS, WGMMA_PER_MS, Work};

pub(super) fn measure(clock: &mut Clock, shape: &Shape, model: &Model) -> Result<()> {
    for rows in if clock.tiny { vec![1, 8] } else { vec![1, 2, 4, 8, 16] } {
        fused(clock, shape, model, rows)?;
    }
    let has_wgmma = clock.backend.driver().has_wgmma();
    let Shape { name, hidden, ffn, vocabulary, heads, .. } = *shape;
    let products = [
        ("qkv", &model.qkv, hidden, heads.qkv_width()),
        ("output", &model.output, heads.q_width(), hidden),
        ("gate and up", &model.gate_up, hidden, 2 * ffn),
        ("down", &model.down, ffn, hidden),
        ("logits", &model.head, hidden, vocabulary),
    ];
    for rows in if clock.tiny { vec![1, 17] } else { vec![1, 4, 16, 17, 32, 64, 128, 512, 2048, 8192] } {
        for (what, weight, cols, out) in products.iter().filter(|product| rows <= 64 || product.0 != "logits") {
            let x = filled(&mut clock.backend, rows, *cols);
            let mut result = clock.backend.activations(rows, *out);
            let (bytes, operations) = (2 * cols * out + 4 * rows * (cols + out), 2 * rows * cols * out);
            // Where there are two ways, both.
            let both: &[bool] = if rows > 16 && has_wgmma { &[true, false] } else { &[false] };
            for &wgmma in both {
                clock.backend.use_wgmma(wgmma);
                let time = clock.time(|backend, call| backend.linear(&x, weight.of(call), None, &mut result))?;
                let (per_ms, by) = if wgmma { (WGMMA_PER_MS, " by wgmma") } else { (MMA_PER_MS, "") };
                let what = format!("{name}: {what} [{out}, {cols}] × {rows}{by}");
                clock.print(&what, time, Work { bytes, operations, per_ms });
            }
            clock.backend.use_wgmma(true);
        }
    }
    Ok(())
}

fn fused(clock: &mut Clock, shape: &Shape, model: &Model, rows: usize) -> Result<()> {
    let Shape { name, hidden, ffn, heads, .. } = *shape;
    let norm = || RmsNorm { weight: &model.norm, eps: 1e-6 };
    let backend = &mut clock.backend;
    let mut residual = Residual::new(backend, rows, hidden);
    backend.write(&values(rows * hidden), residual.start());
    let mut qkv = backend.activations(rows, heads.qkv_width());
    let (mixed, inner) = (filled(backend, rows, heads.q_width()), filled(backend, rows, ffn));
    let (mut both, mut out) = (backend.activations(rows, 2 * ffn), backend.activations(rows, ffn));
    let print = |clock: &Clock, what: &str, weight: &Weights, time, values: usize| {
        let bytes = weight.bytes(&clock.backend) + 4 * rows * values;
        // Operations of so few rows are far from any floor, and not counted.
        clock.print(&format!("{name}: {what} × {rows}"), time, Work { bytes, operations: 0, per_ms: MMA_PER_MS });
    };

    let time = clock.time(|backend, call| {
        backend.norm_linear(&mut residual, norm(), model.qkv.of(call), None, &mut qkv);
    })?;
    print(clock, "norm and qkv", &model.qkv, time, hidden + heads.qkv_width());
    let time = clock.time(|backend, call| {
        backend.norm_linear_silu_mul(&mut residual, norm(), model.gate_up.of(call), None, &mut both, &mut out);
    })?;
    print(clock, "norm, gate and up, silu", &model.gate_up, time, hidden + ffn);
    // The sum grows and grows, which takes no longer.
    let time = clock.time(|backend, call| {
        backend.add_linear(&mixed, model.output.of(call), None, &mut residual);
    })?;
    print(clock, "output, added", &model.output, time, heads.q_width() + 2 * hidden);
    let time = clock.time(|backend, call| {
        backend.add_linear(&inner, model.down.of(call), None, &mut residual);
    })?;
    print(clock, "down, added", &model.down, time, ffn + 2 * hidden);
    Ok(())
}
