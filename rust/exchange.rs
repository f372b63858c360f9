//! What processes tell each other that share the points between them, each with the rows of a range of them.
//!
//! Nothing here adds numbers up. What is folded in an order is folded in the same one by all processes together, one after
//! the other: [`Processes::in_turn`]. All else is put side by side. So no result depends on how many there are.

use std::fmt::Debug;
use std::ops::Range;

use crate::error::Result;
use crate::memory::{POINTS, reserved};

/// Carries bytes between processes that all make the same calls in the same order. Where one of them fails, or says so by
/// handing nothing on, all do.
pub trait Exchange: Debug + Sync {
    /// The number of this process, from 0 on.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// What each of them has, in their order.
    ///
    /// # Errors
    /// If one of them failed.
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits for a turn, and returns the state as the process before left it; for the first that which is given.
    ///
    /// # Errors
    /// If one of them failed.
    fn receive(&self, state: &[u8]) -> Result<Vec<u8>>;

    /// Ends a turn, after which it returns the state as the last process left it. None says that this one failed.
    ///
    /// # Errors
    /// If one of them failed.
    fn hand_on(&self, state: Option<&[u8]>) -> Result<Vec<u8>>;
}

/// Numbers as they are sent.
pub trait Plain: Copy + Send + Sync {
    /// How many bytes one takes.
    const BYTES: usize;

    fn write(self, bytes: &mut Vec<u8>);

    fn read(bytes: &[u8]) -> Self;
}

macro_rules! plain {
    ($($number:ty),*) => {$(
        impl Plain for $number {
            const BYTES: usize = size_of::<$number>();

            fn write(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }

            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("as many bytes as a number has"))
            }
        }
    )*};
}

plain!(f32, f64, i32, u32, u64);

/// What is handed from one process to the next.
pub trait State {
    /// Shows each list of its numbers to `list`.
    fn lists(&mut self, list: &mut dyn List);
}

/// Something that is done to the lists of a [`State`], one after the other.
pub trait List {
    fn doubles(&mut self, values: &mut [f64]);
    fn counts(&mut self, values: &mut [u64]);
}

impl State for f64 {
    fn lists(&mut self, list: &mut dyn List) {
        list.doubles(std::slice::from_mut(self));
    }
}

impl State for Vec<f64> {
    fn lists(&mut self, list: &mut dyn List) {
        list.doubles(self);
    }
}

struct Writer(Vec<u8>);

impl List for Writer {
    fn doubles(&mut self, values: &mut [f64]) {
        values.iter().for_each(|value| value.write(&mut self.0));
    }

    fn counts(&mut self, values: &mut [u64]) {
        values.iter().for_each(|value| value.write(&mut self.0));
    }
}

struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn read<T: Plain>(&mut self, values: &mut [T]) {
        let (own, rest) = self.0.split_at(values.len() * T::BYTES);
        values.iter_mut().zip(own.chunks_exact(T::BYTES)).for_each(|(value, bytes)| *value = T::read(bytes));
        self.0 = rest;
    }
}

impl List for Reader<'_> {
    fn doubles(&mut self, values: &mut [f64]) {
        self.read(values);
    }

    fn counts(&mut self, values: &mut [u64]) {
        self.read(values);
    }
}

/// The processes that share points; one by itself unless told otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct Processes<'a> {
    exchange: Option<&'a dyn Exchange>,
}

impl<'a> Processes<'a> {
    pub fn new(exchange: &'a dyn Exchange) -> Self {
        Self { exchange: (exchange.size() > 1).then_some(exchange) }
    }

    pub fn rank(&self) -> usize {
        self.exchange.map_or(0, Exchange::rank)
    }

    pub fn size(&self) -> usize {
        self.exchange.map_or(1, Exchange::size)
    }

    /// Has all processes change a state, one after the other in their order, so that it is changed as one process would do
    /// it; then all have the last one's.
    ///
    /// # Errors
    /// What `own` gives, or if another process failed.
    pub fn in_turn<S: State>(&self, state: &mut S, own: impl FnOnce(&mut S) -> Result<()>) -> Result<()> {
        let Some(exchange) = self.exchange else { return own(state) };
        let bytes = |state: &mut S| {
            let mut writer = Writer(Vec::new());
            state.lists(&mut writer);
            writer.0
        };
        let before = exchange.receive(&bytes(state))?;
        state.lists(&mut Reader(&before));
        if let Err(error) = own(state) {
            // What the others say of it is of no use here.
            let _ = exchange.hand_on(None);
            return Err(error);
        }
        let after = exchange.hand_on(Some(&bytes(state)))?;
        state.lists(&mut Reader(&after));
        Ok(())
    }

    /// The values of all processes, one after the other in their order.
    ///
    /// # Errors
    /// If another process failed, or the memory cannot be had.
    pub fn gathered<T: Plain>(&self, own: &[T]) -> Result<Vec<Vec<T>>> {
        let Some(exchange) = self.exchange else { return Ok(vec![own.to_vec()]) };
        let mut bytes = reserved(size_of_val(own), POINTS)?;
        own.iter().for_each(|value| value.write(&mut bytes));
        let read = |bytes: &Vec<u8>| {
            let mut values = reserved(bytes.len() / T::BYTES, POINTS)?;
            values.extend(bytes.chunks_exact(T::BYTES).map(T::read));
            Ok(values)
        };
        exchange.gather(&bytes)?.iter().map(read).collect()
    }

    /// Completes a list of which each process has a range, one after the other in their order.
    ///
    /// # Errors
    /// As [`Processes::gathered`].
    pub fn complete<T: Plain>(&self, values: &mut [T], own: Range<usize>) -> Result<()> {
        if self.exchange.is_none() {
            return Ok(());
        }
        let mut place = 0;
        for part in self.gathered(&values[own])? {
            values[place..place + part.len()].copy_from_slice(&part);
            place += part.len();
        }
        Ok(())
    }
}
