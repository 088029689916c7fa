//! Adapters that read and write the memory of a CUDA device: real verbs devices, those of the emulated machine that
//! `make test-rdma` starts, and an emulated CUDA device, whose memory they find by its address and which does what it
//! is told as late as it may.

use std::sync::Arc;

use engine_cuda_emulated::Emulated;
use engine_kernels::cuda::AdapterAccess;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;

use super::devices::{adapters, settle};
use crate::handoff::{MailboxSlot, SessionId, Status, WorkerId};
use crate::transfer::rdma::{Granted, Lane, Piece, RdmaLane, Reached, Registration, Source, Target};
use crate::transfer::tests::device::{Pages, everything};
use crate::transfer::tests::support::{
    SHAPE, SLOTS, complete, connector_config, epoch, holds, server_config, soon, write,
};
use crate::transfer::{
    Connector, ConnectorConfig, LocalPages, Mailbox, PageCopy, Region, RegionShape, Session, SessionEvent,
    SessionServer, StagingRing, Transport, WriteError,
};

/// soft-RoCE takes no memory by file.
const REACHED: Reached = Reached { by: Registration::PeerMemory, flush: true };

/// A decode worker whose pages are on a device, and adapters that write to it.
struct Decode {
    pages: Pages,
    mailbox: Mailbox,
    target: Target,
    server: SessionServer,
    events: UnboundedReceiver<SessionEvent>,
    _folder: tempfile::TempDir,
}

impl Decode {
    async fn start(driver: &Emulated, devices: &[&str]) -> Self {
        let (pages, mailbox) = (Pages::new(driver), Mailbox::new(SLOTS).unwrap());
        pages.compute(false);
        assert_eq!(pages.page(0, 0), [0; SHAPE.page_bytes]);
        let (target, reached) = Target::on_device(&adapters(devices), &pages.region, &mailbox).unwrap();
        assert_eq!(reached, REACHED);
        let folder = tempfile::tempdir().unwrap();
        let mut config = server_config(folder.path().to_path_buf());
        (config.rdma, config.tcp_pages) = (Some(target.clone()), false);
        let (sender, events) = unbounded_channel();
        let sink = Arc::new(move |event| drop(sender.send(event)));
        // What stands in for pages where they do not come over RDMA has fewer of them.
        let region = Region::private(RegionShape { pages: 1, ..SHAPE }).unwrap();
        let server = SessionServer::start(config, region, mailbox.clone(), sink).await.unwrap();
        Self { pages, mailbox, target, server, events, _folder: folder }
    }

    /// Opens a session of `prefill`, and lends it everything.
    async fn session(&mut self, prefill: &Connector) -> (SessionId, Session) {
        let session = soon(prefill.connect(self.server.addresses(), WorkerId(7))).await.unwrap();
        assert_eq!(session.transport(), Transport::Rdma);
        let Some(SessionEvent::Opened { session: id, .. }) = soon(self.events.recv()).await else {
            panic!("no session")
        };
        self.server.lend(id, MailboxSlot(1), epoch(1), (0..SHAPE.pages as u32).collect());
        (id, session)
    }

    fn has_everything(&self) -> bool {
        let there =
            |PageCopy { layer, local, remote }| holds(&self.pages.page(layer as usize, remote), layer as usize, local);
        everything().into_iter().all(there)
    }
}

/// A prefill worker whose pages are on a device and computed, but not yet. What they would be staged in is left to look
/// at.
fn prefill(driver: &Emulated, devices: &[&str]) -> (Connector, Region) {
    let pages = Pages::new(driver);
    let (source, reached) = Source::on_device(&adapters(devices), &pages.region).unwrap();
    assert_eq!(reached, Reached { flush: false, ..REACHED });
    assert!(driver.is_open_to_adapters(pages.region.start()) && driver.dma_bufs() > 0, "both ways were tried");
    pages.compute(true);
    connector(source, LocalPages::Device(StagingRing::new(pages.region, 0).unwrap()))
}

fn connector(source: Source, pages: LocalPages) -> (Connector, Region) {
    let config = ConnectorConfig { shm: false, rdma: Some(source), tcp: false, ..connector_config(Transport::Rdma) };
    let host = pages.host().clone();
    (Connector::new(config, pages).unwrap(), host)
}

fn is_untouched(region: &Region) -> bool {
    // SAFETY: all of the region, to which nobody writes who keeps to his word.
    let bytes = unsafe { std::slice::from_raw_parts(region.base(), region.shape().total_bytes()) };
    bytes.iter().all(|&byte| byte == 0)
}

