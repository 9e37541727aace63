//! What build.rs makes of kernels/, and what it must refuse: the rules of a kernel file, the words
//! of ptxas, and the machine code itself, as the disassembler reads it.
//!
//! The disassembler is in ISOBATH_CUDA_TOOLS or where `tools/fetch-nvcc --tools` puts it. Without
//! it, or without fatbins, the tests of machine code say "skipped"; with
//! ISOBATH_REQUIRE_CUDA_TOOLS=1 they fail.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

use isobath::cuda::binaries::{ARCHITECTURES, CODE, FATBINS, NVCC, fatbin};
use isobath::version::Program;
use rayon::prelude::*;

#[path = "../build/ptxas.rs"]
mod ptxas;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn kernel_files() -> Vec<PathBuf> {
    files_of_kernels("cu")
}

fn files_of_kernels(extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("kernels")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|it| it == extension));
    files.sort();
    files
}

fn files_under(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_under(&path) } else { vec![path] }).collect()
}

// ---------------------------------------------------------------- the rules of a kernel file

/// Lines that a kernel file must not have, and the include that it must. `shared`: what several
/// kernel files may include besides.
fn broken_rules(text: &str, shared: &[&str]) -> Vec<String> {
    let mut broken = vec![];
    let mut includes_isobath = false;
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap().trim();
        let directive = code.strip_prefix('#').map(str::trim_start).unwrap_or_default();
        let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
        if directive.starts_with("if") || directive.starts_with("el") {
            broken.push(format!("line {}: a condition of the preprocessor: {line}", number + 1));
        } else if words.any(|word| matches!(word, "asm" | "__asm__" | "__asm")) {
            broken.push(format!("line {}: inline asm: {line}", number + 1));
        } else if code == "#include \"isobath.cuh\"" && !includes_isobath {
            includes_isobath = true;
        } else if directive.starts_with("include")
            && !shared.iter().any(|header| code == format!("#include \"{header}\""))
        {
            broken.push(format!("line {}: another include: {line}", number + 1));
        }
    }
    if !includes_isobath {
        broken.push("isobath.cuh is not included".to_string());
    }
    broken
}

/// The headers that are no more than parts of kernel files obey the same rules.
#[test]
fn kernel_files_have_no_other_include_no_condition_and_no_asm() {
    let headers = files_of_kernels("cuh");
    let names = headers.iter().map(|path| path.file_name().unwrap().to_str().unwrap());
    let shared: Vec<&str> = names.filter(|name| *name != "isobath.cuh").collect();
    let files = kernel_files();
    assert!(files.len() >= 3, "{files:?}");
    for path in files {
        let broken = broken_rules(&fs::read_to_string(&path).unwrap(), &shared);
        assert!(broken.is_empty(), "{}:\n{}", path.display(), broken.join("\n"));
    }
    for name in shared {
        let text = fs::read_to_string(root().join("kernels").join(name)).unwrap();
        assert!(text.contains("\n#pragma once\n"), "{name}");
        let broken = broken_rules(&text, &[]);
        assert_eq!(broken, ["isobath.cuh is not included"], "{name}: a kernel file includes that");
    }
}

#[test]
fn a_planted_condition_asm_or_include_is_found() {
    let clean =
        "// asm and #if in a comment\n#include \"isobath.cuh\"\n#include \"part.cuh\"\nint asm_;\n";
    let shared = ["part.cuh"];
    assert_eq!(broken_rules(clean, &shared), [""; 0]);
    for planted in [
        "#if 1",
        "  # ifdef __CUDACC__",
        "#ifndef X",
        "#elif X",
        "#else",
        "  asm volatile(\"trap;\");",
        "asm(\"\");",
        "{__asm__(\"\");}",
        "#include <cuda_bf16.h>",
        "# include \"isobath.cuh\"",
        "#include \"isobath.cuh\"",
        "#include \"device/wrappers.cuh\"",
        "#include \"other.cuh\"",
    ] {
        let broken = broken_rules(&format!("{clean}{planted} // text\n"), &shared);
        assert_eq!(broken.len(), 1, "{planted}: {broken:?}");
        assert!(broken[0].starts_with("line 5: "), "{planted}: {broken:?}");
    }
    assert_eq!(broken_rules("int x;\n", &shared).len(), 1);
}

