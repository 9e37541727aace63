//! Every line with a barrier, fence, wait, arrival, commit or swizzle, removed or altered in turn.

use super::super::library;
use super::kernels::Kernels;
use super::{MUTATION, Mutant, Source, Verdict, judge_all};

/// A call in a kernel file that is worth breaking: its name with "(" or "<" after it.
const BREAKABLE: &[&str] = &[
    "__syncthreads",
    "__syncwarp",
    "barrier_sync",
    "barrier_arrive",
    "mbarrier_init",
    "mbarrier_wait",
    "mbarrier_wait_cluster",
    "mbarrier_arrive",
    "mbarrier_arrive_cluster",
    "mbarrier_arrive_peer",
    "mbarrier_arrive_expect_tx",
    "mbarrier_expect_tx",
    "fence_mbarrier_init",
    "fence_proxy_async",
    "fence_proxy_async_global",
    "wgmma_fence",
    "wgmma_commit",
    "wgmma_wait",
    "bulk_commit",
    "bulk_wait",
    "bulk_wait_read",
    "cp_async_commit",
    "cp_async_wait",
    "cluster_sync",
    "cluster_arrive",
    "cluster_arrive_relaxed",
    "cluster_wait",
    "elect_one",
    "swizzle",
    "__threadfence",
    "load_acquire",
    "store_release",
    "begin_after_previous",
];

/// name<template>(arguments), and where in the text it stands.
struct Call<'a> {
    name: &'a str,
    template: Option<&'a str>,
    arguments: Vec<&'a str>,
    start: usize,
    end: usize,
}

impl Call<'_> {
    /// Whether it has one; the others are `void`.
    fn is_value(&self) -> bool {
        matches!(self.name, "swizzle" | "elect_one" | "load_acquire")
    }
}

/// The text between an opening bracket and the one that closes it, and where the rest begins.
fn bracketed(text: &str, open: char, close: char) -> Option<(&str, usize)> {
    let inner = text.strip_prefix(open)?;
    let mut depth = 1;
    for (at, c) in inner.char_indices() {
        depth += i32::from(c == open) - i32::from(c == close);
        if depth == 0 {
            return Some((&inner[..at], at + 2));
        }
    }
    None
}

/// Splits at the commas that are in no bracket.
fn split_arguments(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, vec![]);
    for (at, c) in text.char_indices() {
        depth += i32::from("([{".contains(c)) - i32::from(")]}".contains(c));
        if c == ',' && depth == 0 {
            parts.push(text[start..at].trim());
            start = at + 1;
        }
    }
    if !text.trim().is_empty() {
        parts.push(text[start..].trim());
    }
    parts
}

/// Every breakable call of a kernel file, comments left out.
fn calls(text: &str) -> Vec<Call<'_>> {
    let mut found = vec![];
    let mut line_start = 0;
    for line in text.split_inclusive('\n') {
        let code = line.split("//").next().unwrap();
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        for &name in BREAKABLE {
            for (at, _) in code.match_indices(name) {
                let before = code[..at].chars().next_back();
                let rest = &text[line_start + at + name.len()..];
                if before.is_some_and(word) || rest.starts_with(word) {
                    continue;
                }
                let (template, template_end) = match bracketed(rest, '<', '>') {
                    Some((inner, end)) => (Some(inner), end),
                    None => (None, 0),
                };
                let Some((inner, end)) = bracketed(&rest[template_end..], '(', ')') else {
                    continue;
                };
                let start = line_start + at;
                found.push(Call {
                    name,
                    template,
                    arguments: split_arguments(inner),
                    start,
                    end: start + name.len() + template_end + end,
                });
            }
        }
        line_start += line.len();
    }
    found.sort_by_key(|call| call.start);
    found
}

