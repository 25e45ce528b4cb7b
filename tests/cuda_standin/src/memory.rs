//! The table of device memory, and the judgement of every access to it.
//!
//! All memory comes from one large reserved range: an allocation is whole pages with a page behind it that nobody may touch. What is between its end and that page holds a
//! pattern, which is looked at after every kernel that writes to the allocation.

use crate::{
    clock::Clock,
    error::{self, Code, INVALID_VALUE, OUT_OF_MEMORY},
    stream::lock,
};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::{Mutex, OnceLock},
};

const PAGE: usize = 4096;
/// All bits set is NaN in every element; the pattern behind the end is another.
const FRESH: u8 = 0xff;
const BEHIND: u8 = 0xfe;

struct Access {
    range: Range<usize>,
    write: bool,
    stream: usize,
    tick: u64,
    what: String,
}

struct Allocation {
    size: usize,
    device: usize,
    freed: bool,
    /// Whether it is a graph's, and lives again with each launch.
    of_graph: bool,
    accesses: Vec<Access>,
}

#[derive(Default)]
struct Table {
    // Freed ranges stay in the table and reserved, so that an address is never handed out twice and use after free is always seen.
    allocations: BTreeMap<usize, Allocation>,
    used: HashMap<usize, usize>,
    pinned: BTreeMap<usize, usize>,
    /// What is left of the reserved range.
    left: Range<usize>,
}

/// How much is reserved: addresses, not memory.
const RESERVED: usize = 8 << 40;
const UNTOUCHABLE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Table {
    /// Counts bytes of a device that come into use, if it has as many.
    fn charge(&mut self, device: usize, size: usize) -> Result<(), Code> {
        let used = self.used.entry(device).or_default();
        if size > limit().saturating_sub(*used) {
            return Err(OUT_OF_MEMORY);
        }
        *used += size;
        Ok(())
    }

    /// Ends the life of an allocation.
    fn retire(&mut self, start: usize) {
        if let Some(found) = self.allocations.get_mut(&start) {
            found.freed = true;
            // A graph's next launch has to come after what was done with it, the freeing too.
            if !found.of_graph {
                found.accesses = Vec::new();
            }
            *self.used.entry(found.device).or_default() -= found.size;
        }
    }

    /// Addresses that were never given out.
    fn reserve(&mut self, size: usize) -> Option<usize> {
        if self.left.is_empty() {
            // SAFETY: a fresh mapping.
            let start =
                unsafe { libc::mmap(std::ptr::null_mut(), RESERVED, libc::PROT_NONE, UNTOUCHABLE, -1, 0) };
            if start == libc::MAP_FAILED {
                return None;
            }
            self.left = start as usize..start as usize + RESERVED;
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

/// Who accesses: a stream of a device, at a tick of its clock.
pub struct Accessor<'a> {
    pub device: usize,
    pub stream: usize,
    pub tick: u64,
    pub clock: &'a Clock,
    /// What it does, as the first of its accesses says.
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

/// Fresh memory, NaN in every floating-point type.
pub fn allocate(device: usize, size: usize) -> Result<usize, Code> {
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    with_table(|table| {
        table.charge(device, size)?;
        let start = table.reserve(size.next_multiple_of(PAGE) + PAGE).ok_or(OUT_OF_MEMORY)?;
        if !open(start, size) {
            return Err(OUT_OF_MEMORY);
        }
        let own = Allocation { size, device, freed: false, of_graph: false, accesses: Vec::new() };
        table.allocations.insert(start, own);
        Ok(start)
    })
}

/// Makes reserved pages memory. Whether the system has that much.
fn open(start: usize, size: usize) -> bool {
    let pages = size.next_multiple_of(PAGE);
    // SAFETY: the range is part of what was reserved, and one allocation's; it has as many bytes. The page behind it stays as it is.
    unsafe {
        if libc::mprotect(start as *mut _, pages, libc::PROT_READ | libc::PROT_WRITE) != 0 {
            return false;
        }
        std::ptr::write_bytes(start as *mut u8, FRESH, size);
        std::ptr::write_bytes((start + size) as *mut u8, BEHIND, pages - size);
    }
    true
}

/// An address for memory that launches of a graph allocate.
pub fn reserve(device: usize, size: usize) -> Result<usize, Code> {
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    with_table(|table| {
        let start = table.reserve(size.next_multiple_of(PAGE) + PAGE).ok_or(OUT_OF_MEMORY)?;
        let own = Allocation { size, device, freed: true, of_graph: true, accesses: Vec::new() };
        table.allocations.insert(start, own);
        Ok(start)
    })
}

/// A launch of a graph allocates these, all or none: not while they live.
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

/// The pages of such memory, when the launch comes to it.
pub fn map(start: usize) {
    let size = with_table(|table| table.allocations.get(&start).map(|found| found.size));
    if size.is_none_or(|size| !open(start, size)) {
        error::report(format!("pages at {start:#x} are not there"));
    }
}

/// The bytes from an address to the end of its allocation; none if it is in none.
pub fn to_end(start: usize) -> Option<usize> {
    with_table(|table| {
        let (base, found) = table.allocations.range(..=start).next_back()?;
        found.size.checked_sub(start - base)
    })
}

/// Judges an access and remembers it for those to come. `Err` says what is wrong.
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
        if found.device != who.device {
            return Err(format!(
                "{what}: memory of device {} on a stream of device {}",
                found.device, who.device
            ));
        }
        let range = offset..offset + size;
        for old in &found.accesses {
            let overlap = old.range.start < range.end && range.start < old.range.end;
            if overlap && (old.write || write) && !who.clock.covers(old.stream, old.tick) {
                return Err(format!(
                    "race: {what} of stream {} and {} of stream {} are not ordered",
                    who.stream, old.what, old.stream
                ));
            }
        }
        // What this access covers and follows cannot race with a later one unless this access does too; a read only stands
        // for reads.
        found.accesses.retain(|old| {
            let inside = range.start <= old.range.start && old.range.end <= range.end;
            !(inside && (write || !old.write) && who.clock.covers(old.stream, old.tick))
        });
        found.accesses.push(Access {
            range,
            write,
            stream: who.stream,
            tick: who.tick,
            what: what.to_string(),
        });
        Ok(())
    })
}

