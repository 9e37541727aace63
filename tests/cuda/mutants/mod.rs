//! Mutation tests of the CPU machine: real kernels with one thing broken must be found out.
//!
//! Two sets: planted bugs, each with what the machine has to say about it; and every line with a
//! barrier, fence, wait, arrival, commit or swizzle, found by scanning the kernels, removed or
//! altered in turn. Each mutant runs in processes of its own (`child_mutant`): in race mode, then
//! plain, each under several schedules, until a fault or other bits than those of the true kernel
//! give it away. Those that are no bugs stand in [`EQUIVALENT`](scan::EQUIVALENT), each with its
//! reason; of the others at least 95% must be caught.
//!
//! A planted bug is a text of its own. The mutants of a scan are one text, compiled once, in which
//! each broken call asks `mutation()` whether it is the one to be broken.

mod kernels;
mod planted;
mod scan;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use isobath::cuda::Driver;
use isobath::cuda::gemm::Layout;
use isobath::cuda::host::{Asynchronous, Host, Options, Order};

use kernels::{
    GATED, Kernels, MORE_GRADIENTS, MORE_NORMS, MORE_PRODUCTS, gemm_mma, run_gemm_sm90, run_norm,
    run_swiglu,
};

use super::library::{self, Variant};

// ------------------------------------------------------------------ schedules

/// One block after the other, and each takes as many rows and tiles as a small machine makes it.
fn options(race: bool, order: Order, asynchronous: Asynchronous, seed: u64) -> Options {
    let watchdog = Duration::from_secs(2);
    let (workers, multiprocessors, dependent) = (1, 1, true);
    Options { race, order, asynchronous, seed, workers, watchdog, multiprocessors, dependent }
}

/// How a machine for these kernels begins; it keeps its number of multiprocessors.
fn first_options(kernels: Kernels) -> Options {
    let multiprocessors = match kernels {
        Kernels::GemmSm90 => 3,     // for as many splits
        Kernels::GemmGradient => 2, // for a pair of blocks
        _ => 1,
    };
    Options { multiprocessors, ..options(true, Order::Fifo, Asynchronous::Late, 0) }
}

/// What a mutant compiled like this has to pass, the most telling first.
fn schedules(variant: Variant) -> Vec<Options> {
    use Asynchronous::*;
    use Order::*;
    let race = variant == Variant::Hooked;
    let mut all = vec![options(race, Fifo, Late, 0), options(race, Lifo, Early, 0)];
    all.extend((1..=3).map(|seed| options(race, Random, Anytime, seed)));
    all
}

// ------------------------------------------------------------------ a mutant and its process

/// A kernel file with one thing changed, or with many of which `mutation()` chooses one.
struct Source {
    kernels: Kernels,
    text: String,
    /// By [`Variant`], each compiled when it is first asked for: few planted bugs get to the plain
    /// one.
    libraries: [OnceLock<Result<PathBuf, String>>; 2],
}

/// Of a text that asks for it: which of its changes to make, 0 for none. As its own indices to a
/// thread, it is no access to memory.
const MUTATION: &str = "static const int chosen_mutation = [] {\n\
    const char* const chosen = getenv(\"ISOBATH_MUTANT_CHOICE\");\n\
    return chosen ? atoi(chosen) : 0;\n\
    }();\n\
    __attribute__((const, noinline, no_sanitize(\"thread\"))) static int mutation() {\n\
    return chosen_mutation;\n\
    }\n\
    #line 1\n";

impl Source {
    fn new(kernels: Kernels, text: String) -> Self {
        Source { kernels, text, libraries: Default::default() }
    }

    /// In `folder`, or what the compiler said; `number` is of this source only.
    fn library(&self, folder: &Path, number: usize, variant: Variant) -> &Result<PathBuf, String> {
        self.libraries[variant as usize].get_or_init(|| {
            let name = format!("source{number}_{variant:?}");
            let files = [(name.as_str(), self.text.as_str())];
            let compile = || library::compile_variants(folder, &name, &files, &[variant]);
            std::panic::catch_unwind(compile)
                .map_err(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default())
        })
    }
}

