//! Presets, layers, names in messages, rules: the whole way from text to a validated value.

use std::fs;
use std::path::{Path, PathBuf};

use isobath::Error;
use isobath::config::{
    Config, DeviceKind, Dtype, Format, InitKind, NormKind, OptimizerKind, Placement, Recompute,
    Rows, ScheduleKind, preset_names,
};
use isobath::model::parameters::{ParameterTable, WIDTH_MULTIPLE};
use isobath::plan::PlanReport;
use tempfile::TempDir;

/// From "The Curse of Depth", the published configurations: name, all parameters, those without
/// embedding and head.
pub const PAPER: [(&str, u64, u64); 13] = [
    ("9m", 8_995_968, 803_968),
    ("20m", 19_548_416, 3_164_416),
    ("35m", 35_197_824, 10_621_824),
    ("40m", 42_392_480, 15_768_480),
    ("60m", 58_073_600, 25_305_600),
    ("71m", 70_578_688, 37_810_688),
    ("100m", 100_117_120, 59_029_120),
    ("130m", 134_105_856, 84_953_856),
    ("250m", 247_370_496, 198_218_496),
    ("350m", 367_969_280, 302_433_280),
    ("1b", 1_339_082_752, 1_208_010_752),
    ("3b", 2_685_831_680, 2_521_991_680),
    ("7b", 6_738_415_616, 6_476_271_616),
];

fn resolve(sets: &[&str]) -> Result<Config, Error> {
    Config::resolve(None, None, &owned(sets))
}

fn owned(sets: &[&str]) -> Vec<String> {
    sets.iter().map(|set| set.to_string()).collect()
}

fn file(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, text).unwrap();
    (folder, path)
}

