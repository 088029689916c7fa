//! Real queue pairs on real devices: those of the emulated machine that `make test-rdma` starts. `rxe0` reaches itself,
//! `rxw0` and `rxw1` each other.

use std::io::{self, BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::handoff::{Epoch, MailboxSlot, MailboxWord, SessionId, Status, WorkerId};
use crate::transfer::rdma::{Adapters, Granted, Lane, Offer, Piece, RdmaError, RdmaLane, Source, Target, Wish};
use crate::transfer::tests::support::{
    PATIENCE, all_layers, complete, connector_config, epoch, server_config, soon, write,
};
use crate::transfer::{
    ConnectError, Connector, Mailbox, PageCopy, Region, RegionShape, ServerConfig, Session, SessionAddresses,
    SessionEvent, SessionServer, Transport, WriteError,
};

const SHAPE: RegionShape = RegionShape { layers: 2, pages: 32, page_bytes: 4096 };
const SLOTS: u32 = 4;
/// What nobody has written to yet.
const UNTOUCHED: u8 = 0xee;

/// Under their IPv4 addresses, which come second; the first one that a loopback interface has leads nowhere.
pub(super) fn adapters(devices: &[&str]) -> Adapters {
    Adapters::open(&Wish { devices: devices.iter().map(ToString::to_string).collect(), gid_index: Some(1) }).unwrap()
}

/// Bytes of all pages of a layer. For pages that nobody writes to, or to see whether somebody does.
fn layer(region: &Region, layer: usize) -> Vec<u8> {
    let bytes = region.shape().layer_stride();
    // SAFETY: the layer lies in the region, and bytes have no invalid values.
    unsafe { std::slice::from_raw_parts(region.pages(layer, 0, region.shape().pages), bytes) }.to_vec()
}

fn fill(region: &Region, byte: u8) {
    // SAFETY: the tests that call it let nobody write at the same time.
    unsafe { region.base().write_bytes(byte, region.shape().total_bytes()) };
}

fn fill_page(region: &Region, layer: usize, page: u32, byte: u8) {
    // SAFETY: as above.
    unsafe { region.pages(layer, page as usize, 1).write_bytes(byte, region.shape().page_bytes) };
}

/// The bytes of a page, if they are all the same.
fn content(region: &Region, layer: usize, page: u32) -> Option<u8> {
    let page_bytes = region.shape().page_bytes;
    // SAFETY: as above.
    let bytes = unsafe { std::slice::from_raw_parts(region.pages(layer, page as usize, 1), page_bytes) };
    bytes.iter().all(|byte| *byte == bytes[0]).then_some(bytes[0])
}

/// Two ends of a connection, without a session.
struct Ends {
    region: Region,
    mailbox: Mailbox,
    granted: Granted,
    lane: RdmaLane,
    source: Source,
    target: Target,
}

/// Connects `source` to `target`, after `change` has changed what it is told.
fn connect(source: &Source, target: &Target, change: impl FnOnce(&mut Offer)) -> (Granted, RdmaLane) {
    let opening = source.open(1).unwrap();
    let (granted, mut offers) = target.accept(&opening.endpoints()).unwrap();
    change(&mut offers[0]);
    (granted, opening.connect(&offers).unwrap().pop().unwrap())
}

impl Ends {
    fn new() -> Self {
        Self::told(|_| ())
    }

    fn told(change: impl FnOnce(&mut Offer)) -> Self {
        let (region, mailbox) = (Region::private(SHAPE).unwrap(), Mailbox::new(SLOTS).unwrap());
        let pages = Region::private(SHAPE).unwrap();
        fill(&region, UNTOUCHED);
        fill(&pages, 7);
        let adapters = adapters(&["rxe0"]);
        let (source, target) =
            (Source::new(&adapters, &pages).unwrap(), Target::new(&adapters, &region, &mailbox).unwrap());
        let (granted, lane) = connect(&source, &target, change);
        Self { region, mailbox, granted, lane, source, target }
    }

    fn is_untouched(&self) -> bool {
        (0..SHAPE.layers).all(|number| layer(&self.region, number).iter().all(|&byte| byte == UNTOUCHED))
    }
}

/// Waits until all that was added is complete.
pub(super) fn settle(lane: &mut RdmaLane) -> io::Result<()> {
    lane.ring()?;
    let started = Instant::now();
    while lane.completed()? < lane.added() {
        assert!(started.elapsed() < PATIENCE, "requests are never complete");
        std::thread::yield_now();
    }
    Ok(())
}

fn page_of(pages: u32) -> Piece {
    Piece { offset: 0, bytes: pages * SHAPE.page_bytes as u32 }
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_write_lands_where_it_should_and_nowhere_else() {
    let mut ends = Ends::new();
    ends.lane.write(3 * SHAPE.page_bytes as u64, &[page_of(2)]);
    ends.lane.word(MailboxSlot(2), MailboxWord::new(epoch(5), Status::Done));
    settle(&mut ends.lane).unwrap();
    assert_eq!(ends.mailbox.load(MailboxSlot(2)).status_of(epoch(5)), Some(Status::Done));
    assert_eq!(ends.mailbox.load(MailboxSlot(1)), MailboxWord::EMPTY);
    for page in 0..SHAPE.pages as u32 {
        let expected = if (3..5).contains(&page) { 7 } else { UNTOUCHED };
        assert_eq!(content(&ends.region, 0, page), Some(expected), "page {page}");
    }
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_wrong_key_a_wrong_address_and_one_beyond_the_region_are_refused_and_the_next_connection_works() {
    let total = SHAPE.total_bytes() as u64;
    type Change = fn(&mut Offer);
    let changes: [(&str, Change, u64); 3] = [
        ("a wrong key", |offer| offer.region_key ^= 0x0101_0101, 0),
        ("a wrong address", |offer| offer.region_address -= 1 << 30, 0),
        ("beyond the region", |_| (), total - SHAPE.page_bytes as u64 / 2),
    ];
    for (what, change, to) in changes {
        let mut ends = Ends::told(change);
        ends.lane.write(to, &[page_of(1)]);
        let error = settle(&mut ends.lane).unwrap_err().to_string();
        assert!(error.contains("refused the address or the key"), "{what}: {error}");
        // The connection is over: not even what would be right goes through it.
        ends.lane.write(0, &[page_of(1)]);
        assert!(settle(&mut ends.lane).is_err());
        assert!(ends.is_untouched(), "{what}");
        let (granted, mut lane) = connect(&ends.source, &ends.target, |_| ());
        lane.write(0, &[page_of(1)]);
        settle(&mut lane).unwrap();
        assert_eq!(content(&ends.region, 0, 0), Some(7));
        granted.end().unwrap().settle().unwrap();
    }
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn after_the_fence_nothing_lands_whatever_is_posted() {
    let mut ends = Ends::new();
    // Full of writes, so that some are under way when the fence falls.
    while ends.lane.room() > 0 {
        ends.lane.write(0, &[page_of(16)]);
        ends.lane.ring().unwrap();
    }
    ends.granted.end().unwrap().settle().unwrap();
    let (before, word) = (layer(&ends.region, 0), ends.mailbox.load(MailboxSlot(0)));
    fill(&ends.region, UNTOUCHED);
    assert!(settle(&mut ends.lane).is_err(), "writes that were under way fail");
    ends.lane.write(0, &[page_of(1)]);
    ends.lane.word(MailboxSlot(0), MailboxWord::new(epoch(1), Status::Done));
    assert!(settle(&mut ends.lane).is_err(), "and so do later ones");
    assert!(before.iter().all(|&byte| byte == 7 || byte == UNTOUCHED));
    assert_eq!(ends.mailbox.load(MailboxSlot(0)), word);
    let landed = (0..SHAPE.layers).any(|number| layer(&ends.region, number).iter().any(|&byte| byte != UNTOUCHED));
    assert!(!landed, "a write landed after the fence");
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_fence_ends_one_connection_and_no_other() {
    let ends = Ends::new();
    let (_granted, mut lane) = connect(&ends.source, &ends.target, |_| ());
    ends.granted.end().unwrap().settle().unwrap();
    lane.write(0, &[page_of(1)]);
    settle(&mut lane).unwrap();
    assert_eq!(content(&ends.region, 0, 0), Some(7));
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_word_of_another_epoch_counts_for_nothing() {
    let mut ends = Ends::new();
    ends.lane.word(MailboxSlot(0), MailboxWord::new(epoch(1), Status::Done));
    settle(&mut ends.lane).unwrap();
    assert_eq!(ends.mailbox.load(MailboxSlot(0)).status_of(epoch(2)), None);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_device_that_is_not_there_is_named() {
    let wish = Wish { devices: vec!["mlx5_7".into()], gid_index: None };
    let Err(error) = Adapters::open(&wish) else { panic!("there is one") };
    assert!(matches!(error, RdmaError::Choose(_)) && error.to_string().contains("rxe0"), "{error}");
}

/// A decode worker over RDMA.
struct Decode {
    region: Region,
    mailbox: Mailbox,
    server: SessionServer,
    events: tokio::sync::mpsc::UnboundedReceiver<SessionEvent>,
    _folder: tempfile::TempDir,
}

impl Decode {
    async fn start(shape: RegionShape, devices: &[&str]) -> Self {
        Self::start_with(shape, devices, |_| ()).await
    }

    async fn start_with(shape: RegionShape, devices: &[&str], change: impl FnOnce(&mut ServerConfig)) -> Self {
        let (region, mailbox) = (Region::shared(shape).unwrap(), Mailbox::new(SLOTS).unwrap());
        fill(&region, UNTOUCHED);
        let folder = tempfile::tempdir().unwrap();
        let mut config = server_config(folder.path().to_path_buf());
        config.rdma = Some(Target::new(&adapters(devices), &region, &mailbox).unwrap());
        config.tcp_pages = false;
        change(&mut config);
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let sink = Arc::new(move |event| drop(sender.send(event)));
        let server = SessionServer::start(config, region.clone(), mailbox.clone(), sink).await.unwrap();
        Self { region, mailbox, server, events, _folder: folder }
    }

    async fn event(&mut self) -> SessionEvent {
        soon(self.events.recv()).await.unwrap()
    }

    async fn opened(&mut self) -> SessionId {
        match self.event().await {
            SessionEvent::Opened { session, peer } => {
                assert_eq!(peer.transport, Transport::Rdma);
                session
            }
            other => panic!("no session: {other:?}"),
        }
    }

    fn lend(&self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        let pages = (0..self.region.shape().pages as u32).collect::<Vec<_>>();
        self.server.lend(session, slot, epoch, pages.into());
    }

    /// Polls the mailbox as an engine thread does.
    async fn word(&self, slot: MailboxSlot, epoch: Epoch) -> Status {
        soon(async {
            loop {
                if let Some(status) = self.mailbox.load(slot).status_of(epoch) {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }
}

/// A prefill worker over RDMA and nothing else: its connector, and its pages.
fn prefill(shape: RegionShape, devices: &[&str]) -> (Connector, Region) {
    let region = Region::private(shape).unwrap();
    for number in 0..shape.layers {
        for page in 0..shape.pages as u32 {
            fill_page(&region, number, page, mark(number, page));
        }
    }
    let rdma = Some(Source::new(&adapters(devices), &region).unwrap());
    let config = crate::transfer::ConnectorConfig { shm: false, rdma, tcp: false, ..connector_config(Transport::Rdma) };
    (Connector::new(config, region.clone()).unwrap(), region)
}

/// What the prefill worker's page is full of.
fn mark(layer: usize, page: u32) -> u8 {
    (layer as u8).wrapping_mul(67).wrapping_add(page as u8) % 200
}

async fn session(decode: &mut Decode, connector: &Connector) -> (SessionId, Session) {
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
    assert_eq!(session.transport(), Transport::Rdma);
    (decode.opened().await, session)
}

async fn pages_of_this_size_arrive(page_bytes: usize, to: &[&str], from: &[&str]) {
    let shape = RegionShape { layers: 3, pages: 12, page_bytes };
    let mut decode = Decode::start(shape, to).await;
    let (connector, _) = prefill(shape, from);
    let (id, session) = session(&mut decode, &connector).await;
    decode.lend(id, MailboxSlot(1), epoch(3));
    // Neighbours, single pages, in another order here than there, and gaps between them.
    let pages = [(0, 1), (1, 2), (5, 4), (3, 6), (2, 7), (9, 11)];
    let copies: Vec<_> = (0..shape.layers as u32)
        .flat_map(|layer| pages.map(|(local, remote)| PageCopy { layer, local, remote }))
        .collect();
    write(&session.writer(), MailboxSlot(1), epoch(3), copies).await.unwrap();
    complete(&session.writer(), MailboxSlot(1), epoch(3), Status::Done).await.unwrap();
    assert_eq!(decode.word(MailboxSlot(1), epoch(3)).await, Status::Done);
    for number in 0..shape.layers {
        for page in 0..shape.pages as u32 {
            let written = pages.iter().find(|(_, remote)| *remote == page);
            let expected = written.map_or(UNTOUCHED, |&(local, _)| mark(number, local));
            assert_eq!(content(&decode.region, number, page), Some(expected), "{page_bytes} bytes: {number}, {page}");
        }
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn pages_of_every_size_arrive_and_leave_gaps_alone() {
    for page_bytes in [64, 512, 4096, 24 << 10, 64 << 10, 1 << 20, (1 << 20) + 64, 3 << 20] {
        pages_of_this_size_arrive(page_bytes, &["rxe0"], &["rxe0"]).await;
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn pages_go_from_one_adapter_to_another_and_over_several_at_once() {
    pages_of_this_size_arrive(64 << 10, &["rxw0"], &["rxw1"]).await;
    pages_of_this_size_arrive(64 << 10, &["rxw0", "rxw1"], &["rxw1", "rxw0"]).await;
    // As many as the side with fewer has.
    pages_of_this_size_arrive(4096, &["rxw0"], &["rxw1", "rxe0"]).await;
    pages_of_this_size_arrive(4096, &["rxw0", "rxe0"], &["rxw1"]).await;
}

/// Many handoffs, each of some random pages with new contents; what the word finds is looked at at once.
async fn handoffs_arrive_whole(rounds: u32, to: &[&str], from: &[&str]) {
    let mut random = rand::rngs::StdRng::seed_from_u64(20_261_128);
    let mut decode = Decode::start(SHAPE, to).await;
    let (connector, pages) = prefill(SHAPE, from);
    let (id, session) = session(&mut decode, &connector).await;
    let mut there: Vec<u32> = (0..SHAPE.pages as u32).collect();
    for round in 1..=rounds {
        let (slot, epoch) = (MailboxSlot(round % SLOTS), epoch(round));
        there.shuffle(&mut random);
        let count = random.random_range(1..6);
        let copies: Vec<_> =
            all_layers(&there[..count].iter().zip(0..).map(|(&to, from)| (from, to)).collect::<Vec<_>>())
                .into_iter()
                .filter(|copy| copy.layer < SHAPE.layers as u32)
                .collect();
        let byte =
            |copy: &PageCopy| (round as u8).wrapping_mul(31).wrapping_add(copy.layer as u8 * 16 + copy.local as u8);
        for copy in &copies {
            fill_page(&pages, copy.layer as usize, copy.local, byte(copy));
        }
        decode.lend(id, slot, epoch);
        let writer = session.writer();
        writer.write(slot, epoch, copies.clone(), |_| ());
        let completed = tokio::spawn(async move { complete(&writer, slot, epoch, Status::Done).await });
        // What the word finds is looked at before anything else is waited for.
        assert_eq!(decode.word(slot, epoch).await, Status::Done);
        for copy in &copies {
            let found = content(&decode.region, copy.layer as usize, copy.remote);
            assert_eq!(found, Some(byte(copy)), "round {round}: the word came before its pages");
        }
        completed.await.unwrap().unwrap();
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn ten_thousand_handoffs_arrive_whole() {
    handoffs_arrive_whole(10_000, &["rxe0"], &["rxe0"]).await;
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn handoffs_over_two_adapters_arrive_whole() {
    handoffs_arrive_whole(500, &["rxw0", "rxw1"], &["rxw1", "rxw0"]).await;
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_loan_that_is_taken_back_gets_no_more_and_the_session_goes_on() {
    let shape = RegionShape { layers: 2, pages: 64, page_bytes: 64 << 10 };
    let mut decode = Decode::start(shape, &["rxe0"]).await;
    let (connector, _) = prefill(shape, &["rxe0"]);
    let (id, session) = session(&mut decode, &connector).await;
    decode.lend(id, MailboxSlot(0), epoch(1));
    let copies: Vec<_> = (0..64).map(|page| PageCopy { layer: 0, local: page, remote: page }).collect();
    let (done, mut answers) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..20 {
        let done = done.clone();
        session.writer().write(MailboxSlot(0), epoch(1), copies.clone(), move |result| {
            let _ = done.send(result);
        });
    }
    soon(async {
        while content(&decode.region, 0, 0) != Some(mark(0, 0)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    decode.server.revoke(id, MailboxSlot(0), epoch(1));
    assert_eq!(decode.event().await, SessionEvent::Revoked { session: id, slot: MailboxSlot(0), epoch: epoch(1) });
    fill(&decode.region, UNTOUCHED);
    let mut revoked = 0;
    for _ in 0..20 {
        revoked += usize::from(soon(answers.recv()).await.unwrap() == Err(WriteError::Revoked));
    }
    assert!(revoked > 0, "nothing was under way");
    assert_eq!(write(&session.writer(), MailboxSlot(0), epoch(1), copies.clone()).await, Err(WriteError::Revoked));
    assert!(layer(&decode.region, 0).iter().all(|&byte| byte == UNTOUCHED));
    write(&session.writer(), MailboxSlot(0), epoch(2), copies).await.unwrap();
    complete(&session.writer(), MailboxSlot(0), epoch(2), Status::Done).await.unwrap();
    assert_eq!(content(&decode.region, 0, 1), Some(mark(0, 1)));
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_connection_that_ends_amid_a_handoff_is_fenced_at_once_and_the_next_one_works() {
    let shape = RegionShape { layers: 2, pages: 64, page_bytes: 64 << 10 };
    let mut decode = Decode::start(shape, &["rxe0"]).await;
    let (connector, _) = prefill(shape, &["rxe0"]);
    let (id, first) = session(&mut decode, &connector).await;
    decode.lend(id, MailboxSlot(0), epoch(1));
    let pages = |layer| (0..64).map(move |page| PageCopy { layer, local: page, remote: page });
    let (done, mut answers) = tokio::sync::mpsc::unbounded_channel();
    for layer in [0, 1, 0, 1, 0, 1] {
        let done = done.clone();
        first.writer().write(MailboxSlot(0), epoch(1), pages(layer).collect(), move |result| {
            let _ = done.send(result);
        });
    }
    // Some of it has landed, most has not.
    soon(async {
        while content(&decode.region, 0, 0) != Some(mark(0, 0)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    decode.server.fence(id);
    assert_eq!(decode.event().await, SessionEvent::Closed { session: id });
    assert_eq!(decode.event().await, SessionEvent::Fenced { session: id });
    fill(&decode.region, UNTOUCHED);
    let mut failed = 0;
    for _ in 0..6 {
        failed += usize::from(soon(answers.recv()).await.unwrap().is_err());
    }
    assert!(failed > 0, "nothing was under way");
    assert!((0..2).all(|number| layer(&decode.region, number).iter().all(|&byte| byte == UNTOUCHED)));
    let (_, second) = session(&mut decode, &connector).await;
    write(&second.writer(), MailboxSlot(0), epoch(2), pages(0).collect()).await.unwrap();
    assert_eq!(content(&decode.region, 0, 63), Some(mark(0, 63)));
}

const ADDRESSES: &str = "ENGINE_RDMA_TEST_ADDRESSES";

/// Another process: the prefill worker of the test below. Killed when dropped.
struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What it does; without addresses it is a test that tests nothing.
#[tokio::test]
#[ignore = "the other process of a test"]
async fn child() {
    let Ok(addresses) = std::env::var(ADDRESSES) else { return };
    let addresses: SessionAddresses = serde_json::from_str(&addresses).unwrap();
    let (connector, _) = prefill(SHAPE, &["rxe0"]);
    let session = connector.connect(&addresses, WorkerId(1)).await.unwrap();
    let copies = |page| vec![PageCopy { layer: 0, local: page, remote: page }];
    println!("writing");
    for page in (0..SHAPE.pages as u32).cycle() {
        write(&session.writer(), MailboxSlot(0), epoch(1), copies(page)).await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_peer_that_is_killed_amid_its_writes_is_fenced_at_once() {
    let mut decode = Decode::start(SHAPE, &["rxe0"]).await;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "transfer::rdma::tests::devices::child", "--ignored", "--nocapture"]);
    command.env(ADDRESSES, serde_json::to_string(decode.server.addresses()).unwrap());
    let mut writer = Writer(command.stdout(Stdio::piped()).spawn().unwrap());
    let id = decode.opened().await;
    decode.lend(id, MailboxSlot(0), epoch(1));
    let lines = BufReader::new(writer.0.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("writing")));
    soon(async {
        while content(&decode.region, 0, 3) != Some(mark(0, 3)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    drop(writer);
    assert_eq!(decode.event().await, SessionEvent::Closed { session: id });
    assert_eq!(decode.event().await, SessionEvent::Fenced { session: id });
    fill(&decode.region, UNTOUCHED);
    let (connector, _) = prefill(SHAPE, &["rxe0"]);
    let (_, session) = session(&mut decode, &connector).await;
    write(&session.writer(), MailboxSlot(0), epoch(2), vec![PageCopy { layer: 1, local: 0, remote: 0 }]).await.unwrap();
    assert!(layer(&decode.region, 0).iter().all(|&byte| byte == UNTOUCHED));
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn adapters_that_do_not_reach_each_other_leave_tcp_if_that_is_allowed() {
    // rxe0 is on the loopback interface, from which no packet leads to rxw0's address.
    let mut decode = Decode::start_with(SHAPE, &["rxw0"], |config| config.tcp_pages = true).await;
    let (connector, region) = prefill(SHAPE, &["rxe0"]);
    let refused = soon(connector.connect(decode.server.addresses(), WorkerId(1))).await;
    let Err(ConnectError::Rdma(_) | ConnectError::Refused(_)) = refused else { panic!("a session that cannot be") };
    let rdma = Some(Source::new(&adapters(&["rxe0"]), &region).unwrap());
    let config = crate::transfer::ConnectorConfig { shm: false, rdma, tcp: true, ..connector_config(Transport::Rdma) };
    let connector = Connector::new(config, region).unwrap();
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(1))).await.unwrap();
    assert_eq!(session.transport(), Transport::Tcp);
    drop((session, decode.events.close()));
}
