//! Who is turned away, and what ends a session.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use super::support::*;
use crate::handoff::{MailboxSlot, MailboxWord, SessionId, Status, WorkerId};
use crate::transfer::frame::{Frame, Loan, Run};
use crate::transfer::handshake::{self, Hello, VERSION};
use crate::transfer::socket::Socket;
use crate::transfer::{
    ClusterToken, ConnectError, ConnectorConfig, Refusal, RegionShape, SessionAddresses, SessionEvent, Transport,
};

const BOTH: [Transport; 2] = [Transport::Shm, Transport::Tcp];

/// A connection to the server's TCP port.
async fn tcp(decode: &Decode) -> TcpStream {
    TcpStream::connect(decode.server.addresses().tcp.as_deref().unwrap()).await.unwrap()
}

/// A TCP peer that says what the test wants.
async fn raw(decode: &mut Decode) -> (SessionId, Socket) {
    let socket = Socket::new(tcp(decode).await.into_std().unwrap()).unwrap();
    handshake::connect(&socket, &ClusterToken::new("tea"), &hello(decode.server.addresses(), Transport::Tcp))
        .await
        .unwrap();
    (decode.opened().await, socket)
}

/// Waits until the server has hung up.
async fn hung_up(socket: &Socket) {
    let mut buffer = [0; 1024];
    while soon(socket.read(&mut buffer)).await.is_ok() {}
}

fn data(loan: Loan, layer: u32, page: u32, count: u32) -> Vec<u8> {
    let mut bytes = Frame::Data(loan, vec![Run { layer, page, count }]).encode().to_vec();
    bytes.resize(bytes.len() + count as usize * SHAPE.page_bytes, 7);
    bytes
}

#[tokio::test]
async fn another_token_is_refused_by_either_side() {
    for transport in BOTH {
        let decode = Decode::start().await;
        let mut config = connector_config(transport);
        config.token = ClusterToken::new("coffee");
        let prefill = Prefill::new_with(SHAPE, config);
        let refused = soon(prefill.connector.connect(decode.server.addresses(), WorkerId(1))).await.err().unwrap();
        assert!(matches!(refused, ConnectError::Token), "{refused}");
        // A peer that does not care whether the server knows the token gets no further.
        let hello = hello(decode.server.addresses(), Transport::Tcp);
        let socket = Socket::new(tcp(&decode).await.into_std().unwrap()).unwrap();
        let refused = handshake::connect_unchecked(&socket, &ClusterToken::new("coffee"), &hello).await.err().unwrap();
        assert!(matches!(refused, ConnectError::Refused(Refusal::Token)), "{refused}");
        assert!(decode.metrics.refused.get() >= 1);
    }
}

#[tokio::test]
async fn whoever_does_not_fit_is_told_why() {
    for transport in BOTH {
        let decode = Decode::start().await;
        let refusal = async |shape, change: fn(&mut crate::transfer::ConnectorConfig)| {
            let mut config = connector_config(transport);
            change(&mut config);
            let prefill = Prefill::new_with(shape, config);
            match soon(prefill.connector.connect(decode.server.addresses(), WorkerId(1))).await {
                Err(ConnectError::Refused(refusal)) => refusal,
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("it was taken"),
            }
        };
        assert_eq!(refusal(SHAPE, |config| config.model_key = "another".into()).await, Refusal::ModelKey);
        assert_eq!(refusal(RegionShape { layers: 4, ..SHAPE }, |_| ()).await, Refusal::Layout);
        assert_eq!(refusal(RegionShape { page_bytes: 8192, ..SHAPE }, |_| ()).await, Refusal::Layout);
    }
}