/// Files that comments of a text name, and that are none of `known`: a path from the root or from
/// kernels/, or a name alone, wherever the file lies.
fn unknown_files(text: &str, known: &[String]) -> Vec<String> {
    let comments = text.lines().filter_map(|line| Some(line.split_once("//")?.1));
    let words =
        comments.flat_map(|it| it.split(|c: char| !c.is_alphanumeric() && !"_./-".contains(c)));
    let names = words.map(|word| word.trim_end_matches('.')).filter(|word| {
        let extension = Path::new(word).extension().and_then(|it| it.to_str());
        extension.is_some_and(|it| ["cu", "cuh", "cpp", "h", "md", "rs"].contains(&it))
    });
    let is_known = |name: &str| {
        let end = format!("/{name}");
        known.iter().any(|path| match name.split('/').next() {
            Some("src" | "tests" | "docs" | "build" | "kernels") => path == name,
            _ => path == name || path.ends_with(&end),
        })
    };
    names.filter(|name| !is_known(name)).map(str::to_string).collect()
}

#[test]
fn comments_of_kernels_name_files_that_exist() {
    let folders = ["build", "docs", "kernels", "src", "tests"].map(|name| root().join(name));
    let all = folders.iter().flat_map(|folder| files_under(folder));
    let relative = |path: PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
    let mut known: Vec<String> = all.map(relative).collect();
    known.push("build.rs".to_string());
    for path in known.iter().filter(|path| path.starts_with("kernels/")) {
        let unknown = unknown_files(&fs::read_to_string(root().join(path)).unwrap(), &known);
        assert!(unknown.is_empty(), "{path} names {unknown:?}");
    }
    let text =
        "int x;  // as src/cuda/norm.rs, norm.rs, src/norm.rs and kernels/norm.rs say.\n// none.cu";
    assert_eq!(unknown_files(text, &known), ["src/norm.rs", "kernels/norm.rs", "none.cu"]);
}

// ---------------------------------------------------------------- the words of ptxas

/// What nvcc 13.0.88 printed for four functions, shortened.
const SAID: &str = "\
ptxas warning : Registers are spilled to local memory in function 'many', 164 bytes spill stores, 328 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'many' for 'sm_80'
ptxas info    : Function properties for many
    168 bytes stack frame, 164 bytes spill stores, 328 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 168 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'indexed' for 'sm_90a'
ptxas info    : Function properties for indexed
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

#[test]
fn spills_and_local_arrays_are_named_with_function_and_architecture() {
    let found = ptxas::objections("kernels/x.cu", SAID, 2, &[]);
    assert_eq!(
        found,
        [
            "many: 168 bytes stack frame, 164 bytes spill stores, 328 bytes spill loads (sm_80)",
            "indexed: 256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads (sm_90a)",
        ]
    );
    let excepted = ptxas::objections("kernels/x.cu", SAID, 2, &[("many", "a test")]);
    assert_eq!(excepted, found[1..]);
}

#[test]
fn serialized_wgmma_injected_waits_and_an_ignored_setmaxnreg_are_refused() {
    // Printed by nvcc 13.0.88 for kernels that were written so.
    let serialized = "(C7511) Potential Performance Loss: wgmma.mma_async instructions are \
                      serialized due to insufficient register resources for the wgmma pipeline \
                      in the function 'serial'";
    let injected = "(C7517) warpgroup.wait is injected in around line 82 by compiler to allow use \
                    of registers defined by GMMA in function 'serial'";
    let ignored = "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine \
                   register count at entry.";
    for (what, name) in [(serialized, "serial"), (injected, "serial"), (ignored, "kernels/x.cu")] {
        let said = format!("ptxas info    : {what}\n{SAID}");
        let found = ptxas::objections("kernels/x.cu", &said, 2, &[]);
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[0], format!("{name}: ptxas info    : {what}"));
    }
    let silent = ptxas::objections("kernels/x.cu", "", 2, &[]);
    assert!(silent.len() == 1 && silent[0].contains("of 0 functions, not of 2"), "{silent:?}");
}