/// One change in a source.
struct Mutant {
    /// Where its source is among all.
    source: usize,
    choice: usize,
    /// "kernels/gemm_sm90.cu:112 `wgmma_commit();`: removed"
    name: String,
}

/// What became of one.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    /// The machine's words.
    Fault(String),
    /// Other bits, and under which schedule.
    Wrong(String),
    NotCompiled(String),
    /// Nothing was noticed, or the process died of it: the machine failed.
    Survived,
    Died(String),
}

const LIBRARY: &str = "ISOBATH_MUTANT_LIBRARY";
const SUITE: &str = "ISOBATH_MUTANT_KERNELS";
const VARIANT: &str = "ISOBATH_MUTANT_VARIANT";
const CHOICE: &str = "ISOBATH_MUTANT_CHOICE";
/// The bits of the true kernel: written if it is not there.
const REFERENCE: &str = "ISOBATH_MUTANT_REFERENCE";
const ANSWER: &str = "ISOBATH_MUTANT_ANSWER";

#[test]
#[ignore = "child process of other tests"]
fn child_mutant() {
    let (Ok(library), Ok(reference)) = (env::var(LIBRARY), env::var(REFERENCE)) else { return };
    let kernels = Kernels::named(&env::var(SUITE).unwrap());
    let variants = [Variant::Plain, Variant::Hooked];
    let variant = env::var(VARIANT).unwrap();
    let variant = variants.into_iter().find(|it| format!("{it:?}") == variant).unwrap();
    let (reference, answer) = (PathBuf::from(reference), PathBuf::from(env::var(ANSWER).unwrap()));
    let mut host = Host::load(Path::new(&library), first_options(kernels)).unwrap();
    for options in schedules(variant) {
        host.set_options(options);
        let schedule = format!(
            "{}{} {} {}",
            if options.race { "race " } else { "" },
            options.order,
            options.asynchronous,
            options.seed
        );
        match kernels.run(&mut host) {
            Err(error) => return fs::write(answer, format!("fault\n{schedule}: {error}")).unwrap(),
            Ok(bits) if !reference.exists() => fs::write(&reference, bits).unwrap(),
            Ok(bits) if fs::read(&reference).unwrap() != bits => {
                return fs::write(answer, format!("wrong\n{schedule}")).unwrap();
            }
            Ok(_) => {}
        }
    }
    fs::write(answer, "survived\n").unwrap();
}

/// Sources, and the folder for what is compiled of them and for the references.
struct Court<'a> {
    folder: tempfile::TempDir,
    sources: &'a [Source],
}

impl Court<'_> {
    /// Runs one, in race mode and then, if that finds nothing, without.
    fn judge(&self, mutant: &Mutant) -> Verdict {
        let source = &self.sources[mutant.source];
        for variant in [Variant::Hooked, Variant::Plain] {
            let verdict = match source.library(self.folder.path(), mutant.source, variant) {
                Err(said) => Verdict::NotCompiled(said.clone()),
                Ok(library) => self.run(mutant, source.kernels, variant, library),
            };
            if verdict != Verdict::Survived {
                return verdict;
            }
        }
        Verdict::Survived
    }

    fn run(&self, mutant: &Mutant, kernels: Kernels, variant: Variant, library: &Path) -> Verdict {
        let at = |name: String| self.folder.path().join(name);
        let answer = at(format!("{}_{}.answer", mutant.source, mutant.choice));
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", "cuda::mutants::child_mutant", "--ignored", "--nocapture"]);
        child.env(LIBRARY, library).env(SUITE, kernels.name()).env(ANSWER, &answer);
        child.env(VARIANT, format!("{variant:?}")).env(CHOICE, mutant.choice.to_string());
        child.env(REFERENCE, at(format!("{}.reference", kernels.name())));
        child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = child.spawn().unwrap();
        let limit = Instant::now() + Duration::from_secs(120);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if Instant::now() > limit {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let text = match (status, fs::read_to_string(&answer)) {
            (Some(_), Ok(text)) => text,
            (status, _) => return Verdict::Died(format!("{status:?}")),
        };
        fs::remove_file(&answer).unwrap();
        match text.split_once('\n').unwrap() {
            ("fault", said) => Verdict::Fault(said.to_string()),
            ("wrong", schedule) => Verdict::Wrong(schedule.to_string()),
            _ => Verdict::Survived,
        }
    }

    /// Several at once.
    fn judge_each(&self, mutants: &[Mutant]) -> Vec<Verdict> {
        let verdicts: Vec<OnceLock<Verdict>> = mutants.iter().map(|_| OnceLock::new()).collect();
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, |it| it.get()) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(mutant) = mutants.get(index) else { break };
                        let verdict = self.judge(mutant);
                        println!("{}: {verdict:?}", mutant.name);
                        verdicts[index].set(verdict).unwrap();
                    }
                });
            }
        });
        verdicts.into_iter().map(|verdict| verdict.into_inner().unwrap()).collect()
    }
}