/// What is done to a call: a word for it, and what stands in its place.
fn alterations(call: &Call) -> Vec<(&'static str, String)> {
    let Call { name, ref arguments, .. } = *call;
    let argument = |i: usize| arguments[i];
    let removed = ("removed", "((void)0)".to_string());
    match name {
        "swizzle" => vec![("identity", format!("({})", argument(0)))],
        "elect_one" => vec![("true", "true".to_string())],
        "load_acquire" => vec![("an ordinary load", format!("(*{})", argument(0)))],
        "store_release" => {
            vec![removed, ("an ordinary store", format!("(*({}) = {})", argument(0), argument(1)))]
        }
        "__syncthreads" => vec![
            removed,
            ("of the warp only", "__syncwarp()".to_string()),
            ("of half the block", "barrier_sync(0, int(blockDim.x) / 2)".to_string()),
        ],
        "barrier_sync" | "barrier_arrive" => {
            let (id, count) = (argument(0), argument(1));
            vec![
                removed,
                ("barrier 1", format!("{name}(1, {count})")),
                ("another barrier for odd warps", {
                    format!("{name}(({id}) + 8 * (int(threadIdx.x) / 32 % 2), {count})")
                }),
                ("count + 32", format!("{name}({id}, ({count}) + 32)")),
                ("count - 32", format!("{name}({id}, ({count}) - 32)")),
                ("of the warp only", "__syncwarp()".to_string()),
            ]
        }
        "mbarrier_init" => {
            let (barrier, count) = (argument(0), argument(1));
            vec![
                removed,
                ("count + 1", format!("mbarrier_init({barrier}, ({count}) + 1)")),
                ("count - 1", format!("mbarrier_init({barrier}, ({count}) - 1)")),
            ]
        }
        "mbarrier_wait" | "mbarrier_wait_cluster" => {
            vec![removed, ("parity", format!("{name}({}, ({}) ^ 1)", argument(0), argument(1)))]
        }
        "mbarrier_arrive" => vec![
            removed,
            ("twice", format!("(mbarrier_arrive({0}), mbarrier_arrive({0}))", argument(0))),
        ],
        "mbarrier_arrive_expect_tx" | "mbarrier_expect_tx" => {
            let (barrier, bytes) = (argument(0), argument(1));
            vec![
                removed,
                ("bytes - 16", format!("{name}({barrier}, ({bytes}) - 16)")),
                ("bytes + 16", format!("{name}({barrier}, ({bytes}) + 16)")),
                ("no bytes", format!("mbarrier_arrive({barrier})")),
            ]
        }
        "wgmma_wait" | "bulk_wait" | "bulk_wait_read" | "cp_async_wait" => {
            let groups = call.template.expect("a number of groups");
            let mut all = vec![removed, ("groups + 1", format!("{name}<({groups}) + 1>()"))];
            if name == "bulk_wait" {
                all.push(("sources only", format!("bulk_wait_read<{groups}>()")));
            }
            all
        }
        _ => vec![removed],
    }
}

/// Mutants that are no bugs: kernel file, the line, the alteration, and why nothing can come of it.
/// They do not count.
const EQUIVALENT: &[(Kernels, &str, &str, &str)] = &[
    (
        Kernels::GemmSm90,
        "if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();",
        "sources only",
        "what has been read from shared memory is written by the end of the launch, and nobody in \
         it reads the result",
    ),
    (
        Kernels::AttentionForward,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::AttentionBackward,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::AttentionForward,
        "wgmma_fence();  // the one above is enough, but not for ptxas, after a loop",
        "removed",
        "no register of these products is touched after the other fence",
    ),
    (
        Kernels::AttentionBackward,
        "wgmma_fence();  // the one above is enough, but not for ptxas, after a branch",
        "removed",
        "no register of these products is touched after the other fence",
    ),
    (
        Kernels::AttentionBackward,
        "wgmma_wait<0>();  // for ptxas, which does not see that the last one was enough",
        "removed",
        "the wait after each head's tiles was for the same products",
    ),
    (
        Kernels::AttentionBackward,
        "if constexpr (D > 96) wgmma_wait<0>();  // there are no registers for the next step's scores",
        "removed",
        "for registers' sake, and of other head dims",
    ),
    (
        Kernels::AttentionBackward,
        "if constexpr (D > 96) wgmma_wait<0>();  // there are no registers for the next step's scores",
        "groups + 1",
        "for registers' sake, and of other head dims",
    ),
    (
        Kernels::AttentionOnePass,
        "wgmma_fence();  // the one of the scores is enough, but not for ptxas, after a loop",
        "removed",
        "no register of these products is touched after the other fence",
    ),
    (
        Kernels::AttentionOnePass,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::AttentionShort,
        "wgmma_fence();  // the first one is enough, but not for ptxas, after a loop",
        "removed",
        "no register of these products is touched after the other fence",
    ),
    (
        Kernels::AttentionShort,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::GemmMma,
        "return tile + swizzle<64>(uint32_t(row * ROW_BYTES + chunk * 16));",
        "identity",
        "copies and ldmatrix find every chunk through this one function: other banks, same values",
    ),
];

/// A change in a scanned source: its mutant, the line, and the alteration.
struct Change {
    mutant: Mutant,
    line: String,
    what: &'static str,
}

/// The source with every alteration of every call in it, and what they are; it will be the
/// `source`th.
fn scanned(kernels: Kernels, source: usize) -> (Source, Vec<Change>) {
    let text = kernels.text();
    let (mut all, mut changes, mut behind) = (MUTATION.to_string(), vec![], 0);
    for call in calls(&text).iter().filter(|call| kernels.breaks(&text, call.start)) {
        assert!(behind <= call.start, "a breakable call in another one's arguments");
        let number = text[..call.start].lines().count();
        let line = text.lines().nth(number.max(1) - 1).unwrap().trim();
        let original = &text[call.start..call.end];
        let of_type = if call.is_value() { "" } else { "(void)" };
        let mut choices = String::new();
        for (what, other) in alterations(call).into_iter().filter(|(_, it)| it != original) {
            let choice = changes.len() + 1;
            let name = format!("{}.cu:{number} `{line}`: {} {what}", kernels.name(), call.name);
            let mutant = Mutant { source, choice, name };
            changes.push(Change { mutant, line: line.to_string(), what });
            choices += &format!("mutation() == {choice} ? {of_type}({other}) : ");
        }
        all += &format!("{}({choices}{of_type}{original})", &text[behind..call.start]);
        behind = call.end;
    }
    all += &text[behind..];
    (Source::new(kernels, all), changes)
}

