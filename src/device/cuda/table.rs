//! Small tables of numbers and flags that kernels read. A cache keeps the tables on the device and
//! finds them by their contents. It saves uploads, because the layers of a model use equal tables,
//! and its steps often do too.

use super::{Cuda, memory::StreamMemory};
use crate::error::Result;
use std::{collections::HashMap, rc::Rc};

/// A table on the device.
pub(crate) struct Table(Rc<StreamMemory>);

impl Table {
    /// Returns the address of the table's first byte.
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
    /// The largest table in bytes that the cache keeps. To look up a larger table could take longer
    /// than to upload it.
    const MAX_TABLE: usize = 16 << 10;
    /// The largest total size of the cached tables in bytes. If a new table would exceed it, the
    /// cache first drops all its tables. Their memory is freed in stream order, after the kernels
    /// that read it.
    const MAX_TOTAL: usize = 4 << 20;

    fn keep(&mut self, contents: Vec<u8>, table: &Rc<StreamMemory>) {
        if contents.len() > Self::MAX_TABLE {
            return;
        }
        if self.bytes + contents.len() > Self::MAX_TOTAL {
            *self = Self::default();
        }
        self.bytes += contents.len();
        self.known.insert(contents.into(), Rc::clone(table));
    }
}

impl Cuda {
    /// Returns a table of integers. Later work of the stream can read it.
    pub(crate) fn table(&self, values: &[i64]) -> Result<Table> {
        self.table_of(values.iter().flat_map(|value| value.to_ne_bytes()).collect())
    }

    /// Returns a table of 32-bit integers.
    pub(crate) fn table_u32(&self, values: &[u32]) -> Result<Table> {
        self.table_of(values.iter().flat_map(|value| value.to_ne_bytes()).collect())
    }

    /// Returns a table of floating-point numbers.
    pub(crate) fn table_f64(&self, values: &[f64]) -> Result<Table> {
        self.table_of(values.iter().flat_map(|value| value.to_ne_bytes()).collect())
    }

    /// Returns a table of flags, one byte each.
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
