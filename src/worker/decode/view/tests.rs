use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};

use super::*;
use crate::{
    cluster::{Consumer, Local, Queue, QueueDepth, QueueError, tests::card},
    engine::{Inbox, Message, inbox},
    telemetry::Metrics,
};

/// A decode worker's view of a cluster in this process, which has a prefill worker.
struct Bench {
    cluster: Cluster,
    key: ModelKey,
    view: Arc<View>,
    inbox: Inbox,
}

impl Bench {
    /// The queue is about to be looked at for the first time, and was found as deep as this before.
    fn start(depth: u64) -> Self {
        Self::start_in(Cluster::local(), depth)
    }

    fn start_in(cluster: Cluster, depth: u64) -> Self {
        let view = view(Limits::default());
        view.set_registered(1);
        view.set_depth(Some(depth));
        let key = ModelKey::of(b"a model");
        let (post, inbox) = inbox();
        tokio::spawn(follow_queue(cluster.clone(), key, view.clone(), post));
        Self { cluster, key, view, inbox }
    }

    async fn publish(&self) {
        self.cluster.queue.publish(self.key, "a job".to_owned(), "{}".into()).await.unwrap();
    }

    /// Lets so many looks come.
    async fn pass(&self, looks: u32) {
        tokio::time::sleep(DEPTH_PERIOD * looks - Duration::from_millis(1)).await;
    }

    /// Jobs that are gone, of which the engine was told since this was last asked.
    fn gone(&self) -> Vec<HandoffId> {
        let gone = |message| match message {
            Message::Lender(LenderEvent::JobGone { handoff }) => Some(handoff),
            _ => None,
        };
        self.inbox.0.try_iter().filter_map(gone).collect()
    }