/// Has everything written, and the word, without waiting in between.
async fn hand_over(session: &Session) {
    let writer = session.writer();
    writer.write(MailboxSlot(1), epoch(1), everything(), |result| assert!(result.is_ok()));
    complete(&writer, MailboxSlot(1), epoch(1), Status::Done).await.unwrap();
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn adapters_take_pages_from_a_device_to_a_device_when_they_are_computed_and_none_is_staged() {
    for (to, from) in [(&["rxe0"][..], &["rxe0"][..]), (&["rxw0", "rxw1"], &["rxw1", "rxw0"])] {
        let (here, there) = (Emulated::default(), Emulated::default());
        let mut decode = Decode::start(&there, to).await;
        let (connector, ring) = prefill(&here, from);
        let (_, session) = decode.session(&connector).await;
        hand_over(&session).await;
        assert_eq!(decode.mailbox.load(MailboxSlot(1)).status_of(epoch(1)), Some(Status::Done));
        assert!(decode.has_everything(), "{to:?}");
        assert!(is_untouched(&ring), "{to:?}");
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn pages_that_are_staged_at_one_end_alone_arrive() {
    let (here, there) = (Emulated::default(), Emulated::default());
    let pages = Pages::new(&here);
    pages.compute(true);
    // Through less room than there are pages.
    let ring = StagingRing::new(pages.region.clone(), 5 * SHAPE.layers * SHAPE.page_bytes).unwrap();
    let source = Source::new(&adapters(&["rxe0"]), &LocalPages::Device(ring.clone()).host().clone()).unwrap();
    let (connector, _) = connector(source, LocalPages::Device(ring));
    let mut decode = Decode::start(&there, &["rxe0"]).await;
    let (_, session) = decode.session(&connector).await;
    hand_over(&session).await;
    assert!(decode.has_everything());
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn after_a_device_fails_adapters_bring_nothing_of_the_loan_the_word_least_of_all() {
    let (here, there) = (Emulated::default(), Emulated::default());
    let mut decode = Decode::start(&there, &["rxe0"]).await;
    let (connector, _) = prefill(&here, &["rxe0"]);
    let (_, session) = decode.session(&connector).await;
    here.break_down();
    let writer = session.writer();
    let (done, wait) = oneshot::channel();
    writer.write(MailboxSlot(1), epoch(1), everything(), |result| done.send(result.map(drop)).unwrap());
    // Handed over before anybody knows.
    assert_eq!(complete(&writer, MailboxSlot(1), epoch(1), Status::Done).await, Err(WriteError::Device));
    assert_eq!(soon(wait).await.unwrap(), Err(WriteError::Device));
    assert_eq!(decode.mailbox.load(MailboxSlot(1)).status_of(epoch(1)), None);
    assert_eq!(decode.pages.page(0, 3), [0; SHAPE.page_bytes]);
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_loan_of_device_memory_is_over_when_its_session_is_fenced() {
    let (here, there) = (Emulated::default(), Emulated::default());
    let mut decode = Decode::start(&there, &["rxe0"]).await;
    let (connector, _) = prefill(&here, &["rxe0"]);
    let (id, session) = decode.session(&connector).await;
    hand_over(&session).await;
    decode.server.fence(id);
    assert_eq!(soon(decode.events.recv()).await, Some(SessionEvent::Closed { session: id }));
    assert_eq!(soon(decode.events.recv()).await, Some(SessionEvent::Fenced { session: id }));
    decode.pages.compute(false);
    assert_eq!(write(&session.writer(), MailboxSlot(1), epoch(1), everything()).await, Err(WriteError::Closed));
    assert_eq!(decode.pages.page(0, 3), [0; SHAPE.page_bytes]);
    let (_, session) = decode.session(&connector).await;
    hand_over(&session).await;
    assert!(decode.has_everything());
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_device_that_keeps_adapters_out_is_said_to_do_so() {
    let driver = Emulated::default();
    let pages = Pages::new(&driver);
    let none = AdapterAccess { dma_buf: false, by_address: false, ordered: true, flushes: true };
    driver.set_adapter_access(none);
    let refused = Source::on_device(&adapters(&["rxe0"]), &pages.region).err().unwrap().to_string();
    assert!(refused.contains("lets no adapter reach"), "{refused}");
    driver.set_adapter_access(AdapterAccess { dma_buf: true, ..none });
    let refused = Source::on_device(&adapters(&["rxe0"]), &pages.region).err().unwrap().to_string();
    assert!(refused.contains("rxe0 takes no device memory by dma-buf"), "{refused}");
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_device_whose_memory_is_registered_and_not_reached_is_found_out() {
    let by_address = AdapterAccess { dma_buf: false, by_address: true, ordered: false, flushes: true };
    for (unseen, unreached) in [(true, false), (false, true)] {
        let driver = Emulated::default();
        let (pages, mailbox) = (Pages::new(&driver), Mailbox::new(SLOTS).unwrap());
        driver.set_adapter_access(by_address);
        driver.mislead_adapters(unseen, unreached);
        let target = Target::on_device(&adapters(&["rxe0"]), &pages.region, &mailbox).err().unwrap().to_string();
        assert!(target.contains("other bytes by nvidia-peermem"), "{target}");
        // Who is only read from need not see what is written.
        let source = Source::on_device(&adapters(&["rxe0"]), &pages.region);
        assert_eq!(source.is_err(), unseen);
    }
}

/// Pages on a device that adapters write to, and those who write, without sessions.
struct Ends {
    pages: Pages,
    target: Target,
    source: Source,
    /// Of the prefill worker.
    _from: Region,
}

impl Ends {
    fn new(devices: &[&str]) -> Self {
        let (driver, mailbox) = (Emulated::default(), Mailbox::new(SLOTS).unwrap());
        let pages = Pages::new(&driver);
        let (target, _) = Target::on_device(&adapters(devices), &pages.region, &mailbox).unwrap();
        let from = Region::private(SHAPE).unwrap();
        // SAFETY: all of the region, which is nobody else's.
        unsafe { from.base().write_bytes(7, SHAPE.total_bytes()) };
        let source = Source::new(&adapters(devices), &from).unwrap();
        Self { pages, target, source, _from: from }
    }

    fn connect(&self, lanes: usize) -> (Granted, Vec<RdmaLane>) {
        let opening = self.source.open(lanes).unwrap();
        let (granted, offers) = self.target.accept(&opening.endpoints()).unwrap();
        (granted, opening.connect(&offers).unwrap())
    }

    fn answered(&self) -> Vec<u64> {
        self.target.echoes().map(|echo| echo.unwrap().answered()).collect()
    }
}

const PAGE: Piece = Piece { offset: 0, bytes: SHAPE.page_bytes as u32 };

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn after_the_fence_nothing_lands_on_a_device_whatever_is_posted() {
    let ends = Ends::new(&["rxe0"]);
    let (granted, mut lanes) = ends.connect(1);
    let lane = &mut lanes[0];
    // Full of writes, so that some are under way when the fence falls.
    while lane.room() > 0 {
        lane.write(0, &[PAGE]);
        lane.ring().unwrap();
    }
    granted.end().unwrap().settle().unwrap();
    ends.pages.compute(false);
    assert_eq!(ends.pages.page(0, 0), [0; SHAPE.page_bytes]);
    assert!(settle(lane).is_err(), "writes that were under way fail");
    lane.write(0, &[PAGE]);
    assert!(settle(lane).is_err(), "and so do later ones");
    assert_eq!(ends.pages.page(0, 0), [0; SHAPE.page_bytes]);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_fence_reads_the_device_once_for_each_adapter_of_the_session_and_the_next_one_too() {
    let ends = Ends::new(&["rxw0", "rxw1"]);
    let before = ends.answered();
    let (one, _one) = ends.connect(1);
    let (both, _both) = ends.connect(2);
    let ended = one.end().unwrap();
    assert_eq!(ends.answered(), before);
    ended.settle().unwrap();
    assert_eq!(ends.answered(), [before[0] + 1, before[1]]);
    both.end().unwrap().settle().unwrap();
    assert_eq!(ends.answered(), [before[0] + 2, before[1] + 1]);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn an_adapter_that_loses_its_connection_with_itself_makes_another_one_for_the_fence() {
    let ends = Ends::new(&["rxe0"]);
    let [before] = ends.answered()[..] else { panic!("one adapter") };
    let (first, _first) = ends.connect(1);
    let (second, _second) = ends.connect(1);
    ends.target.echoes().for_each(|echo| echo.unwrap().break_down());
    let ended = first.end().unwrap();
    assert!(ended.settle().is_err(), "nobody knows");
    ended.settle().unwrap();
    second.end().unwrap().settle().unwrap();
    assert_eq!(ends.answered(), [before + 2]);
}

/// The same of a whole session: its fence waits and comes.
#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn sessions_are_fenced_though_the_adapter_lost_its_connection_with_itself() {
    let (here, there) = (Emulated::default(), Emulated::default());
    let mut decode = Decode::start(&there, &["rxe0"]).await;
    let (connector, _) = prefill(&here, &["rxe0"]);
    for _ in 0..2 {
        let (id, _session) = decode.session(&connector).await;
        decode.target.echoes().for_each(|echo| echo.unwrap().break_down());
        decode.server.fence(id);
        assert_eq!(soon(decode.events.recv()).await, Some(SessionEvent::Closed { session: id }));
        assert_eq!(soon(decode.events.recv()).await, Some(SessionEvent::Fenced { session: id }));
    }
}
