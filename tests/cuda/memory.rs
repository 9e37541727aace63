//! The memory table against what the driver was asked for, row by row, and whether anything takes
//! memory once a trainer is made: what has trained one step does not run out of memory later.

use std::collections::BTreeMap;

use isobath::backend::Footprint;
use isobath::config::{Attention, Config, DeviceKind, Dtype, Master, ModelConfig, Recompute};
use isobath::cuda::host::{Host, Options};
use isobath::cuda::{Cuda, Driver, Family, GPU_RESERVE_BYTES};
use isobath::engine::{MemoryTable, Plan, Rows, Trainer};
use isobath::model::init::initial_parameters;
use isobath::optim;
use isobath::plan::{PlanReport, plan_of_gpu};
use isobath::throughput::{MemoryUse, WARM_UP_STEPS};
use isobath::train::{Console, Interrupt, Run, train};

use super::counting::{Counting, Taken, TakenSoFar};
use super::machines::{has_simt, machines};
use crate::support::{run_config, small_model, text_file, tokens};

fn config(dtype: Dtype) -> Config {
    let model =
        ModelConfig { hidden: 64, heads: 2, kv_heads: 1, ffn: 75, layers: 3, ..small_model() };
    let mut config = run_config(&model);
    config.device = DeviceKind::Simt;
    config.dtype = dtype;
    config.data.sequence = 21;
    config.train.grad_accumulation = 3;
    config
}

/// Parameters in halves, moments in bf16.
fn narrow(config: &Config, offload: bool) -> Config {
    let mut config = config.clone();
    let optimizer = &mut config.optimizer;
    (optimizer.master, optimizer.moments) = (Master::Split, Dtype::Bf16);
    optimizer.offload = offload;
    config
}

fn cases() -> Vec<(String, Config, bool)> {
    let bf16 = config(Dtype::Bf16);
    let mut documents = bf16.clone();
    documents.data.attention = Attention::Document;
    let mut sampled = bf16.clone();
    (sampled.optimizer.sampled_layers, sampled.optimizer.sample_interval) = (1, 1);
    let mut single = bf16.clone();
    single.train.grad_accumulation = 1;
    // Long enough for attention's backward pass in one, which sums d_q in memory of its own.
    let mut long = single.clone();
    (long.model.layers, long.data.sequence, long.train.micro_batch) = (1, 1024, 1);
    long.model.max_sequence = 1024;
    let mut long_documents = long.clone();
    long_documents.data.attention = Attention::Document;
    let mut cases = vec![
        ("one micro-batch".to_string(), single, true),
        ("long rows".to_string(), long, true),
        ("long rows of documents".to_string(), long_documents, true),
        ("f32".to_string(), config(Dtype::F32), true),
        ("documents".to_string(), documents, true),
        ("narrow state".to_string(), narrow(&bf16, false), true),
        ("narrow state of sampled layers, offloaded".to_string(), narrow(&sampled, true), true),
        ("sampled layers".to_string(), sampled, true),
        ("without graphs".to_string(), bf16.clone(), false),
    ];
    cases.extend(Recompute::NAMES.iter().map(|level| {
        let mut config = bf16.clone();
        config.train.recompute = level.parse().unwrap();
        (format!("recompute {level}"), config, true)
    }));
    cases
}

/// The row of the table that a buffer belongs to.
fn row(label: &str) -> &'static str {
    match label {
        "parameters" | "lower halves of the parameters" | "f32 copies of vectors" => "parameters",
        "working copy of the parameters" => "working_copy",
        "gradients" => "gradients",
        "first moment"
        | "second moment"
        | "first moments of a chunk"
        | "second moments of a chunk"
        | "gradient norm"
        | "optimizer scalars and scratch" => "moments",
        "first moment in host memory" | "second moment in host memory" => "host_moments",
        "what is sent, in host memory" | "what is read, in host memory" => "host_transfers",
        "activations" => "activations",
        "tokens of a step"
        | "targets of a step"
        | "document starts of a step"
        | "losses of a step" => "batches",
        "key-value cache" | "activations of a sample" => "sampling",
        "semaphores of split products" | "sums of attention's gradients" => "scratch",
        other => panic!("`{other}` belongs to no row of the memory table"),
    }
}

type Table = BTreeMap<String, u64>;

