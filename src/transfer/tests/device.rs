//! Pages in the memory of an emulated device, which does what it is told as late as it may: whoever does not wait for
//! what computes a page sends what was there before.

use std::sync::Arc;
use std::time::Instant;

use engine_cuda_emulated::Emulated;
use engine_kernels::DeviceRegion;
use engine_kernels::cuda::{Driver, Memory};
use tokio::sync::oneshot;

use super::support::*;
use crate::handoff::{MailboxSlot, Status, WorkerId};
use crate::transfer::{
    ConnectError, Connector, ConnectorConfig, Exported, Limits, LocalPages, PageCopy, RegionShape, SessionEvent,
    StagingRing, Transport, WriteError,
};

/// Pages on the device.
pub(in crate::transfer) struct Pages {
    driver: Emulated,
    pub(in crate::transfer) region: DeviceRegion,
    memory: Arc<dyn Memory>,
}

impl Pages {
    pub(in crate::transfer) fn new(driver: &Emulated) -> Self {
        let memory: Arc<dyn Memory> = Arc::new(driver.allocate(DeviceRegion::bytes(SHAPE)).unwrap());
        let region = DeviceRegion::new(memory.clone(), driver.mover(), SHAPE);
        Self { driver: driver.clone(), region, memory }
    }

    /// Enqueues what "computes" all pages: the prefill worker's pattern, or none.
    pub(in crate::transfer) fn compute(&self, patterned: bool) {
        let host = self.driver.allocate_host(SHAPE.total_bytes()).unwrap();
        let host: &'static _ = Box::leak(Box::new(host));
        for layer in 0..SHAPE.layers {
            for page in 0..SHAPE.pages {
                let byte = if patterned { pattern(layer, page as u32) } else { 0 };
                let at = SHAPE.offset(layer, page, 1);
                // SAFETY: within the memory, which nobody else has and which stays.
                unsafe {
                    let start = engine_kernels::cuda::HostMemory::start(host).add(at);
                    start.write_bytes(byte, SHAPE.page_bytes);
                }
            }
        }
        self.driver.upload(host, self.memory.address(), SHAPE.total_bytes()).unwrap();
    }

    pub(in crate::transfer) fn page(&self, layer: usize, page: u32) -> Vec<u8> {
        let mut bytes = vec![0; SHAPE.page_bytes];
        let at = SHAPE.offset(layer, page as usize, 1);
        self.driver.read(self.memory.address().offset(at), &mut bytes).unwrap();
        bytes
    }
}

/// A prefill worker whose pages are computed, but not yet: with room for so many staged pages of each layer.
fn prefill(transport: Transport, driver: &Emulated, staged: usize) -> (Pages, Connector) {
    let pages = Pages::new(driver);
    pages.compute(true);
    let bytes = staged * SHAPE.layers * SHAPE.page_bytes;
    let ring = StagingRing::new(pages.region.clone(), bytes).unwrap();
    let config = ConnectorConfig { tcp: transport == Transport::Tcp, ..connector_config(transport) };
    (pages, Connector::new(config, LocalPages::Device(ring)).unwrap())
}

/// All layers of all pages, so that they end up in another order.
pub(in crate::transfer) fn everything() -> Vec<PageCopy> {
    let pages: Vec<_> = (0..SHAPE.pages as u32).map(|page| (page, (page * 7 + 3) % SHAPE.pages as u32)).collect();
    all_layers(&pages)
}

#[tokio::test]
async fn pages_are_staged_when_they_are_computed_whatever_way_they_go_and_through_however_little_room() {
    for transport in [Transport::Shm, Transport::Tcp] {
        for staged in [1, 5, 64] {
            let driver = Emulated::default();
            let (_pages, connector) = prefill(transport, &driver, staged);
            let mut decode = Decode::start().await;
            let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
            let id = decode.opened().await;
            assert_eq!(session.transport(), transport);
            let (slot, epoch) = (MailboxSlot(1), epoch(1));
            decode.server.lend(id, slot, epoch, (0..SHAPE.pages as u32).collect());
            let writer = session.writer();
            // Not awaited: the order of the calls is enough, for messages too.
            writer.write(slot, epoch, everything(), |result| assert!(result.is_ok()));
            session.send("behind the pages".into());
            complete(&writer, slot, epoch, Status::Done).await.unwrap();
            assert_eq!(decode.mailbox.load(slot).status_of(epoch), Some(Status::Done));
            for PageCopy { layer, local, remote } in everything() {
                assert!(holds(&decode.page(layer as usize, remote), layer as usize, local), "{transport:?} {staged}");
            }
            assert_eq!(decode.message().await, "behind the pages");
        }
    }
}

/// A decode worker whose pages other processes may open, and a session to it.
async fn exporting(driver: &Emulated) -> (Pages, Decode) {
    exporting_to(driver, Limits::default().sessions).await
}

