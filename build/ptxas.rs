//! Reads what `ptxas -v` says of each function, and objects to what makes a kernel slow: spills,
//! local memory, serialized wgmma, an ignored setmaxnreg; and to waits that it injects because the
//! kernel reads accumulators without its own.

/// Kernels that may be so: the name of the function (or of the file, where ptxas names none), and
/// why.
pub const EXCEPTIONS: &[(&str, &str)] = &[];

/// All that is wrong with a file's functions, one a line; `said` is of all its architectures.
/// `functions` is how many lines about functions there must be at least, so that another ptxas
/// with other words does not pass for a silent one.
pub fn objections(
    file: &str,
    said: &str,
    functions: usize,
    exceptions: &[(&str, &str)],
) -> Vec<String> {
    let mut found = vec![];
    let mut object = |function: &str, what: &str| {
        if !exceptions.iter().any(|(name, _)| *name == function) {
            found.push(format!("{function}: {what}"));
        }
    };
    let (mut architecture, mut function, mut counted) = ("", "", 0);
    for line in said.lines() {
        if line.contains("Compiling entry function") {
            architecture = quoted(line, 1).unwrap_or(architecture);
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name.trim();
        } else if line.contains("bytes stack frame") {
            counted += 1;
            // "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
            if line.split(',').any(|part| part.split_whitespace().next() != Some("0")) {
                object(function, &format!("{} ({architecture})", line.trim()));
            }
        } else if ["serialized", "warpgroup.wait is injected"]
            .iter()
            .any(|word| line.contains(word))
            || line.contains("setmaxnreg") && line.contains("ignored")
        {
            object(named_function(line).unwrap_or(file), line.trim());
        }
    }
    if counted < functions {
        found.push(format!(
            "{file}: ptxas told the stack frames of {counted} functions, not of {functions} or \
             more: this nvcc speaks otherwise than build/ptxas.rs expects"
        ));
    }
    found
}

/// The `index`-th 'word' in quotes.
fn quoted(line: &str, index: usize) -> Option<&str> {
    line.split('\'').nth(2 * index + 1)
}

/// "... in the function 'name'".
fn named_function(line: &str) -> Option<&str> {
    quoted(line.split_once("function '").map(|(before, _)| &line[before.len()..])?, 0)
}