/// Rows that are not empty, without the sum and what no driver is asked for.
fn planned(table: &impl serde::Serialize) -> Table {
    let mut rows = serde_json::to_value(table).unwrap();
    let rows = rows.as_object_mut().unwrap();
    ["total", "process", "reserve", "tensors"]
        .iter()
        .for_each(|name| drop(rows.remove(*name).unwrap()));
    let bytes = rows.iter().map(|(name, bytes)| (name.clone(), bytes.as_u64().unwrap()));
    bytes.filter(|(_, bytes)| *bytes > 0).collect()
}

fn allocated(taken: &TakenSoFar) -> Table {
    let mut table = Table::new();
    for taken in taken.borrow().iter() {
        if let Taken::Buffer { label, bytes } = taken {
            *table.entry(row(label).to_string()).or_default() += bytes;
        }
    }
    table
}

/// The rows of every micro-batch of a step.
struct Batch {
    ids: Vec<i32>,
    starts: Option<Vec<i32>>,
}

impl Batch {
    fn new(config: &Config, step: u64) -> Self {
        let count = config.train.micro_batch * config.data.sequence;
        let starts = config.data.packs_documents().then(|| vec![0; count]);
        Batch { ids: tokens(step, count + 1, config.model.vocab), starts }
    }

    fn rows(&self) -> Rows<'_> {
        let document_starts = self.starts.as_deref();
        let count = self.ids.len() - 1;
        Rows { tokens: &self.ids[..count], targets: &self.ids[1..], document_starts }
    }
}

fn step(config: &Config, trainer: &mut Trainer<Cuda>, step: u64) {
    let batch = Batch::new(config, step);
    let rows = std::iter::repeat_n(batch.rows(), config.train.grad_accumulation);
    trainer.begin(step);
    trainer.accumulate(rows).unwrap();
    let lr = optim::learning_rate(&config.optimizer, step, config.train.steps);
    trainer.update(&config.optimizer, step, lr).unwrap();
}

/// An evaluation and a sample.
fn look(config: &Config, trainer: &mut Trainer<Cuda>) {
    trainer.evaluate(Batch::new(config, 9).rows()).unwrap();
    let (decoder, backend) = trainer.decoder().unwrap();
    decoder.clear();
    // A whole chunk of a prompt, and tokens on their own.
    let prompt: Vec<u32> = (0..64).map(|i| i % 50).collect();
    decoder.push(&prompt, backend).unwrap();
    decoder.clear();
    decoder.push(&[1, 2], backend).unwrap();
}

#[test]
fn the_plan_is_what_was_allocated_and_nothing_is_once_a_trainer_is_made() {
    if !has_simt() {
        return;
    }
    for (what, config, graphs) in cases() {
        let table = planned(&PlanReport::new(&config).unwrap().bytes);
        let taken = TakenSoFar::default();
        let host = Host::new(Options::default()).unwrap();
        let driver = Box::new(Counting { taken: taken.clone(), ..Counting::new(host) });
        let backend = Cuda::new(driver, config.dtype, None).unwrap().with_graphs(graphs);
        let plan = Plan::new(&config, &backend).unwrap();
        assert_eq!(planned(&plan.memory()), table, "{what}: the plan and `isobath plan`");
        let mut trainer = Trainer::new(plan, &config, backend).unwrap();
        assert_eq!(allocated(&taken), table, "{what}: what was allocated, and the plan");
        let sums = taken.borrow().iter().any(|it| match it {
            Taken::Buffer { label, .. } => label == "sums of attention's gradients",
            _ => false,
        });
        assert_eq!(sums, what == "long rows", "{what}: passes of attention in one");
        let graphs = taken.borrow().iter().filter(|it| **it == Taken::Graph).count();
        let parameters = initial_parameters(trainer.table(), config.seed);
        trainer.set_parameters(&parameters).unwrap();
        taken.borrow_mut().clear();
        for at in 1..=2 {
            step(&config, &mut trainer, at);
            look(&config, &mut trainer);
            assert_eq!(*taken.borrow(), [], "{what}: taken in step {at}, after {graphs} graphs");
        }
        let multiprocessors = trainer.device().0.driver().properties().multiprocessors as usize;
        let of_gpu = plan_of_gpu(&config, multiprocessors).unwrap().memory();
        assert_eq!(planned(&of_gpu), table, "{what}: the plan for a GPU that is not here");
        let driver = trainer.device().0.driver();
        let on_device = table.iter().filter(|(row, _)| !row.starts_with("host_"));
        let on_device = on_device.map(|(_, bytes)| bytes).sum::<u64>();
        assert_eq!(driver.allocated_bytes(), on_device, "{what}");
    }
}

