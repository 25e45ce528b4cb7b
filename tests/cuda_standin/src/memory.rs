//! The table of device memory, and the judgement of every access to it.
//!
//! All memory comes from one large reserved range: an allocation is whole pages with a page behind it that
//! nobody may touch. It lies at the end of its pages, at a multiple of 512 bytes as a real pool's. What is
//! before and behind it in them holds a pattern, which is looked at after every kernel that writes to it.
//!
//! Pages that were freed are given out again as a real pool does it: at once where the program has put the
//! allocation behind the free, else where the free is done or where the pool may put it behind the free by
//! itself. Until then their use is found; afterwards it is as wrong as on a GPU, and found if it is a race.
//! With `CUDA_STANDIN_POOL=fresh` nothing is given out twice, so that every use after free is found.

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
/// What addresses are multiples of.
const ALIGNMENT: usize = 512;
/// All bits set is NaN in every element. A real pool gives what was there before, which would hide reads of
/// what nobody has written. The pattern around an allocation is another.
const FRESH: u8 = 0xff;
const AROUND: u8 = 0xfe;

struct Access {
    range: Range<usize>,
    write: bool,
    stream: usize,
    tick: u64,
    what: String,
}

struct Allocation {
    /// Its pages.
    place: Range<usize>,
    size: usize,
    device: usize,
    freed: bool,
    /// Whether it is a graph's, and lives again with each launch.
    of_graph: bool,
    /// The how manieth it is: the next at its address is another.
    serial: u64,
    accesses: Vec<Access>,
}

/// Pages that were freed: by which operation of which stream, and whether that is done.
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
    // What was freed stays in the table until its pages are given out again, so that its use is seen.
    allocations: BTreeMap<usize, Allocation>,
    used: HashMap<usize, usize>,
    pinned: BTreeMap<usize, usize>,
    /// By device and size of the place, the latest last.
    spare: HashMap<(usize, usize), Vec<Spare>>,
    serials: u64,
    /// What is left of the reserved range.
    left: Range<usize>,
}

/// A stream that allocates, as far as the choice of the memory depends on it.
pub struct By<'a> {
    pub stream: usize,
    pub clock: &'a Clock,
    pub policy: Policy,
}

/// The attributes of a pool that say what may be used again.
#[derive(Clone, Copy)]
pub struct Policy {
    /// What events have put before the allocation.
    pub follow_events: bool,
    /// What happens to be free already.
    pub opportunistic: bool,
    /// What is not free yet: the pool lets the stream wait for it.
    pub internal: bool,
}

/// Memory for a stream, which it has once it comes to `open`.
pub struct Given {
    pub bounds: Bounds,
    /// What the stream has to wait for first.
    pub after: Option<Arc<Progress>>,
}

/// Where an allocation is.
#[derive(Clone)]
pub struct Bounds {
    place: Range<usize>,
    pub start: usize,
    size: usize,
    serial: u64,
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

    /// Pages for an allocation, and what it has to come after.
    fn place(
        &mut self,
        device: usize,
        size: usize,
        by: Option<&By>,
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
                self.allocations.remove(&old.start);
                let is_ordered = by.is_none_or(|by| by.clock.covers(old.stream, old.tick));
                return Some((old.place, (!is_ordered && !old.done.is_at(1)).then_some(old.done)));
            }
        }
        let start = self.reserve(pages + PAGE)?;
        Some((start..start + pages, None))
    }

    /// Enters an allocation at the end of its place.
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
        };
        self.allocations.insert(start, own);
        bounds
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

fn never_twice() -> bool {
    static NEVER: OnceLock<bool> = OnceLock::new();
    *NEVER.get_or_init(|| std::env::var("CUDA_STANDIN_POOL").is_ok_and(|pool| pool == "fresh"))
}

/// Memory for a stream, or for the host where there is none.
pub fn allocate(device: usize, size: usize, by: Option<&By>) -> Result<Given, Code> {
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    with_table(|table| {
        table.charge(device, size)?;
        let (place, after) = table.place(device, size, by).ok_or(OUT_OF_MEMORY)?;
        Ok(Given { bounds: table.enter(place, size, device, false), after })
    })
}

/// An address for memory that launches of a graph allocate.
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
    /// Makes the reserved pages memory, NaN in every floating-point type.
    pub fn open(&self) {
        let (start, pages) = (self.place.start, self.place.len());
        // SAFETY: the pages are part of what was reserved, and one allocation's, whose turn it is: whoever had them
        // before has given them back.
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

    /// Gives the pages back and leaves the range unreadable.
    pub fn close(&self) {
        let (start, pages) = (self.place.start, self.place.len());
        // SAFETY: the pages are one allocation's, which is freed, and nothing else was mapped there.
        let done = unsafe {
            libc::mmap(start as *mut _, pages, libc::PROT_NONE, UNTOUCHABLE | libc::MAP_FIXED, -1, 0)
        };
        if done == libc::MAP_FAILED {
            error::report(format!("pages at {start:#x} were not given back"));
        }
    }

    /// Whether what lies around the allocation is as it was.
    pub fn is_intact(&self) -> bool {
        let end = self.start + self.size;
        [self.place.start..self.start, end..self.place.end].into_iter().all(|slack| {
            // SAFETY: the slack is part of the allocation's pages, which are open while its work is done.
            let slack = unsafe { std::slice::from_raw_parts_mut(slack.start as *mut u8, slack.len()) };
            let is_intact = slack.iter().all(|byte| *byte == AROUND);
            slack.fill(AROUND);
            is_intact
        })
    }

    /// Whether the same allocation is still there.
    pub fn is_current(&self) -> bool {
        with_table(|table| table.allocations.get(&self.start).is_some_and(|now| now.serial == self.serial))
    }
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

/// Ends an allocation's life: it counts as a write to all of it. `done` says when the stream has come to it.
pub fn free(who: &Accessor, start: usize, done: &Arc<Progress>) -> Result<(), String> {
    let size = with_table(|table| table.allocations.get(&start).map(|found| found.size));
    let size = size.ok_or_else(|| format!("free: {start:#x} is not the start of an allocation"))?;
    access(who, start, size, true, "free")?;
    with_table(|table| {
        table.retire(start);
        let Some(found) = table.allocations.get(&start).filter(|found| !found.of_graph) else { return };
        let place = found.place.clone();
        let (stream, tick, done) = (who.stream, who.tick, Arc::clone(done));
        let spare = table.spare.entry((found.device, place.len())).or_default();
        spare.push(Spare { place, start, stream, tick, done });
    });
    Ok(())
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
