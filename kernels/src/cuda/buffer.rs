//! What lies in device memory.

use std::sync::Arc;

use super::driver::{Address, Driver, HostMemory, Memory};
use super::plan::bucket;
use super::stream::Stream;
use super::weight::{Form, Unpacked};
use crate::{KernelError, KvLayout, Matrix};

/// Device memory that may be missing: after a failure, nothing more is allocated or launched.
pub(super) struct Buffer<D: Driver>(Option<Arc<D::Memory>>);

impl<D: Driver> Buffer<D> {
    pub(super) fn zeroed(stream: &Stream<D>, bytes: usize) -> Self {
        Self(stream.attempt(|driver| driver.allocate(bytes.max(16))).map(Arc::new))
    }

    pub(super) fn holding(stream: &Stream<D>, bytes: &[u8]) -> Self {
        let buffer = Self::zeroed(stream, bytes.len());
        let to = buffer.address();
        stream.attempt(|driver| driver.write(bytes, to));
        buffer
    }

    pub(super) fn address(&self) -> Address {
        self.0.as_ref().map_or(Address::NULL, |memory| memory.address())
    }

    /// The memory itself, for others to keep.
    pub(super) fn memory(&self) -> Option<Arc<dyn Memory>> {
        self.0.clone().map(|memory| memory as Arc<dyn Memory>)
    }
}

/// A vector of f32.
pub struct Vector<D: Driver> {
    pub(super) buffer: Buffer<D>,
    pub(super) len: usize,
}

/// Cosines and sines, `[positions, pairs]` each.
pub struct Rope<D: Driver> {
    pub(super) cos: Buffer<D>,
    pub(super) sin: Buffer<D>,
    pub(super) pairs: usize,
    pub(super) positions: usize,
}

/// Consecutive rows of a weight that are stored alike.
pub(super) struct Part<D: Driver> {
    pub(super) form: Form,
    pub(super) values: Buffer<D>,
    pub(super) scales: Buffer<D>,
    /// Number of the first of its rows.
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// A weight matrix `[out, in]`.
pub struct Linear<D: Driver> {
    pub(super) parts: Vec<Part<D>>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) bytes: usize,
}

impl<D: Driver> Linear<D> {
    /// `parts`, stacked along their rows. Neighbours that are stored alike are one part here.
    pub(super) fn new(stream: &Stream<D>, parts: &[Matrix<'_>]) -> Result<Self, KernelError> {
        let cols = parts[0].cols();
        let mut linear = Self { parts: Vec::new(), rows: 0, cols, bytes: 0 };
        for alike in parts.chunk_by(|a, b| Form::of(a.dtype()) == Form::of(b.dtype())) {
            let mut unpacked = Unpacked::default();
            for part in alike {
                if part.cols() != cols {
                    return Err(KernelError::StackedColumns { first: cols, other: part.cols() });
                }
                unpacked.push(part);
            }
            let rows = alike.iter().map(Matrix::rows).sum();
            linear.bytes += unpacked.values.len() + unpacked.scales.len();
            linear.parts.push(Part {
                form: Form::of(alike[0].dtype()),
                values: Buffer::holding(stream, &unpacked.values),
                scales: Buffer::holding(stream, &unpacked.scales),
                first: linear.rows,
                rows,
            });
            linear.rows += rows;
        }
        stream.check()?;
        Ok(linear)
    }
}

/// A working buffer `[rows, cols]` of f32. In memory, rows are filled up to a multiple of eight elements with zeros
/// that nobody overwrites, and there is room for the rows that steps are filled up with.
pub struct Activations<D: Driver> {
    pub(super) buffer: Buffer<D>,
    pub(super) rows: usize,
    pub(super) rows_max: usize,
    pub(super) cols: usize,
}

impl<D: Driver> Activations<D> {
    pub(super) fn new(stream: &Stream<D>, rows_max: usize, cols: usize) -> Self {
        let bytes = bucket(rows_max) * cols.next_multiple_of(8) * size_of::<f32>();
        Self { buffer: Buffer::zeroed(stream, bytes), rows: 0, rows_max, cols }
    }

    /// Says how many rows it holds from now on.
    pub(super) fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.rows_max, "{rows} rows do not fit into a buffer of {}", self.rows_max);
        self.rows = rows;
    }

    pub(super) fn address(&self) -> Address {
        self.buffer.address()
    }

    /// f32 from one row to the next.
    pub(super) fn stride(&self) -> usize {
        self.cols.next_multiple_of(8)
    }

    /// Rows to compute for those it holds.
    pub(super) fn computed_rows(&self) -> usize {
        bucket(self.rows)
    }
}

/// Keys and values of all layers: `[layer][page][kv_head][K or V][token][head_dim]`.
pub struct KvCache<D: Driver> {
    pub(super) buffer: Buffer<D>,
    pub(super) layout: KvLayout,
}