/// Whether what lies behind the allocation of an address is as it was.
pub fn is_intact(start: usize) -> bool {
    let Some((end, slack)) = with_table(|table| {
        let (base, found) =
            table.allocations.range(..=start).next_back().filter(|(_, found)| !found.freed)?;
        let end = base + found.size;
        Some((end, end.next_multiple_of(PAGE) - end))
    }) else {
        return true;
    };
    // SAFETY: the slack is part of the allocation's mapping, and readable while it is not freed.
    let behind = unsafe { std::slice::from_raw_parts_mut(end as *mut u8, slack) };
    let intact = behind.iter().all(|byte| *byte == BEHIND);
    behind.fill(BEHIND);
    intact
}

/// Ends an allocation's life: it counts as a write to all of it, and the address is not used again.
pub fn free(who: &Accessor, start: usize) -> Result<(), String> {
    let size = with_table(|table| table.allocations.get(&start).map(|found| found.size));
    let size = size.ok_or_else(|| format!("free: {start:#x} is not the start of an allocation"))?;
    access(who, start, size, true, "free")?;
    with_table(|table| table.retire(start));
    Ok(())
}

/// Gives the pages back and leaves the range unreadable.
pub fn release(start: usize) {
    let Some(size) = with_table(|table| table.allocations.get(&start).map(|found| found.size)) else {
        return;
    };
    let flags = UNTOUCHABLE | libc::MAP_FIXED;
    // SAFETY: the range is a mapping of `allocate` that `free` has retired; nothing else was mapped there.
    let done =
        unsafe { libc::mmap(start as *mut _, size.next_multiple_of(PAGE), libc::PROT_NONE, flags, -1, 0) };
    if done == libc::MAP_FAILED {
        error::report(format!("pages at {start:#x} were not given back"));
    }
}

/// Host memory that the device reaches by itself: a copy reads or writes it when its turn comes, not when it is asked for.
pub fn pin(size: usize) -> usize {
    let memory = vec![0_u128; size.div_ceil(16).max(1)].into_boxed_slice();
    let start = Box::into_raw(memory) as *mut u128 as usize;
    with_table(|table| table.pinned.insert(start, size));
    start
}

/// Frees such memory.
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
