use futures::{FutureExt, future::BoxFuture};

use super::*;
use crate::{
    cluster::{ModelKey, QueueError, Role, Settle, tests::card},
    engine::tests::{BLOCK, config, start},
    handoff::{BorrowerConfig, BorrowerTimeouts},
    telemetry::Metrics,
    transfer::{
        ClusterToken, Connector, ConnectorConfig, Limits, Mailbox, Region, RegionShape, ServerConfig, SessionEvent,
        SessionServer, TransferMetrics,
    },
};

const DAVE: WorkerId = WorkerId(4);

/// A prefill worker without tasks, what it asks of these, and what the queue is told of its jobs.
struct Bench {
    borrowing: SharedBorrowing,
    _notes: mpsc::UnboundedReceiver<Note>,
    say: mpsc::UnboundedSender<&'static str>,
    told: mpsc::UnboundedReceiver<&'static str>,
}

impl Bench {
    fn new() -> Self {
        let timeouts = BorrowerTimeouts { keep_alive: Duration::ZERO, ..BorrowerTimeouts::default() };
        let borrower = BorrowerConfig { model_key: "m".into(), block_size: BLOCK as u32, jobs_max: 8, timeouts };
        let (engine, metrics) = (start(config()).0, Metrics::new().engine.handoffs.clone());
        let (borrowing, notes) = Borrowing::new(Borrower::new(borrower), engine, 1, metrics);
        let (say, told) = mpsc::unbounded_channel();
        Self { borrowing, _notes: notes, say, told }
    }

    /// The queue delivers the job of a prompt of so many tokens.
    fn deliver(&self, handoff: u128, prompt_tokens: u32) {
        let job = Job {
            handoff: HandoffId(handoff),
            decode: DAVE,
            model_key: "m".into(),
            addresses: serde_json::Value::Null,
            prompt_tokens,
            traceparent: None,
        };
        let settle = Box::new(Told(self.say.clone()));
        lock(&self.borrowing).deliver(Delivery::new(job.encode().into(), 1, settle));
    }

    fn has_room(&self) -> bool {
        lock(&self.borrowing).has_room()
    }
}

/// Tells what the queue is told of a job.
struct Told(mpsc::UnboundedSender<&'static str>);

impl Told {
    fn say(&self, what: &'static str) -> BoxFuture<'_, Result<(), QueueError>> {
        let _ = self.0.send(what);
        async { Ok(()) }.boxed()
    }
}

impl Settle for Told {
    fn ack(&self) -> BoxFuture<'_, Result<(), QueueError>> {
        self.say("done")
    }

    fn in_progress(&self) -> BoxFuture<'_, Result<(), QueueError>> {
        self.say("in progress")
    }

    fn nak(&self, _: Duration) -> BoxFuture<'_, Result<(), QueueError>> {
        self.say("for another")
    }

    fn bury(&self, _: &str) -> BoxFuture<'_, Result<(), QueueError>> {
        self.say("dead")
    }

    fn abandon(&self) {
        let _ = self.0.send("dropped");
    }
}

#[tokio::test]
async fn jobs_are_taken_one_at_a_time_unless_several_fit_one_step() {
    let (_server, session) = session().await;
    let reached = || {
        let bench = Bench::new();
        lock(&bench.borrowing).connected(DAVE, &session);
        bench
    };
    let bench = reached();
    let step = config().max_num_batched_tokens as u32;
    assert!(bench.has_room());
    for short in 1..=2 {
        bench.deliver(short, step / 4);
        assert!(bench.has_room(), "{short} short ones");
    }
    bench.deliver(3, step / 2);
    assert!(!bench.has_room(), "they fill a step");
    // What is computed makes room.
    let half = step as usize / 2;
    lock(&bench.borrowing).computed(HandoffId(3), half / 2, half);
    assert!(bench.has_room());
    let bench = reached();
    bench.deliver(1, 1000);
    assert!(!bench.has_room(), "a long one is enough");
    let bench = Bench::new();
    bench.deliver(1, 1);
    assert!(!bench.has_room(), "whether it can be done is not known");
    lock(&bench.borrowing).connected(DAVE, &session);
    assert!(bench.has_room());
}