/// The message has every part, and the error counts as wrong input.
#[track_caller]
fn assert_refused<T>(found: Result<T, Error>, parts: &[&str]) {
    let Err(error) = found else { panic!("accepted; expected an error with {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert_eq!(error.exit_code(), 2, "{message}");
}

#[test]
fn presets_have_the_published_parameter_counts() {
    let names: Vec<&str> = PAPER.iter().map(|(name, ..)| *name).collect();
    assert_eq!(preset_names(), [&["demo"][..], &names, &["sft", "sft-lisa"]].concat());
    for (name, parameters, non_embedding) in PAPER {
        let config = Config::preset(name).unwrap();
        let report = PlanReport::new(&config).unwrap();
        assert_eq!(report.parameters, parameters, "{name}");
        assert_eq!(report.non_embedding_parameters, non_embedding, "{name}");
        // 2 V d + L (4 d^2 + 3 d f + 2 d) + d
        let m = &config.model;
        let (v, d, f, l) = (m.vocab as u64, m.hidden as u64, m.ffn as u64, m.layers as u64);
        assert_eq!(parameters, 2 * v * d + l * (4 * d * d + 3 * d * f + 2 * d) + d, "{name}");
    }
}

#[test]
fn an_odd_ffn_is_stored_padded_and_counted_unpadded() {
    let config = Config::preset("1b").unwrap();
    assert_eq!(config.model.ffn, 5461);
    let table = ParameterTable::new(&config.model);
    let padding = 3 * config.model.hidden * config.model.layers * (5464 - 5461);
    assert_eq!(5461usize.next_multiple_of(WIDTH_MULTIPLE), 5464);
    assert_eq!(table.stored_elements(), table.parameters() + padding);
}

#[test]
fn the_250m_preset_has_heads_of_48() {
    assert_eq!(Config::preset("250m").unwrap().model.head_dim(), 48);
}

#[test]
fn paper_presets_have_the_recipes_of_the_run_scripts() {
    // lr, steps, warm-up, rows at once; 512 rows of 256 in a step
    for (name, lr, steps, warmup, micro_batch) in [
        ("71m", 1e-3, 10_000, 1_000, 256),
        ("130m", 1e-3, 20_000, 2_000, 64),
        ("250m", 1e-3, 40_000, 4_000, 128),
        ("350m", 5e-4, 60_000, 6_000, 128),
        ("1b", 5e-4, 100_000, 1_000, 32),
        ("7b", 5e-4, 150_000, 15_000, 4),
    ] {
        let Config { optimizer, train, .. } = Config::preset(name).unwrap();
        assert_eq!(
            (optimizer.lr, train.steps, optimizer.warmup, train.micro_batch),
            (lr, steps, warmup, micro_batch),
            "{name}"
        );
    }
    for (name, ..) in PAPER {
        let config = Config::preset(name).unwrap();
        let (model, optimizer) = (&config.model, &config.optimizer);
        assert_eq!(config.tokens_per_step(), 512 * 256, "{name}");
        assert_eq!((config.data.sequence, config.data.rows), (256, Rows::Document), "{name}");
        assert_eq!((config.dtype, config.device), (Dtype::Bf16, DeviceKind::Auto), "{name}");
        assert_eq!((model.placement, model.tied), (Placement::Lns, false), "{name}");
        assert_eq!((model.norm_eps, model.rope_theta), (1e-6, 10_000.0), "{name}");
        assert_eq!((model.init_std, model.embedding_std), (0.02, 0.02), "{name}");
        assert_eq!(optimizer.kind, OptimizerKind::Adam, "{name}");
        assert_eq!(optimizer.schedule, ScheduleKind::Cosine, "{name}");
        assert_eq!((optimizer.beta1, optimizer.beta2, optimizer.eps), (0.9, 0.999, 1e-8), "{name}");
        assert_eq!((optimizer.weight_decay, optimizer.clip), (0.0, 0.0), "{name}");
        assert_eq!(optimizer.min_lr_ratio, 0.1, "{name}");
    }
}

#[test]
fn tuning_presets_have_the_recipe_of_the_papers_group() {
    for (name, sampled_layers) in [("sft", 0), ("sft-lisa", 4)] {
        let mut config = Config::preset(name).unwrap();
        let Config { seed, data, train, optimizer, .. } = &config;
        assert_eq!((*seed, train.epochs, optimizer.lr), (42, 4.0, 3e-4), "{name}");
        assert_eq!((optimizer.sampled_layers, optimizer.sample_interval), (sampled_layers, 3));
        assert_eq!((data.format, data.rows), (Format::Supervised, Rows::Packed), "{name}");
        assert!(data.packs_documents(), "{name}: examples attend to each other");
        assert_refused(config.validate(), &["data.train = []", "prompts and answers"]);
        config.data.train = vec!["chat.jsonl".to_string()];
        assert_refused(config.validate(), &["data.tokenizer = \"\"", "--init FOLDER"]);
        config.data.tokenizer = "tokenizer.json".to_string();
        config.validate().unwrap();
    }
}

#[test]
fn every_preset_can_be_planned_and_all_but_the_data_of_the_paper_is_there() {
    Config::preset("demo").unwrap().validate().unwrap();
    for (name, ..) in PAPER {
        let mut config = Config::preset(name).unwrap();
        config.validate_shape().unwrap();
        let most = format!("at most {} entries", config.model.vocab);
        assert_refused(config.validate(), &["data.train", "data.tokenizer", &most]);
        config.data.train = vec!["c4".to_string()];
        assert_refused(config.validate(), &["data.tokenizer = \"\""]);
        config.data.tokenizer = "tokenizer.json".to_string();
        config.validate().unwrap();
    }
}

#[test]
fn every_preset_survives_the_way_to_a_file_and_back() {
    for name in preset_names() {
        let config = Config::preset(name).unwrap();
        let text = config.to_toml().unwrap();
        assert_eq!(Config::from_toml(&text).unwrap(), config, "{text}");
    }
}

#[test]
fn a_saved_configuration_keeps_awkward_values_exactly() {
    let mut config = Config::preset("demo").unwrap();
    config.seed = i64::MAX as u64;
    config.optimizer.lr = 0.1 + 0.2;
    config.optimizer.eps = f64::MIN_POSITIVE;
    config.model.rope_theta = 5e5;
    config.data.train = vec!["with \"quotes\"\n.txt".to_string(), "täxt, 文.txt".to_string()];
    config.train.init_from = Some(PathBuf::from("C:\\models\\first"));
    config.device = DeviceKind::Simt;
    config.train.recompute = Recompute::Block;
    let text = config.to_toml().unwrap();
    assert_eq!(Config::from_toml(&text).unwrap(), config, "{text}");
}

#[test]
fn a_saved_configuration_shows_every_key() {
    let text = Config::preset("demo").unwrap().to_toml().unwrap();
    assert!(text.contains("init_from = \"\""), "{text}");
    let without = text.replace("beta2 = 0.95\n", "").replace("seed = 1\n", "");
    assert_refused(Config::from_toml(&without), &["lacks", "`optimizer.beta2`", "`seed`"]);
}

#[test]
fn a_seed_that_toml_cannot_hold_is_an_error_and_not_another_seed() {
    let mut config = Config::preset("demo").unwrap();
    config.seed = u64::MAX;
    assert_refused(config.to_toml(), &["2^63"]);
    assert_refused(config.validate(), &["seed = 18446744073709551615"]);
}

#[test]
fn names_in_files_are_those_of_the_values() {
    fn check<T>(names: &[&str])
    where
        T: std::str::FromStr<Err = Error> + std::fmt::Display,
    {
        for name in names {
            assert_eq!(name.parse::<T>().unwrap().to_string(), *name);
        }
    }
    check::<Dtype>(Dtype::NAMES);
    check::<DeviceKind>(DeviceKind::NAMES);
    check::<NormKind>(NormKind::NAMES);
    check::<Placement>(Placement::NAMES);
    check::<InitKind>(InitKind::NAMES);
    check::<Rows>(Rows::NAMES);
    check::<Recompute>(Recompute::NAMES);
    check::<OptimizerKind>(OptimizerKind::NAMES);
    check::<ScheduleKind>(ScheduleKind::NAMES);
    assert_refused("gpu".parse::<DeviceKind>(), &["`gpu`", "`cuda`"]);
}

#[test]
fn later_layers_are_stronger() {
    let demo = resolve(&[]).unwrap();
    assert_eq!(demo, Config::preset("demo").unwrap());

    let (_folder, path) = file(
        "preset = \"60m\"\nname = \"mine\"\n[optimizer]\nlr = 0.5\nwarmup = 7\n[model]\nlayers = 3\n",
    );
    let path = Some(path.as_path());
    // The file names the preset and changes some of it.
    let config = Config::resolve(None, path, &[]).unwrap();
    assert_eq!((config.name.as_str(), config.model.hidden, config.model.layers), ("mine", 512, 3));
    assert_eq!((config.optimizer.lr, config.optimizer.warmup), (0.5, 7));
    // The preset's flag beats the file's preset, the file's values beat the flag's preset.
    let config = Config::resolve(Some("130m"), path, &[]).unwrap();
    assert_eq!((config.model.hidden, config.model.layers), (768, 3));
    // --set beats the file, the last one wins, and the rest of the file stays.
    let sets = owned(&["optimizer.lr=0.25", "optimizer.lr=0.125"]);
    let config = Config::resolve(Some("130m"), path, &sets).unwrap();
    assert_eq!((config.optimizer.lr, config.optimizer.warmup), (0.125, 7));
}

#[test]
fn every_way_of_writing_a_table_is_read() {
    for text in [
        "[model]\nhidden = 96\n",
        "model.hidden = 96\n",
        "model = { hidden = 96 }\n",
        "\u{feff}[model]\r\nhidden = 96\r\n",
    ] {
        let (_folder, path) = file(text);
        let config = Config::resolve(None, Some(&path), &[]).unwrap();
        assert_eq!(config.model.hidden, 96, "{text:?}");
    }
}

#[test]
fn set_takes_bare_strings_toml_values_and_lists() {
    let config = resolve(&[
        "model.placement=pre",
        "optimizer.kind=\"adam\"",
        " train.steps = 1_000 ",
        "optimizer.lr=1",
        "optimizer.eps=1e-9",
        "model.tied=true",
        "data.train=a, b=c.txt",
        "data.valid=[\"x.txt\", 'y.txt']",
        "name=130",
        "data.field=true",
        "train.init_from=models/llama",
    ])
    .unwrap();
    assert_eq!(config.model.placement, Placement::Pre);
    assert_eq!(config.optimizer.kind, OptimizerKind::Adam);
    assert_eq!((config.train.steps, config.model.tied), (1000, true));
    assert_eq!((config.optimizer.lr, config.optimizer.eps), (1.0, 1e-9));
    assert_eq!(config.data.train, ["a, b=c.txt"]);
    assert_eq!(config.data.valid, ["x.txt", "y.txt"]);
    assert_eq!((config.name.as_str(), config.data.field.as_str()), ("130", "true"));
    assert_eq!(config.train.init_from.as_deref(), Some(Path::new("models/llama")));

    let emptied = resolve(&["data.train=", "train.init_from="]).unwrap();
    assert!(emptied.data.train.is_empty() && emptied.train.init_from.is_none());
}

#[test]
fn unknown_keys_are_named_with_the_nearest_one() {
    for (given, nearest) in [
        ("model.hiden", "model.hidden"),
        ("modle.hidden", "model.hidden"),
        ("model.lr", "optimizer.lr"),
        ("steps", "train.steps"),
        ("train.grad_accum", "train.grad_accumulation"),
        ("optimizer.weigth_decay", "optimizer.weight_decay"),
        ("model.n_heads", "model.heads"),
        ("devise", "device"),
        ("Model.Hidden", "model.hidden"),
    ] {
        let message = format!("unknown key `{given}`; nearest: `{nearest}`");
        assert_refused(resolve(&[&format!("{given}=1")]), &[&message]);
    }
    assert_refused(resolve(&["model.hiden=1"]), &["[model] has", "hidden", "rope_theta"]);
    assert_refused(resolve(&["modle.hidden=1"]), &["the tables are", "optimizer"]);
    for odd in ["=1", ".=1", "model.=1", "model..hidden=1", "model.hidden.x=1"] {
        assert_refused(resolve(&[odd]), &["unknown key", "nearest"]);
    }
}

#[test]
fn unknown_keys_in_a_file_come_with_path_and_line() {
    let (_folder, path) = file("seed = 3\n\n[model]\nlayers = 2\nhiden = 64\n");
    let place = format!("{}:5", path.display());
    assert_refused(
        Config::resolve(None, Some(&path), &[]),
        &[&place, "unknown key `model.hiden`; nearest: `model.hidden`"],
    );
    let (_folder, path) = file("[modle]\nhidden = 64\n");
    assert_refused(
        Config::resolve(None, Some(&path), &[]),
        &["run.toml:1", "unknown table `modle`; nearest: `model`"],
    );
    let (_folder, path) = file("[model.hidden]\nwide = true\n");
    assert_refused(Config::resolve(None, Some(&path), &[]), &["model.hidden", "a whole number"]);
}

#[test]
fn unknown_values_are_refused_with_the_allowed_ones_nearest_first() {
    assert_refused(
        resolve(&["model.placement=prr"]),
        &["model.placement = \"prr\"", "use `pre`, `lns`, `post`,"],
    );
    assert_refused(
        resolve(&["optimizer.schedule=cosin"]),
        &["optimizer.schedule = \"cosin\"", "use `cosine`, ", "`constant`", "`linear`", "`wsd`"],
    );
    let (_folder, path) = file("[data]\nsequence = 4\nrows = \"documents\"\n");
    let place = format!("{}:3: data.rows = \"documents\"", path.display());
    assert_refused(
        Config::resolve(None, Some(&path), &[]),
        &[&place, "use `document` or `packed`"],
    );
}

#[test]
fn wrong_types_say_what_was_given_and_what_is_expected() {
    for (set, expected, found) in [
        ("model.hidden=wide", "a whole number", "a string"),
        ("model.hidden=64.5", "a whole number", "a number with a fraction"),
        ("model.hidden=-64", "a whole number from 0", "-64"),
        ("model.hidden=[64]", "a whole number", "an array"),
        ("model.hidden=", "a whole number", "a string"),
        ("seed=9223372036854775808", "a whole number", "string"),
        ("optimizer.lr=high", "a number", "a string"),
        ("optimizer.lr=true", "a number", "a boolean"),
        ("model.tied=1", "true or false", "an integer"),
        ("model.tied=yes", "true or false", "a string"),
        ("data.train=[1]", "a list of strings", "an integer"),
    ] {
        let key = set.split('=').next().unwrap();
        assert_refused(resolve(&[set]), &["--set", key, expected, found]);
    }
    assert_refused(resolve(&["model=3"]), &["`model` is a table", "hidden", "layers"]);
    assert_refused(resolve(&["model.hidden"]), &["--set model.hidden", "no `=`"]);
    assert_refused(resolve(&["preset=130m"]), &["--preset 130m"]);

    for (text, parts) in [
        ("[model]\nhidden = \"64\"\n", ["run.toml:2", "model.hidden", "a whole number"]),
        ("name = 3\n", ["run.toml:1", "name = 3", "a string"]),
        ("model = 3\n", ["run.toml:1", "`model` is a table", "hidden"]),
        ("preset = 130\n", ["run.toml:1", "`preset` is an integer", "`130m`"]),
        ("seed = 18446744073709551615\n", ["run.toml:1", "seed", "2^63"]),
        ("\n[model\n", ["run.toml:2", "remedy", "TOML"]),
        ("seed = 1\nseed = 2\n", ["run.toml:2", "duplicate", "TOML"]),
    ] {
        let (_folder, path) = file(text);
        assert_refused(Config::resolve(None, Some(&path), &[]), &parts);
    }
}

#[test]
fn an_unknown_preset_comes_with_the_list_nearest_first() {
    let parts = ["unknown preset `130`", "use `130m`, ", "`demo`", "`7b`"];
    assert_refused(Config::resolve(Some("130"), None, &[]), &parts);
    let (_folder, path) = file("preset = \"130\"\n");
    assert_refused(Config::resolve(None, Some(&path), &[]), &parts);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let missing = Path::new("no/such/run.toml");
    assert_refused(Config::resolve(None, Some(missing), &[]), &["no/such/run.toml"]);
    let (_folder, path) = file("");
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert_refused(Config::resolve(None, Some(&path), &[]), &["run.toml", "UTF-8"]);
}

/// One test for each rule: the change that breaks it, and what the message has to say.
macro_rules! rules {
    ($($name:ident: $sets:expr => $parts:expr;)+) => {$(
        #[test]
        fn $name() {
            let config = resolve(&$sets).unwrap();
            assert_refused(config.validate(), &$parts);
        }
    )+};
}

rules! {
    hidden_is_at_least_1: ["model.hidden=0"] => ["model.hidden = 0", "1 or more"];
    hidden_has_a_limit: ["model.hidden=9223372036854775807"] => ["model.hidden = 9223", "at most"];
    heads_are_at_least_1: ["model.heads=0"] => ["model.heads = 0", "1 or more"];
    heads_divide_hidden: ["model.heads=3"] => ["model.heads = 3", "model.hidden = 128", "2 or 4"];
    head_dim_is_even: ["model.heads=128"] => ["model.heads = 128", "1 dimensions", "even"];
    kv_heads_are_at_least_1: ["model.kv_heads=0"] => ["model.kv_heads = 0", "1 or more"];
    kv_heads_divide_heads: ["model.kv_heads=3"] => ["model.kv_heads = 3", "model.heads = 4", "2 or 4"];
    kv_heads_are_no_more_than_heads: ["model.kv_heads=8"] => ["model.kv_heads = 8", "set it to 4"];
    layers_are_at_least_1: ["model.layers=0"] => ["model.layers = 0", "1 or more"];
    layers_have_a_limit: ["model.layers=1000000000000"] => ["model.layers = 1000", "at most"];
    ffn_is_at_least_1: ["model.ffn=0"] => ["model.ffn = 0", "1 or more"];
    ffn_has_a_limit: ["model.ffn=9000000000000000000"] => ["model.ffn = 9000", "at most"];
    vocab_has_a_limit: ["model.vocab=4294967296"] => ["model.vocab = 4294967296", "at most"];
    max_sequence_is_at_least_1: ["model.max_sequence=0", "data.sequence=1"] => ["model.max_sequence = 0"];
    max_sequence_has_a_limit: ["model.max_sequence=3000000000"] => ["model.max_sequence = 3000"];
    norm_eps_is_positive: ["model.norm_eps=0"] => ["model.norm_eps = 0"];
    rope_theta_is_positive: ["model.rope_theta=-1.0"] => ["model.rope_theta = -1"];
    init_std_is_not_negative: ["model.init_std=-0.1"] => ["model.init_std = -0.1"];
    embedding_std_is_finite: ["model.embedding_std=inf"] => ["model.embedding_std = inf"];
    sequence_is_at_least_1: ["data.sequence=0"] => ["data.sequence = 0", "1 or more"];
    sequence_fits_the_model: ["data.sequence=2048"] => ["data.sequence = 2048", "max_sequence = 256"];
    steps_are_at_least_1: ["train.steps=0"] => ["train.steps = 0", "1 or more"];
    steps_have_a_limit: ["train.steps=9223372036854775807"] => ["train.steps = 9223", "lower"];
    micro_batch_is_at_least_1: ["train.micro_batch=0"] => ["train.micro_batch = 0", "1 or more"];
    micro_batch_has_a_limit: ["train.micro_batch=9223372036854775807"] => ["train.micro_batch = 9223"];
    grad_accumulation_is_at_least_1:
        ["train.grad_accumulation=0"] => ["train.grad_accumulation = 0", "1 or more"];
    grad_accumulation_has_a_limit:
        ["train.grad_accumulation=9223372036854775807"] => ["train.grad_accumulation = 9223"];
    lr_is_positive: ["optimizer.lr=0"] => ["optimizer.lr = 0", "above 0"];
    lr_is_a_number: ["optimizer.lr=nan"] => ["optimizer.lr = NaN", "above 0"];
    lr_is_finite: ["optimizer.lr=inf"] => ["optimizer.lr = inf", "finite"];
    min_lr_ratio_is_at_most_1: ["optimizer.min_lr_ratio=1.5"] => ["optimizer.min_lr_ratio = 1.5"];
    min_lr_ratio_is_not_negative: ["optimizer.min_lr_ratio=-0.1"] => ["optimizer.min_lr_ratio = -0.1"];
    warmup_is_within_the_run: ["train.steps=50"] => ["optimizer.warmup = 100", "train.steps = 50", "at most 50"];
    decay_share_is_above_0: ["optimizer.decay_share=0"] => ["optimizer.decay_share = 0"];
    decay_share_is_at_most_1: ["optimizer.decay_share=1.1"] => ["optimizer.decay_share = 1.1"];
    beta1_is_below_1: ["optimizer.beta1=1"] => ["optimizer.beta1 = 1"];
    beta2_is_not_negative: ["optimizer.beta2=-0.5"] => ["optimizer.beta2 = -0.5"];
    beta2_is_a_number: ["optimizer.beta2=nan"] => ["optimizer.beta2 = NaN"];
    eps_is_positive: ["optimizer.eps=0"] => ["optimizer.eps = 0"];
    weight_decay_is_not_negative: ["optimizer.weight_decay=-1"] => ["optimizer.weight_decay = -1"];
    clip_is_not_negative: ["optimizer.clip=-1"] => ["optimizer.clip = -1"];
    z_loss_is_not_negative: ["train.z_loss=-1"] => ["train.z_loss = -1"];
    supervised_examples_do_not_see_each_other:
        ["data.format=supervised"] => ["data.attention = row", "data.attention to document"];
    epochs_are_not_negative: ["train.epochs=-1.0"] => ["train.epochs = -1"];
    epochs_are_a_number: ["train.epochs=nan"] => ["train.epochs = NaN"];
    no_more_layers_are_sampled_than_there_are:
        ["optimizer.sampled_layers=7"] => ["optimizer.sampled_layers = 7", "has 6 layers"];
    layers_are_sampled_for_an_update_at_least:
        ["optimizer.sample_interval=0"] => ["optimizer.sample_interval = 0"];
    held_out_is_not_negative: ["data.held_out=-0.1"] => ["data.held_out = -0.1"];
    held_out_is_at_most_a_half: ["data.held_out=0.6"] => ["data.held_out = 0.6"];
    data_train_is_given: ["data.train="] => ["data.train = []", "bundled:austen"];
    data_train_has_no_empty_name: ["data.train=['a', '']"] => ["data.train = [\"a\", \"\"]"];
    data_valid_has_no_empty_name: ["data.valid=['']"] => ["data.valid = [\"\"]"];
    a_tokenizer_is_given: ["data.tokenizer="] => ["data.tokenizer = \"\"", "tokenizer.json"];
    a_trained_tokenizer_has_a_size: ["data.tokenizer=train:many"] => ["data.tokenizer = \"train:many\""];
    a_trained_tokenizer_has_the_bytes: ["data.tokenizer=train:256"] => ["data.tokenizer", "from 257"];
    a_field_is_given: ["data.field="] => ["data.field = \"\""];
    bf16_is_not_for_the_cpu: ["dtype=bf16", "device=cpu"] => ["dtype = bf16", "--set dtype=f32"];
    narrow_moments_are_not_for_the_cpu: ["optimizer.moments=bf16", "device=cpu"]
        => ["optimizer.moments = bf16", "--set optimizer.moments=f32", "cuda or simt"];
    halves_are_not_for_the_cpu: ["optimizer.master=bf16+16", "device=cpu"]
        => ["optimizer.master = bf16+16", "--set optimizer.master=f32", "cuda or simt"];
    halves_need_a_bf16_copy: ["optimizer.master=bf16+16", "device=simt"]
        => ["optimizer.master = bf16+16", "dtype = f32", "in bf16"];
    there_is_nothing_to_offload_on_the_cpu: ["optimizer.offload=true", "device=cpu"]
        => ["optimizer.offload = true", "--set optimizer.offload=false", "cuda or simt"];
    the_name_is_no_path: ["name=a/b"] => ["name = \"a/b\"", "letters"];
    the_name_is_no_windows_path: ["name='a\\b'"] => ["name = "];
    the_name_is_not_the_parent: ["name=.."] => ["name = \"..\""];
    the_name_is_not_empty: ["name="] => ["name = \"\""];
    the_name_is_no_option: ["name=-x"] => ["name = \"-x\""];
    the_name_has_a_longest: [&format!("name={}", "n".repeat(101))] => ["name = ", "100"];
}

#[test]
fn values_on_the_edge_of_the_rules_pass() {
    for sets in [
        &["optimizer.min_lr_ratio=0", "optimizer.beta1=0", "optimizer.decay_share=1"][..],
        &["optimizer.min_lr_ratio=1", "data.held_out=0.5", "optimizer.clip=0"],
        &["train.steps=100", "model.kv_heads=1", "data.sequence=256"],
        &["model.heads=64", "model.kv_heads=64", "optimizer.warmup=1800"],
        &["data.tokenizer=bytes", "dtype=bf16", "name=run_1.5-ä"],
        &["data.tokenizer=train:257", "device=cpu", "optimizer.warmup=0"],
        // A tokenizer may come out smaller than asked for, and the saved vocabulary says so.
        &["data.tokenizer=train:1024", "model.vocab=900"],
    ] {
        resolve(sets).unwrap().validate().unwrap();
    }
}

#[test]
fn what_auto_turns_out_to_be_is_checked_too() {
    let mut config = Config::preset("130m").unwrap();
    assert_refused(config.validate_on(DeviceKind::Cpu), &["dtype = bf16", "--set dtype=f32"]);
    config.validate_on(DeviceKind::Cuda).unwrap();
    config.dtype = Dtype::F32;
    config.validate_on(DeviceKind::Cpu).unwrap();
    config.optimizer.moments = Dtype::Bf16;
    let parts = ["optimizer.moments = bf16", "--set optimizer.moments=f32"];
    assert_refused(config.validate_on(DeviceKind::Cpu), &parts);
    config.validate_on(DeviceKind::Cuda).unwrap();
    config.validate_on(DeviceKind::Simt).unwrap();
}

#[test]
fn a_plan_needs_no_more_than_shapes() {
    // Not trainable: no data, a warm-up longer than the run.
    let config = Config::resolve(Some("60m"), None, &owned(&["train.steps=10"])).unwrap();
    assert_eq!(PlanReport::new(&config).unwrap().tokens, 10 * 512 * 256);
    let config = resolve(&["data.tokenizer=my.json"]).unwrap();
    assert_refused(PlanReport::new(&config), &["model.vocab", "my.json"]);
    let config = resolve(&["data.tokenizer=train:99999999999"]).unwrap();
    assert_refused(PlanReport::new(&config), &["model.vocab", "at most"]);
}

#[test]
fn a_plan_counts_tied_embeddings_kv_heads_and_flops() {
    let sets = [
        "model.hidden=8",
        "model.heads=2",
        "model.kv_heads=1",
        "model.layers=3",
        "model.ffn=5",
        "model.vocab=7",
        "model.tied=true",
        "data.sequence=11",
    ];
    let report = PlanReport::new(&resolve(&sets).unwrap()).unwrap();
    // q and o: 8x8; k and v: 4x8; gate, up, down: 5x8; the head is the embedding, 7x8.
    let block = 2 * 64 + 2 * 32 + 3 * 40;
    assert_eq!(report.matmul_parameters, 3 * block + 56);
    assert_eq!(report.parameters, 3 * (block + 2 * 8) + 8 + 56);
    assert_eq!(report.non_embedding_parameters, report.parameters - 56);
    assert_eq!(report.flops_per_token, 6 * (3 * block + 56) + 6 * 3 * 11 * 8);
    // Rows of 8 stored for 5, and every parameter starts at a multiple of 64:
    // embedding 64, three times (64 + 128 + 64 + 64 + 128 + 64), final norm 64
    assert_eq!(report.stored_elements, 64 + 3 * 512 + 64);
    assert_eq!(report.bytes.parameters, 4 * report.stored_elements);
    assert_eq!(report.bytes.gradients, 4 * report.stored_elements);
    // And the gradient's norm.
    assert_eq!(report.bytes.moments, 8 * report.stored_elements + 4);
}

#[test]
fn the_configuration_page_lists_every_key_with_its_demo_value() {
    let page = include_str!("../docs/configuration.md");
    let demo: toml::Table = Config::preset("demo").unwrap().to_toml().unwrap().parse().unwrap();
    let mut keys = 0;
    let mut check = |key: String, value: &toml::Value| {
        let line = page.lines().find(|line| line.contains(&format!("`{key}`")));
        let line = line.unwrap_or_else(|| panic!("docs/configuration.md lacks `{key}`"));
        let shown = line.rsplit('|').nth(1).unwrap_or_default().replace('`', "");
        let is_value = |text: &str| {
            let table = format!("v = {}", text.trim()).parse::<toml::Table>();
            table.is_ok_and(|table| table["v"] == *value)
        };
        // A line may list several keys, and their values in the same order.
        let listed = is_value(&shown) || shown.split(", ").any(is_value);
        assert!(listed, "docs/configuration.md has {shown} for `{key}`, the demo {value}");
        keys += 1;
    };
    for (key, value) in &demo {
        match value {
            toml::Value::Table(table) => {
                table.iter().for_each(|(inner, value)| check(format!("{key}.{inner}"), value))
            }
            value => check(key.clone(), value),
        }
    }
    assert!(keys > 45, "{keys} keys");
}
