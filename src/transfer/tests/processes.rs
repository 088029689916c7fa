//! Sessions between two processes, one of which is killed, stopped, or does not keep the rules. The other process is
//! this test binary again, running [`child`].

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use super::support::*;
use crate::handoff::{MailboxSlot, SessionId, Status, WorkerId};
use crate::transfer::handshake;
use crate::transfer::socket::Socket;
use crate::transfer::{ClusterToken, ConnectError, Region, SessionAddresses, SessionEvent, Transport, WriteError};

#[path = "../../../tests/program/signal.rs"]
mod signal;

const ROLE: &str = "ENGINE_TRANSFER_TEST_ROLE";
const ADDRESSES: &str = "ENGINE_TRANSFER_TEST_ADDRESSES";
const PAGES: u32 = 32;

/// Another process. Killed when dropped.
struct Process {
    child: Child,
    stdin: ChildStdin,
}

impl Process {
    fn start(role: &str, addresses: Option<&SessionAddresses>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "transfer::tests::processes::child", "--nocapture"]).env(ROLE, role);
        command.env(ADDRESSES, serde_json::to_string(&addresses).unwrap());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Self { stdin: child.stdin.take().unwrap(), child }
    }

    fn signal(&self, name: &str) {
        signal::send(self.child.id(), name);
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Lets a process that waits in [`await_go`] go on.
    fn go(&mut self) {
        self.stdin.write_all(b"go\n").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the other process does; without a role it is a test that tests nothing.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let addresses = serde_json::from_str(&std::env::var(ADDRESSES).unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        match (role.as_str(), addresses) {
            ("write for ever", Some(addresses)) => write_for_ever(addresses).await,
            ("complete rounds", Some(addresses)) => complete_rounds(addresses).await,
            ("leave without unmapping", Some(addresses)) => leave_without_unmapping(addresses).await,
            ("decode", None) => decode().await,
            (other, _) => panic!("no role {other}"),
        }
    });
}

fn await_go() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
}

/// Writes the same pages until the session ends, and then lives on.
async fn write_for_ever(addresses: SessionAddresses) {
    let prefill = Prefill::new(Transport::Shm);
    let mut session = prefill.connector.connect(&addresses, WorkerId(1)).await.unwrap();
    assert_eq!(session.transport(), Transport::Shm);
    assert!(session.receive().await.is_some(), "the grant");
    let pages: Vec<_> = (0..PAGES).map(|page| (page, page)).collect();
    while write(&session.writer(), MailboxSlot(0), epoch(1), all_layers(&pages)).await.is_ok() {}
    await_go();
}

/// Answers each message with all pages and a completion.
async fn complete_rounds(addresses: SessionAddresses) {
    let prefill = Prefill::new(Transport::Shm);
    let mut session = prefill.connector.connect(&addresses, WorkerId(1)).await.unwrap();
    let pages: Vec<_> = (0..PAGES).map(|page| (PAGES - 1 - page, page)).collect();
    for round in 1.. {
        if session.receive().await.is_none() {
            return;
        }
        session.writer().write(MailboxSlot(0), epoch(round), all_layers(&pages), |_| ());
        let _ = complete(&session.writer(), MailboxSlot(0), epoch(round), Status::Done).await;
    }
}

/// A prefill worker with a bug: it drops the connection and keeps the mapping, through which it writes much later.
async fn leave_without_unmapping(addresses: SessionAddresses) {
    let stream = tokio::net::UnixStream::connect(addresses.unix.as_ref().unwrap()).await.unwrap();
    let socket = Socket::new(stream.into_std().unwrap()).unwrap();
    let hello = hello(&addresses, Transport::Shm);
    let (_, files) = handshake::connect(&socket, &ClusterToken::new("tea"), &hello).await.unwrap();
    let region = Region::open(files.into_iter().next().unwrap(), SHAPE).unwrap();
    drop(socket);
    await_go();
    // SAFETY: within the region. That it comes too late is the point.
    unsafe { region.pages(0, 5, 1).write_bytes(99, SHAPE.page_bytes) };
    await_go();
}

/// Serves sessions until it is killed.
async fn decode() {
    let decode = Decode::start().await;
    println!("\n{}", serde_json::to_string(decode.server.addresses()).unwrap());
    std::future::pending().await
}

