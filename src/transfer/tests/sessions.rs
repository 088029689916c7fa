//! What sessions are for, over each transport, both ends in this process.

use std::sync::Arc;

use bytes::Bytes;

use super::support::*;
use crate::handoff::{MailboxSlot, MailboxWord, Status};
use crate::transfer::{SessionEvent, Transport, WriteError};

const BOTH: [Transport; 2] = [Transport::Shm, Transport::Tcp];

#[tokio::test]
async fn pages_arrive_before_the_word_that_says_so() {
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new(transport));
        let (id, session) = decode.session(&prefill).await;
        assert_eq!(session.transport(), transport);
        let (slot, epoch) = (MailboxSlot(5), epoch(3));
        // Neighbours and strays, backwards and forwards.
        let pages = [(0, 10), (1, 11), (2, 12), (40, 3), (39, 2), (7, 63)];
        decode.server.lend(id, slot, epoch, pages.map(|(_, remote)| remote).into());
        let writer = session.writer();
        // Not awaited: the order of the calls is enough.
        writer.write(slot, epoch, all_layers(&pages), |result| assert!(result.is_ok()));
        complete(&writer, slot, epoch, Status::Done).await.unwrap();
        assert_eq!(decode.mailbox.load(slot).status_of(epoch), Some(Status::Done));
        for layer in 0..SHAPE.layers {
            for (local, remote) in pages {
                assert!(holds(&decode.page(layer, remote), layer, local), "{transport:?} {layer} {remote}");
            }
            assert!(decode.page(layer, 13).iter().all(|&byte| byte == 0), "a page nobody wrote");
        }
        let bytes = (pages.len() * SHAPE.layers * SHAPE.page_bytes) as u64;
        assert_eq!(prefill.metrics.bytes.with_label_values(&[transport.name()]).get(), bytes);
        assert_eq!(prefill.metrics.seconds.with_label_values(&[transport.name()]).get_sample_count(), 1);
        assert_eq!(prefill.metrics.fallbacks.get(), u64::from(transport == Transport::Tcp));
        drop(session);
        decode.ended(id).await;
    }
}

#[tokio::test]
async fn messages_go_both_ways_in_order_up_to_their_limit() {
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new(transport));
        let (id, mut session) = decode.session(&prefill).await;
        // The tokens of a prompt of 200,000, and then some.
        let long: Bytes = (0..1u32 << 20).map(|i| i as u8).collect();
        for message in [Bytes::from_static(b"claim"), long.clone(), Bytes::new()] {
            assert!(session.send(message.clone()));
            assert_eq!(decode.message().await, message);
            decode.server.send(id, message.clone());
            assert_eq!(soon(session.receive()).await, Some(message));
        }
        let too_long = Bytes::from(vec![0; (16 << 20) + 1]);
        assert!(!session.send(too_long.clone()) && !session.writer().send_ahead(too_long), "larger than the limit");
        assert!(session.send(Bytes::from_static(b"still there")));
        decode.message().await;
    }
}

#[tokio::test]
async fn a_message_does_not_overtake_the_pages_written_before_it() {
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new(transport));
        let (id, session) = decode.session(&prefill).await;
        let pages: Vec<_> = (0..64).map(|page| (page, page)).collect();
        for round in 1..20 {
            let (slot, epoch) = (MailboxSlot(0), epoch(round));
            decode.server.lend(id, slot, epoch, (0..64).collect());
            session.writer().write(slot, epoch, all_layers(&pages), |result| assert!(result.is_ok()));
            session.send(Bytes::from_static(b"released"));
            decode.message().await;
            assert!(holds(&decode.page(2, 63), 2, 63), "{transport:?}");
            // SAFETY: the peer has said that it writes no more.
            unsafe { decode.region.pages(2, 63, 1).write_bytes(0, SHAPE.page_bytes) };
        }
    }
}

#[tokio::test]
async fn a_sign_of_life_overtakes_pages_that_are_still_to_be_sent() {
    let (mut decode, prefill) = (Decode::start().await, Prefill::new(Transport::Tcp));
    let (id, session) = decode.session(&prefill).await;
    let (slot, epoch, writer) = (MailboxSlot(0), epoch(1), session.writer());
    let pages: Vec<_> = (0..64).map(|page| (page, page)).collect();
    decode.server.lend(id, slot, epoch, (0..64).collect());
    // In one go: the session's task has not looked in between.
    writer.write(slot, epoch, all_layers(&pages), |result| assert!(result.is_ok()));
    writer.send("released".into());
    assert!(writer.send_ahead("alive".into()));
    assert_eq!([decode.message().await, decode.message().await], ["alive", "released"]);
    assert!(holds(&decode.page(2, 63), 2, 63));
}

