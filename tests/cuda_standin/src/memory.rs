//! The table of device memory, and the check of every access to it.
//!
//! All memory comes from one large reserved range. An allocation has whole pages, followed by a
//! page that must not be accessed. It lies at the end of its pages, aligned to 512 bytes as in a
//! real pool. The rest of the pages holds a pattern, which is checked after every kernel that
//! writes to the allocation.
//!
//! Freed pages are reused as in a real pool: at once if the program has ordered the allocation
//! after the free, else once the free is done, or if the pool may order the allocation after the
//! free itself. Until the reuse, any use after free is found. Afterwards it is as wrong as on a
//! GPU, and found if it is a race. With `CUDA_STANDIN_POOL=fresh` memory is never reused, so that
//! every use after free is found.

use crate::{
    clock::Clock,
    error::{self, Code, INVALID_VALUE, OUT_OF_MEMORY},
    stream::{Progress, lock},
};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::{Arc, Mutex, OnceLock},
};

const PAGE: usize = 4096;
/// The alignment of addresses.
const ALIGNMENT: usize = 512;
/// All bits set is NaN in every element type. A real pool returns old contents, which would hide
/// reads of unwritten memory. The pattern around an allocation differs.
const FRESH: u8 = 0xff;
const AROUND: u8 = 0xfe;

struct Access {
    range: Range<usize>,
    write: bool,
    by: Operation,
}

/// The origin of an access: an operation of a stream, what is ordered before it, and its name.
#[derive(Clone)]
struct Operation {
    stream: usize,
    tick: u64,
    clock: Arc<Clock>,
    what: String,
}

impl Operation {
    /// Whether the program has ordered the two operations.
    fn is_ordered(&self, other: &Self) -> bool {
        self.clock.covers(other.stream, other.tick) || other.clock.covers(self.stream, self.tick)
    }
}

/// An allocation that a kernel may use, until its accesses are known.
pub struct Loan {
    pub bounds: Bounds,
    by: Operation,
}

struct Allocation {
    /// Its pages.
    place: Range<usize>,
    size: usize,
    device: usize,
    freed: bool,
    /// Whether it belongs to a graph, and is allocated again by each launch.
    of_graph: bool,
    /// Its serial number: later memory at the same address has another.
    serial: u64,
    accesses: Vec<Access>,
    /// Kernels that have not run yet.
    loans: Vec<Operation>,
}

impl Allocation {
    fn is_of(&self, device: usize, what: &str) -> Result<(), String> {
        if self.device == device {
            Ok(())
        } else {
            Err(format!("{what}: memory of device {} on a stream of device {device}", self.device))
        }
    }

    /// Checks an access against the earlier ones, and records it for later ones.
    fn judge(&mut self, range: Range<usize>, write: bool, by: &Operation) -> Result<(), String> {
        for old in &self.accesses {
            let overlap = old.range.start < range.end && range.start < old.range.end;
            if overlap && (old.write || write) && !by.is_ordered(&old.by) {
                return Err(format!(
                    "race: {} of stream {} and {} of stream {} are not ordered",
                    by.what, by.stream, old.by.what, old.by.stream
                ));
            }
        }
        // An earlier access that this one covers and follows can be dropped: a later access cannot
        // race with it without racing with this one; a read only replaces reads. But a kernel that
        // has not run yet may turn out to race with it.
        if self.loans.is_empty() {
            self.accesses.retain(|old| {
                let inside = range.start <= old.range.start && old.range.end <= range.end;
                !(inside && (write || !old.write) && by.clock.covers(old.by.stream, old.by.tick))
            });
        }
        self.accesses.push(Access { range, write, by: by.clone() });
        Ok(())
    }
}

/// Freed pages: the stream and operation that freed them, and whether that is done.
struct Spare {
    place: Range<usize>,
    /// The allocation that was there.
    start: usize,
    stream: usize,
    tick: u64,
    done: Arc<Progress>,
}

