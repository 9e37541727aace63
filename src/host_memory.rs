//! What the operating system says of the memory that this process may have, and of what it has had
//! (Linux: /proc, and the limits of control groups, as containers and batch systems set them).

use std::fs;
use std::path::{Path, PathBuf};

/// In bytes; `None` where the system does not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostMemory {
    /// The machine's, or the limit of a control group, whichever is less.
    pub total: Option<u64>,
    /// What can still be allocated.
    pub available: Option<u64>,
}

impl HostMemory {
    pub fn now() -> Self {
        Self::under(Path::new("/"))
    }

    /// As the files below `root` have it.
    pub fn under(root: &Path) -> Self {
        let of_machine = |name| bytes_of_field(&root.join("proc/meminfo"), name);
        let groups = groups(root);
        let limits = groups.iter().map(|group| group.limit);
        let left = groups.iter().map(Group::left);
        HostMemory {
            total: of_machine("MemTotal").into_iter().chain(limits).min(),
            available: of_machine("MemAvailable").into_iter().chain(left).min(),
        }
    }
}

/// Bytes that can still be allocated; `u64::MAX` where the system does not say.
pub fn available_bytes() -> u64 {
    HostMemory::now().available.unwrap_or(u64::MAX)
}

/// The most bytes that this process has had at one time; `None` where the system does not say.
pub fn peak_of_process() -> Option<u64> {
    bytes_of_field(Path::new("/proc/self/status"), "VmHWM")
}

/// The first `name : value` line of a file of the Linux kernel; `None` on other systems.
pub fn field(path: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(field, _)| field.trim() == name)?;
    Some(value.trim().to_string())
}

fn bytes_of_field(path: &Path, name: &str) -> Option<u64> {
    let kibibytes: u64 = field(path, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}

// ------------------------------------------------------------------ control groups

/// A control group with a limit, in bytes.
struct Group {
    limit: u64,
    used: u64,
    /// Of the used ones: pages of files that nobody has read lately, which the kernel gives up
    /// first.
    reclaimable: u64,
}

impl Group {
    fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used.saturating_sub(self.reclaimable))
    }

    /// `None`: this folder has no limit.
    fn read(folder: &Path, files: &Files) -> Option<Self> {
        let number = |name: &str| -> Option<u64> {
            fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
        };
        let reclaimable = fs::read_to_string(folder.join("memory.stat")).ok().and_then(|text| {
            let mut values = text.lines().filter_map(|line| line.split_once(' '));
            values.find(|(name, _)| *name == files.reclaimable)?.1.trim().parse().ok()
        });
        Some(Group {
            // "max", or a number near 2^63, is none.
            limit: number(files.limit).filter(|limit| *limit < NO_LIMIT)?,
            used: number(files.used)?,
            reclaimable: reclaimable.unwrap_or(0),
        })
    }
}

/// The least that version 1 writes for none, with the largest pages that there are.
const NO_LIMIT: u64 = i64::MAX as u64 - (1 << 24);

/// What the two versions call the same, descendants included.
struct Files {
    limit: &'static str,
    used: &'static str,
    reclaimable: &'static str,
}

const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const VERSION_2: Files =
    Files { limit: "memory.max", used: "memory.current", reclaimable: "inactive_file" };

/// Those of this process and the ones around them, with limits; see cgroups(7).
fn groups(root: &Path) -> Vec<Group> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let (own, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut groups = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let files = match controllers {
            "" => &VERSION_2,
            _ if controllers.split(',').any(|it| it == "memory") => &VERSION_1,
            _ => continue,
        };
        for mount in mounts.lines().filter_map(|line| Mount::parse(line, files)) {
            let top = root.join(mount.at.trim_start_matches('/'));
            let inner = mount.inner(path).unwrap_or_default();
            let around = inner.ancestors().map(|inner| top.join(inner));
            groups.extend(around.filter_map(|folder| Group::read(&folder, files)));
        }
    }
    groups
}

/// Where a hierarchy of control groups can be seen, and which part of it.
struct Mount<'a> {
    part: &'a str,
    at: &'a str,
}

impl<'a> Mount<'a> {
    /// A line of mountinfo, see proc_pid_mountinfo(5); `None`: of something else.
    fn parse(line: &'a str, files: &Files) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let kind = file_system.next()?;
        let is_ours = match files.limit == VERSION_2.limit {
            true => kind == "cgroup2",
            false => kind == "cgroup" && file_system.nth(1)?.split(',').any(|it| it == "memory"),
        };
        let mut fields = mount.split(' ').skip(3);
        let (part, at) = (fields.next()?, fields.next()?);
        is_ours.then_some(Mount { part, at })
    }

    /// A group's folder below the mount; `None`: it is not in the part that can be seen.
    fn inner(&self, group: &str) -> Option<PathBuf> {
        let inner = Path::new(group).strip_prefix(self.part).ok()?;
        Some(inner.to_path_buf())
    }
}
