//! The users file: who may follow with a password.

use std::{fs, io, io::Read, path::Path};

use wire::postgres::scram::Verifier;

/// Some ten thousand users.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The verifier of `user` in the file at `path`: lines `user:SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`, `#`
/// begins a comment. Read at each login, so that a change needs no restart. Blocks.
///
/// # Errors
/// The file cannot be read, or the user's line is malformed; the text names file and line.
pub(super) fn find(path: &Path, user: &str) -> io::Result<Option<Verifier>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut text = String::new();
    let file = fs::File::open(path).map_err(named)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(named)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(named(io::Error::other(format!("larger than {FILE_BYTES_MAX} bytes"))));
    }
    for (index, line) in text.lines().enumerate() {
        // Verifiers have colons, user names do not.
        let Some((name, verifier)) = line.trim().split_once(':') else { continue };
        if name == user && !name.starts_with('#') {
            let verifier = verifier.trim().parse().map_err(|error| {
                named(io::Error::new(io::ErrorKind::InvalidData, format!("line {}: {error}", index + 1)))
            })?;
            return Ok(Some(verifier));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_and_malformed_lines_are_named() {
        let path = std::env::temp_dir().join(format!("users-{}", uuid::Uuid::new_v4()));
        let verifier = Verifier::of_password("secret", b"salt", 4096);
        fs::write(&path, format!("# who may follow\n\nanna:{verifier}\nbert:md5abc\n#carl:{verifier}\n")).unwrap();

        assert_eq!(Some(verifier), find(&path, "anna").unwrap());
        assert_eq!(None, find(&path, "nobody").unwrap());
        assert_eq!(None, find(&path, "#carl").unwrap());
        let error = find(&path, "bert").unwrap_err().to_string();
        assert!(error.contains("line 4") && error.contains("SCRAM-SHA-256"), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(find(&path, "anna").unwrap_err().to_string().contains("users-"));
    }
}