/// The verdict on each mutant, after the true kernels, in these sources without a choice, have
/// survived and written the references.
fn judge_all(sources: &[Source], true_sources: &[usize], mutants: &[Mutant]) -> Vec<Verdict> {
    let court = Court { folder: tempfile::tempdir().unwrap(), sources };
    let unchanged = |&source: &usize| {
        let name = format!("{} unchanged", sources[source].kernels.name());
        Mutant { source, choice: 0, name }
    };
    let unchanged: Vec<Mutant> = true_sources.iter().map(unchanged).collect();
    for (mutant, verdict) in unchanged.iter().zip(court.judge_each(&unchanged)) {
        assert_eq!(verdict, Verdict::Survived, "{}", mutant.name);
    }
    court.judge_each(mutants)
}

// ------------------------------------------------------------------ no false alarms

/// The true kernels under 25 random schedules each, every access checked: the same bits each time.
#[test]
fn random_schedules_of_the_true_kernels_are_clean() {
    if library::is_missing() {
        return;
    }
    const SEEDS: u64 = 25;
    let folder = tempfile::tempdir().unwrap();
    let mma = Kernels::GemmMma;
    let library = library::compile(folder.path(), mma.name(), &[(mma.name(), &mma.text())]);
    let machines = [
        (Kernels::Norm, Host::new(first_options(Kernels::Norm)).unwrap()),
        (Kernels::GemmSm90, Host::new(first_options(Kernels::GemmSm90)).unwrap()),
        (Kernels::GemmGradient, Host::new(first_options(Kernels::GemmGradient)).unwrap()),
        (mma, Host::load(&library, first_options(mma)).unwrap()),
    ];
    let run = |kernels: Kernels, host: &mut Host| {
        let driver: &mut dyn Driver = host;
        let mut bits = kernels.run(driver)?;
        let more = match kernels {
            Kernels::Norm => run_norm(driver, &MORE_NORMS),
            Kernels::GemmSm90 => run_gemm_sm90(driver, &MORE_PRODUCTS).and_then(|products| {
                let gated = run_swiglu(driver, Layout::Nt, 96, &GATED)?;
                Ok([products, gated].concat())
            }),
            Kernels::GemmGradient => run_swiglu(driver, Layout::Nn, 128, &MORE_GRADIENTS),
            Kernels::GemmMma => gemm_mma(driver, 128, 64, 96).map(|(exact, found)| {
                assert_eq!(exact, found);
                vec![]
            }),
            Kernels::Loss
            | Kernels::AttentionForward
            | Kernels::AttentionBackward
            | Kernels::AttentionOnePass
            | Kernels::AttentionShort => Ok(vec![]),
        };
        bits.extend(more.map_err(|error| error.to_string())?);
        Ok::<Vec<u8>, String>(bits)
    };
    thread::scope(|scope| {
        for (kernels, mut host) in machines {
            scope.spawn(move || {
                let expected = run(kernels, &mut host).unwrap();
                for seed in 0..SEEDS {
                    // A thread of a busy machine may stand still for seconds.
                    let watchdog = Duration::from_secs(20);
                    let random = options(true, Order::Random, Asynchronous::Anytime, seed);
                    let random = Options { watchdog, ..random };
                    host.set_options(random);
                    let found = run(kernels, &mut host).unwrap_or_else(|error| panic!("{error}"));
                    assert!(found == expected, "{}: other bits, {random:?}", kernels.name());
                }
            });
        }
    });
}
