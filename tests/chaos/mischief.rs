//! What is done to workers and services.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use engine::cluster::{Cluster, ModelKey, QueueDepth, Role, WorkerFilter, WorkerId, WorkerSet};
use tokio::sync::watch;

use crate::{
    cell::{Cell, card, join},
    clock::Clock,
    random::Random,
    seats::Seat,
    services::Service,
    story::Story,
};

/// After so long everybody has heard that a decode worker is well: the frontend asks those that were not every two
/// seconds, and gives them five to answer.
const SETTLING_TIME: Duration = Duration::from_secs(8);

/// Where the jobs are.
const STREAM: &str = "engine-prefill";
/// How long the queue waits for a worker's sign of life before it delivers a job again.
const ACK_WAIT: Duration = Duration::from_secs(8);
/// Longer than jobs are kept for a worker that is gone.
const PATIENCE: Duration = Duration::from_secs(120);

/// Who is registered, where, and since when.
type Registered = BTreeMap<WorkerId, (String, Duration)>;

/// Whoever has a decode worker's seat.
struct Seated {
    address: SocketAddr,
    /// Nobody else who may have had its address has registered since.
    came: Duration,
    /// Since when it is well; `None`: something is being done to it.
    well: Option<Duration>,
}

/// Sees to it that at any time one decode worker is well, and known to be.
pub(crate) struct Guard {
    clock: Clock,
    runtime: tokio::runtime::Runtime,
    cluster: Cluster,
    key: ModelKey,
    registered: Arc<Mutex<Registered>>,
    seated: Mutex<Vec<Seated>>,
}