#[derive(Default)]
struct Table {
    // Freed allocations stay in the table until their pages are reused, so that a use after free is
    // found.
    allocations: BTreeMap<usize, Allocation>,
    used: HashMap<usize, usize>,
    pinned: BTreeMap<usize, usize>,
    /// By device and size of the place, the latest last.
    spare: HashMap<(usize, usize), Vec<Spare>>,
    serials: u64,
    /// Allocations whose pages were reused before earlier kernels that may use them have run.
    late: HashMap<u64, Allocation>,
    /// The rest of the reserved range.
    left: Range<usize>,
    /// The number of reserved ranges.
    ranges: usize,
}

/// A stream that allocates, with what determines the choice of the memory.
pub struct AllocatingStream<'a> {
    pub stream: usize,
    pub clock: &'a Clock,
    pub policy: Policy,
}

/// The attributes of a pool that select what may be reused.
#[derive(Clone, Copy)]
pub struct Policy {
    /// Memory whose free is ordered before the allocation by events.
    pub follow_events: bool,
    /// Memory that happens to be free already.
    pub opportunistic: bool,
    /// Memory that is not free yet: the pool makes the stream wait for it.
    pub internal: bool,
}

/// Memory for a stream, usable once the stream reaches `open`.
pub struct NewMemory {
    pub bounds: Bounds,
    /// What the stream has to wait for first.
    pub after: Option<Arc<Progress>>,
}

/// The location of an allocation.
#[derive(Clone)]
pub struct Bounds {
    place: Range<usize>,
    pub start: usize,
    size: usize,
    serial: u64,
}

/// The reserved size, in addresses, not memory.
const RESERVED: usize = 8 << 40;
/// The start of device memory and the largest number of ranges; shim/cuda.h has the same values.
const DEVICE: usize = 32 << 40;
const RANGES: usize = 6;
const UNTOUCHABLE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Table {
    /// Adds to the bytes in use on a device, if it has that many.
    fn charge(&mut self, device: usize, size: usize) -> Result<(), Code> {
        let used = self.used.entry(device).or_default();
        if size > limit().saturating_sub(*used) {
            return Err(OUT_OF_MEMORY);
        }
        *used += size;
        Ok(())
    }

    /// Chooses pages for an allocation, and what it must wait for.
    fn place(
        &mut self,
        device: usize,
        size: usize,
        by: Option<&AllocatingStream>,
    ) -> Option<(Range<usize>, Option<Arc<Progress>>)> {
        let pages = size.next_multiple_of(PAGE);
        if let Some(spare) = self.spare.get_mut(&(device, pages)).filter(|_| !never_twice()) {
            let is_done = |old: &Spare| old.done.is_at(1);
            let chosen = match by {
                None => spare.iter().rposition(is_done),
                Some(by) => {
                    let policy = by.policy;
                    let is_before = |old: &Spare| {
                        by.clock.covers(old.stream, old.tick)
                            && (policy.follow_events || old.stream == by.stream)
                    };
                    let free = |old: &Spare| policy.opportunistic && is_done(old);
                    (spare.iter().rposition(is_before))
                        .or_else(|| spare.iter().rposition(free))
                        .or_else(|| spare.len().checked_sub(1).filter(|_| policy.internal))
                }
            };
            if let Some(old) = chosen.map(|at| spare.remove(at)) {
                if let Some(gone) = self.allocations.remove(&old.start).filter(|gone| !gone.loans.is_empty())
                {
                    self.late.insert(gone.serial, gone);
                }
                let is_ordered = by.is_none_or(|by| by.clock.covers(old.stream, old.tick));
                return Some((old.place, (!is_ordered && !old.done.is_at(1)).then_some(old.done)));
            }
        }
        let start = self.reserve(pages + PAGE)?;
        Some((start..start + pages, None))
    }

    /// Adds an allocation at the end of its place.
    fn enter(&mut self, place: Range<usize>, size: usize, device: usize, of_graph: bool) -> Bounds {
        self.serials += 1;
        let start = place.end - size.next_multiple_of(ALIGNMENT);
        let bounds = Bounds { place: place.clone(), start, size, serial: self.serials };
        let own = Allocation {
            place,
            size,
            device,
            freed: of_graph,
            of_graph,
            serial: self.serials,
            accesses: Vec::new(),
            loans: Vec::new(),
        };
        self.allocations.insert(start, own);
        bounds
    }

    /// Ends the life of an allocation.
    fn retire(&mut self, start: usize) {
        if let Some(found) = self.allocations.get_mut(&start) {
            found.freed = true;
            // A graph's next launch must be ordered after all uses of it, including the free.
            if !found.of_graph && found.loans.is_empty() {
                found.accesses = Vec::new();
            }
            *self.used.entry(found.device).or_default() -= found.size;
        }
    }

    /// Reserves addresses that were never used.
    fn reserve(&mut self, size: usize) -> Option<usize> {
        if self.left.len() < size {
            let place = DEVICE + self.ranges * RESERVED;
            let flags = UNTOUCHABLE | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: a fresh mapping, where nothing is yet.
            let start = unsafe { libc::mmap(place as *mut _, RESERVED, libc::PROT_NONE, flags, -1, 0) };
            if self.ranges == RANGES || start as usize != place {
                return None;
            }
            self.ranges += 1;
            self.left = place..place + RESERVED;
        }
        let start = self.left.start;
        self.left.start = start.checked_add(size).filter(|end| *end <= self.left.end)?;
        Some(start)
    }
}

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

