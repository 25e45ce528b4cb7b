//! The processor and the memory of this machine.

use sysinfo::{CGroupLimits, CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

pub(crate) struct Host(System);

impl Host {
    pub(crate) fn new() -> Self {
        let (memory, cpu) = (MemoryRefreshKind::nothing().with_ram(), CpuRefreshKind::nothing());
        Self(System::new_with_specifics(RefreshKind::nothing().with_memory(memory).with_cpu(cpu)))
    }

    /// The bytes of memory of this machine, or of the cgroup if that has a limit. 0 if unknown.
    pub(crate) fn memory(&self) -> u64 {
        let total = self.0.total_memory();
        self.cgroup().map_or(total, |limits| limits.total_memory.min(total))
    }

    /// The bytes of memory that programs can still take, also within the cgroup. 0 if unknown.
    pub(crate) fn available(&self) -> u64 {
        let available = self.0.available_memory();
        // The kernel frees the cgroup's cached files when its programs need their memory.
        let within = |limits: CGroupLimits| limits.total_memory.saturating_sub(limits.rss);
        self.cgroup().map_or(available, |limits| within(limits).min(available))
    }

    fn cgroup(&self) -> Option<CGroupLimits> {
        // sysinfo panics if the memory is unknown.
        if self.0.total_memory() > 0 { self.0.cgroup_limits() } else { None }
    }

    /// The name of the processor.
    pub(crate) fn brand(&self) -> String {
        let brand = self.0.cpus().first().map_or("", |cpu| cpu.brand().trim());
        if brand.is_empty() { "this machine".into() } else { brand.into() }
    }
}