#[tokio::test]
async fn a_revoked_loan_is_written_to_no_more() {
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new(transport));
        let (id, session) = decode.session(&prefill).await;
        let (slot, epoch, writer) = (MailboxSlot(1), epoch(1), session.writer());
        decode.server.lend(id, slot, epoch, Arc::from([4, 5]));
        write(&writer, slot, epoch, all_layers(&[(4, 4)])).await.unwrap();
        decode.server.revoke(id, slot, epoch);
        assert_eq!(decode.event().await, SessionEvent::Revoked { session: id, slot, epoch });
        // Once the peer knows, it does not try; until then, it is in vain.
        while write(&writer, slot, epoch, all_layers(&[(5, 5)])).await != Err(WriteError::Revoked) {}
        assert_eq!(complete(&writer, slot, epoch, Status::Done).await, Err(WriteError::Revoked));
        assert!(decode.page(0, 5).iter().all(|&byte| byte == 0));
        assert_eq!(decode.mailbox.load(slot), MailboxWord::EMPTY);
        // The slot's next loan is none of that one's business.
        decode.server.lend(id, slot, epoch.next(), Arc::from([5]));
        write(&writer, slot, epoch.next(), all_layers(&[(5, 5)])).await.unwrap();
        complete(&writer, slot, epoch.next(), Status::Failed).await.unwrap();
        assert_eq!(decode.mailbox.load(slot).status_of(epoch.next()), Some(Status::Failed));
        assert!(holds(&decode.page(1, 5), 1, 5));
    }
}

#[tokio::test]
async fn a_fenced_session_ends_on_both_sides() {
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new(transport));
        let (id, mut session) = decode.session(&prefill).await;
        decode.server.fence(id);
        // Over shm that needs the peer's help, which it gives.
        decode.ended(id).await;
        assert_eq!(soon(session.receive()).await, None);
        let writer = session.writer();
        assert_eq!(write(&writer, MailboxSlot(0), epoch(1), all_layers(&[(0, 0)])).await, Err(WriteError::Closed));
        assert_eq!(complete(&writer, MailboxSlot(0), epoch(1), Status::Done).await, Err(WriteError::Closed));
        assert!(!writer.send(Bytes::new()) && !writer.send_ahead(Bytes::new()));
        // A new one is a new one.
        let (again, _session) = decode.session(&prefill).await;
        assert_ne!(again, id);
    }
}

#[tokio::test]
async fn what_one_side_does_not_have_is_refused_before_anything_is_written() {
    let smaller = crate::transfer::RegionShape { pages: 10, ..SHAPE };
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new_with(smaller, connector_config(transport)));
        let (_, session) = decode.session(&prefill).await;
        let writer = session.writer();
        for (local, remote) in [(10, 0), (0, 64)] {
            let result = write(&writer, MailboxSlot(0), epoch(1), all_layers(&[(1, 1), (local, remote)])).await;
            assert_eq!(result, Err(WriteError::OutOfRange));
        }
        assert_eq!(write(&writer, MailboxSlot(SLOTS), epoch(1), vec![]).await, Err(WriteError::OutOfRange));
        assert_eq!(complete(&writer, MailboxSlot(SLOTS), epoch(1), Status::Done).await, Err(WriteError::OutOfRange));
        assert!(decode.page(0, 1).iter().all(|&byte| byte == 0));
    }
}

#[tokio::test]
async fn several_sessions_share_a_copier_and_a_server() {
    for transport in BOTH {
        let (mut decode, prefill) = (Decode::start().await, Prefill::new(transport));
        let mut sessions = Vec::new();
        for slot in 0..4 {
            let (id, session) = decode.session(&prefill).await;
            decode.server.lend(id, MailboxSlot(slot), epoch(1), (slot * 16..slot * 16 + 16).collect());
            sessions.push(session);
        }
        let writes = sessions.iter().zip(0..).map(|(session, slot)| async move {
            let pages: Vec<_> = (slot * 16..slot * 16 + 16).map(|page| (page, page)).collect();
            write(&session.writer(), MailboxSlot(slot), epoch(1), all_layers(&pages)).await.unwrap();
            complete(&session.writer(), MailboxSlot(slot), epoch(1), Status::Done).await.unwrap();
        });
        futures::future::join_all(writes).await;
        for page in 0..64 {
            assert!(holds(&decode.page(2, page), 2, page));
        }
    }
}

#[tokio::test]
async fn both_sides_of_an_idle_session_know_that_the_other_lives() {
    for transport in BOTH {
        let quick = std::time::Duration::from_millis(10);
        let mut decode = Decode::start_with(|config| config.limits.heartbeat = quick).await;
        let prefill = Prefill::new(transport);
        let (_, mut session) = decode.session(&prefill).await;
        // More heartbeats than may be missed, on this same clock.
        let mut beats = tokio::time::interval(quick);
        for _ in 0..150 {
            beats.tick().await;
        }
        assert!(decode.no_event());
        decode.server.send(crate::handoff::SessionId(1), Bytes::from_static(b"hello"));
        assert_eq!(soon(session.receive()).await, Some(Bytes::from_static(b"hello")));
    }
}
