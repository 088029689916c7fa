//! Whole steps that decode and of prompts, and the kernels of their layers, each by itself.

use anyhow::{Result, ensure};
use engine_cuda_device::Device;
use engine_kernels::{
    KvDType,
    cuda::{Driver, Noted},
};

use super::{
    Shape,
    clock::Clock,
    layer::{Kernels, Step},
    model::Model,
    row::{MMA_PER_MS, WGMMA_PER_MS, Work},
    work::Purpose,
};

/// Sequences, and tokens of each: what matters most first, as there may be no time for all.
const DECODES: [[usize; 2]; 7] = [[1, 512], [64, 512], [16, 512], [4, 512], [256, 512], [1, 8192], [1, 65_536]];
/// One of them whose attention is measured with a cache of eight bits too.
const WITH_F8: [usize; 2] = [64, 512];
/// Tokens of a chunk of a prompt, and those before it.
const PROMPTS: [[usize; 2]; 4] = [[2048, 0], [16_384, 0], [512, 0], [512, 7680]];
/// Around where other kernels take over.
const BETWEEN: [[usize; 2]; 4] = [[2, 512], [8, 512], [32, 512], [128, 512]];

pub(super) fn measure(clock: &mut Clock, shape: Shape, model: &Model<Device>) -> Result<()> {
    let (decodes, with_f8, prompts, between) = match shape.is_small {
        true => (&[[1, 200], [8, 20], [17, 20]][..], [8, 20], &[[20, 9]][..], &[][..]),
        false => (&DECODES[..], WITH_F8, &PROMPTS[..], &BETWEEN[..]),
    };
    decodes.iter().try_for_each(|&size| decode(clock, shape, model, size, size == with_f8))?;
    for &[tokens, cached] in prompts {
        let mut step = Step::prompt(&mut clock.backend, shape, model, [tokens, cached])?;
        step.fill(&mut clock.backend);
        let what = format!("{}: {tokens} of a prompt behind {cached}", shape.name);
        let time = clock.time_with_host(|backend| step.enqueue(backend))?;
        // Of the last layer only keys and values are computed.
        let whole = shape.layers - 1;
        let weights = whole * shape.layer_weights() + shape.hidden * shape.heads.qkv_width();
        let operations = 2 * tokens * weights + whole * step.size.attention_operations();
        let bytes = 2 * weights + shape.layers * step.size.pages_bytes();
        let per_ms = if clock.backend.driver().has_wgmma() { WGMMA_PER_MS } else { MMA_PER_MS };
        clock.print(&format!("{what}: a step without logits"), time, Work { bytes, operations, per_ms });
        kernels(clock, &what, &mut step, &mut Vec::new())?;
    }
    between.iter().try_for_each(|&size| decode(clock, shape, model, size, false))
}

/// A step that decodes, and its kernels; and then, if that is wanted, what a cache of eight bits makes different.
fn decode(
    clock: &mut Clock,
    shape: Shape,
    model: &Model<Device>,
    [sequences, context]: [usize; 2],
    with_f8: bool,
) -> Result<()> {
    let mut step = Step::decode(&mut clock.backend, shape, model, [sequences, context], KvDType::BF16)?;
    let what = format!("{}: {sequences} × {context} tokens", shape.name);
    let time = clock.time_with_host(|backend| step.enqueue(backend))?;
    let weights = shape.layers * shape.layer_weights() + shape.vocabulary * shape.hidden;
    let bytes = 2 * weights + shape.layers * step.size.pages_bytes();
    clock.print(&format!("{what}: a step"), time, Work { bytes, operations: 0, per_ms: MMA_PER_MS });
    let mut known = Vec::new();
    kernels(clock, &what, &mut step, &mut known)?;
    if with_f8 {
        let mut step = Step::decode(&mut clock.backend, shape, model, [sequences, context], KvDType::F8)?;
        kernels(clock, &what, &mut step, &mut known)?;
    }
    Ok(())
}

/// The kernels of a layer, then those of the end of a step. Where there are two ways to compute it, all of one, and
/// then what the other does differently.
fn kernels(clock: &mut Clock, what: &str, step: &mut Step<'_, Device>, known: &mut Vec<(String, Work)>) -> Result<()> {
    let both: &[bool] = if clock.backend.driver().has_wgmma() { &[true, false] } else { &[false] };
    for &wgmma in both {
        clock.backend.use_wgmma(wgmma);
        let Kernels { layers, ends } = step.kernels(&mut clock.backend);
        let purposes = step.size.of_layer(&layers[0])?;
        each(clock, what, &purposes, &layers, known)?;
        if let Some(end) = ends.first() {
            let purposes = step.size.of_end(end)?;
            each(clock, what, &purposes, &ends, known)?;
        }
    }
    clock.backend.use_wgmma(true);
    Ok(())
}

/// A row for each kernel, unless one that moves and computes as much is known by its name: of the same layer, it is
/// timed once.
fn each(
    clock: &mut Clock,
    what: &str,
    purposes: &[Purpose],
    copies: &[Vec<Noted>],
    known: &mut Vec<(String, Work)>,
) -> Result<()> {
    for (index, (purpose, work)) in purposes.iter().enumerate() {
        let (name, work) = (copies[0][index].kernel(), *work);
        ensure!(
            copies.iter().all(|copy| copy[index].kernel() == name),
            "{name} is not what every layer launches there"
        );
        let kernel = (format!("{what}: {purpose}, {name}"), work);
        if known.contains(&kernel) {
            continue;
        }
        let time = clock.time(|backend, call| backend.enqueue(&copies[call % copies.len()][index]))?;
        clock.print(&kernel.0, time, work);
        known.push(kernel);
    }
    Ok(())
}