fn with_table<R>(f: impl FnOnce(&mut Table) -> R) -> R {
    f(lock(&TABLE).get_or_insert_default())
}

/// The origin of an access: a stream of a device, at a tick of its clock.
pub struct Accessor<'a> {
    pub device: usize,
    pub stream: usize,
    pub tick: u64,
    pub clock: &'a Arc<Clock>,
    /// The operation's name, set by its first access.
    pub name: &'a RefCell<Option<String>>,
}

/// Bytes of one device, `CUDA_STANDIN_MEMORY` (default 1 GiB).
pub fn limit() -> usize {
    static LIMIT: OnceLock<usize> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        std::env::var("CUDA_STANDIN_MEMORY").ok().and_then(|v| v.parse().ok()).unwrap_or(1 << 30)
    })
}

/// Bytes in use on a device.
pub fn used(device: usize) -> usize {
    with_table(|table| table.used.get(&device).copied().unwrap_or(0))
}

fn never_twice() -> bool {
    static NEVER: OnceLock<bool> = OnceLock::new();
    *NEVER.get_or_init(|| std::env::var("CUDA_STANDIN_POOL").is_ok_and(|pool| pool == "fresh"))
}

/// Allocates memory for a stream, or for the host if `by` is `None`.
pub fn allocate(device: usize, size: usize, by: Option<&AllocatingStream>) -> Result<NewMemory, Code> {
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    with_table(|table| {
        table.charge(device, size)?;
        let (place, after) = table.place(device, size, by).ok_or(OUT_OF_MEMORY)?;
        Ok(NewMemory { bounds: table.enter(place, size, device, false), after })
    })
}

/// Reserves an address for memory that launches of a graph allocate.
pub fn reserve(device: usize, size: usize) -> Result<Bounds, Code> {
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    with_table(|table| {
        let pages = size.next_multiple_of(PAGE);
        let start = table.reserve(pages + PAGE).ok_or(OUT_OF_MEMORY)?;
        Ok(table.enter(start..start + pages, size, device, true))
    })
}

/// The allocation of an address.
pub fn bounds(address: usize) -> Option<Bounds> {
    with_table(|table| {
        let (start, found) = table.allocations.range(..=address).next_back()?;
        (address - start <= found.size).then(|| Bounds {
            place: found.place.clone(),
            start: *start,
            size: found.size,
            serial: found.serial,
        })
    })
}

impl Bounds {
    /// The allocation with the space around it.
    pub fn place(&self) -> [usize; 2] {
        [self.place.start, self.place.end]
    }

