//! What lies in device memory.

use std::sync::Arc;

use super::driver::{Address, Driver, DriverError, HostMemory, Memory};
use super::plan::bucket;
use super::stream::Stream;
use super::weight::{Form, Unpacked};
use crate::{KernelError, KvLayout, Matrix};

/// What is left free of the device's memory by what steps can do without, recordings and the like. Requests want some
/// too, for copies, events, and where nobody has loaded all kernels, for those that come first; and a step does not do
/// without those.
pub(super) const SPARE_BYTES: usize = 256 << 20;

/// Device memory that may be missing: after a failure, nothing more is allocated or launched.
pub(super) struct Buffer<D: Driver>(Option<Arc<D::Memory>>);

impl<D: Driver> Buffer<D> {
    pub(super) fn missing() -> Self {
        Self(None)
    }

    pub(super) fn zeroed(stream: &Stream<D>, bytes: usize) -> Self {
        Self(stream.attempt(|driver| driver.allocate(bytes.max(16))).map(Arc::new))
    }

    /// The same, unless the device has no room for it, or would have little left: then it is missing, and nothing has
    /// failed.
    pub(super) fn zeroed_if_there_is_room(stream: &Stream<D>, bytes: usize) -> Self {
        let memory = stream.attempt(|driver| {
            let (free, _) = driver.memory()?;
            if free < bytes + SPARE_BYTES {
                return Ok(None);
            }
            match driver.allocate(bytes) {
                // Others were faster, or what is free is in pieces.
                Err(DriverError::OutOfMemory { .. }) => Ok(None),
                memory => memory.map(Some),
            }
        });
        Self(memory.flatten().map(Arc::new))
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
        for alike in parts.chunk_by(|a, b| Form::of(a.dtype(), cols) == Form::of(b.dtype(), cols)) {
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
                form: Form::of(alike[0].dtype(), cols),
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

/// Page-locked memory that is used in turns, so that there is something for the host to write or read while the copy
/// before is under way.
struct Turns<D: Driver> {
    turns: [Turn<D>; 2],
    /// Whose turn it was last.
    last: usize,
}

struct Turn<D: Driver> {
    host: Option<D::HostMemory>,
    /// The end of the last copy from or to it, until somebody has waited for it.
    copied: Option<D::Event>,
    /// What marked it, and will mark the next one: to make an event takes a call of the driver, and to give it back too.
    used: Option<D::Event>,
}

impl<D: Driver> Turns<D> {
    fn new() -> Self {
        Self { turns: [(); 2].map(|()| Turn { host: None, copied: None, used: None }), last: 0 }
    }

    /// Other memory, of `bytes` each.
    fn renew(&mut self, stream: &Stream<D>, bytes: usize) {
        for turn in &mut self.turns {
            turn.settle(stream);
            turn.host = stream.attempt(|driver| driver.allocate_host(bytes));
        }
    }

    fn next(&mut self) -> &mut Turn<D> {
        self.last = 1 - self.last;
        &mut self.turns[self.last]
    }
}

impl<D: Driver> Turn<D> {
    /// Waits until the last copy is over.
    fn settle(&mut self, stream: &Stream<D>) {
        if let Some(event) = self.copied.take() {
            stream.attempt(|driver| driver.wait(&event));
            self.used = Some(event);
        }
    }

    /// A copy was enqueued.
    fn mark(&mut self, stream: &Stream<D>) {
        let used = self.used.take();
        self.copied = stream.attempt(|driver| driver.record(used));
    }
}

/// Data on its way to the device: page-locked memory, and device memory as large. Both grow as needed, which is seldom.
pub(super) struct Staged<D: Driver> {
    turns: Turns<D>,
    device: Buffer<D>,
    capacity: usize,
}

impl<D: Driver> Staged<D> {
    pub(super) fn new() -> Self {
        Self { turns: Turns::new(), device: Buffer::missing(), capacity: 0 }
    }

    pub(super) fn address(&self) -> Address {
        self.device.address()
    }

    /// Makes room for `bytes`. Whether the device's side has another address now.
    pub(super) fn reserve(&mut self, stream: &Stream<D>, bytes: usize) -> bool {
        if bytes <= self.capacity {
            return false;
        }
        self.capacity = bytes.next_power_of_two().max(4096);
        self.turns.renew(stream, self.capacity);
        self.device = Buffer::zeroed(stream, self.capacity);
        true
    }

    /// Enqueues a copy of `parts`, one after the other, to the device. They fit: see [`Staged::reserve`]. Waits for the
    /// copy before the last.
    pub(super) fn upload(&mut self, stream: &Stream<D>, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(bytes <= self.capacity, "room was made first");
        let turn = self.turns.next();
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
        turn.mark(stream);
    }
}

/// Data that kernels leave for the host: device memory, and page-locked memory as large.
pub(super) struct Fetched<D: Driver> {
    turns: Turns<D>,
    device: Buffer<D>,
    capacity: usize,
}

impl<D: Driver> Fetched<D> {
    pub(super) fn new() -> Self {
        Self { turns: Turns::new(), device: Buffer::missing(), capacity: 0 }
    }

    pub(super) fn address(&self) -> Address {
        self.device.address()
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes room for `bytes`, while nothing is on its way; what was there is gone. Whether the device's side has
    /// another address now.
    pub(super) fn reserve(&mut self, stream: &Stream<D>, bytes: usize) -> bool {
        if bytes <= self.capacity {
            return false;
        }
        self.assert_idle();
        self.capacity = bytes.next_power_of_two().max(4096);
        self.turns.renew(stream, self.capacity);
        self.device = Buffer::zeroed(stream, self.capacity);
        true
    }

    /// Nothing is on its way that nobody has looked at.
    pub(super) fn assert_idle(&self) {
        assert!(self.turns.turns.iter().all(|turn| turn.copied.is_none()), "what was fetched is collected first");
    }

    /// Enqueues a copy of the first `bytes` to the host. At most two may wait to be shown.
    pub(super) fn download(&mut self, stream: &Stream<D>, bytes: usize) {
        assert!(bytes <= self.capacity, "room was made first");
        let turn = self.turns.next();
        assert!(turn.copied.is_none(), "what was fetched is collected first");
        let Some(host) = &turn.host else { return };
        let from = self.device.address();
        if bytes > 0 {
            stream.attempt(|driver| driver.download(from, host, bytes));
        }
        turn.mark(stream);
    }

    /// Waits for the earliest download that was not shown, and shows `bytes` of it; nothing after a failure.
    pub(super) fn show(&mut self, stream: &Stream<D>, bytes: usize) -> &[u8] {
        assert!(bytes <= self.capacity, "room was made first");
        let Turns { turns, last } = &mut self.turns;
        let earliest = if turns[1 - *last].copied.is_some() { 1 - *last } else { *last };
        let turn = &mut turns[earliest];
        assert!(turn.copied.is_some() || stream.check().is_err(), "it was fetched first");
        turn.settle(stream);
        let (Some(host), Ok(())) = (&turn.host, stream.check()) else { return &[] };
        // SAFETY: within the memory by the assertion; it was zeroed or copied to, and no copy is under way.
        unsafe { std::slice::from_raw_parts(host.start(), bytes) }
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