/// What a GPU's driver takes for itself is a row of the one table, which training and `isobath
/// plan` hold against what is free.
#[test]
fn a_plan_leaves_room_for_what_the_driver_takes() {
    if !has_simt() {
        return;
    }
    let config = config(Dtype::Bf16);
    let train_with = |free: u64| {
        let memory = Some([free, GPU_RESERVE_BYTES]);
        let host = Host::new(Options::default()).unwrap();
        let driver = Box::new(Counting { memory, ..Counting::new(host) });
        let backend = Cuda::new(driver, config.dtype, None).unwrap();
        let plan = Plan::new(&config, &backend).unwrap();
        let memory = plan.memory();
        // What was allocated when it was opened is in the table, and no longer free.
        (memory.total - backend.scratch_bytes() as u64, Trainer::new(plan, &config, backend).err())
    };
    let (needed, refused) = train_with(0);
    assert!(needed > GPU_RESERVE_BYTES, "{needed}");
    assert_eq!(planned_for_gpu(&config).reserve, GPU_RESERVE_BYTES);
    let message = refused.unwrap().to_string();
    for part in ["graphs and code (estimated)", "512.0", "lower train.micro_batch", "offload"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
    assert!(train_with(needed - 1).1.is_some() && train_with(needed).1.is_none());
}

fn planned_for_gpu(config: &Config) -> MemoryTable {
    plan_of_gpu(config, 132).unwrap().memory()
}

/// A plan that counts on a device to compute SwiGLU's gradient at once has no memory to do it
/// twice.
#[test]
fn a_plan_for_fused_gradients_is_refused_where_they_are_not_fused() {
    if !has_simt() {
        return;
    }
    let config = config(Dtype::Bf16);
    let new = |family| {
        let host = Box::new(Host::new(Options::default()).unwrap());
        Cuda::new(host, config.dtype, Some(family)).unwrap()
    };
    let [plan, larger] =
        [Family::Sm90, Family::Sm80].map(|it| Plan::new(&config, &new(it)).unwrap());
    assert!(plan.memory().activations < larger.memory().activations);
    let refused = Trainer::new(plan, &config, new(Family::Sm80)).err().unwrap().to_string();
    assert!(refused.contains("plan for the device that trains"), "{refused}");
    Trainer::new(larger, &config, new(Family::Sm80)).unwrap();
}

/// The same on every machine, without a look at each allocation; a GPU also says whether a graph or
/// a kernel's code took any of its memory.
#[test]
fn no_memory_is_taken_after_the_first_step() {
    let config = config(Dtype::Bf16);
    for machine in machines() {
        let backend = Cuda::new(machine, config.dtype, None).unwrap();
        let plan = Plan::new(&config, &backend).unwrap();
        let memory = plan.memory();
        let mut trainer = Trainer::new(plan, &config, backend).unwrap();
        let parameters = initial_parameters(trainer.table(), config.seed);
        trainer.set_parameters(&parameters).unwrap();
        step(&config, &mut trainer, 1);
        let seen = |trainer: &mut Trainer<Cuda>| {
            let driver = trainer.device().0.driver();
            // Of host memory others take, too.
            let free = (driver.device() == "cuda").then(|| driver.free_bytes().unwrap());
            (driver.allocated_bytes(), free)
        };
        let first = seen(&mut trainer);
        assert_eq!(first.0, memory.total - memory.process - memory.reserve);
        for at in 2..=3 {
            look(&config, &mut trainer);
            step(&config, &mut trainer, at);
            assert_eq!(seen(&mut trainer), first, "buffers, free memory after step {at}");
        }
    }
}

/// What a session says of its memory: no byte in buffers that was not planned.
#[test]
fn a_session_allocates_what_its_table_says() {
    if !has_simt() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(Dtype::Bf16);
    config.model.vocab = 0;
    config.data.train = vec![text_file(folder.path(), 4000).display().to_string()];
    config.train.steps = WARM_UP_STEPS + 1;
    config.train.eval_every = 2;
    let run = Run { config, folder: folder.path().join("run"), resume: false };
    let outcome = train(run, Interrupt::none(), &mut Console::quiet()).unwrap();
    let MemoryUse { planned, allocated, peak, .. } = outcome.throughput.unwrap().memory;
    let process = Host::new(Options::default()).unwrap().process_bytes();
    assert_eq!(allocated, Some(planned - process));
    assert!(peak.is_none_or(|peak| peak > allocated.unwrap()), "{peak:?}");
}
