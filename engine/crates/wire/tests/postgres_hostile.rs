//! No bytes make a decoder of PostgreSQL's protocol panic or hold more than its bound.

use proptest::{collection::vec, prelude::*};
use wire::postgres::{
    CopyMessage, FrontendMessage, MAX_MESSAGE_BYTES, MessageReader, decode_copy, options_setting, parse_command, scram,
};

proptest! {
    #[test]
    fn any_startup(bytes in vec(any::<u8>(), 0..200), cut: usize) {
        let mut reader = MessageReader::new();
        let (first, second) = bytes.split_at(cut % (bytes.len() + 1));
        let mut results = vec![];
        for part in [first, second] {
            reader.feed(part);
            while let Ok(Some(message)) = reader.next_startup() {
                results.push(message);
            }
        }
        let mut whole = MessageReader::new();
        whole.feed(&bytes);
        let mut expected = vec![];
        while let Ok(Some(message)) = whole.next_startup() {
            expected.push(message);
        }
        prop_assert_eq!(expected, results);
    }

    #[test]
    fn any_messages(bytes in vec(any::<u8>(), 0..200)) {
        let mut reader = MessageReader::new();
        reader.feed(&bytes);
        while let Ok(Some(message)) = reader.next() {
            match message {
                FrontendMessage::CopyData(data) => {
                    let _refused_or_read: Result<CopyMessage, _> = decode_copy(data);
                }
                FrontendMessage::Authentication(data) => {
                    let _refused_or_read = scram::initial_response(data);
                }
                FrontendMessage::Query(text) => {
                    let _refused_or_read = parse_command(text);
                }
                _ => {}
            }
        }
        prop_assert!(reader.take_buffer().capacity() <= 2 * MAX_MESSAGE_BYTES);
    }

    #[test]
    fn any_command(text in "\\PC{0,80}") {
        let _refused_or_read = parse_command(&text);
        let _found_or_not = options_setting(&text, "lakebase.log");
    }

    #[test]
    fn commands_of_the_right_words(
        words in vec(proptest::sample::select(vec![
            "START_REPLICATION", "SLOT", "\"s\"", "s", "PHYSICAL", "0/0", "TIMELINE", "1", "(", ")", ",", "RESERVE_WAL",
            "CREATE_REPLICATION_SLOT", "TEMPORARY", "'x'", "SHOW", "a.b", ";", "DROP_REPLICATION_SLOT", "WAIT",
        ]), 0..8),
    ) {
        let _refused_or_read = parse_command(&words.join(" "));
    }

    #[test]
    fn any_verifier(text in "SCRAM-SHA-256\\$[0-9]{1,6}:[A-Za-z0-9+/=]{0,24}\\$[A-Za-z0-9+/=]{0,44}:[A-Za-z0-9+/=]{0,44}") {
        if let Ok(verifier) = text.parse::<scram::Verifier>() {
            prop_assert_eq!(Ok(verifier.clone()), verifier.to_string().parse());
        }
    }
}
