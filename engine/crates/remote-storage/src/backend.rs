//! One attempt of each operation on one store.

use std::{ops::Range, path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use object_store::{
    GetOptions, MultipartId, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    multipart::{MultipartStore, PartId},
    path::Path,
};

#[cfg(feature = "faults")]
use crate::faults::Faults;
use crate::{
    LISTED_MAX, ObjectInfo,
    error::AttemptError,
    local::{LocalDirectory, Mode, Source},
};

/// What is on the other side.
pub(crate) enum Writes {
    /// A directory of this machine.
    Local(Arc<LocalDirectory>),
    /// A service.
    Service(Arc<dyn MultipartStore>),
}

pub(crate) struct Backend {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) writes: Writes,
    /// Before every key.
    pub(crate) prefix: Path,
    #[cfg(feature = "faults")]
    pub(crate) faults: Faults,
}

/// More objects than [`LISTED_MAX`].
pub(crate) struct TooMany;

impl Backend {
    fn path(&self, key: &str) -> Result<Path, AttemptError> {
        let key = Path::parse(key).map_err(|error| AttemptError::Rejected(error.to_string()))?;
        Ok(self.prefix.parts().chain(key.parts()).collect())
    }

    /// Runs an attempt, in test builds with what a store may do wrong.
    async fn faulty<T>(&self, attempt: impl Future<Output = Result<T, AttemptError>>) -> Result<T, AttemptError> {
        #[cfg(feature = "faults")]
        return self.faults.around(attempt).await;
        #[cfg(not(feature = "faults"))]
        attempt.await
    }

    pub(crate) async fn get(&self, key: &str) -> Result<Bytes, AttemptError> {
        let path = self.path(key)?;
        self.faulty(async { Ok(self.store.get(&path).await?.bytes().await?) }).await
    }

    pub(crate) async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, AttemptError> {
        let path = self.path(key)?;
        self.faulty(async {
            let bytes = self.store.get_range(&path, range.clone()).await?;
            if bytes.len() as u64 != range.end - range.start {
                return Err(AttemptError::Rejected(format!("bytes {range:?} are not all in it")));
            }
            Ok(bytes)
        })
        .await
    }

    /// Length of an object.
    pub(crate) async fn length(&self, key: &str) -> Result<u64, AttemptError> {
        let path = self.path(key)?;
        self.faulty(async { Ok(self.store.get_opts(&path, GetOptions::new().with_head(true)).await?.meta.size) }).await
    }

    pub(crate) async fn put(&self, key: &str, bytes: Bytes, mode: Mode) -> Result<(), AttemptError> {
        let path = self.path(key)?;
        self.faulty(async {
            match &self.writes {
                Writes::Local(directory) => {
                    let (directory, path) = (directory.clone(), path.to_string());
                    unblock(move || directory.write(&path, &Source::Bytes(&bytes), mode)).await?;
                }
                Writes::Service(_) => {
                    let mode = match mode {
                        Mode::Overwrite => PutMode::Overwrite,
                        Mode::Create => PutMode::Create,
                    };
                    self.store.put_opts(&path, PutPayload::from(bytes), PutOptions::from(mode)).await?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Writes a local file to a local directory; `None` when the store is none.
    pub(crate) async fn copy_new(&self, key: &str, file: &std::path::Path) -> Option<Result<u64, AttemptError>> {
        let Writes::Local(directory) = &self.writes else { return None };
        let path = match self.path(key) {
            Ok(path) => path.to_string(),
            Err(error) => return Some(Err(error)),
        };
        let (directory, file) = (directory.clone(), file.to_owned());
        Some(self.faulty(unblock(move || directory.write(&path, &Source::File(&file), Mode::Create))).await)
    }

    /// All objects below a directory, in no order.
    pub(crate) async fn list(&self, directory: &str) -> Result<Result<Vec<ObjectInfo>, TooMany>, AttemptError> {
        let path = self.path(directory)?;
        self.faulty(async {
            let mut listed = self.store.list(Some(&path));
            let mut objects = Vec::new();
            while let Some(object) = listed.next().await {
                let object = object?;
                if objects.len() >= LISTED_MAX {
                    return Ok(Err(TooMany));
                }
                let Some(parts) = object.location.prefix_match(&self.prefix) else { continue };
                let key = parts.collect::<Path>().to_string();
                objects.push(ObjectInfo { key, bytes: object.size });
            }
            Ok(Ok(objects))
        })
        .await
    }

    /// Directories directly in a directory.
    pub(crate) async fn list_directories(&self, directory: &str) -> Result<Vec<String>, AttemptError> {
        let path = self.path(directory)?;
        self.faulty(async {
            let listed = self.store.list_with_delimiter(Some(&path)).await?;
            let name = |path: &Path| path.filename().map(str::to_owned);
            Ok(listed.common_prefixes.iter().filter_map(name).collect())
        })
        .await
    }

    /// Removes objects; one that is not there is fine.
    pub(crate) async fn delete(&self, keys: &[String]) -> Result<(), AttemptError> {
        let paths = keys.iter().map(|key| self.path(key)).collect::<Result<Vec<_>, _>>()?;
        self.faulty(async {
            let mut deleted = self.store.delete_stream(stream::iter(paths.into_iter().map(Ok)).boxed());
            while let Some(result) = deleted.next().await {
                match result.map_err(AttemptError::from) {
                    Ok(_) | Err(AttemptError::NotFound) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
        .await
    }

    fn service(&self) -> Result<&Arc<dyn MultipartStore>, AttemptError> {
        match &self.writes {
            Writes::Service(service) => Ok(service),
            Writes::Local(_) => Err(AttemptError::Rejected("parts are for services".to_owned())),
        }
    }

    pub(crate) async fn begin_parts(&self, key: &str) -> Result<MultipartId, AttemptError> {
        let (path, service) = (self.path(key)?, self.service()?);
        self.faulty(async { Ok(service.create_multipart(&path).await?) }).await
    }

    pub(crate) async fn put_part(
        &self,
        key: &str,
        id: &MultipartId,
        part: usize,
        bytes: Bytes,
    ) -> Result<PartId, AttemptError> {
        let (path, service) = (self.path(key)?, self.service()?);
        self.faulty(async { Ok(service.put_part(&path, id, part, PutPayload::from(bytes)).await?) }).await
    }

    pub(crate) async fn end_parts(&self, key: &str, id: &MultipartId, parts: Vec<PartId>) -> Result<(), AttemptError> {
        let (path, service) = (self.path(key)?, self.service()?);
        self.faulty(async { Ok(service.complete_multipart(&path, id, parts).await.map(drop)?) }).await
    }

    pub(crate) async fn abort_parts(&self, key: &str, id: &MultipartId) -> Result<(), AttemptError> {
        let (path, service) = (self.path(key)?, self.service()?);
        Ok(service.abort_multipart(&path, id).await?)
    }
}

/// Runs a call that blocks on a thread for that.
pub(crate) async fn unblock<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, AttemptError> + Send + 'static,
) -> Result<T, AttemptError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(error) => Err(AttemptError::temporary(error)),
    }
}

/// Reads a part of a local file.
pub(crate) async fn read_file(file: PathBuf, offset: u64, length: usize) -> Result<Bytes, AttemptError> {
    use std::os::unix::fs::FileExt;
    unblock(move || {
        let mut bytes = vec![0; length];
        std::fs::File::open(&file)
            .and_then(|opened| opened.read_exact_at(&mut bytes, offset))
            .map_err(|error| AttemptError::File(file, error))?;
        Ok(Bytes::from(bytes))
    })
    .await
}
