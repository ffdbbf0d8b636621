//! Memory that direct I/O can use: owned, aligned to 4 KiB, recycled within a bound.
//!
//! Knows nothing about what is in it. Alignment is found inside an ordinary vector, because a vector of aligned blocks
//! cannot be seen as bytes without `unsafe`.

use alloc::{vec, vec::Vec};
use core::fmt;

use crate::segment::BLOCK_BYTES;

/// Largest write. Above 1 MiB a disk gains nothing (measured: `docs/design`, runtime), below 256 KiB it loses.
pub const WRITE_BYTES_MAX: usize = 1 << 20;

/// Smallest buffer: a commit of a few records fits, and an awake log costs little.
const BUFFER_BYTES_MIN: usize = 32 << 10;

/// Aligned memory of a fixed capacity with a length, both in whole blocks of 4 KiB once it is handed to a write.
///
/// The memory never moves while the buffer is owned by an operation of the kernel.
pub struct Buffer {
    memory: Vec<u8>,
    /// Offset of the first aligned byte in `memory`.
    aligned: usize,
    capacity: usize,
    len: usize,
}

impl Buffer {
    /// A buffer of length 0 that holds up to `capacity` bytes, rounded up to whole blocks.
    pub fn with_capacity(capacity: usize) -> Buffer {
        let block = BLOCK_BYTES as usize;
        let capacity = capacity.max(1).next_multiple_of(block);
        // Zeroed memory of this size comes from the kernel untouched, so that an unused tail costs nothing.
        let memory = vec![0u8; capacity + block - 1];
        let aligned = (block - memory.as_ptr().addr() % block) % block;
        Buffer { memory, aligned, capacity, len: 0 }
    }

    /// A buffer that holds a copy of `bytes`, filled up with zeros to whole blocks.
    pub fn padded(bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::with_capacity(bytes.len());
        buffer.extend(bytes);
        buffer.pad();
        buffer
    }

    /// A buffer of `len` zeros; `len` is a multiple of 4 KiB.
    pub fn zeroed(len: usize) -> Buffer {
        let mut buffer = Buffer::with_capacity(len);
        buffer.len = len;
        buffer
    }

    /// Bytes that it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it holds; starts at an address that is a multiple of 4 KiB.
    pub fn as_bytes(&self) -> &[u8] {
        &self.memory[self.aligned..self.aligned + self.len]
    }

    /// The same, to be read into.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.aligned..self.aligned + self.len]
    }

    /// Appends what fits of `bytes`; returns how much that was.
    pub(crate) fn extend(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.capacity - self.len);
        let at = self.aligned + self.len;
        self.memory[at..at + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    /// Fills up with zeros to a whole number of blocks.
    pub(crate) fn pad(&mut self) {
        let end = self.len.next_multiple_of(BLOCK_BYTES as usize);
        self.memory[self.aligned + self.len..self.aligned + end].fill(0);
        self.len = end;
    }

    /// Forgets everything behind the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.as_bytes_mut()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} of {})", self.len, self.capacity)
    }
}

/// The buffers of one log that are not in use. Follows the traffic: small while commits are small, empty when idle.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Vec<Buffer>,
    capacity_max: usize,
    /// Capacity of the next new buffer; 0 before the first.
    capacity: usize,
}

impl Pool {
    /// One for each write in flight and one being filled; more are dropped.
    const FREE_MAX: usize = 5;

    /// Hands out buffers of up to `capacity_max` bytes, a whole number of blocks.
    pub(crate) fn new(capacity_max: usize) -> Pool {
        Pool { free: Vec::new(), capacity_max, capacity: 0 }
    }

    pub(crate) fn capacity_max(&self) -> usize {
        self.capacity_max
    }

    /// An empty buffer. `wanted` is how many bytes wait for it.
    pub(crate) fn take(&mut self, wanted: usize) -> Buffer {
        let least = BUFFER_BYTES_MIN.min(self.capacity_max);
        let fitting = wanted.next_power_of_two().clamp(least, self.capacity_max);
        self.capacity = self.capacity.max(fitting);
        match self.free.pop() {
            Some(buffer) if buffer.capacity >= fitting => buffer,
            _ => Buffer::with_capacity(self.capacity),
        }
    }

    /// Takes a buffer back. One that was filled to the brim was too small: the next new one is twice as large.
    pub(crate) fn give(&mut self, mut buffer: Buffer) {
        if buffer.len == buffer.capacity && buffer.capacity >= self.capacity {
            self.capacity = (self.capacity * 2).min(self.capacity_max);
        }
        if buffer.capacity >= self.capacity && self.free.len() < Pool::FREE_MAX {
            buffer.len = 0;
            self.free.push(buffer);
        }
    }

    /// Drops all memory; called when the log has been idle for a while.
    pub(crate) fn clear(&mut self) {
        *self = Pool::new(self.capacity_max);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.capacity == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_padded_with_zeros() {
        for len in [1, 4095, 4096, 4097, 100_000] {
            let mut buffer = Buffer::padded(&vec![7u8; len]);
            assert_eq!(0, buffer.as_bytes().as_ptr().addr() % 4096);
            assert_eq!(len.next_multiple_of(4096), buffer.len());
            assert!(buffer.as_bytes()[..len].iter().all(|&b| b == 7));
            assert!(buffer.as_bytes()[len..].iter().all(|&b| b == 0));
            assert_eq!(buffer.len(), buffer.as_bytes_mut().len());
        }
    }

    #[test]
    fn reused_memory_is_padded_with_zeros_too() {
        let mut pool = Pool::new(WRITE_BYTES_MAX);
        let mut buffer = pool.take(100);
        buffer.extend(&vec![0xFF; 8192]);
        pool.give(buffer);
        let mut buffer = pool.take(100);
        buffer.extend(b"x");
        buffer.pad();
        assert_eq!(4096, buffer.len());
        assert!(buffer.as_bytes()[1..].iter().all(|&b| b == 0));
    }

    #[test]
    fn pool_follows_the_traffic_and_holds_nothing_when_idle() {
        let mut pool = Pool::new(WRITE_BYTES_MAX);
        let mut buffer = pool.take(200);
        assert_eq!(BUFFER_BYTES_MIN, buffer.capacity());
        for doubled in [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 1 << 20] {
            let filled = vec![1u8; buffer.capacity()];
            buffer.extend(&filled);
            pool.give(buffer);
            buffer = pool.take(200);
            assert_eq!(doubled, buffer.capacity());
        }
        pool.give(buffer);
        pool.clear();
        assert!(pool.is_empty());
        assert_eq!(BUFFER_BYTES_MIN, pool.take(1).capacity());
    }
}
