//! The machine for PTX itself: it reads every kernel, and notices what is wrong in one.

use std::collections::BTreeSet;

use isobath::cuda::conformance::{Case, cases};

use super::{code, folder, present, texts, with_texts};

/// Fences order memory, which is in one order here; hints do nothing anywhere; registers are as
/// many as PTX names.
const WITHOUT_EFFECT: [&str; 7] = [
    "fence.",
    "prefetch.",
    "setmaxnreg.",
    "griddepcontrol.",
    "wgmma.fence.",
    "membar.",
    "nanosleep.",
];

/// Changes that change nothing here, and why.
const SURVIVORS: [(&str, &str); 8] = [
    ("setp.ne.b32: left out", "the flag is false anyway: a product that overwrites"),
    ("mov.u32: left out", "the rank of block 0"),
    ("mbarrier.inval", "the kernel ends after it"),
    ("cp.async.bulk.wait_group", "stores end with the kernel, if not before"),
    ("cp.async.bulk.commit_group", "the same"),
    ("wgmma.commit_group", "the same"),
    ("ld.acquire.gpu.u32: left out", "what it waits for has come"),
    ("mbarrier.try_wait", "what it waits for has come"),
];

#[test]
fn every_kernel_of_the_build_is_read() {
    if let Err(why) = present() {
        return println!("skipped: no PTX: {why}");
    }
    let files = texts(folder().unwrap()).unwrap();
    for (stem, text) in &files {
        let kernels = code::kernels(text).unwrap_or_else(|why| panic!("{stem}.ptx: {why}"));
        let names: Vec<&str> = kernels.iter().map(|it| it.name.as_str()).collect();
        let entries = text.split(".visible .entry ").skip(1);
        let entries: Vec<&str> = entries.map(|it| it.split_once('(').unwrap().0).collect();
        assert_eq!(names, entries, "{stem}.ptx");
        assert!(kernels.iter().all(|it| !it.instructions.is_empty()), "{stem}.ptx");
    }
    let names = files.iter().map(|(_, text)| text.matches(".visible .entry ").count());
    assert!(names.sum::<usize>() > 300, "this build has hundreds of kernels");
}

/// Every instruction of a wrapper, in each kernel of conformance*.cu: left out, with two operands
/// of one kind exchanged, or with another flag. Nearly all must change what a case gives, or be a
/// fault.
#[test]
fn a_changed_instruction_is_noticed() {
    if let Err(why) = present() {
        return println!("skipped: no PTX: {why}");
    }
    let files = texts(folder().unwrap()).unwrap();
    let files = files.iter().filter(|(stem, _)| stem.starts_with("conformance"));
    let (mut noticed, mut survivors) = (0, vec![]);
    for (stem, text) in files {
        let (head, _) = text.split_once(".visible .entry").unwrap();
        for kernel in text.split(".visible .entry ").skip(1) {
            let name = kernel.split_once('(').unwrap().0;
            let cases: Vec<Case> = cases().into_iter().filter(|it| it.kernel == name).collect();
            let unchanged = format!("{head}.visible .entry {kernel}");
            assert!(!cases.iter().any(|case| differs(case, stem, &unchanged)), "{name}");
            for (what, changed) in changes(kernel) {
                let text = format!("{head}.visible .entry {changed}");
                code::kernels(&text).unwrap_or_else(|why| panic!("{name}, {what}: {why}"));
                match cases.iter().any(|case| differs(case, stem, &text)) {
                    true => noticed += 1,
                    false => survivors.push(format!("{name}: {what}")),
                }
            }
        }
    }
    let all = noticed + survivors.len();
    println!("{noticed} of {all} changes are noticed");
    assert!(all > 1500, "only {all} changes");
    let known = |it: &String| SURVIVORS.iter().any(|(change, _)| it.contains(change));
    let new: Vec<String> = survivors.into_iter().filter(|it| !known(it)).collect();
    assert!(new.is_empty(), "not noticed:\n  {}", new.join("\n  "));
}

/// A fault, or a result that is not the case's.
fn differs(case: &Case, stem: &str, text: &str) -> bool {
    let texts = vec![(stem.to_string(), text.to_string())];
    match case.run(&mut with_texts(texts, 6, 0, 1 << 18)) {
        Err(_) => true,
        Ok(found) => case.compare(&case.expected, &found).is_err(),
    }
}

/// What is changed, and the kernel with it. Of the statements of inline assembly, the first with
/// each opcode.
fn changes(kernel: &str) -> Vec<(String, String)> {
    let mut changes = vec![];
    let mut opcodes = BTreeSet::new();
    let mut inside = false;
    let mut from = 0;
    for line in kernel.split_inclusive('\n') {
        let place = from..from + line.len();
        from = place.end;
        match line.trim() {
            "// begin inline asm" => inside = true,
            "// end inline asm" => inside = false,
            _ => {}
        }
        let statement = line.trim();
        let (opcode, operands) = statement.split_once(' ').unwrap_or((statement, ""));
        let ours =
            inside && statement.ends_with(';') && !statement.starts_with(['.', '{', '}', '/']);
        let without_effect = WITHOUT_EFFECT.iter().any(|it| opcode.starts_with(it));
        if !ours || without_effect || !opcodes.insert(opcode.to_string()) {
            continue;
        }
        let mut change = |what: &str, statement: &str| {
            let mut changed = kernel.to_string();
            changed.replace_range(place.clone(), &format!("{statement}\n"));
            changes.push((format!("{opcode}: {what}"), changed));
        };
        // `selp` only hands on what the instruction before it has found.
        if opcode != "selp.u32" {
            change("left out", "");
        }
        let names = registers(operands);
        // Of a product's hundred accumulators, a few.
        for pair in names.windows(2).step_by(1 + names.len() / 16) {
            let (first, second) = (&operands[pair[0].clone()], &operands[pair[1].clone()]);
            if kind(first) == kind(second) && first != second {
                let between = &operands[pair[0].end..pair[1].start];
                let (front, behind) = (&operands[..pair[0].start], &operands[pair[1].end..]);
                let swapped = format!("{opcode} {front}{second}{between}{first}{behind}");
                change(&format!("{first} and {second} exchanged"), &swapped);
            }
        }
        if let Some(front) = statement.strip_suffix(", 0;") {
            change("a flag set", &format!("{front}, 1;"));
        }
        if let Some(front) = statement.strip_suffix(", 1;") {
            change("a flag cleared", &format!("{front}, 0;"));
        }
        if opcode.contains(".trans") {
            change("not transposed", &statement.replace(".trans", ""));
        }
    }
    changes
}

/// Where the registers stand.
fn registers(operands: &str) -> Vec<std::ops::Range<usize>> {
    let mut found = vec![];
    let mut start = None;
    for (at, character) in operands.char_indices() {
        match (start, character) {
            (None, '%') => start = Some(at),
            (Some(from), it) if !it.is_alphanumeric() => {
                found.push(from..at);
                start = None;
            }
            _ => {}
        }
    }
    found
}

/// `%rd` of `%rd7`
fn kind(register: &str) -> &str {
    register.trim_end_matches(|it: char| it.is_ascii_digit())
}