/// The same, with room for so many sessions.
async fn exporting_to(driver: &Emulated, sessions: usize) -> (Pages, Decode) {
    let pages = Pages::new(driver);
    pages.compute(false);
    let exported = Exported::new(&pages.region).unwrap();
    let decode = Decode::start_with(|config| {
        config.cuda = Some(exported);
        config.limits.sessions = sessions;
    })
    .await;
    (pages, decode)
}

#[tokio::test]
async fn pages_go_from_device_to_device_when_they_are_computed_and_before_the_word() {
    let driver = Emulated::default();
    let (written, mut decode) = exporting(&driver).await;
    let (_pages, connector) = prefill(Transport::CudaIpc, &driver, 1);
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
    let id = decode.opened().await;
    assert_eq!(session.transport(), Transport::CudaIpc);
    assert_eq!(decode.server.transport(id), Some(Transport::CudaIpc));
    assert_eq!(driver.open_handles(), 1);
    let (slot, epoch) = (MailboxSlot(2), epoch(4));
    let writer = session.writer();
    writer.write(slot, epoch, everything(), |result| assert!(result.is_ok()));
    complete(&writer, slot, epoch, Status::Done).await.unwrap();
    assert_eq!(decode.mailbox.load(slot).status_of(epoch), Some(Status::Done));
    for PageCopy { layer, local, remote } in everything() {
        assert!(holds(&written.page(layer as usize, remote), layer as usize, local));
    }
    // Nothing went where other sessions' pages arrive.
    assert!(decode.page(0, 0).iter().all(|&byte| byte == 0));
    drop(session);
    decode.ended(id).await;
    assert_eq!(driver.open_handles(), 0, "fenced when it is closed, not before");
}

#[tokio::test]
async fn memory_that_takes_too_long_to_open_is_closed_and_its_session_gives_its_place_back_when_it_is_open() {
    let driver = Emulated::default();
    let (_written, mut decode) = exporting_to(&driver, 1).await;
    let (_pages, connector) = prefill(Transport::CudaIpc, &driver, 1);
    let addresses = decode.server.addresses().clone();
    driver.keep_busy(true);
    {
        let mut connecting = std::pin::pin!(connector.connect(&addresses, WorkerId(7)));
        let begun = async {
            while driver.open_handles() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = &mut connecting => panic!("the device is busy"),
            () = soon(begun) => {}
        }
        // As it is when its time is over.
    }
    let id = decode.opened().await;
    assert!(decode.no_event(), "whoever has it open may write there");
    driver.keep_busy(false);
    decode.ended(id).await;
    assert_eq!(driver.open_handles(), 0, "fenced when it is closed, not before");
    let session = soon(connector.connect(&addresses, WorkerId(7))).await.unwrap();
    assert_eq!(session.transport(), Transport::CudaIpc);
}

#[tokio::test]
async fn who_writes_pages_is_told_when_they_were_computed_and_not_when_the_device_was_told() {
    for transport in [Transport::CudaIpc, Transport::Shm, Transport::Tcp] {
        let driver = Emulated::default();
        let (_written, mut decode) = exporting(&driver).await;
        let (_pages, connector) = prefill(transport, &driver, 4);
        let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
        let id = decode.opened().await;
        let (slot, epoch) = (MailboxSlot(0), epoch(1));
        decode.server.lend(id, slot, epoch, (0..SHAPE.pages as u32).collect());
        driver.keep_busy(true);
        let writer = session.writer();
        let (done, wait) = oneshot::channel();
        writer.write(slot, epoch, everything(), |result| done.send(result).unwrap());
        let still_busy = Instant::now();
        driver.keep_busy(false);
        complete(&writer, slot, epoch, Status::Done).await.unwrap();
        let arrived = Instant::now();
        let computed = soon(wait).await.unwrap().unwrap();
        assert!((still_busy..arrived).contains(&computed), "{transport:?}");
    }
}

#[tokio::test]
async fn a_loan_that_is_taken_back_gets_no_further_copies_from_a_device() {
    let driver = Emulated::default();
    let (written, mut decode) = exporting(&driver).await;
    let (_pages, connector) = prefill(Transport::CudaIpc, &driver, 1);
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
    let id = decode.opened().await;
    decode.server.revoke(id, MailboxSlot(0), epoch(1));
    assert_eq!(decode.event().await, SessionEvent::Revoked { session: id, slot: MailboxSlot(0), epoch: epoch(1) });
    let writer = session.writer();
    assert_eq!(write(&writer, MailboxSlot(0), epoch(1), everything()).await, Err(WriteError::Revoked));
    assert_eq!(complete(&writer, MailboxSlot(0), epoch(1), Status::Done).await, Err(WriteError::Revoked));
    assert!(written.page(0, 3).iter().all(|&byte| byte == 0));
}