impl Guard {
    pub(crate) fn new(cell: &Cell, decodes: &[Seat], clock: Clock) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (cluster, key, workers) = runtime.block_on(async {
            let cluster = join(cell).await;
            let key = card(&cluster, Role::Decode).await.model_key;
            let mut workers = cluster.discovery.workers(WorkerFilter::of(key, Role::Decode));
            workers.wait_for(|workers| workers.len() == decodes.len()).await.unwrap();
            (cluster, key, workers)
        });
        let now = clock.now();
        let registered = Arc::new(Mutex::new(Registered::new()));
        runtime.spawn(follow(workers, registered.clone(), clock.clone()));
        let seated = |seat: &Seat| Seated { address: seat.with(|decode| decode.address), came: now, well: Some(now) };
        let seated = Mutex::new(decodes.iter().map(seated).collect());
        Self { clock, runtime, cluster, key, registered, seated }
    }

    /// Takes a decode worker for harm, unless it is the last one that everybody can find.
    fn take(&self, number: usize) -> bool {
        let now = self.clock.now();
        let registered = self.registered.lock().unwrap();
        let settled = |since: Duration| now.saturating_sub(since) >= SETTLING_TIME;
        let known = |worker: &Seated| {
            let address = worker.address.to_string();
            // A lease from before is that of one who sat at the same address.
            registered.values().any(|(at, since)| *at == address && *since >= worker.came && settled(*since))
        };
        let mut seated = self.seated.lock().unwrap();
        let found = |worker: &Seated| worker.well.is_some_and(settled) && known(worker);
        let another = seated.iter().enumerate().any(|(other, worker)| other != number && found(worker));
        if another {
            seated[number].well = None;
        }
        another
    }

    /// A worker is well again, or, where another `came` since then, that one.
    fn is_well(&self, seat: &Seat, came: Option<Duration>) {
        let address = seat.with(|decode| decode.address);
        let mut seated = self.seated.lock().unwrap();
        let came = came.unwrap_or(seated[seat.number].came);
        seated[seat.number] = Seated { address, came, well: Some(self.clock.now()) };
    }

    /// Returns when no job is on the queue, waiting or with anybody, while everybody is at rest.
    ///
    /// A server that `was_killed` may say too much for good, as it writes down neither figure at once: it may store
    /// jobs that were acked, and count jobs as under way that it stores no more. A job that is there comes to somebody,
    /// for the first time or again, before the second [`ACK_WAIT`] is over, and is acked: what stays longer is
    /// nobody's.
    pub(crate) fn wait_until_the_queue_is_empty(&self, nats: &str, was_killed: bool) {
        let started = self.clock.now();
        let (mut seen, mut since) = (None, started);
        self.runtime.block_on(async {
            let jetstream = async_nats::jetstream::new(async_nats::connect(nats).await.unwrap());
            loop {
                let stored = jetstream.get_stream(STREAM).await.map(|stream| stream.cached_info().state.messages).ok();
                // Who asks for jobs says nothing about them.
                let depth =
                    self.cluster.queue.depth(self.key).await.ok().map(|depth| QueueDepth { asking: 0, ..depth });
                let now = self.clock.now();
                if seen != Some((stored, depth)) {
                    (seen, since) = (Some((stored, depth)), now);
                }
                let waiting = depth.map(|depth| depth.waiting);
                if stored == Some(0) || was_killed && waiting == Some(0) && now - since > 2 * ACK_WAIT {
                    return;
                }
                assert!(now - started < PATIENCE, "jobs are left: {stored:?}, {depth:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
}

/// Keeps note of who is registered, and for how long.
async fn follow(mut workers: watch::Receiver<Arc<WorkerSet>>, registered: Arc<Mutex<Registered>>, clock: Clock) {
    loop {
        let now = clock.now();
        let live = workers.borrow_and_update().clone();
        {
            let mut registered = registered.lock().unwrap();
            registered.retain(|lease, _| live.contains_key(lease));
            for (&lease, card) in live.iter() {
                registered.entry(lease).or_insert_with(|| (card.address.clone(), now));
            }
        }
        if workers.changed().await.is_err() {
            return;
        }
    }
}

/// Kills, stops and drains a worker now and then. It is well on return.
pub(crate) fn harm_worker(seat: &Seat, guard: &Guard, story: &Story, mut random: Random, until: Duration) {
    let clock = &guard.clock;
    loop {
        clock.rest(random.within(300, 6_000), until);
        if clock.now() >= until {
            return;
        }
        if seat.role == Role::Decode && !guard.take(seat.number) {
            continue;
        }
        let (choice, pause, begins) = (random.below(8), random.pause(), clock.now());
        let came = match choice {
            0..=2 if !seat.lives_long() => {
                story.tell(format!("{} for {pause:?}: killed", seat.name()));
                seat.with(|worker| worker.signal("KILL"));
                clock.rest(pause, until);
                seat.restart();
                Some(begins)
            }
            3 if !seat.lives_long() => {
                story.tell(format!("{}: drained", seat.name()));
                seat.with(|worker| worker.signal("TERM"));
                seat.restart();
                Some(begins)
            }
            _ => {
                story.tell(format!("{} for {pause:?}: stopped", seat.name()));
                seat.with(|worker| worker.signal("STOP"));
                clock.rest(pause, until);
                seat.with(|worker| worker.signal("CONT"));
                None
            }
        };
        if seat.role == Role::Decode {
            guard.is_well(seat, came);
        }
    }
}

/// Kills and stops a service now and then. It is well on return. Whether it was killed.
pub(crate) fn harm_service(
    service: &mut Service,
    name: &str,
    story: &Story,
    mut random: Random,
    until: Duration,
) -> bool {
    let clock = story.clock();
    let mut was_killed = false;
    loop {
        clock.rest(random.within(2_000, 15_000), until);
        if clock.now() >= until {
            return was_killed;
        }
        let (killed, pause) = (random.below(2) == 0, random.pause());
        was_killed |= killed;
        if killed {
            story.tell(format!("{name} for {pause:?}: killed"));
            service.kill();
            clock.rest(pause, until);
            service.restart();
        } else {
            story.tell(format!("{name} for {pause:?}: stopped"));
            service.signal("STOP");
            clock.rest(pause, until);
            service.signal("CONT");
        }
    }
}