/// A decode worker with quick heartbeats, and a process that writes to it without end.
async fn writing() -> (Decode, Process, SessionId) {
    let mut decode = Decode::start_with(|config| {
        config.limits.heartbeat = Duration::from_millis(20);
        config.limits.missed_heartbeats = 250;
    })
    .await;
    let process = Process::start("write for ever", Some(decode.server.addresses()));
    let session = decode.opened().await;
    decode.server.lend(session, MailboxSlot(0), epoch(1), (0..PAGES).collect());
    decode.server.send(session, "grant".into());
    soon(async {
        while !holds(&decode.page(2, PAGES - 1), 2, PAGES - 1) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    (decode, process, session)
}

#[tokio::test]
async fn a_process_killed_in_the_middle_of_a_write_is_fenced() {
    let (mut decode, process, session) = writing().await;
    process.signal("KILL");
    decode.ended(session).await;
    // Now that it is fenced, the pages are this process' alone.
    // SAFETY: see above.
    unsafe { decode.region.base().write_bytes(0, SHAPE.total_bytes()) };
    assert!((0..PAGES).all(|page| decode.page(0, page).iter().all(|&byte| byte == 0)));
}

#[tokio::test]
async fn a_stopped_process_is_not_fenced_until_it_goes_on_and_lets_go() {
    let (mut decode, mut process, session) = writing().await;
    process.signal("STOP");
    assert_eq!(decode.event().await, SessionEvent::Closed { session });
    // It may still write. Meanwhile others are served.
    let other = Prefill::new(Transport::Shm);
    let (id, another) = decode.session(&other).await;
    drop(another);
    decode.ended(id).await;
    assert!(decode.no_event());
    process.signal("CONT");
    assert_eq!(decode.event().await, SessionEvent::Fenced { session });
    assert!(process.is_running());
}

#[tokio::test]
async fn a_stopped_process_that_is_killed_is_fenced() {
    let (mut decode, process, session) = writing().await;
    process.signal("STOP");
    assert_eq!(decode.event().await, SessionEvent::Closed { session });
    assert!(decode.no_event());
    process.signal("KILL");
    assert_eq!(decode.event().await, SessionEvent::Fenced { session });
}

#[tokio::test]
async fn a_revoked_loan_of_a_stopped_process_stays_unresolved() {
    let (mut decode, process, session) = writing().await;
    process.signal("STOP");
    decode.server.revoke(session, MailboxSlot(0), epoch(1));
    decode.server.fence(session);
    assert_eq!(decode.event().await, SessionEvent::Closed { session });
    assert!(decode.no_event());
    process.signal("KILL");
    assert_eq!(decode.event().await, SessionEvent::Fenced { session });
}

#[tokio::test]
async fn a_process_that_closed_its_session_can_still_write_so_its_pages_are_not_fenced() {
    let mut decode = Decode::start().await;
    let mut process = Process::start("leave without unmapping", Some(decode.server.addresses()));
    let session = decode.opened().await;
    assert_eq!(decode.event().await, SessionEvent::Closed { session });
    process.go();
    soon(async {
        while decode.page(0, 5)[SHAPE.page_bytes - 1] != 99 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(decode.no_event(), "it was not fenced, and it did write");
    process.go();
    assert_eq!(decode.event().await, SessionEvent::Fenced { session });
}

#[tokio::test]
async fn whoever_reads_the_word_reads_the_pages() {
    let mut decode = Decode::start().await;
    let _process = Process::start("complete rounds", Some(decode.server.addresses()));
    let session = decode.opened().await;
    for round in 1..=200 {
        // SAFETY: the last loan is completed and the next not made.
        unsafe { decode.region.base().write_bytes(0, SHAPE.total_bytes()) };
        decode.server.lend(session, MailboxSlot(0), epoch(round), (0..PAGES).collect());
        decode.server.send(session, "grant".into());
        let (mailbox, region) = (decode.mailbox.clone(), decode.region.clone());
        let seen = tokio::task::spawn_blocking(move || {
            while mailbox.load(MailboxSlot(0)).status_of(epoch(round)).is_none() {
                std::hint::spin_loop();
                std::thread::yield_now();
            }
            // The bytes written last first.
            (0..SHAPE.layers).rev().all(|layer| {
                let length = PAGES as usize * SHAPE.page_bytes;
                // SAFETY: the loan is completed: nobody writes.
                let bytes = unsafe { std::slice::from_raw_parts(region.pages(layer, 0, PAGES as usize), length) };
                (0..PAGES).rev().all(|page| {
                    let start = page as usize * SHAPE.page_bytes;
                    holds(&bytes[start..start + SHAPE.page_bytes], layer, PAGES - 1 - page)
                })
            })
        });
        assert!(soon(seen).await.unwrap(), "round {round}");
    }
}

#[tokio::test]
async fn the_death_of_a_decode_worker_ends_sessions_and_writes() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let mut process = Process::start("decode", None);
        let lines = BufReader::new(process.child.stdout.take().unwrap()).lines();
        let addresses = lines.map(Result::unwrap).find(|line| line.starts_with('{')).unwrap();
        let addresses: SessionAddresses = serde_json::from_str(&addresses).unwrap();
        let prefill = Prefill::new(transport);
        let mut session = soon(prefill.connector.connect(&addresses, WorkerId(1))).await.unwrap();
        process.signal("KILL");
        assert_eq!(soon(session.receive()).await, None);
        let result = write(&session.writer(), MailboxSlot(0), epoch(1), all_layers(&[(0, 0)])).await;
        assert_eq!(result, Err(WriteError::Closed));
        let again = soon(prefill.connector.connect(&addresses, WorkerId(1))).await;
        assert!(matches!(again, Err(ConnectError::Io(_))));
        // What a killed worker leaves behind is removed by the next one that starts there.
        let unix = addresses.unix.unwrap();
        assert!(unix.exists());
        let folder = unix.parent().unwrap().to_path_buf();
        let _next = Decode::start_with(|config| config.unix = Some(folder.clone())).await;
        assert!(!unix.exists());
        std::fs::remove_dir_all(folder).unwrap();
    }
}

/// Runs as root only: others cannot become somebody else.
#[tokio::test]
async fn another_user_is_refused_shared_memory() {
    use std::os::unix::fs::PermissionsExt;

    if !rustix::process::geteuid().is_root() {
        return;
    }
    let decode = Decode::start().await;
    let mut addresses = decode.server.addresses().clone();
    addresses.tcp = None;
    for path in [decode.folder.path(), addresses.unix.as_deref().unwrap()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let other = std::thread::spawn(move || {
        const NOBODY: libc::c_long = 65534;
        // SAFETY: takes numbers and touches no memory. The bare system call changes this thread's user alone.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) }, 0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let path = addresses.unix.as_ref().unwrap();
            let socket = Socket::new(tokio::net::UnixStream::connect(path).await.unwrap().into_std().unwrap()).unwrap();
            let hello = hello(&addresses, Transport::Shm);
            handshake::connect(&socket, &ClusterToken::new("tea"), &hello).await.map(|_| ())
        })
    });
    let refused = tokio::task::spawn_blocking(|| other.join().unwrap()).await.unwrap().unwrap_err();
    assert!(matches!(refused, ConnectError::Refused(crate::transfer::Refusal::User)), "{refused}");
}

/// A loan over shm is given back by a peer that is alive when asked, without a fence: see `sessions`. Here the peer is
/// another process in the middle of its copies.
#[tokio::test]
async fn a_running_process_stops_writing_when_its_loan_is_revoked() {
    let (mut decode, mut process, session) = writing().await;
    decode.server.revoke(session, MailboxSlot(0), epoch(1));
    let revoked = SessionEvent::Revoked { session, slot: MailboxSlot(0), epoch: epoch(1) };
    assert_eq!(decode.event().await, revoked);
    // SAFETY: the loan is resolved: the pages are this process' alone.
    unsafe { decode.region.base().write_bytes(0, SHAPE.total_bytes()) };
    let (lent, another) = (Arc::from([40]), epoch(2));
    decode.server.lend(session, MailboxSlot(0), another, lent);
    process.go();
    // Its end is the end of its session.
    decode.ended(session).await;
    assert!((0..PAGES).all(|page| decode.page(0, page).iter().all(|&byte| byte == 0)));
}