#[test]
fn every_exception_has_a_reason() {
    for (name, reason) in ptxas::EXCEPTIONS {
        assert!(reason.split_whitespace().count() >= 3, "{name}: {reason:?} is no reason");
    }
}

// ---------------------------------------------------------------- the machine code

/// The opcodes of each function of a fatbin, such as "HGMMA.64x128x16.F32.BF16".
type Code = BTreeMap<String, Vec<String>>;

/// Reads what `cuobjdump -sass` prints.
fn opcodes(listing: &str) -> Code {
    let mut code = Code::new();
    let mut function = None;
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("Function : ") {
            function = Some(code.entry(name.to_string()).or_default());
        } else if let Some((_, instruction)) =
            line.strip_prefix("/*").and_then(|line| line.split_once("*/"))
            && let Some((instruction, _)) = instruction.split_once(';')
        {
            // "@!P0 LDL R1, [R2]"
            let mut words = instruction.split_whitespace();
            let opcode = words.find(|word| !word.starts_with('@')).unwrap_or_default();
            function.as_mut().expect("a function before its code").push(opcode.to_string());
        }
    }
    code
}

fn has(code: &[String], mnemonic: &str) -> bool {
    code.iter().any(|opcode| opcode.split('.').next() == Some(mnemonic))
}

/// Functions whose code reads or writes local memory.
fn in_local_memory(code: &Code) -> Vec<&String> {
    let local = |code: &[String]| has(code, "LDL") || has(code, "STL");
    code.iter().filter(|(_, code)| local(code)).map(|(name, _)| name).collect()
}

/// The folder with cuobjdump and nvdisasm; `None`, after saying so, where the test cannot run.
fn disassembler() -> Option<PathBuf> {
    let fetched = root().join(".cuda/tools/nvidia/cu13/bin");
    let folder = env::var_os("ISOBATH_CUDA_TOOLS").map_or(fetched, PathBuf::from);
    let missing = ["cuobjdump", "nvdisasm"].into_iter().find(|tool| !folder.join(tool).is_file());
    let why = match (NVCC, missing) {
        (Err(why), _) => format!("this build has no machine code: {why}"),
        (Ok(_), Some(tool)) => {
            format!("no {tool} in {}; run tools/fetch-nvcc --tools", folder.display())
        }
        (Ok(_), None) => return Some(folder),
    };
    assert!(env::var_os("ISOBATH_REQUIRE_CUDA_TOOLS").is_none(), "{why}");
    eprintln!("skipped: {why}");
    None
}

/// The machine code of every kernel file for every architecture ("sm_90a"), read once for all
/// tests.
fn machine_code(tools: &Path) -> impl Iterator<Item = (&'static str, &'static str, &'static Code)> {
    static ALL: OnceLock<Vec<(&str, &str, Code)>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let machine = |targets: &'static str| targets.split(' ').filter(|it| it.starts_with("sm_"));
        let files: Vec<(&str, &str)> = CODE
            .iter()
            .flat_map(|&(stem, targets)| machine(targets).map(move |target| (stem, target)))
            .collect();
        let one = |&(stem, target): &_| (stem, target, disassemble(tools, stem, target));
        files.par_iter().map(one).collect()
    });
    all.iter().map(|(stem, architecture, code)| (*stem, *architecture, code))
}

fn machine_code_of(tools: &Path, stem: &str, architecture: &str) -> &'static Code {
    let found = machine_code(tools).find(|it| (it.0, it.1) == (stem, architecture));
    found.unwrap_or_else(|| panic!("this build has no {stem} for {architecture}")).2
}

fn disassemble(tools: &Path, stem: &str, architecture: &str) -> Code {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(format!("{stem}.fatbin"));
    fs::write(&file, fatbin(stem).unwrap()).unwrap();
    // cuobjdump starts nvdisasm.
    let path = env::var_os("PATH").unwrap_or_default();
    let path = [tools.to_path_buf()].into_iter().chain(env::split_paths(&path));
    let done = Command::new(tools.join("cuobjdump"))
        .args(["-sass", "-arch", architecture])
        .arg(&file)
        .env("PATH", env::join_paths(path).unwrap())
        .output()
        .unwrap();
    let (listing, message) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{stem} for {architecture}: {message}");
    let code = opcodes(&listing);
    assert!(!code.is_empty(), "{stem} for {architecture}: no functions in {listing}{message}");
    code
}

