//! The append and the page protocol, and PostgreSQL's as followers speak it.

use wire::{
    append::{
        BatchAssembler, BatchFrames, Frame, FrameReader, FrameType, MessageType, WireError, decode, encode_to_vec,
    },
    page::{self, MetadataJoin, PageFrame, PageFrameReader, PageMessage, PageMessageType},
    postgres::{
        FrontendMessage, MAX_MESSAGE_BYTES, MessageReader, StartupMessage, decode_copy, options_setting, parse_command,
        scram::{self, ChannelBinding, Verifier},
    },
};

/// First byte: the type of a message. The rest is its body.
///
/// Rule: what can be read is written in a form that is read alike.
pub fn fuzz_append_message(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    let kind = MessageType::ALL[usize::from(*kind) % MessageType::ALL.len()];
    if body.len() > kind.max_body_bytes() as usize {
        return;
    }
    let Ok(message) = decode(Frame { message: kind, body }) else { return };
    let bytes = encode_to_vec(&message).expect("what was accepted can be sent");
    let mut reader = FrameReader::new();
    reader.feed(&bytes);
    let frame = reader.next().expect("our own header").expect("a whole frame");
    assert_eq!(Ok(message), decode(frame));
}

/// First byte: where the stream is cut. The rest is the stream.
///
/// Rule: frames do not depend on how the stream is cut, and an error stays.
pub fn fuzz_append_stream(data: &[u8]) {
    let Some((cut, stream)) = data.split_first() else { return };
    let read = |chunk: usize| {
        let (mut reader, mut frames) = (FrameReader::new(), Vec::new());
        for bytes in stream.chunks(chunk) {
            let mut buffer = reader.take_buffer(true);
            buffer.extend_from_slice(bytes);
            reader.return_buffer(buffer);
            loop {
                match reader.next() {
                    Ok(Some(frame)) => frames.push((frame.message, frame.body.to_vec())),
                    Ok(None) => break,
                    Err(error) => return (frames, Some::<WireError>(error)),
                }
            }
        }
        (frames, None)
    };
    assert_eq!(read(stream.len().max(1)), read(usize::from(*cut) + 1));
}

/// Messages of a feed, each as type (1 byte), length (2 bytes), body.
///
/// Rule: a batch that is put together is sent in frames that give the same batch.
pub fn fuzz_feed(data: &[u8]) {
    let (mut assembler, mut rest) = (BatchAssembler::new(), data);
    while let Some(([kind, low, high], behind)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
        let (body, behind) = behind.split_at(length);
        rest = behind;
        let message = match kind % 3 {
            0 => MessageType::FeedBatch,
            1 => MessageType::FeedItems,
            _ => MessageType::FeedProgress,
        };
        let Ok(message) = decode(Frame { message, body }) else { return };
        match assembler.take(&message) {
            Ok(Some(batch)) => {
                let (mut frames, mut again) = (BatchFrames::new(batch.clone()), BatchAssembler::new());
                let mut reader = FrameReader::new();
                let mut found = None;
                while let Some(frame) = frames.next_frame().expect("what was accepted can be sent") {
                    reader.feed(&frame);
                    let frame = reader.next().expect("our own header").expect("a whole frame");
                    found = again.take(&decode(frame).expect("our own body")).expect("our own pieces");
                }
                assert_eq!(Some(batch), found);
            }
            Ok(None) => {}
            Err(_) => return,
        }
    }
}

/// First byte: the type of a message of the page protocol. The rest is its body.
///
/// Rules: what can be read is written in a form that is read alike; an answer is joined or refused.
pub fn fuzz_page_message(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    let kind = PageMessageType::ALL[usize::from(*kind) % PageMessageType::ALL.len()];
    if body.len() > kind.max_body_bytes() as usize {
        return;
    }
    let Ok(message) = page::decode(PageFrame { message: kind, body }) else { return };
    let bytes = page::encode_to_vec(&message).expect("what was accepted can be sent");
    let mut reader = PageFrameReader::default();
    reader.feed(&bytes);
    let frame = reader.next().expect("our own header").expect("a whole frame");
    assert_eq!(Ok(&message), page::decode(frame).as_ref());
    if let PageMessage::MetadataPart(part) = &message
        && let Ok(Some((_, values))) = MetadataJoin::default().add(part)
    {
        assert!(part.last && values.is_sorted_by(|a, b| a.0 < b.0));
    }
}

/// What a client sends before and after its login.
///
/// Rule: messages do not depend on how the stream is cut, and the buffer stays within its bound.
pub fn fuzz_postgres_session(data: &[u8]) {
    let Some((cut, stream)) = data.split_first() else { return };
    let read = |chunk: usize| {
        let (mut reader, mut seen, mut started) = (MessageReader::new(), Vec::new(), false);
        for bytes in stream.chunks(chunk) {
            reader.feed(bytes);
            while !started {
                match reader.next_startup() {
                    Ok(Some(StartupMessage::Startup(startup))) => {
                        let options = startup.parameter("options").unwrap_or_default();
                        seen.push(format!("{startup:?} {:?}", options_setting(options, "lakebase.log")));
                        started = true;
                    }
                    Ok(Some(other)) => seen.push(format!("{other:?}")),
                    Ok(None) => break,
                    Err(error) => {
                        seen.push(error.to_string());
                        return seen;
                    }
                }
            }
            while started {
                let ready = reader.is_message_ready();
                match reader.next() {
                    Ok(Some(message)) => {
                        assert!(ready);
                        seen.push(match message {
                            FrontendMessage::Query(query) => format!("{:?}", parse_command(query)),
                            FrontendMessage::CopyData(data) => format!("{:?}", decode_copy(data)),
                            FrontendMessage::Authentication(data) => format!("{:?}", scram::initial_response(data)),
                            other => format!("{other:?}"),
                        });
                    }
                    Ok(None) => {
                        assert!(!ready);
                        break;
                    }
                    Err(error) => {
                        assert!(ready);
                        seen.push(error.to_string());
                        return seen;
                    }
                }
            }
        }
        assert!(reader.take_buffer().len() <= MAX_MESSAGE_BYTES + stream.len().min(chunk));
        seen
    };
    assert_eq!(read(stream.len().max(1)), read(usize::from(*cut) + 1));
}

/// A stored verifier, the client's first and its last message, separated by newlines.
///
/// Rule: nobody gets in without the password, which is in none of the inputs.
pub fn fuzz_scram(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let (Some(stored), Some(first), Some(last)) = (parts.next(), parts.next(), parts.next()) else { return };
    if let Ok(stored) = core::str::from_utf8(stored)
        && let Ok(verifier) = stored.parse::<Verifier>()
    {
        assert_eq!(Ok(verifier.clone()), verifier.to_string().parse());
    }
    let secret = [7; 32];
    for (mechanism, binding) in
        [(scram::MECHANISM, ChannelBinding::None), (scram::MECHANISM_PLUS, ChannelBinding::Offered(b"hash"))]
    {
        let verifier = Verifier::mock("nobody", &secret);
        if let Ok((exchange, _)) = scram::start(mechanism, first, verifier, &[9; scram::NONCE_BYTES], binding) {
            assert!(exchange.finish(last).is_err());
        }
    }
}