#[tokio::test]
async fn another_version_is_refused_by_name() {
    let decode = Decode::start().await;
    let socket = Socket::new(tcp(&decode).await.into_std().unwrap()).unwrap();
    let future = Hello { version: VERSION + 1, ..hello(decode.server.addresses(), Transport::Tcp) };
    let refused = handshake::connect(&socket, &ClusterToken::new("tea"), &future).await.err().unwrap();
    assert!(matches!(refused, ConnectError::Refused(Refusal::Version { ours: VERSION })), "{refused}");
}

#[tokio::test]
async fn a_server_that_restarted_under_the_same_address_is_not_the_one_that_was_meant() {
    let decode = Decode::start().await;
    let mut addresses = decode.server.addresses().clone();
    addresses.instance = "of the last run".into();
    for transport in BOTH {
        let prefill = Prefill::new(transport);
        let refused = soon(prefill.connector.connect(&addresses, WorkerId(1))).await.err().unwrap();
        assert!(matches!(refused, ConnectError::Refused(Refusal::Instance)), "{refused}");
    }
}

#[tokio::test]
async fn tcp_takes_over_where_the_unix_socket_cannot_be_reached() {
    let mut decode = Decode::start().await;
    let (addresses, prefill) = (decode.server.addresses().clone(), Prefill::new(Transport::Shm));
    let nowhere = decode.folder.path().join("nowhere.sock");
    let other_host = crate::transfer::SessionAddresses { host: "another".into(), ..addresses.clone() };
    let hidden = crate::transfer::SessionAddresses { unix: Some(nowhere), ..addresses.clone() };
    for (count, addresses) in [(1, other_host), (2, hidden)] {
        let session = soon(prefill.connector.connect(&addresses, WorkerId(1))).await.unwrap();
        decode.opened().await;
        assert_eq!(session.transport(), Transport::Tcp);
        assert_eq!(prefill.metrics.fallbacks.get(), count);
        drop(session);
        assert!(matches!(decode.event().await, SessionEvent::Closed { .. }));
        decode.event().await;
    }
    let nothing = crate::transfer::SessionAddresses { tcp: None, unix: None, ..addresses };
    assert!(matches!(prefill.connector.connect(&nothing, WorkerId(1)).await, Err(ConnectError::NoAddress)));
}

#[tokio::test]
async fn a_server_takes_so_many_sessions() {
    let mut decode = Decode::start_with(|config| config.limits.sessions = 1).await;
    let prefill = Prefill::new(Transport::Shm);
    let (id, session) = decode.session(&prefill).await;
    let refused = soon(prefill.connector.connect(decode.server.addresses(), WorkerId(1))).await.err().unwrap();
    assert!(matches!(refused, ConnectError::Refused(Refusal::Busy)), "{refused}");
    drop(session);
    decode.ended(id).await;
    decode.session(&prefill).await;
}

#[tokio::test]
async fn a_peer_that_leaves_before_it_has_the_memory_gives_the_place_back() {
    let mut decode = Decode::start_with(|config| config.limits.sessions = 1).await;
    let (prefill, addresses) = (Prefill::new(Transport::Shm), decode.server.addresses().clone());
    let left = {
        let mut connecting = std::pin::pin!(prefill.connector.connect(&addresses, WorkerId(1)));
        tokio::select! {
            biased;
            id = decode.opened() => id,
            _ = &mut connecting => panic!("it has the memory before there is a session"),
        }
        // As it is when its time is over.
    };
    decode.ended(left).await;
    decode.session(&prefill).await;
}

#[tokio::test]
async fn garbage_on_the_port_is_hung_up_on() {
    let decode = Decode::start().await;
    let unix = decode.server.addresses().unix.clone().unwrap();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0; 64],
        &[0xff; 4096],
        b"EkvS\xff\xff\xff\xff",
        b"EkvS\x04\0\0\0abcd",
    ] {
        let mut stream = tcp(&decode).await;
        stream.write_all(garbage).await.unwrap();
        // Reset counts as hung up: there may be garbage it did not read.
        let _ = soon(stream.read_to_end(&mut Vec::new())).await;
        let mut stream = UnixStream::connect(&unix).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let _ = soon(stream.read_to_end(&mut Vec::new())).await;
    }
    assert_eq!(decode.metrics.refused.get(), 10);
}