#[test]
fn opcodes_are_read_after_predicates_and_local_memory_is_seen() {
    let listing = "\t\tFunction : first\n\t.headerflags @\"EF\"\n\
                   /*0000*/   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */\n\
                   /* 0x000e220000000800 */\n\
                   /*0010*/   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;  /* 0x00 */\n\
                   \t\tFunction : second\n/*0000*/  @!P0 STL.64 [R1], R2 ; /* 0x00 */\n\
                   \t\tFunction : third\n/*0000*/  @P0 LDL R2, [R1] ; /* 0x00 */\n";
    let code = opcodes(listing);
    assert_eq!(code["first"], ["LDC", "HGMMA.64x64x16.F32.BF16"]);
    assert!(has(&code["first"], "HGMMA") && !has(&code["first"], "LDL"));
    assert_eq!(in_local_memory(&code), ["second", "third"]);
}

#[test]
fn no_kernel_uses_local_memory_in_machine_code() {
    let Some(tools) = disassembler() else { return };
    assert!(!CODE.is_empty());
    for (stem, architecture, code) in machine_code(&tools) {
        let local = in_local_memory(code);
        assert!(local.is_empty(), "{stem} for {architecture}: LDL or STL in {local:?}");
    }
}

/// Opcodes that read or write global memory, or may.
fn reaches_global_memory(opcode: &str) -> bool {
    let mnemonic = opcode.split('.').next().unwrap();
    // Loads, stores and atomics, of a known space or of any; cp.async; TMA. Not their prefetch, and
    // not LDC, LDS, STS and ATOMS.
    let exact = ["LD", "LDG", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS"];
    exact.contains(&mnemonic)
        || (mnemonic.starts_with("UTMA") && !mnemonic.contains("CCTL"))
        || mnemonic.starts_with("UBLK")
}

/// What is wrong with a kernel that may be launched dependent (src/cuda/overlap.rs).
fn waits_too_late(code: &[String]) -> Option<String> {
    let wait = code.iter().position(|it| it == "ACQBULK");
    let Some(wait) = wait else { return Some("no ACQBULK".to_string()) };
    let before = &code[..wait];
    let early = before.iter().find(|it| reaches_global_memory(it) || *it == "EXIT");
    match early {
        Some(early) => Some(format!("{early} before ACQBULK")),
        None if !has(before, "PREEXIT") => Some("no PREEXIT before ACQBULK".to_string()),
        None if has(&code[wait + 1..], "ACQBULK") => Some("a second ACQBULK".to_string()),
        None => None,
    }
}

#[test]
fn early_accesses_are_found_in_machine_code() {
    let code = |opcodes: &[&str]| opcodes.iter().map(|it| it.to_string()).collect::<Vec<_>>();
    let wrong = |opcodes: &[&str]| waits_too_late(&code(opcodes)).unwrap_or_default();
    let right = ["LDC.64", "STS", "UTMACCTL.PF", "SYNCS.EXCH.64", "PREEXIT", "ACQBULK", "LDG.E"];
    assert_eq!(wrong(&right), "");
    assert_eq!(wrong(&["PREEXIT", "LDG.E"]), "no ACQBULK");
    assert_eq!(wrong(&["ACQBULK", "LDG.E"]), "no PREEXIT before ACQBULK");
    assert_eq!(wrong(&["PREEXIT", "ACQBULK", "LDG.E", "ACQBULK"]), "a second ACQBULK");
    for early in ["LDG.E.128", "STG.E", "LD.E", "RED.E.ADD", "LDGSTS.E", "UTMALDG.2D", "EXIT"] {
        let found = wrong(&["PREEXIT", early, "ACQBULK"]);
        assert_eq!(found, format!("{early} before ACQBULK"));
    }
}

/// Every kernel but those of conformance: the drivers let it begin while the previous one still
/// runs.
#[test]
fn every_kernel_waits_for_the_previous_one_before_it_touches_global_memory() {
    let Some(tools) = disassembler() else { return };
    let mut checked = 0;
    for (stem, architecture, code) in machine_code(&tools) {
        if architecture != "sm_90a" || stem.starts_with("conformance") {
            continue;
        }
        for (name, code) in code {
            let wrong = waits_too_late(code);
            assert!(wrong.is_none(), "{stem}: {name}: {}", wrong.unwrap_or_default());
            checked += 1;
        }
    }
    assert!(checked >= 200, "{checked} kernels");
}

#[test]
fn the_hopper_gemm_multiplies_with_wgmma_and_loads_with_tma() {
    let Some(tools) = disassembler() else { return };
    let code = machine_code_of(&tools, "gemm_sm90", "sm_90a");
    for (name, code) in code {
        for mnemonic in ["HGMMA", "UTMALDG"] {
            assert!(has(code, mnemonic), "{name} has no {mnemonic}");
        }
        // What is accumulated is added to in the L2 cache, two values at a time; nothing waits. Of
        // what epilogues read, only angles are loaded by those who would wait for them.
        let added = name.contains("_tn_");
        assert_eq!(has(code, "LDG"), name.contains("_rotary_"), "{name}");
        assert_eq!(has(code, "UTMASTG"), !added, "{name}");
        assert_eq!(code.iter().any(|it| it.starts_with("REDG.E.ADD.F32x2.")), added, "{name}");
    }
    assert_eq!(code.len(), 9 + 9, "three layouts in three tiles, and the epilogues");
}

/// wgmma and TMA in every kernel; and the exponents of a step stand before the wait for the
/// products that run meanwhile, above which ptxas would move whatever it may.
#[test]
fn the_hopper_attention_computes_exponents_while_it_multiplies() {
    let Some(tools) = disassembler() else { return };
    let code = machine_code_of(&tools, "attention_sm90", "sm_90a");
    assert_eq!(code.len(), 18, "three passes, five head dims; forward of three in two forms");
    for (name, code) in code {
        for mnemonic in ["HGMMA", "UTMALDG", "UTMASTG"] {
            assert!(has(code, mnemonic), "{name} has no {mnemonic}");
        }
        // The waits of a step are the first two; forward has one before its first step.
        let of_step = usize::from(name.contains("_forward_"));
        let waits = code.iter().enumerate().filter(|(_, it)| *it == "WARPGROUP.DEPBAR.LE");
        let waits: Vec<usize> = waits.map(|(at, _)| at).skip(of_step).take(2).collect();
        let exponents = code[waits[0]..waits[1]].iter().filter(|it| *it == "MUFU.EX2").count();
        // A consumer's 64 rows of so many columns, shared by 128 threads.
        let columns = match name.rsplit_once('_').unwrap() {
            (pass, _) if pass.contains("_backward_kv_") => 64,
            (pass, "128x96" | "128x128") if pass.contains("_backward_q_") => 64,
            _ => 128,
        };
        assert!(exponents >= columns / 2, "{name}: {exponents} exponents between {waits:?}");
    }
}

/// The same of the backward pass in one. At a head dim of 128 no product needs the exponents before
/// the wait, and ptxas moves some of them after it.
#[test]
fn the_hopper_backward_pass_computes_exponents_while_it_multiplies() {
    let Some(tools) = disassembler() else { return };
    let code = machine_code_of(&tools, "attention_backward_sm90", "sm_90a");
    assert_eq!(code.len(), 2 * 3, "a kernel and the one before it, for three head dims");
    for (name, code) in code.iter().filter(|(name, _)| name.contains("_backward_")) {
        for mnemonic in ["HGMMA", "UTMALDG", "UTMASTG", "UBLKRED", "UBLKCP"] {
            assert!(has(code, mnemonic), "{name} has no {mnemonic}");
        }
        // After the wait for the scores, before that for dP.
        let step = code.split(|it| it == "WARPGROUP.DEPBAR.LE").nth(1).unwrap();
        let exponents = step.iter().filter(|it| *it == "MUFU.EX2").count();
        let all = 64 * 64 / 128; // a consumer's scores over its threads
        let expected = if name.ends_with("x128") { 8..=all } else { all..=all };
        assert!(expected.contains(&exponents), "{name}: {exponents}");
    }
}

/// The same of rows of at most 256 tokens; at a head dim of 64 there are no registers for it. What
/// gradients are rotated by is read before the wait for d_q.
#[test]
fn the_hopper_backward_pass_over_short_rows_reads_and_computes_while_it_multiplies() {
    let Some(tools) = disassembler() else { return };
    let code = machine_code_of(&tools, "attention_backward_short_sm90", "sm_90a");
    assert_eq!(code.len(), 3, "three head dims");
    for (name, code) in code {
        for mnemonic in ["HGMMA", "UTMALDG", "UTMASTG"] {
            assert!(has(code, mnemonic), "{name} has no {mnemonic}");
        }
        let steps: Vec<&[String]> = code.split(|it| it == "WARPGROUP.DEPBAR.LE").collect();
        let exponents = steps[1].iter().filter(|it| *it == "MUFU.EX2").count();
        let expected = if name.ends_with("x64") { 0 } else { 64 * 64 / 128 };
        assert!(exponents >= expected, "{name}: {exponents}");
        let reads = |step: &[String]| step.iter().filter(|it| *it == "LDG.E.64").count();
        let head_dim: usize = name.rsplit_once('x').unwrap().1.parse().unwrap();
        let before_last = steps[steps.len() - 2];
        assert_eq!(reads(before_last), head_dim / 16 * 4, "{name}: cosines and sines of two rows");
    }
}

/// Every copy and every read of fragments as wide as there is; operands that lie the other way are
/// transposed on that way.
#[test]
fn the_mma_gemm_copies_16_bytes_and_reads_four_matrices_at_once() {
    let Some(tools) = disassembler() else { return };
    for architecture in ["sm_80", "sm_90a"] {
        for (name, code) in machine_code_of(&tools, "gemm_sm80", architecture) {
            let what = format!("{name} for {architecture}");
            let all = |mnemonic: &str| -> Vec<&String> {
                let of = |opcode: &&String| opcode.split('.').next() == Some(mnemonic);
                code.iter().filter(of).collect()
            };
            assert!(has(code, "HMMA"), "{what}");
            let (copies, reads) = (all("LDGSTS"), all("LDSM"));
            assert!(!copies.is_empty() && copies.iter().all(|it| it.ends_with(".128")), "{what}");
            assert!(!reads.is_empty() && reads.iter().all(|it| it.ends_with(".4")), "{what}");
            let transposed = reads.iter().filter(|it| it.contains(".MT88")).count();
            let expected = match name.split('_').nth(2) {
                Some("nt") => 0,
                Some("nn") => reads.len() / 2,
                _ => reads.len(),
            };
            assert_eq!(transposed, expected, "{what}: {reads:?}");
        }
    }
}

#[test]
fn each_kernel_file_is_compiled_for_what_it_says() {
    if NVCC.is_err() || ARCHITECTURES != "80,90a" {
        eprintln!("skipped: no fatbins, or for other architectures than 80 and 90a");
        return;
    }
    let stems: Vec<&str> = FATBINS.iter().map(|(stem, _)| *stem).collect();
    let files = kernel_files();
    let expected: Vec<&str> =
        files.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(stems, expected);
    let code: BTreeMap<&str, &str> = CODE.iter().copied().collect();
    assert_eq!(code["norm"], "sm_80 sm_90a compute_80");
    assert_eq!(code["gemm_sm90"], "sm_90a", "by its name");
    assert_eq!(code["conformance"], "sm_90a", "by the line in its header");
}

#[test]
fn the_program_knows_its_commit() {
    let root = root();
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        let done = command.arg("-C").arg(root).args(arguments).output().ok()?;
        let text = String::from_utf8(done.stdout).unwrap().trim().to_string();
        done.status.success().then_some(text)
    };
    let this = Program::this();
    let top = git(&["rev-parse", "--show-toplevel"]);
    if top.is_none_or(|top| Path::new(&top) != root.canonicalize().unwrap()) {
        assert_eq!((this.commit, this.changed), (None, None));
        return;
    }
    // HEAD may have moved since the build.
    let commit = this.commit.clone().unwrap();
    assert_eq!(git(&["cat-file", "-t", &commit]).as_deref(), Some("commit"), "{commit}");
    let words = this.commit_words().unwrap();
    assert_eq!(words.ends_with(" with changes"), this.changed.unwrap());
    assert!(words.starts_with(&commit[..12]));
}
