//! Whole servers over HTTP: throughput, time to first token, inter-token latency.

use std::path::Path;

use anyhow::Result;

use crate::load::{self, Load};
use crate::server::Server;
use crate::stats::{median, percentile};

/// One server at one number of clients, over all rounds.
pub(crate) struct Figures {
    /// Median of the rounds' output tokens per second.
    pub(crate) tokens_per_second: f64,
    /// Time to first token, seconds: median and 99th percentile.
    pub(crate) first_token: (f64, f64),
    /// Inter-token latency, seconds: median and 99th percentile.
    pub(crate) inter_token: (f64, f64),
}

/// One row of the table.
pub(crate) struct Row {
    /// Clients at once.
    pub(crate) clients: usize,
    /// This engine.
    pub(crate) engine: Figures,
    /// The peer, if there is one.
    pub(crate) peer: Option<Figures>,
}

/// Starts each server in turn, round after round, and puts the same load on it.
pub(crate) fn compare(model: &Path, llama: Option<&Path>, rounds: usize, threads: usize) -> Result<Vec<Row>> {
    let loads = [(1, 4), (4, 12), (16, 32)];
    let mut ours: [Vec<Load>; 3] = Default::default();
    let mut theirs: [Vec<Load>; 3] = Default::default();
    for round in 0..rounds {
        let measure = |name: &str, server: Server, into: &mut [Vec<Load>; 3]| -> Result<()> {
            load::burst(&server.address, &server.model, 1, 1, u64::MAX >> 21)?;
            for (index, (clients, requests)) in loads.into_iter().enumerate() {
                let seed = (round * loads.len() + index) as u64 + 1;
                let load = load::burst(&server.address, &server.model, clients, requests, seed)?;
                eprintln!("round {}: {name}, {clients} clients: {:.1} tokens/s", round + 1, load.tokens_per_second);
                into[index].push(load);
            }
            Ok(())
        };
        measure("engine", Server::engine(model, threads)?, &mut ours)?;
        if let Some(folder) = llama {
            measure("llama.cpp", Server::llama(folder, model, threads)?, &mut theirs)?;
        }
    }
    let rows = loads.iter().zip(ours).zip(theirs).map(|((&(clients, _), ours), theirs)| Row {
        clients,
        engine: figures(&ours),
        peer: (!theirs.is_empty()).then(|| figures(&theirs)),
    });
    Ok(rows.collect())
}

fn figures(loads: &[Load]) -> Figures {
    let throughput: Vec<f64> = loads.iter().map(|load| load.tokens_per_second).collect();
    let first: Vec<f64> = loads.iter().flat_map(|load| load.first_token.iter().copied()).collect();
    let gaps: Vec<f64> = loads.iter().flat_map(|load| load.gaps.iter().copied()).collect();
    Figures {
        tokens_per_second: median(&throughput),
        first_token: (percentile(&first, 50.0), percentile(&first, 99.0)),
        inter_token: (percentile(&gaps, 50.0), percentile(&gaps, 99.0)),
    }
}
