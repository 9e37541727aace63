//! src/host_memory.rs: limits of control groups, from folders that look like the kernel's.

use std::fs;
use std::path::Path;

use isobath::host_memory::HostMemory;
use tempfile::{TempDir, tempdir};

const GIB: u64 = 1 << 30;

/// A root folder of a machine with 64 GiB, of which 48 are free, and these files.
fn machine(files: &[(&str, String)]) -> TempDir {
    let root = tempdir().unwrap();
    let meminfo = format!(
        "MemTotal:       {} kB\nMemFree:        1 kB\nMemAvailable:   {} kB\n",
        64 << 20,
        48 << 20
    );
    write(root.path(), "proc/meminfo", &meminfo);
    files.iter().for_each(|(path, text)| write(root.path(), path, text));
    root
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Total and available GiB.
#[track_caller]
fn assert_memory(what: &str, files: &[(&str, String)], total: u64, available: u64) {
    let root = machine(files);
    let found = HostMemory::under(root.path());
    let expected = HostMemory { total: Some(total * GIB), available: Some(available * GIB) };
    assert_eq!(found, expected, "{what}");
}

fn gib(count: u64) -> String {
    format!("{}\n", count * GIB)
}

const UNIFIED: &str = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";

#[test]
fn without_control_groups_it_is_the_machines() {
    assert_memory("none", &[], 64, 48);
    let nothing = tempdir().unwrap();
    let unknown = HostMemory { total: None, available: None };
    assert_eq!(HostMemory::under(nothing.path()), unknown);
}

#[test]
fn version_2_limits_a_group_and_those_around_it() {
    let own = ("proc/self/cgroup", "0::/batch/job\n".to_string());
    let mounts = ("proc/self/mountinfo", UNIFIED.to_string());
    let free = [
        own.clone(),
        mounts.clone(),
        ("sys/fs/cgroup/batch/job/memory.max", "max\n".to_string()),
        ("sys/fs/cgroup/batch/job/memory.current", gib(3)),
    ];
    assert_memory("no limit", &free, 64, 48);
    let limited = [
        own.clone(),
        mounts.clone(),
        ("sys/fs/cgroup/batch/job/memory.max", gib(16)),
        ("sys/fs/cgroup/batch/job/memory.current", gib(6)),
    ];
    assert_memory("its own limit", &limited, 16, 10);
    // The kernel takes back what it keeps of files that nobody reads.
    let cached = format!("anon 5\nactive_file {}\ninactive_file {}\n", 2 * GIB, 4 * GIB);
    let cached = [&limited[..], &[("sys/fs/cgroup/batch/job/memory.stat", cached)]].concat();
    assert_memory("files in memory", &cached, 16, 14);
    let around = [
        &limited[..],
        &[
            ("sys/fs/cgroup/batch/memory.max", gib(20)),
            ("sys/fs/cgroup/batch/memory.current", gib(19)),
        ],
    ];
    assert_memory("the limit around it", &around.concat(), 16, 1);
    let above = [
        own,
        mounts,
        ("sys/fs/cgroup/batch/job/memory.max", gib(2)),
        ("sys/fs/cgroup/batch/job/memory.current", gib(3)),
    ];
    assert_memory("more than it may have", &above, 2, 0);
}

/// Of a container, /proc tells the path on the host, and only its own part is mounted.
#[test]
fn a_container_sees_its_own_part() {
    let limits = |folder: &str| {
        [
            (format!("{folder}/memory.limit_in_bytes"), gib(8)),
            (format!("{folder}/memory.usage_in_bytes"), gib(3)),
            (format!("{folder}/memory.stat"), format!("total_inactive_file {GIB}\n")),
        ]
    };
    let own = "9:name=systemd:/docker/4f\n4:cpu,memory:/docker/4f\n0::/\n";
    let mount = |part: &str| {
        format!(
            "30 23 0:27 {part} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
             32 31 0:29 {part} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        )
    };
    for (part, folder) in [
        ("/docker/4f", "sys/fs/cgroup/memory"),
        ("/", "sys/fs/cgroup/memory/docker/4f"),
        // Moved to another group after it was mounted: what can be seen is all there is.
        ("/docker/77", "sys/fs/cgroup/memory"),
    ] {
        let mut files = vec![
            ("proc/self/cgroup", own.to_string()),
            ("proc/self/mountinfo", mount(part) + UNIFIED),
        ];
        let limits = limits(folder);
        files.extend(limits.iter().map(|(path, text)| (path.as_str(), text.clone())));
        assert_memory(part, &files, 8, 6);
    }
    // Version 1 writes a number for none.
    let none = [
        ("proc/self/cgroup", own.to_string()),
        ("proc/self/mountinfo", mount("/")),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n".to_string()),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", gib(1)),
    ];
    assert_memory("no limit", &none, 64, 48);
}