#[tokio::test]
async fn after_a_device_fails_nothing_of_the_loan_is_done_the_word_least_of_all() {
    for transport in [Transport::CudaIpc, Transport::Shm] {
        let driver = Emulated::default();
        let (_written, mut decode) = exporting(&driver).await;
        let (_pages, connector) = prefill(transport, &driver, 4);
        let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
        let id = decode.opened().await;
        let (slot, epoch) = (MailboxSlot(0), epoch(1));
        decode.server.lend(id, slot, epoch, (0..SHAPE.pages as u32).collect());
        driver.break_down();
        let writer = session.writer();
        let (done, wait) = oneshot::channel();
        writer.write(slot, epoch, everything(), |result| done.send(result.map(drop)).unwrap());
        // Handed over before anybody knows.
        assert!(complete(&writer, slot, epoch, Status::Done).await.is_err(), "{transport:?}");
        assert_eq!(soon(wait).await.unwrap(), Err(WriteError::Device), "{transport:?}");
        assert_eq!(decode.mailbox.load(slot).status_of(epoch), None, "{transport:?}");
    }
}

#[tokio::test]
async fn copies_whose_end_nobody_can_tell_end_the_session_and_leave_the_fence_to_the_end_of_the_process() {
    let driver = Emulated::default();
    let (_written, mut decode) = exporting(&driver).await;
    let (_pages, connector) = prefill(Transport::CudaIpc, &driver, 1);
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
    let id = decode.opened().await;
    let (slot, epoch) = (MailboxSlot(0), epoch(1));
    decode.server.lend(id, slot, epoch, (0..SHAPE.pages as u32).collect());
    driver.lose_copies();
    let (done, mut answer) = oneshot::channel();
    session.writer().write(slot, epoch, everything(), |result| done.send(result.map(drop)).unwrap());
    assert_eq!(decode.event().await, SessionEvent::Closed { session: id });
    assert_eq!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty), "the pages may still be read and written");
    assert_eq!(driver.open_handles(), 1, "and the memory is not closed, of which the decode worker would hear");
    assert_eq!(decode.mailbox.load(slot).status_of(epoch), None);
}

#[tokio::test]
async fn pages_are_staged_where_the_other_device_cannot_be_reached_or_opened_unless_that_is_forbidden() {
    let here = Emulated::default();
    // Another device of the same name, whose allocations are none of this one's.
    let there = Emulated::default();
    let (_written, mut decode) = exporting(&there).await;
    let mut unseen = decode.server.addresses().clone();
    unseen.cuda = Some(format!("GPU-{}", "00".repeat(16)));
    let (_pages, connector) = prefill(Transport::CudaIpc, &here, 4);
    for addresses in [&unseen, decode.server.addresses()] {
        let refused = soon(connector.connect(addresses, WorkerId(1))).await.err().unwrap();
        assert!(matches!(refused, ConnectError::Device(_)), "{refused}");
    }
    // Of the two, one did open a session, and says that it has nothing open.
    let id = decode.opened().await;
    decode.ended(id).await;

    let (_pages, region) = (Pages::new(&here), Pages::new(&here).region);
    let ring = StagingRing::new(region, 1).unwrap();
    let config = ConnectorConfig { shm: true, ..connector_config(Transport::CudaIpc) };
    let connector = Connector::new(config, LocalPages::Device(ring)).unwrap();
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(1))).await.unwrap();
    assert_eq!(session.transport(), Transport::Shm);
}

#[tokio::test]
async fn a_session_that_ends_while_pages_wait_to_be_staged_answers_for_all_of_them() {
    let driver = Emulated::default();
    let (_pages, connector) = prefill(Transport::Tcp, &driver, 1);
    let mut decode = Decode::start_with(|config| config.limits = Limits { frame_bytes: 1, ..config.limits }).await;
    let session = soon(connector.connect(decode.server.addresses(), WorkerId(7))).await.unwrap();
    let id = decode.opened().await;
    // Nothing is lent: the first page ends the session. The others may have left by the time that is known here.
    let writer = session.writer();
    let written = write(&writer, MailboxSlot(0), epoch(1), everything()).await;
    assert!(matches!(written, Ok(()) | Err(WriteError::Closed)), "{written:?}");
    assert_eq!(complete(&writer, MailboxSlot(0), epoch(1), Status::Done).await, Err(WriteError::Closed));
    decode.ended(id).await;
}

#[tokio::test]
async fn pages_of_another_size_never_go_from_device_to_device() {
    let driver = Emulated::default();
    let (_written, decode) = exporting(&driver).await;
    let shape = RegionShape { page_bytes: 2 * SHAPE.page_bytes, ..SHAPE };
    let memory: Arc<dyn Memory> = Arc::new(driver.allocate(DeviceRegion::bytes(shape)).unwrap());
    let ring = StagingRing::new(DeviceRegion::new(memory, driver.mover(), shape), 1).unwrap();
    let config = ConnectorConfig { tcp: false, ..connector_config(Transport::CudaIpc) };
    let connector = Connector::new(config, LocalPages::Device(ring)).unwrap();
    let refused = soon(connector.connect(decode.server.addresses(), WorkerId(1))).await.err().unwrap();
    assert!(matches!(refused, ConnectError::Refused(crate::transfer::Refusal::Layout)), "{refused}");
}