const ROWS_AND_PRODUCTS: [Kernels; 4] =
    [Kernels::Norm, Kernels::Loss, Kernels::GemmSm90, Kernels::GemmMma];

#[test]
fn every_synchronisation_that_is_broken_is_caught() {
    break_all(&[&ROWS_AND_PRODUCTS[..], &[Kernels::GemmGradient]].concat(), 120);
}

#[test]
#[ignore = "takes half a minute: to be run when kernels/attention_sm90.cu has changed"]
fn every_synchronisation_of_attention_that_is_broken_is_caught() {
    break_all(&[Kernels::AttentionForward, Kernels::AttentionBackward], 60);
}

#[test]
#[ignore = "takes half a minute: to be run when kernels/attention_backward_sm90.cu has changed"]
fn every_synchronisation_of_attention_in_one_pass_that_is_broken_is_caught() {
    break_all(&[Kernels::AttentionOnePass], 60);
}

#[test]
#[ignore = "takes 10 s: to be run when kernels/attention_backward_short_sm90.cu has changed"]
fn every_synchronisation_of_attention_to_short_rows_that_is_broken_is_caught() {
    break_all(&[Kernels::AttentionShort], 60);
}

/// `least`: as many mutants the scan has to find.
fn break_all(suites: &[Kernels], least: usize) {
    if library::is_missing() {
        return;
    }
    // First the files as they are, whose bits those with a choice must give where none is made.
    let unchanged = suites.iter().map(|&kernels| Source::new(kernels, kernels.text()));
    let mut sources: Vec<Source> = unchanged.collect();
    let true_sources: Vec<usize> = (0..sources.len()).collect();
    let (mut mutants, mut changes) = (vec![], vec![]);
    for &kernels in suites {
        let source = sources.len();
        let name = format!("{} with choices", kernels.name());
        mutants.push(Mutant { source, choice: 0, name });
        let (source, in_it) = scanned(kernels, source);
        sources.push(source);
        changes.extend(in_it.into_iter().map(|change| (kernels, change)));
    }
    let key = |(kernels, change): &(Kernels, Change)| (*kernels, change.line.clone(), change.what);
    let keys: Vec<_> = changes.iter().map(key).collect();
    for (kernels, line, what, _) in EQUIVALENT.iter().filter(|it| suites.contains(&it.0)) {
        let known = keys.iter().any(|key| key.0 == *kernels && key.1 == *line && key.2 == *what);
        assert!(known, "no mutant `{what}` of `{line}`: remove it from EQUIVALENT");
    }
    mutants.extend(changes.into_iter().map(|(_, change)| change.mutant));
    let mut verdicts = judge_all(&sources, &true_sources, &mutants);
    for (mutant, verdict) in mutants.drain(..suites.len()).zip(verdicts.drain(..suites.len())) {
        assert_eq!(verdict, Verdict::Survived, "{}", mutant.name);
    }
    let (mut faults, mut wrong, mut survivors) = (0, 0, vec![]);
    let mut equivalent = 0;
    for ((mutant, (kernels, line, what)), verdict) in mutants.iter().zip(&keys).zip(&verdicts) {
        let justified = EQUIVALENT.iter().any(|(its_kernels, its_line, its_what, _)| {
            its_kernels == kernels && its_line == line && its_what == what
        });
        match verdict {
            Verdict::Fault(_) => faults += 1,
            Verdict::Wrong(_) => wrong += 1,
            Verdict::Survived if justified => equivalent += 1,
            other => survivors.push(format!("{}: {other:?}", mutant.name)),
        }
        if justified {
            assert_eq!(*verdict, Verdict::Survived, "{} is no equivalent", mutant.name);
        }
    }
    let counted = mutants.len() - equivalent;
    println!(
        "{counted} mutants: {faults} found by a fault, {wrong} by wrong results, {} survived; \
         {equivalent} are equivalent",
        survivors.len()
    );
    for survivor in &survivors {
        println!("survived: {survivor}");
    }
    assert!(counted >= least, "the scan finds too little");
    assert!(survivors.iter().all(|it| !it.contains("NotCompiled") && !it.contains("Died")));
    let share = (faults + wrong) as f64 / counted as f64;
    assert!(share >= 0.95, "{share:.3} of the mutants were caught, 0.95 are needed");
}

#[test]
fn the_scan_finds_calls_and_not_comments() {
    let text = "  // __syncthreads();\n  if (x) bulk_wait_read<STORES - 1>();  // wgmma_commit()\n\
                \x20 mbarrier_wait(&full[f(a, b)], at.parity ^ 1);\n  my__syncwarp();\n";
    let found = calls(text);
    let names: Vec<&str> = found.iter().map(|call| call.name).collect();
    assert_eq!(names, ["bulk_wait_read", "mbarrier_wait"]);
    assert_eq!(&text[found[0].start..found[0].end], "bulk_wait_read<STORES - 1>()");
    assert_eq!(found[0].template, Some("STORES - 1"));
    assert_eq!(found[1].arguments, ["&full[f(a, b)]", "at.parity ^ 1"]);
}