impl<D: Driver> KvCache<D> {
    /// Where the pages of a layer start.
    pub(super) fn layer(&self, layer: usize) -> Address {
        assert!(layer < self.layout.layers, "layer {layer} of {}", self.layout.layers);
        self.buffer.address().offset(layer * self.layout.region_shape().layer_stride())
    }
}

/// Data on its way between host and device, one way or the other: a piece of device memory, and two as large of
/// page-locked memory, used in turns, so that there is something for the host to write or read while the copy before is
/// under way. All grow as needed, which is seldom.
pub(super) struct Staged<D: Driver> {
    turns: [Turn<D>; 2],
    /// Whose turn it was last.
    last: usize,
    device: Buffer<D>,
    capacity: usize,
}

/// A host's side.
struct Turn<D: Driver> {
    host: Option<D::HostMemory>,
    /// The end of the last copy from or to it.
    copied: Option<D::Event>,
}

impl<D: Driver> Staged<D> {
    pub(super) fn new() -> Self {
        let turns = [(); 2].map(|()| Turn { host: None, copied: None });
        Self { turns, last: 0, device: Buffer(None), capacity: 0 }
    }

    pub(super) fn address(&self) -> Address {
        self.device.address()
    }

    /// Makes room for `bytes`; what was there is gone. Whether the device's side has another address now.
    pub(super) fn reserve(&mut self, stream: &Stream<D>, bytes: usize) -> bool {
        if bytes <= self.capacity {
            return false;
        }
        self.capacity = bytes.next_power_of_two().max(4096);
        for turn in &mut self.turns {
            turn.settle(stream);
            turn.host = stream.attempt(|driver| driver.allocate_host(self.capacity));
        }
        self.device = Buffer::zeroed(stream, self.capacity);
        true
    }

    /// Enqueues a copy of `parts`, one after the other, to the device. They fit: see [`Staged::reserve`].
    pub(super) fn upload(&mut self, stream: &Stream<D>, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(bytes <= self.capacity, "room was made first");
        self.last = 1 - self.last;
        let turn = &mut self.turns[self.last];
        turn.settle(stream);
        let Some(host) = &turn.host else { return };
        let mut at = 0;
        for part in parts {
            // SAFETY: within the memory by the assertion, and no copy of it is under way.
            unsafe { host.start().add(at).copy_from_nonoverlapping(part.as_ptr(), part.len()) };
            at += part.len();
        }
        let to = self.device.address();
        stream.attempt(|driver| driver.upload(host, to, bytes));
        turn.copied = stream.attempt(|driver| driver.record());
    }

    /// Enqueues a copy of the first `bytes` of the device's side to the host. No more than two are shown later.
    pub(super) fn download(&mut self, stream: &Stream<D>, bytes: usize) {
        assert!(bytes <= self.capacity, "room was made first");
        self.last = 1 - self.last;
        let turn = &mut self.turns[self.last];
        assert!(turn.copied.is_none(), "what comes is shown first");
        let Some(host) = &turn.host else { return };
        let from = self.device.address();
        stream.attempt(|driver| driver.download(from, host, bytes));
        turn.copied = stream.attempt(|driver| driver.record());
    }

    /// Waits for the earliest download that was not shown, and shows `bytes` of it; nothing after a failure.
    pub(super) fn show(&mut self, stream: &Stream<D>, bytes: usize) -> &[u8] {
        assert!(bytes <= self.capacity, "room was made first");
        let earlier = 1 - self.last;
        let earliest = if self.turns[earlier].copied.is_some() { earlier } else { self.last };
        let turn = &mut self.turns[earliest];
        if !turn.settle(stream) {
            return &[];
        }
        let Some(host) = &turn.host else { return &[] };
        // SAFETY: within the memory by the assertion; it was zeroed or copied to, and no copy is under way.
        unsafe { std::slice::from_raw_parts(host.start(), bytes) }
    }
}

impl<D: Driver> Turn<D> {
    /// Waits until the last copy is over. Whether there was one, and it succeeded.
    fn settle(&mut self, stream: &Stream<D>) -> bool {
        let Some(event) = self.copied.take() else { return false };
        stream.attempt(|driver| driver.wait(&event)).is_some()
    }
}

/// Plain values as bytes.
pub(super) fn bytes_of<T: PlainWord>(values: &[T]) -> &[u8] {
    // SAFETY: any such value is initialised bytes without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Types without padding whose bytes kernels read.
///
/// # Safety
/// Every byte of a value is initialised.
pub(super) unsafe trait PlainWord: Copy {}
// SAFETY: plain numbers.
unsafe impl PlainWord for i32 {}
// SAFETY: plain numbers.
unsafe impl PlainWord for u32 {}
// SAFETY: plain numbers.
unsafe impl PlainWord for f32 {}