    /// Maps the reserved pages as memory, NaN in every floating-point type.
    pub fn open(&self) {
        let (start, pages) = (self.place.start, self.place.len());
        // SAFETY: the pages are part of what was reserved, and belong to one allocation: the
        // previous one has given them back.
        let is_open = unsafe {
            libc::mprotect(start as *mut _, pages, libc::PROT_READ | libc::PROT_WRITE) == 0 && {
                std::ptr::write_bytes(start as *mut u8, AROUND, pages);
                std::ptr::write_bytes(self.start as *mut u8, FRESH, self.size);
                true
            }
        };
        if !is_open {
            error::report(format!("pages at {start:#x} are not there"));
        }
    }

    /// Returns the pages and leaves the range unreadable.
    pub fn close(&self) {
        let (start, pages) = (self.place.start, self.place.len());
        // SAFETY: the pages are one allocation's, which is freed, and nothing else was mapped
        // there.
        let done = unsafe {
            libc::mmap(start as *mut _, pages, libc::PROT_NONE, UNTOUCHABLE | libc::MAP_FIXED, -1, 0)
        };
        if done == libc::MAP_FAILED {
            error::report(format!("pages at {start:#x} were not given back"));
        }
    }

    /// Whether the space around the allocation is unchanged.
    pub fn is_intact(&self) -> bool {
        let end = self.start + self.size;
        [self.place.start..self.start, end..self.place.end].into_iter().all(|slack| {
            // SAFETY: the slack is part of the allocation's pages, which are open while its work is
            // done.
            let slack = unsafe { std::slice::from_raw_parts_mut(slack.start as *mut u8, slack.len()) };
            let is_intact = slack.iter().all(|byte| *byte == AROUND);
            slack.fill(AROUND);
            is_intact
        })
    }
}

/// Allocates these for a launch of a graph, all or none; an error if any is still allocated.
pub fn revive(starts: &[usize]) -> Result<(), Code> {
    with_table(|table| {
        if !starts.iter().all(|start| table.allocations.get(start).is_some_and(|found| found.freed)) {
            return Err(INVALID_VALUE);
        }
        for (at, start) in starts.iter().enumerate() {
            let Some((device, size)) = table.allocations.get(start).map(|found| (found.device, found.size))
            else {
                return Err(INVALID_VALUE);
            };
            if let Err(code) = table.charge(device, size) {
                for start in &starts[..at] {
                    table.retire(*start);
                }
                return Err(code);
            }
            if let Some(found) = table.allocations.get_mut(start) {
                found.freed = false;
            }
        }
        Ok(())
    })
}

impl Accessor<'_> {
    fn operation(&self, what: &str) -> Operation {
        Operation {
            stream: self.stream,
            tick: self.tick,
            clock: Arc::clone(self.clock),
            what: what.to_string(),
        }
    }
}

/// Lends an allocation to a kernel. `Err` says why it may not be used at all.
pub fn lend(who: &Accessor, bounds: Bounds, what: &str) -> Result<Loan, String> {
    who.name.borrow_mut().get_or_insert_with(|| what.to_string());
    with_table(|table| {
        let start = bounds.start;
        let found = table.allocations.get_mut(&start);
        let Some(found) = found.filter(|found| found.serial == bounds.serial && !found.freed) else {
            return Err(format!("{what}: use after free at {start:#x}"));
        };
        found.is_of(who.device, what)?;
        let by = who.operation(what);
        found.loans.push(by.clone());
        Ok(Loan { bounds, by })
    })
}

