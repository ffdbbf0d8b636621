//! Decompression of PostgreSQL's own method (`common/pg_lzcompress.c`, which describes the format).
//!
//! A control byte announces eight items, lowest bit first: 0 is a byte as it is, 1 a copy of earlier output. A copy is two
//! bytes, or three when it is long: length minus 3 in the low half of the first byte, 15 meaning that the third byte is to be
//! added; distance in the high half of the first byte and the second.

/// Fills `output` from `input`, both of which must end together; `None` when they do not.
pub(crate) fn decompress(input: &[u8], output: &mut [u8]) -> Option<()> {
    let mut input = input.iter().copied();
    let mut filled = 0;
    while filled < output.len() {
        let control = input.next()?;
        for bit in 0..8 {
            if filled == output.len() {
                break;
            }
            if control & 1 << bit == 0 {
                output[filled] = input.next()?;
                filled += 1;
                continue;
            }
            let (first, second) = (usize::from(input.next()?), usize::from(input.next()?));
            let mut length = (first & 0x0F) + 3;
            if length == 18 {
                length += usize::from(input.next()?);
            }
            let distance = (first & 0xF0) << 4 | second;
            if distance == 0 || distance > filled {
                return None;
            }
            // PostgreSQL cuts a copy off at the end of the output. A copy may reach into its own result.
            for at in filled..(filled + length).min(output.len()) {
                output[at] = output[at - distance];
            }
            filled = (filled + length).min(output.len());
        }
    }
    input.next().is_none().then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_copies() {
        // "abc", then 6 bytes from 3 back (overlapping), then "d", then 20 bytes from 1 back.
        let input = [0b0010_1000, b'a', b'b', b'c', 0x03, 0x03, b'd', 0x0F, 0x01, 2];
        let mut output = [0; 30];
        assert_eq!(Some(()), decompress(&input, &mut output));
        assert_eq!(b"abcabcabcddddddddddddddddddddd"[..], output[..]);
    }

    #[test]
    fn damage_is_refused() {
        for input in [&[][..], &[0, 1, 2], &[1, 0x00, 0x01, 0, 0, 0], &[2, b'a', 0x00, 0x02], &[2, b'a', 0x00, 0x00]] {
            assert_eq!(None, decompress(input, &mut [0; 4]), "{input:?}");
        }
        assert_eq!(None, decompress(&[0, 1, 2, 3, 4, 5], &mut [0; 4]), "a byte is left over");
        assert_eq!(Some(()), decompress(&[0, 1, 2, 3, 4], &mut [0; 4]));
    }
}