    fn was_told_of_none(&self) -> bool {
        matches!(self.inbox.0.try_recv(), Ok(Message::NoPrefillWorkers))
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_has_run_empty_unseen_is_soon_looked_at() {
    let bench = Bench::start(5);
    bench.pass(1).await;
    assert_eq!(bench.view.depth(), Some(0));
}

#[tokio::test(start_paused = true)]
async fn an_empty_queue_that_nobody_decides_by_is_seldom_looked_at() {
    let bench = Bench::start(0);
    bench.publish().await;
    bench.pass(IDLE_DEPTH_PERIODS - 1).await;
    assert_eq!(bench.view.depth(), Some(0));
    bench.pass(2).await;
    assert_eq!(bench.view.depth(), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_nobody_works_on_is_left_until_somebody_does() {
    let bench = Bench::start(1);
    bench.publish().await;
    bench.pass(DESERTED_LOOKS - 1).await;
    assert!(bench.view.prefill_workers() == 1 && !bench.was_told_of_none(), "workers ask again in a moment");
    bench.pass(2).await;
    assert!(bench.view.prefill_workers() == 0 && bench.was_told_of_none());
    let mut consumer = bench.cluster.queue.consume(bench.key);
    let job = consumer.next().await.unwrap();
    bench.pass(2).await;
    assert_eq!(bench.view.prefill_workers(), 1, "somebody has a job");
    job.ack().await.unwrap();
    let asking = tokio::spawn(async move { consumer.next().await.is_some() });
    bench.pass(3 * IDLE_DEPTH_PERIODS).await;
    assert!(bench.view.prefill_workers() == 1 && !bench.was_told_of_none(), "somebody waits for one");
    asking.abort();
    bench.pass(IDLE_DEPTH_PERIODS + DESERTED_LOOKS).await;
    assert!(bench.view.prefill_workers() == 0 && bench.was_told_of_none());
}

#[tokio::test(start_paused = true)]
async fn an_idle_queue_that_seems_deserted_is_soon_looked_at_again() {
    let bench = Bench::start(0);
    bench.pass(IDLE_DEPTH_PERIODS + DESERTED_LOOKS - 2).await;
    assert_eq!(bench.view.prefill_workers(), 1);
    bench.pass(2).await;
    assert!(bench.view.prefill_workers() == 0 && bench.was_told_of_none());
    // Whoever was registered has gone; whoever comes is taken to be alive.
    bench.view.set_registered(0);
    bench.pass(2).await;
    bench.view.set_registered(1);
    assert_eq!(bench.view.prefill_workers(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_has_gone_from_the_queue_is_not_waited_for() {
    let bench = Bench::start(0);
    let (jobs, received) = mpsc::unbounded_channel();
    let (_lease, lease) = watch::channel(Some(WorkerId(1)));
    let (Bench { cluster, key, view, .. }, (post, _inbox)) = (&bench, inbox());
    let nowhere = serde_json::Value::Null;
    tokio::spawn(publish_jobs(cluster.clone(), *key, received, lease, nowhere, view.clone(), post));
    jobs.send(NewJob { handoff: HandoffId(7), tokens: 100, trace: None }).unwrap();
    bench.pass(DESERTED_LOOKS - 1).await;
    assert_eq!(bench.gone(), [], "it waits");
    let job = cluster.queue.consume(*key).next().await.unwrap();
    bench.pass(2 * IDLE_DEPTH_PERIODS).await;
    assert_eq!(bench.gone(), [], "somebody has it");
    job.nak(3 * IDLE_DEPTH_PERIODS * DEPTH_PERIOD).await.unwrap();
    bench.pass(2 * IDLE_DEPTH_PERIODS).await;
    assert_eq!(bench.gone(), [], "somebody will get it");
    let job = cluster.queue.consume(*key).next().await.unwrap();
    job.bury("nobody can do it").await.unwrap();
    bench.pass(2 * IDLE_DEPTH_PERIODS).await;
    assert_eq!(bench.gone(), [HandoffId(7)]);
    bench.pass(2 * IDLE_DEPTH_PERIODS).await;
    assert_eq!(bench.gone(), [], "once");
}

/// A queue that is away at times, or has not counted yet what it has.
#[derive(Default)]
struct Fickle {
    local: Local,
    away: AtomicBool,
    /// At the next look.
    counts_late: AtomicBool,
}

impl Queue for Fickle {
    fn publish(&self, key: ModelKey, id: String, payload: Bytes) -> BoxFuture<'_, Result<(), QueueError>> {
        self.local.publish(key, id, payload)
    }

    fn consume(&self, key: ModelKey) -> Consumer {
        self.local.consume(key)
    }

    fn depth(&self, key: ModelKey) -> BoxFuture<'_, Result<QueueDepth, QueueError>> {
        if self.away.load(Ordering::Relaxed) {
            return async { Err(QueueError::Unavailable("it is away".to_owned())) }.boxed();
        }
        if self.counts_late.swap(false, Ordering::Relaxed) {
            return async { Ok(QueueDepth::default()) }.boxed();
        }
        self.local.depth(key)
    }

    fn flush(&self) -> BoxFuture<'_, ()> {
        self.local.flush()
    }

    fn dead_jobs(&self) -> u64 {
        self.local.dead_jobs()
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_in_a_queue_that_is_away_for_more_than_a_moment_are_not_waited_for() {
    let queue = Arc::new(Fickle::default());
    queue.away.store(true, Ordering::Relaxed);
    let bench = Bench::start_in(Cluster { queue: queue.clone(), ..Cluster::local() }, 1);
    bench.pass(DESERTED_LOOKS - 1).await;
    assert!(bench.view.depth().is_none() && !bench.was_told_of_none(), "it may be back in a moment");
    queue.away.store(false, Ordering::Relaxed);
    bench.pass(1).await;
    assert_eq!(bench.view.depth(), Some(0));
    queue.away.store(true, Ordering::Relaxed);
    bench.pass(DESERTED_LOOKS - 1).await;
    assert!(!bench.was_told_of_none(), "it was back");
    bench.pass(2).await;
    assert!(bench.was_told_of_none());
    bench.pass(10).await;
    assert!(!bench.was_told_of_none(), "once");
}

#[tokio::test(start_paused = true)]
async fn a_job_is_not_taken_for_gone_by_the_first_look_after_it_was_put_there() {
    let queue = Arc::new(Fickle { counts_late: AtomicBool::new(true), ..Fickle::default() });
    let bench = Bench::start_in(Cluster { queue: queue.clone(), ..Cluster::local() }, 1);
    bench.view.enqueued().push(HandoffId(7));
    bench.publish().await;
    bench.pass(2 * IDLE_DEPTH_PERIODS).await;
    assert!(!queue.counts_late.load(Ordering::Relaxed), "it was looked at");
    assert_eq!(bench.gone(), []);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_lost_while_the_queue_is_away_is_not_waited_for() {
    let queue = Arc::new(Fickle { away: AtomicBool::new(true), ..Fickle::default() });
    let bench = Bench::start_in(Cluster { queue: queue.clone(), ..Cluster::local() }, 1);
    bench.view.enqueued().push(HandoffId(7));
    bench.pass(1).await;
    assert!(bench.view.depth().is_none() && bench.gone().is_empty());
    queue.away.store(false, Ordering::Relaxed);
    bench.pass(2).await;
    assert_eq!(bench.gone(), [HandoffId(7)]);
}

/// What a worker with these limits knows at first.
pub(in crate::worker::decode) fn view(limits: Limits) -> Arc<View> {
    View::new(limits, Metrics::new().engine.handoffs.clone())
}

#[tokio::test]
async fn who_is_beside_and_who_has_adapters_is_known_by_the_cards_of_those_who_are_alive() {
    let (cluster, key, view) = (Cluster::local(), ModelKey::of(b"a model"), view(Limits::default()));
    let (post, _inbox) = inbox();
    tokio::spawn(follow_workers(cluster.clone(), key, view.clone(), post));
    let carded = |host: &str, transport: Transport| WorkerCard {
        host_id: host.to_owned(),
        transports: vec![transport.name().to_owned()],
        ..card(Role::Prefill, key, "10.0.0.1:8000")
    };
    let known = async |workers: u32| {
        while view.registered() != workers {
            tokio::task::yield_now().await;
        }
        (view.beside.load(Ordering::Relaxed), view.adapters.load(Ordering::Relaxed))
    };
    let (here, register) = (host_id(), |card| cluster.discovery.register(card));
    let stranger = LocalView { user: u32::MAX, mounts: "others".to_owned(), folder: "another".to_owned() };
    let _others = [
        register(carded("another host", Transport::CudaIpc)),
        register(carded(&here, Transport::Shm)),
        register(WorkerCard { local: Some(stranger), ..carded(&here, Transport::CudaIpc) }),
    ];
    assert_eq!(known(3).await, (false, false));
    let beside = register(carded(&here, Transport::CudaIpc));
    assert_eq!(known(4).await, (true, false));
    let _with_adapters = register(carded("another host", Transport::Rdma));
    assert_eq!(known(5).await, (true, true));
    drop(beside);
    assert_eq!(known(4).await, (false, true));
}

#[tokio::test]
async fn limits_from_the_cluster_reach_those_who_decide_and_those_who_cut_prompts() {
    let (local, key) = (Arc::new(Local::new()), ModelKey::of(b"a model"));
    let cluster = Cluster { discovery: local.clone(), queue: local.clone(), loads: local.clone() };
    let view = view(Limits::default());
    let (post, inbox) = inbox();
    tokio::spawn(follow_limits(cluster, key, view.clone(), Limits::default(), post));
    let set = |config: &'static str| local.set_config(key, Some(Bytes::from_static(config.as_bytes())));
    let told = async || {
        for _ in 0..1000 {
            match inbox.0.try_recv() {
                Ok(Message::ItlTarget(target)) => return target,
                Ok(_) => panic!("nothing else is said"),
                Err(_) => tokio::task::yield_now().await,
            }
        }
        panic!("nothing is said");
    };
    set(r#"{"itl_target_ms": 50, "max_local_prefill_length": 7}"#);
    assert_eq!(told().await, Duration::from_millis(50));
    assert_eq!(view.limits().itl_target(), Duration::from_millis(50));
    assert_eq!(view.limits().max_local_prefill_length, 7);
    // What makes no sense changes nothing, and what it says no more is as the flags say.
    set(r#"{"itl_target_ms": -1}"#);
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(view.limits().itl_target(), Duration::from_millis(50));
    set(r#"{"itl_target_ms": 60}"#);
    assert_eq!(told().await, Duration::from_millis(60));
    assert_eq!(view.limits(), Limits { itl_target_ms: 60.0, ..Limits::default() });
}