#[tokio::test]
async fn who_leaves_without_a_word_is_nobody_and_who_leaves_amid_the_first_is_counted() {
    let decode = Decode::start().await;
    for (refused, words) in [(0, &b""[..]), (1, b"E"), (2, b"EkvS\x40\0\0\0half of a hello")] {
        let mut stream = tcp(&decode).await;
        stream.write_all(words).await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = soon(stream.read_to_end(&mut Vec::new())).await;
        assert_eq!(decode.metrics.refused.get(), refused, "{words:?}");
    }
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_hung_up_on() {
    let decode = Decode::start_with(|config| config.limits.handshake = Duration::from_millis(10)).await;
    let mut stream = tcp(&decode).await;
    soon(stream.read_to_end(&mut Vec::new())).await.unwrap();
    assert_eq!(decode.metrics.refused.get(), 1);
}

#[tokio::test]
async fn strangers_that_fill_the_door_keep_out_nobody_who_knows_the_token() {
    for transport in BOTH {
        // They would stay for as long as they like.
        let mut decode = Decode::start_with(|config| {
            config.limits.handshakes = 3;
            config.limits.handshake = Duration::from_secs(24 * 60 * 60);
        })
        .await;
        let (prefill, mut strangers) = (Prefill::new(transport), Vec::new());
        for _ in 0..3 {
            strangers.push(tcp(&decode).await);
        }
        let (id, mut session) = decode.session(&prefill).await;
        // It needs no place any more, however many come.
        for _ in 0..4 {
            strangers.push(tcp(&decode).await);
        }
        // They are accepted in order, and those that came first make room.
        let latest = strangers.split_off(4);
        for mut oldest in strangers {
            soon(oldest.read_to_end(&mut Vec::new())).await.unwrap();
        }
        for latest in latest {
            let socket = Socket::new(latest.into_std().unwrap()).unwrap();
            let hello = hello(decode.server.addresses(), Transport::Tcp);
            soon(handshake::connect(&socket, &ClusterToken::new("tea"), &hello)).await.unwrap();
            decode.opened().await;
            drop(socket);
            assert!(matches!(decode.event().await, SessionEvent::Closed { .. }));
            assert!(matches!(decode.event().await, SessionEvent::Fenced { .. }));
        }
        decode.server.send(id, "still here".into());
        assert_eq!(soon(session.receive()).await.unwrap(), "still here");
        assert_eq!(decode.metrics.refused.get(), 4);
    }
}

#[tokio::test]
async fn writes_outside_of_what_was_lent_end_the_session_and_touch_nothing() {
    let (slot, lent) = (MailboxSlot(2), epoch(4));
    let bad: [(&str, Vec<u8>); 9] = [
        ("never lent", data((slot, lent), 0, 9, 1)),
        ("half lent", data((slot, lent), 0, 10, 3)),
        ("another slot's", data((MailboxSlot(3), lent), 0, 10, 1)),
        ("an earlier epoch's", data((slot, epoch(3)), 0, 10, 1)),
        ("a later epoch's", data((slot, epoch(5)), 0, 10, 1)),
        ("a layer too many", data((slot, lent), 3, 10, 1)),
        ("beyond the memory", data((slot, lent), 0, u32::MAX, 1)),
        (
            "another loan's word",
            Frame::Complete((MailboxSlot(3), lent), MailboxWord::new(lent, Status::Done)).encode().to_vec(),
        ),
        (
            "another epoch's word",
            Frame::Complete((slot, lent), MailboxWord::new(epoch(9), Status::Done)).encode().to_vec(),
        ),
    ];
    let mut decode = Decode::start().await;
    for (refused, (what, bytes)) in (1..).zip(bad) {
        let (id, socket) = raw(&mut decode).await;
        decode.server.lend(id, slot, lent, Arc::from([10, 11]));
        // The loan stands before anything is sent under it.
        decode.server.send(id, "lent".into());
        let mut message = [0; 20];
        soon(socket.read_exact(&mut message)).await.unwrap();
        let _ = socket.write_all(&bytes).await;
        hung_up(&socket).await;
        decode.ended(id).await;
        assert_eq!(decode.metrics.refused.get(), refused, "{what}");
        for layer in 0..SHAPE.layers {
            for page in 0..SHAPE.pages as u32 {
                assert!(decode.page(layer, page).iter().all(|&byte| byte == 0), "{what}: {layer} {page}");
            }
        }
        assert!((0..SLOTS).all(|slot| decode.mailbox.load(MailboxSlot(slot)) == MailboxWord::EMPTY), "{what}");
    }
}

#[tokio::test]
async fn frames_that_a_prefill_worker_has_no_business_with_end_the_session() {
    let mut decode = Decode::start().await;
    let loan = (MailboxSlot(0), epoch(1));
    for frame in [Frame::Revoke(loan), Frame::Completed(loan, true), Frame::Unmapped, Frame::Stopped(loan)] {
        let (id, socket) = raw(&mut decode).await;
        socket.write_all(&frame.encode()).await.unwrap();
        hung_up(&socket).await;
        decode.ended(id).await;
    }
    // A message beyond the limit is refused by its header, not read.
    let (id, socket) = raw(&mut decode).await;
    let mut header = Frame::Message(bytes::Bytes::new()).encode().to_vec();
    header[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    socket.write_all(&header).await.unwrap();
    decode.ended(id).await;
}

#[tokio::test]
async fn a_loan_revoked_in_the_middle_of_a_frame_gets_not_a_byte_more() {
    let mut decode = Decode::start().await;
    let (id, socket) = raw(&mut decode).await;
    let (loan, pages) = ((MailboxSlot(0), epoch(1)), [20, 21, 22, 23]);
    decode.server.lend(id, loan.0, loan.1, Arc::from(pages));
    let frame = data(loan, 1, 20, 4);
    let (first, rest) = frame.split_at(frame.len() - 2 * SHAPE.page_bytes);
    socket.write_all(first).await.unwrap();
    // Until the half that was sent has landed.
    soon(async {
        while decode.page(1, 21)[SHAPE.page_bytes - 1] != 7 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    decode.server.revoke(id, loan.0, loan.1);
    assert_eq!(decode.event().await, SessionEvent::Revoked { session: id, slot: loan.0, epoch: loan.1 });
    socket.write_all(rest).await.unwrap();
    // What follows on the connection is understood: the rest of the frame was read, and went elsewhere.
    socket.write_all(&Frame::Stopped(loan).encode()).await.unwrap();
    socket.write_all(&Frame::Message("hello".into()).encode()).await.unwrap();
    assert_eq!(&decode.message().await[..], b"hello");
    assert!(decode.page(1, 22).iter().chain(&decode.page(1, 23)).all(|&byte| byte == 0));
    // And after it stopped, the loan is none.
    socket.write_all(&data(loan, 1, 20, 1)).await.unwrap();
    decode.ended(id).await;
}

#[tokio::test]
async fn a_loan_that_was_given_back_lets_nobody_write() {
    let mut decode = Decode::start().await;
    let (id, socket) = raw(&mut decode).await;
    let loan = (MailboxSlot(0), epoch(1));
    decode.server.lend(id, loan.0, loan.1, Arc::from([20]));
    decode.server.forget(id, loan.0, loan.1);
    // A peer that keeps its word writes nothing more; this one does.
    socket.write_all(&data(loan, 1, 20, 1)).await.unwrap();
    decode.ended(id).await;
    assert!(decode.page(1, 20).iter().all(|&byte| byte == 0));
}

#[tokio::test]
async fn a_peer_that_hangs_is_noticed_by_either_side() {
    // The decode worker notices: this peer opens a session and then says nothing.
    let mut decode = Decode::start_with(|config| {
        config.limits.heartbeat = Duration::from_millis(10);
        config.limits.missed_heartbeats = 3;
    })
    .await;
    let (id, socket) = raw(&mut decode).await;
    decode.server.lend(id, MailboxSlot(0), epoch(1), Arc::from([1]));
    socket.write_all(&data((MailboxSlot(0), epoch(1)), 0, 1, 1)[..4000]).await.unwrap();
    decode.ended(id).await;
    // The prefill worker notices: what answers here opens a session and then says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = crate::transfer::SessionAddresses {
        tcp: Some(listener.local_addr().unwrap().to_string()),
        unix: None,
        ..decode.server.addresses().clone()
    };
    let server = async {
        let socket = Socket::new(listener.accept().await.unwrap().0.into_std().unwrap()).unwrap();
        handshake::accept(&socket, &ClusterToken::new("tea"), |_| Ok(())).await.unwrap();
        let limits = (64, SLOTS, 1 << 20, 1 << 20, 1 << 20, 10, 3);
        let (pages, slots, message_bytes, queued_bytes, frame_bytes, heartbeat_ms, missed_heartbeats) = limits;
        let welcome = handshake::Welcome {
            device: None,
            rdma: Vec::new(),
            pages,
            slots,
            message_bytes,
            queued_bytes,
            frame_bytes,
            heartbeat_ms,
            missed_heartbeats,
        };
        handshake::welcome(&socket, welcome, &[]).await.unwrap();
        socket
    };
    let prefill = Prefill::new(Transport::Tcp);
    let (session, _silent) = tokio::join!(prefill.connector.connect(&addresses, WorkerId(1)), server);
    let mut session = session.unwrap();
    assert_eq!(soon(session.receive()).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_decode_worker_that_does_not_answer_is_not_called_again_for_a_while() {
    // Whoever calls there gets a connection, and no word.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let calls = || std::iter::from_fn(|| listener.accept().ok()).count();
    let addresses = SessionAddresses {
        host: "another".into(),
        instance: "silent".into(),
        unix: None,
        cuda: None,
        tcp: Some(listener.local_addr().unwrap().to_string()),
        tls: false,
        rdma: Vec::new(),
    };
    let config = ConnectorConfig { timeout: Duration::from_secs(5), ..connector_config(Transport::Tcp) };
    let connector = Prefill::new_with(SHAPE, config).connector;
    let failed = async || connector.connect(&addresses, WorkerId(1)).await.err().unwrap();
    for pause in [5, 10, 10].map(Duration::from_secs) {
        let error = failed().await;
        assert!(matches!(error, ConnectError::TimedOut), "{error}");
        assert_eq!((calls(), connector.pause(&addresses)), (1, pause));
        let error = failed().await;
        assert!(matches!(error, ConnectError::Silent), "{error}");
        assert_eq!((calls(), connector.pause(&addresses)), (0, pause), "none but the first is a call");
        tokio::time::advance(pause).await;
    }
    // That nobody is there is an answer.
    drop(listener);
    let error = failed().await;
    assert!(matches!(error, ConnectError::Io(_)), "{error}");
    assert!(connector.pause(&addresses).is_zero());
}

#[tokio::test]
async fn a_peer_that_takes_no_messages_is_given_up() {
    let mut decode = Decode::start_with(|config| config.limits.queued_bytes = 32 << 20).await;
    let (id, _socket) = raw(&mut decode).await;
    for _ in 0..4 {
        decode.server.send(id, vec![0; 15 << 20].into());
    }
    decode.ended(id).await;
    // Nor is a message sent that the peer would not take.
    let (id, _socket) = raw(&mut decode).await;
    decode.server.send(id, vec![0; (16 << 20) + 1].into());
    decode.ended(id).await;
}
