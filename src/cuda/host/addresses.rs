//! Where in the source an address of the machine's code lies.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;

use addr2line::Loader;

/// Replaces each "\x01<hex>\x02", an address inside an instruction, by that instruction's line.
pub(super) fn resolve_addresses(text: &str) -> String {
    let mut resolved = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, marked)) = rest.split_once('\x01') {
        resolved.push_str(before);
        let (hex, behind) = marked.split_once('\x02').unwrap_or((marked, ""));
        match usize::from_str_radix(hex.trim_start_matches("0x"), 16) {
            Ok(address) => resolved.push_str(&line_of(address)),
            Err(_) => resolved.push_str(hex),
        }
        rest = behind;
    }
    resolved + rest
}

/// "kernels/norm.cu:71", or the address itself where the debug information is missing.
fn line_of(address: usize) -> String {
    thread_local! {
        /// Of the program and libraries that a fault of this thread lay in.
        static LOADERS: RefCell<HashMap<PathBuf, Option<Loader>>> = RefCell::default();
    }
    let line = || {
        let (image, offset) = image_of(address)?;
        LOADERS.with_borrow_mut(|loaders| {
            let load = || Loader::new(&image).ok();
            innermost_line(loaders.entry(image.clone()).or_insert_with(load).as_ref()?, offset)
        })
    };
    line().unwrap_or_else(|| format!("{address:#x}"))
}

/// The file that is mapped at this address, and how far past its beginning the address lies. Read
/// afresh each time: libraries are loaded while the program runs.
fn image_of(address: usize) -> Option<(PathBuf, u64)> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut beginning = None;
    for line in maps.lines() {
        // "7f12456c0000-7f12456c3000 r--p 00000000 fe:00 1234    /path"
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let [from, to] = [from, to].map(|hex| usize::from_str_radix(hex, 16).ok());
        let (from, to) = (from?, to?);
        let offset = words.nth(1)?;
        let Some(slash) = line.find('/') else { continue };
        let path = &line[slash..];
        if offset.bytes().all(|digit| digit == b'0') {
            beginning = Some((path, from));
        }
        if (from..to).contains(&address) {
            let (_, start) = beginning.filter(|(other, _)| *other == path)?;
            return Some((PathBuf::from(path), (address - start) as u64));
        }
    }
    None
}

/// Of inlined calls, the innermost outside the machine's own headers: a person wrote that line.
fn innermost_line(loader: &Loader, offset: u64) -> Option<String> {
    let mut innermost = None;
    let mut frames = loader.find_frames(loader.relative_address_base() + offset).ok()?;
    while let Ok(Some(frame)) = frames.next() {
        let Some(location) = frame.location else { continue };
        let (Some(file), Some(line)) = (location.file, location.line) else { continue };
        let place = format!("{}:{line}", shortened(file));
        if !file.contains("kernels/host/") {
            return Some(place);
        }
        innermost.get_or_insert(place);
    }
    innermost
}

/// From kernels/ on, wherever the repository was built.
fn shortened(file: &str) -> &str {
    file.rfind("/kernels/").map_or(file, |slash| &file[slash + 1..])
}