/// Ends a loan after the kernel has read and written these addresses. `Err` says what is wrong with
/// that.
pub fn settle(loan: Loan, read: Range<usize>, written: Range<usize>) -> Result<(), String> {
    let Loan { bounds: Bounds { start, size, serial, .. }, by } = loan;
    with_table(|table| {
        let current = table.allocations.get_mut(&start).filter(|found| found.serial == serial);
        let Some(found) = current.or_else(|| table.late.get_mut(&serial)) else {
            return Err(format!("{}: its memory at {start:#x} is not known any more", by.what));
        };
        found.loans.retain(|other| (other.stream, other.tick) != (by.stream, by.tick));
        let judged = [(read, false), (written, true)].into_iter().try_for_each(|(seen, write)| {
            if seen.is_empty() {
                return Ok(());
            }
            if seen.start < start || seen.end > start + size {
                let outside = if seen.start < start { seen.start } else { seen.end - 1 };
                let does = if write { "writes" } else { "reads" };
                return Err(format!(
                    "{}: out of bounds: it {does} {outside:#x}, next to {size} bytes at {start:#x}",
                    by.what
                ));
            }
            found.judge(seen.start - start..seen.end - start, write, &by)
        });
        if found.loans.is_empty() {
            table.late.remove(&serial);
        }
        judged
    })
}

/// Checks an access and records it for later ones. `Err` says what is wrong.
pub fn access(who: &Accessor, start: usize, size: usize, write: bool, what: &str) -> Result<(), String> {
    who.name.borrow_mut().get_or_insert_with(|| what.to_string());
    if size == 0 {
        return Ok(());
    }
    with_table(|table| {
        let found =
            table.allocations.range_mut(..=start).next_back().filter(|(base, a)| start - **base < a.size);
        let Some((&base, found)) = found else {
            return Err(format!("{what}: {start:#x} is not device memory"));
        };
        let offset = start - base;
        if found.freed {
            return Err(format!("{what}: use after free at {start:#x}"));
        }
        if size > found.size - offset {
            return Err(format!(
                "{what}: out of bounds: {size} bytes at offset {offset} of {} bytes",
                found.size
            ));
        }
        found.is_of(who.device, what)?;
        found.judge(offset..offset + size, write, &who.operation(what))
    })
}

/// Ends an allocation's life, which counts as a write to all of it. `done` is set when the stream
/// reaches the free.
pub fn free(who: &Accessor, start: usize, done: &Arc<Progress>) -> Result<(), String> {
    let size = with_table(|table| table.allocations.get(&start).map(|found| found.size));
    let size = size.ok_or_else(|| format!("free: {start:#x} is not the start of an allocation"))?;
    access(who, start, size, true, "free")?;
    with_table(|table| {
        // A kernel that may use the allocation must be ordered before the free, whatever it
        // accesses.
        let loans = table.allocations.get(&start).into_iter().flat_map(|found| &found.loans);
        if let Some(by) = loans.into_iter().find(|by| !who.clock.covers(by.stream, by.tick)) {
            return Err(format!(
                "race: free of stream {} and {} of stream {} are not ordered",
                who.stream, by.what, by.stream
            ));
        }
        table.retire(start);
        let Some(found) = table.allocations.get(&start).filter(|found| !found.of_graph) else {
            return Ok(());
        };
        let place = found.place.clone();
        let (stream, tick, done) = (who.stream, who.tick, Arc::clone(done));
        let spare = table.spare.entry((found.device, place.len())).or_default();
        spare.push(Spare { place, start, stream, tick, done });
        Ok(())
    })
}

/// Host memory that the device accesses directly: a copy reads or writes it when it runs, not when
/// it is enqueued.
pub fn pin(size: usize) -> usize {
    let memory = vec![0_u128; size.div_ceil(16).max(1)].into_boxed_slice();
    let start = Box::into_raw(memory) as *mut u128 as usize;
    with_table(|table| table.pinned.insert(start, size));
    start
}

/// Frees pinned memory.
pub fn unpin(start: usize) -> Option<()> {
    let size = with_table(|table| table.pinned.remove(&start))?;
    // SAFETY: `pin` made a boxed slice of this length there.
    drop(unsafe {
        Box::from_raw(std::ptr::slice_from_raw_parts_mut(start as *mut u128, size.div_ceil(16).max(1)))
    });
    Some(())
}

/// Whether host memory is pinned.
pub fn is_pinned(start: usize, size: usize) -> bool {
    with_table(|table| {
        table.pinned.range(..=start).next_back().is_some_and(|(base, len)| start + size <= base + len)
    })
}
