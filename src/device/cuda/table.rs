//! Small tables of numbers and flags that kernels read. They stay on the device by their contents:
//! the layers of a model, and often its steps, ask for the same ones.

use super::{Cuda, memory::StreamMemory};
use crate::error::Result;
use std::{collections::HashMap, rc::Rc};

/// A table on the device.
pub(crate) struct Table(Rc<StreamMemory>);

impl Table {
    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.0.address()
    }
}

/// The tables of one stream.
#[derive(Default)]
pub(super) struct Tables {
    known: HashMap<Box<[u8]>, Rc<StreamMemory>>,
    bytes: usize,
}

impl Tables {
    /// The bytes of the largest table that is kept: looking for it has to take less than the
    /// upload.
    const LARGEST: usize = 16 << 10;
    /// The bytes of all tables, beyond which they are forgotten. Kernels that read them come first
    /// in the stream.
    const TOGETHER: usize = 4 << 20;

    fn keep(&mut self, contents: Vec<u8>, table: &Rc<StreamMemory>) {
        if contents.len() > Self::LARGEST {
            return;
        }
        if self.bytes + contents.len() > Self::TOGETHER {
            *self = Self::default();
        }
        self.bytes += contents.len();
        self.known.insert(contents.into(), Rc::clone(table));
    }
}

impl Cuda {
    /// Whole numbers for a kernel, in the order of its work.
    pub(crate) fn table(&self, words: &[i64]) -> Result<Table> {
        self.table_of(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }

    /// 32-bit numbers for a kernel.
    pub(crate) fn table_u32(&self, words: &[u32]) -> Result<Table> {
        self.table_of(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }

    /// Floating-point numbers for a kernel.
    pub(crate) fn table_f64(&self, words: &[f64]) -> Result<Table> {
        self.table_of(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }

    /// Flags for a kernel, a byte each.
    pub(crate) fn table_of_flags(&self, flags: impl Iterator<Item = bool>) -> Result<Table> {
        self.table_of(flags.map(u8::from).collect())
    }

    fn table_of(&self, contents: Vec<u8>) -> Result<Table> {
        let handle = &self.0;
        if let Some(table) = handle.tables.borrow().known.get(&contents[..]) {
            return Ok(Table(Rc::clone(table)));
        }
        handle.context.make_current()?;
        let table = Rc::new(StreamMemory::new(handle, contents.len())?);
        handle.staging.borrow_mut().upload(handle, &contents, table.address())?;
        handle.tables.borrow_mut().keep(contents, &table);
        Ok(Table(table))
    }
}