#[tokio::test]
async fn the_queue_hears_that_a_job_is_worked_on_before_what_became_of_it() {
    let mut bench = Bench::new();
    bench.deliver(1, 10);
    lock(&bench.borrowing).on(BorrowerEvent::Tick);
    lock(&bench.borrowing).on(BorrowerEvent::ConnectFailed { decode: DAVE, gone: true, pause: Duration::ZERO });
    settled(&bench.borrowing).await;
    let heard = async { [bench.told.recv().await, bench.told.recv().await] };
    let heard = tokio::time::timeout(Duration::from_secs(10), heard).await.expect("both are said");
    assert_eq!(heard, [Some("in progress"), Some("done")]);
    assert_eq!(lock(&bench.borrowing).held(), 0);
}

/// A session to a decode worker of this process.
async fn session() -> (SessionServer, Session) {
    let shape = RegionShape { layers: 1, pages: 1, page_bytes: 4096 };
    let (token, metrics) = (ClusterToken::new("tea"), TransferMetrics::default());
    let server = ServerConfig {
        tcp: Some(([127, 0, 0, 1], 0).into()),
        tcp_pages: true,
        shm: false,
        cuda: None,
        rdma: None,
        advertise: None,
        unix: None,
        tls: None,
        token: token.clone(),
        model_key: "m".into(),
        limits: Limits::default(),
        metrics: metrics.clone(),
    };
    let (region, mailbox) = (Region::private(shape).unwrap(), Mailbox::new(1).unwrap());
    let server = SessionServer::start(server, region, mailbox, Arc::new(|_: SessionEvent| ())).await.unwrap();
    let connector = ConnectorConfig {
        tls: None,
        token,
        model_key: "m".into(),
        timeout: Duration::from_secs(60),
        cuda_ipc: false,
        shm: false,
        rdma: None,
        tcp: true,
        metrics,
    };
    let connector = Connector::new(connector, Region::private(shape).unwrap()).unwrap();
    let session = connector.connect(server.addresses(), DAVE).await.unwrap();
    (server, session)
}

#[tokio::test]
async fn who_reaches_no_decode_worker_asks_for_jobs_less_and_less_often() {
    let bench = Bench::new();
    let carded = || Arc::new(card(Role::Decode, ModelKey::of(b"m"), "10.0.0.1:8000"));
    let dave_alone = WorkerSet::from([(DAVE, carded())]);
    let two = WorkerSet::from([(DAVE, carded()), (WorkerId(5), carded())]);
    let three = WorkerSet::from([(DAVE, carded()), (WorkerId(5), carded()), (WorkerId(6), carded())]);
    let rest = |alive| lock(&bench.borrowing).rest(alive).as_secs();
    assert_eq!(rest(&dave_alone), 0);
    for (alone, beside_another) in [(1, 0), (2, 2), (4, 4), (8, 4), (16, 4), (16, 4)] {
        lock(&bench.borrowing).miss(DAVE);
        assert_eq!(rest(&dave_alone), alone);
        assert_eq!(rest(&two), beside_another, "the other may be within reach, and may have no job to be tried by");
    }
    assert!(bench.has_room());
    bench.deliver(1, 10);
    assert!(!bench.has_room(), "one at a time");
    let (_server, session) = session().await;
    lock(&bench.borrowing).connected(DAVE, &session);
    assert!(bench.has_room() && rest(&dave_alone) == 0);
    lock(&bench.borrowing).disconnected(session.id());
    assert_eq!(rest(&dave_alone), 0, "it was reached");
    lock(&bench.borrowing).miss(DAVE);
    assert_eq!((rest(&dave_alone), rest(&two)), (1, 0));
    lock(&bench.borrowing).miss(WorkerId(5));
    assert_eq!(rest(&two), 2);
    assert_eq!(rest(&three), 0, "it has tried another each time");
}
