//! Local files to objects and back, in parts where they are large.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::{MultipartId, multipart::PartId};

use crate::{
    backend::{read_file, unblock},
    error::{AttemptError, StorageError},
    metrics::Operation,
    storage::{Context, PutNew},
};

/// A file above this goes to a service in parts; one below in one request, from memory.
pub const PARTS_ABOVE_BYTES: u64 = 32 << 20;
/// Bytes of a part, of all but the last.
const PART_BYTES: u64 = 16 << 20;
/// S3 takes 10,000 parts: the parts of a file that would need more are larger.
const PARTS_MAX: u64 = 9_000;
/// Parts of one transfer that are on their way at once.
const PARTS_AT_ONCE: usize = 2;

/// Offset and length of each part.
fn parts(length: u64) -> impl Iterator<Item = (usize, u64, usize)> {
    let part_bytes = PART_BYTES.max(length.div_ceil(PARTS_MAX));
    (0..length.div_ceil(part_bytes)).map(move |part| {
        let offset = part * part_bytes;
        (part as usize, offset, (length - offset).min(part_bytes) as usize)
    })
}

impl Context {
    pub(crate) async fn upload_new(&self, key: &str, file: &Path) -> Result<PutNew, StorageError> {
        self.counted(Operation::Upload, async {
            let length = fs::metadata(file).map_err(|source| file_error(file, source))?.len();
            let result = if length <= PARTS_ABOVE_BYTES || self.is_local() {
                self.upload_whole(key, file, length).await?
            } else {
                self.upload_parts(key, file, length).await?
            };
            if result == PutNew::Created {
                self.metrics.transferred(Operation::Upload, length);
            }
            Ok(result)
        })
        .await
    }

    fn is_local(&self) -> bool {
        matches!(self.backend.writes, crate::backend::Writes::Local(_))
    }

    async fn upload_whole(&self, key: &str, file: &Path, length: u64) -> Result<PutNew, StorageError> {
        if !self.is_local() {
            let bytes = read_file(file.to_owned(), 0, length as usize).await.map_err(|error| of_file(file, error))?;
            return self.create(key, bytes, self.policies.transfer).await;
        }
        let policy = self.policies.transfer;
        self.try_for(Operation::Upload, key, policy, async |made| match self.backend.copy_new(key, file).await {
            Some(Ok(_)) => Ok(PutNew::Created),
            Some(Err(AttemptError::AlreadyThere)) => match self.is_same(key, file, length).await? {
                true if made > 0 => Ok(PutNew::Created),
                same => Ok(PutNew::AlreadyThere { same }),
            },
            Some(Err(error)) => Err(error),
            None => Err(AttemptError::Rejected("not a local store".to_owned())),
        })
        .await
    }

