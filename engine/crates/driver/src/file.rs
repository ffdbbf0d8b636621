//! Files: owned buffers, direct where the file system can, durable when asked.

use std::{
    io,
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use compio::{
    BufResult,
    buf::{IntoInner, IoBuf, IoBufMut, SetLen},
    io::{AsyncReadAt, AsyncWriteAt},
};

use crate::core::{file_permit, unblock};

/// Unit of direct I/O: offset, length and address of each operation are multiples of it. No disk has larger sectors.
pub const BLOCK_BYTES: usize = 4096;

/// Bytes of one zero-filling write.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

/// An owned buffer that a write can take: its bytes stay where they are, and unchanged, while it is moved.
pub trait Bytes: 'static {
    /// What is to be written.
    fn bytes(&self) -> &[u8];
}

impl Bytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Bytes for AlignedBuffer {
    fn bytes(&self) -> &[u8] {
        self
    }
}

struct Owned<B>(B);

impl<B: Bytes> IoBuf for Owned<B> {
    fn as_init(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Bytes whose address is a multiple of [`BLOCK_BYTES`].
pub struct AlignedBuffer {
    /// One block larger than `length`, so that an aligned range of `length` bytes lies in it.
    storage: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` zero bytes. Large ones cost no memory until they are touched.
    pub fn zeroed(length: usize) -> Self {
        let storage = vec![0; length + BLOCK_BYTES];
        let start = storage.as_ptr().align_offset(BLOCK_BYTES);
        Self { storage, start, length }
    }

    /// Leaves the bytes of `[start, start + length)` only. The address is no longer aligned then.
    ///
    /// # Panics
    /// The range is not inside the buffer.
    #[must_use]
    pub fn window(mut self, start: usize, length: usize) -> Self {
        assert!(start + length <= self.length, "window outside of the buffer");
        self.start += start;
        self.length = length;
        self
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.length]
    }
}

struct Target(AlignedBuffer);

impl IoBuf for Target {
    fn as_init(&self) -> &[u8] {
        &self.0
    }
}

impl SetLen for Target {
    // All of the buffer is initialised from the start, so there is no length to keep.
    unsafe fn set_len(&mut self, _length: usize) {}
}

impl IoBufMut for Target {
    fn as_uninit(&mut self) -> &mut [MaybeUninit<u8>] {
        (*self.0).as_uninit()
    }
}

/// How to open a file.
#[derive(Clone, Copy, Default, Debug)]
pub struct OpenOptions {
    /// For writing, too; else for reading only.
    pub write: bool,
    /// Create it; an existing one is an error.
    pub create_new: bool,
    /// Past the page cache where the file system can; else through it.
    pub direct: bool,
    /// Each write is durable when it returns (`O_DSYNC`), as if [`File::sync_data`] had followed; earlier writes are not.
    pub durable: bool,
}

/// An open file. Clones share the descriptor.
#[derive(Clone)]
pub struct File {
    inner: compio::fs::File,
    direct: bool,
}

impl File {
    /// Opens `path`; created files have mode 0600.
    ///
    /// # Errors
    /// Those of `open(2)`. A file system that refuses direct I/O is not an error: see [`File::is_direct`].
    pub async fn open(path: impl AsRef<Path>, options: OpenOptions) -> io::Result<Self> {
        let _permit = file_permit().await;
        let path = path.as_ref();
        let sync = if options.durable { libc::O_DSYNC } else { 0 };
        if options.direct {
            match open(path, options, libc::O_DIRECT | sync).await {
                // EINVAL: this file system has no direct I/O.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result.map(|inner| Self { inner, direct: true }),
            }
        }
        let inner = open(path, options, sync).await?;
        Ok(Self { inner, direct: false })
    }

    /// Whether operations go past the page cache, and so must be aligned to [`BLOCK_BYTES`].
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Bytes in the file.
    ///
    /// # Errors
    /// Those of `stat(2)`.
    pub async fn size_bytes(&self) -> io::Result<u64> {
        let _permit = file_permit().await;
        Ok(self.inner.metadata().await?.len())
    }

    /// Writes all of `buffer` at `offset`. Durable only after a later [`File::sync_data`], unless opened as such.
    ///
    /// # Errors
    /// Those of `pwrite(2)`; any prefix may have been written. `WriteZero` when the kernel takes no more bytes.
    pub async fn write_at<B: Bytes>(&self, buffer: B, offset: u64) -> (io::Result<()>, B) {
        let _permit = file_permit().await;
        let total = buffer.bytes().len();
        let mut owned = Owned(buffer);
        let mut written = 0;
        while written < total {
            let BufResult(result, slice) =
                (&self.inner).write_at(owned.slice(written..), offset + written as u64).await;
            owned = slice.into_inner();
            match result {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), owned.0),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(error), owned.0),
            }
        }
        (Ok(()), owned.0)
    }

    /// Reads into `buffer` from `offset`; fewer bytes than it has only at the end of the file.
    ///
    /// # Errors
    /// Those of `pread(2)`.
    pub async fn read_at(&self, buffer: AlignedBuffer, offset: u64) -> (io::Result<usize>, AlignedBuffer) {
        let _permit = file_permit().await;
        let total = buffer.len();
        let mut target = Target(buffer);
        let mut read = 0;
        while read < total {
            let BufResult(result, slice) = self.inner.read_at(target.slice(read..), offset + read as u64).await;
            target = slice.into_inner();
            match result {
                Ok(0) => break,
                Ok(count) => {
                    read += count;
                    // A short direct read that is no whole number of blocks has met the end of the file.
                    if self.direct && read % BLOCK_BYTES != 0 {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(error), target.0),
            }
        }
        (Ok(read), target.0)
    }

    /// Reads exactly `length` bytes from `offset`, neither of which need be aligned.
    ///
    /// # Errors
    /// Those of `pread(2)`; `UnexpectedEof` when the file ends earlier.
    pub async fn read_range(&self, offset: u64, length: usize) -> io::Result<AlignedBuffer> {
        let skip = (offset % BLOCK_BYTES as u64) as usize;
        let blocks = (skip + length).div_ceil(BLOCK_BYTES);
        let (result, buffer) = self.read_at(AlignedBuffer::zeroed(blocks * BLOCK_BYTES), offset - skip as u64).await;
        if result? < skip + length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(buffer.window(skip, length))
    }

    /// Makes all writes that have returned before this call durable, with the file size (`fdatasync(2)`).
    ///
    /// # Errors
    /// Those of `fdatasync(2)`. After one, what is durable is unknown: the kernel forgets pages that failed.
    pub async fn sync_data(&self) -> io::Result<()> {
        let _permit = file_permit().await;
        self.inner.sync_data().await
    }
}

async fn open(path: &Path, options: OpenOptions, flags: i32) -> io::Result<compio::fs::File> {
    compio::fs::OpenOptions::new()
        .read(true)
        .write(options.write)
        .create_new(options.create_new)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
        .await
}

/// Writes zeros to `[0, length)` of `file` and makes them durable, so that later writes there change no metadata.
/// `length` is a multiple of [`BLOCK_BYTES`].
///
/// `fallocate` would not do: its extents are marked unwritten, and the first write to each becomes a metadata write.
///
/// # Errors
/// Those of `pwrite(2)` and `fdatasync(2)`, such as a full disk.
pub async fn fill_with_zeros(file: &File, length: u64) -> io::Result<()> {
    let mut zeros = AlignedBuffer::zeroed(ZERO_CHUNK_BYTES.min(length as usize));
    let mut offset = 0;
    while offset < length {
        let count = (length - offset).min(ZERO_CHUNK_BYTES as u64) as usize;
        if count < zeros.len() {
            zeros = zeros.window(0, count);
        }
        let (result, buffer) = file.write_at(zeros, offset).await;
        result?;
        zeros = buffer;
        offset += count as u64;
    }
    file.sync_data().await
}

/// Makes creations, renames and removals in a directory durable.
///
/// # Errors
/// Those of `open(2)` and `fsync(2)`.
pub async fn sync_directory(path: impl Into<PathBuf>) -> io::Result<()> {
    let path = path.into();
    unblock(move || std::fs::File::open(path)?.sync_all()).await
}

/// Whether files in `directory` can be written with direct I/O in blocks of [`BLOCK_BYTES`].
///
/// Some file systems accept `O_DIRECT` at open and refuse the first write, so this writes one.
///
/// # Errors
/// No file can be created or written there at all.
pub async fn direct_io_works(directory: impl Into<PathBuf>) -> io::Result<bool> {
    let path: PathBuf = directory.into().join(format!(".direct-io-probe-{}", std::process::id()));
    unblock(move || {
        let attempt = |flags| {
            use std::os::unix::fs::FileExt;
            let file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(flags)
                .open(&path)?;
            file.write_all_at(&AlignedBuffer::zeroed(BLOCK_BYTES), 0)
        };
        let direct = attempt(libc::O_DIRECT);
        let result = match direct {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => attempt(0).map(|()| false),
            Err(error) => Err(error),
        };
        match std::fs::remove_file(&path) {
            Err(error) if result.is_ok() && error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => result,
        }
    })
    .await
}
