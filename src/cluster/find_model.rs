use std::{collections::BTreeMap, sync::Arc};

use super::{Discovery, ModelKey, Role, WorkerCard, WorkerFilter};

/// Why a prefill worker cannot take its model from the cluster.
#[derive(Debug, thiserror::Error)]
#[error("the cluster serves several models, or one by builds that differ; say which with --model: {0}")]
pub struct SeveralModels(String);

/// The card of a decode worker of the cluster's one model, for a prefill worker that was given none. Waits for a worker
/// to register.
pub async fn find_model(discovery: &dyn Discovery) -> Result<Arc<WorkerCard>, SeveralModels> {
    let mut workers = discovery.workers(WorkerFilter::role(Role::Decode));
    if workers.borrow().is_empty() {
        tracing::info!("waiting for a decode worker, to take the model from it (--model names one)");
    }
    loop {
        let models: BTreeMap<ModelKey, Arc<WorkerCard>> =
            workers.borrow_and_update().values().map(|card| (card.model_key, card.clone())).collect();
        if models.len() > 1 {
            let sources: Vec<_> = models.values().map(|card| card.model.source.as_str()).collect();
            return Err(SeveralModels(sources.join(", ")));
        }
        if let Some((_, card)) = models.into_iter().next() {
            return Ok(card);
        }
        if workers.changed().await.is_err() {
            // The watch ends with the process.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Local, card::tests::card};

    #[tokio::test]
    async fn the_one_model_of_the_cluster_is_waited_for_and_taken() {
        let local = Arc::new(Local::new());
        let found = tokio::spawn({
            let local = local.clone();
            async move { find_model(&*local).await }
        });
        let _lease = local.register(card(Role::Decode, ModelKey::of(b"a"), "h:1"));
        assert_eq!(found.await.unwrap().unwrap().model.source, "/models/demo.gguf");
    }

    #[tokio::test]
    async fn of_several_models_none_is_guessed() {
        let local = Local::new();
        let _leases = [b"a", b"b"].map(|name| local.register(card(Role::Decode, ModelKey::of(name), "h:1")));
        let error = find_model(&local).await.unwrap_err().to_string();
        assert!(error.contains("--model"), "{error}");
    }
}