    /// Whether an object has the bytes of a file.
    async fn is_same(&self, key: &str, file: &Path, length: u64) -> Result<bool, AttemptError> {
        if self.backend.length(key).await? != length {
            return Ok(false);
        }
        for (_, offset, bytes) in parts(length) {
            let theirs = self.backend.get_range(key, offset..offset + bytes as u64).await?;
            if theirs != read_file(file.to_owned(), offset, bytes).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn upload_parts(&self, key: &str, file: &Path, length: u64) -> Result<PutNew, StorageError> {
        let policy = self.policies.transfer;
        // No service joins parts only where nothing is: this keeps a second upload from paying for all of them.
        let there = self.try_for(Operation::Upload, key, policy, |_| self.backend.length(key)).await;
        match there {
            Err(StorageError::NotFound { .. }) => {}
            Err(error) => return Err(error),
            Ok(_) => {
                let same = self.try_for(Operation::Upload, key, policy, |_| self.is_same(key, file, length)).await?;
                return Ok(PutNew::AlreadyThere { same });
            }
        }
        let id = self.try_for(Operation::PutPart, key, policy, |_| self.backend.begin_parts(key)).await?;
        let result = self.put_parts(key, file, length, &id).await;
        if result.is_err() {
            // Parts that stay are invisible; a rule of the bucket for its lifecycle removes them.
            if let Err(error) = self.backend.abort_parts(key, &id).await {
                tracing::debug!(key, ?error, "object store: parts of a failed upload stay");
            }
        }
        result.map(|()| PutNew::Created)
    }

    async fn put_parts(&self, key: &str, file: &Path, length: u64, id: &MultipartId) -> Result<(), StorageError> {
        let policy = self.policies.transfer;
        let sent: Vec<PartId> = stream::iter(parts(length))
            .map(async |(part, offset, bytes)| {
                let bytes = read_file(file.to_owned(), offset, bytes).await.map_err(|error| of_file(file, error))?;
                let attempts = self
                    .try_for(Operation::PutPart, key, policy, |_| self.backend.put_part(key, id, part, bytes.clone()));
                let sent = self.counted(Operation::PutPart, attempts).await?;
                self.metrics.transferred(Operation::PutPart, bytes.len() as u64);
                Ok(sent)
            })
            .buffered(PARTS_AT_ONCE)
            .try_collect()
            .await?;
        self.try_for(Operation::PutPart, key, policy, async |made| {
            let result = self.backend.end_parts(key, id, sent.clone()).await;
            // After an attempt that was done although it seemed to have failed, the parts are gone and the object is there.
            let done = made > 0 && result.is_err() && self.backend.length(key).await.is_ok_and(|found| found == length);
            if done { Ok(()) } else { result }
        })
        .await
    }

    pub(crate) async fn download(&self, key: &str, file: &Path) -> Result<u64, StorageError> {
        self.counted(Operation::Download, async {
            let policy = self.policies.transfer;
            let length = self.try_for(Operation::Download, key, policy, |_| self.backend.length(key)).await?;
            let incoming = Incoming::create(file).map_err(|source| file_error(file, source))?;
            stream::iter(parts(length))
                .map(async |(_, offset, bytes)| {
                    let range = offset..offset + bytes as u64;
                    let part = self
                        .try_for(Operation::Download, key, policy, |_| self.backend.get_range(key, range.clone()))
                        .await?;
                    incoming.write(part, offset).await.map_err(|error| of_file(file, error))
                })
                .buffer_unordered(PARTS_AT_ONCE)
                .try_collect::<()>()
                .await?;
            incoming.finish(file).await.map_err(|error| of_file(file, error))?;
            self.metrics.transferred(Operation::Download, length);
            Ok(length)
        })
        .await
    }
}

/// A file that is being filled beside its place. Removed when it is dropped before it is finished.
struct Incoming {
    file: Arc<File>,
    path: Option<PathBuf>,
}

impl Incoming {
    fn create(place: &Path) -> std::io::Result<Self> {
        let random = getrandom::u64().map_err(|error| std::io::Error::other(error.to_string()))?;
        let mut path = place.to_owned().into_os_string();
        path.push(format!(".{random:016x}.incoming"));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Incoming { file: Arc::new(file), path: Some(path.into()) })
    }

    async fn write(&self, bytes: Bytes, offset: u64) -> Result<(), AttemptError> {
        let (file, path) = (self.file.clone(), self.path.clone().unwrap_or_default());
        unblock(move || file.write_all_at(&bytes, offset).map_err(|error| AttemptError::File(path, error))).await
    }

    async fn finish(mut self, place: &Path) -> Result<(), AttemptError> {
        let (file, path, place) = (self.file.clone(), self.path.clone().unwrap_or_default(), place.to_owned());
        unblock(move || {
            file.sync_all().and_then(|()| fs::rename(&path, &place)).map_err(|error| AttemptError::File(place, error))
        })
        .await?;
        self.path = None;
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

fn file_error(path: &Path, source: std::io::Error) -> StorageError {
    StorageError::File { path: path.to_owned(), source }
}

/// An error of reading or writing the local file.
fn of_file(path: &Path, error: AttemptError) -> StorageError {
    match error {
        AttemptError::File(path, source) => StorageError::File { path, source },
        other => file_error(path, std::io::Error::other(format!("{other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_file_and_are_never_too_many() {
        for length in [0, 1, PART_BYTES, PART_BYTES + 1, 100 << 20, 1 << 40] {
            let all: Vec<_> = parts(length).collect();
            assert!(all.len() as u64 <= PARTS_MAX + 1, "{length}");
            let mut end = 0;
            for (number, (part, offset, bytes)) in all.iter().enumerate() {
                assert_eq!((number, end), (*part, *offset));
                end += *bytes as u64;
            }
            assert_eq!(length, end);
        }
    }
}
