//! src/cuda/gemm/tuned.rs: a choice that was timed comes before the model, on its machine and for
//! its product alone.

use isobath::config::Dtype;
use isobath::cuda::gemm::tuned::{self, Launched, Machine, Table, Timed};
use isobath::cuda::gemm::{Choice, Epilogue, Gemm, Layout, Output, Product};
use isobath::cuda::host::{Host, Options};
use isobath::cuda::{DevicePointer, Driver, Family, StreamId};

use super::counting::Counting;
use super::machines::*;

const SIZES: [usize; 3] = [136, 72, 64 * 5];

fn launched(kernel: &str, splits: usize) -> Launched {
    Launched { kernel: kernel.to_string(), splits, cluster: 1, microseconds: 12.5 }
}

/// On the machine of this driver.
fn table(driver: &dyn Driver, family: Family, layout: Layout, best: Launched) -> Table {
    let properties = driver.properties();
    let model = launched(&best.kernel, 1);
    let [m, n, k] = SIZES;
    let machine = Machine {
        name: properties.name.clone(),
        multiprocessors: properties.multiprocessors as usize,
        driver: properties.driver_version.clone(),
        commit: "0123abc".to_string(),
        products: vec![Timed { family, layout, epilogue: Epilogue::Plain, m, n, k, best, model }],
    };
    Table { machines: vec![machine] }
}

#[test]
fn the_table_that_is_compiled_in_can_be_launched() {
    tuned::built_in().check().unwrap();
}

#[test]
fn what_was_timed_comes_before_the_model() {
    if !has_simt() {
        return;
    }
    let driver: &mut dyn Driver = &mut Host::new(Options::default()).unwrap();
    let machine = driver.properties().clone();
    let gemm = Gemm::new(driver, Dtype::Bf16, None).unwrap();
    let layout = Layout::Tn;
    let model = gemm.by_cost_model(layout, Output::plain(layout), SIZES).unwrap();
    assert_eq!(gemm.choose(layout, Output::plain(layout), SIZES).unwrap(), model);
    assert!(!gemm.is_tuned(layout, Output::plain(layout), SIZES));
    let variant = gemm.variants(layout).find(|it| it.columns == 256).unwrap();
    let timed = Choice { splits: 2, ..Choice::whole(variant) };
    assert_ne!(timed, model, "the model must not choose what this test takes as timed");

    let table = table(driver, Family::Sm90, layout, launched(variant.kernel, 2));
    table.check().unwrap();
    let gemm = gemm.with_table(&machine, &table);
    assert!(gemm.is_tuned(layout, Output::plain(layout), SIZES));
    assert_eq!(gemm.choose(layout, Output::plain(layout), SIZES).unwrap(), timed);
    assert_eq!(gemm.by_cost_model(layout, Output::plain(layout), SIZES).unwrap(), model);
    let [m, n, k] = SIZES;
    for (layout, sizes) in [(layout, [m + 8, n, k]), (layout, [m, n, k + 1]), (Layout::Nn, SIZES)] {
        assert_eq!(
            gemm.choose(layout, Output::plain(layout), sizes).unwrap(),
            gemm.by_cost_model(layout, Output::plain(layout), sizes).unwrap()
        );
    }

    // What is planned is what was chosen, and it is right.
    let [a, b] = [(1, k * m), (2, k * n)].map(|(seed, count)| draws(Dtype::Bf16, seed, count));
    let factors = [&a, &b].map(|values| upload(driver, "factor", Dtype::Bf16, values));
    let out = upload(driver, "out", Dtype::F32, &vec![0.0; m * n]);
    let [a_at, b_at] = factors.map(|it| it.address);
    let output = Output::Accumulate;
    let product = Product { layout, m, n, k, a: a_at, b: b_at, out: out.address, output };
    let plan = gemm.plan(driver, &product).unwrap();
    assert_eq!(plan.choice, timed);
    plan.launch(driver, StreamId::MAIN).unwrap();
    let found = download(driver, Dtype::F32, out);
    let sums = |i: usize| (0..k).map(move |at| (at * m + i / n, at * n + i % n));
    let exact: Vec<f64> =
        (0..m * n).map(|i| sums(i).map(|(row, column)| a[row] * b[column]).sum()).collect();
    let plain = |i| sums(i).fold(0.0f32, |sum, (row, column)| sum + (a[row] * b[column]) as f32);
    let plain: Vec<f64> = (0..m * n).map(|i| f64::from(plain(i))).collect();
    assert_exact("as it was timed", Dtype::F32, &found, &plain, &exact);
}

/// Each epilogue has its own entry; where it has none, the tile of another one is better than a
/// guess.
#[test]
fn what_was_timed_with_an_epilogue_comes_before_what_was_timed_without() {
    if !has_simt() {
        return;
    }
    let driver: &mut dyn Driver = &mut Host::new(Options::default()).unwrap();
    let machine = driver.properties().clone();
    let gemm = Gemm::new(driver, Dtype::Bf16, None).unwrap();
    let null = DevicePointer::NULL;
    // 64 columns of gate and as many of up.
    let (swiglu, sizes) = (Output::SwiGlu { product: null }, [136, 64, 320]);
    let (plain, addend) = (Output::plain(Layout::Nt), Output::Store { addend: Some(null) });
    let entry = |epilogue, kernel: &str| Timed {
        family: Family::Sm90,
        layout: Layout::Nt,
        epilogue,
        m: 136,
        n: 128,
        k: 320,
        best: launched(kernel, 1),
        model: launched(kernel, 1),
    };
    let chosen = |entries: &[Timed]| {
        let mut table = table(driver, Family::Sm90, Layout::Nt, launched("", 1));
        table.machines[0].products = entries.to_vec();
        table.check().unwrap();
        let gemm = gemm.clone().with_table(&machine, &table);
        [(swiglu, sizes), (plain, [136, 128, 320]), (addend, [136, 128, 320])].map(|(it, sizes)| {
            let choice = gemm.choose(Layout::Nt, it, sizes).unwrap();
            (choice.variant.kernel, gemm.is_tuned(Layout::Nt, it, sizes))
        })
    };
    let stored = entry(Epilogue::Plain, "gemm_sm90_nt_128x256");
    let fused = entry(Epilogue::SwiGlu, "gemm_sm90_nt_swiglu_128x192");
    let added = entry(Epilogue::Addend, "gemm_sm90_nt_128x128");
    let expected = [
        ("gemm_sm90_nt_swiglu_128x192", true),
        ("gemm_sm90_nt_128x256", true),
        ("gemm_sm90_nt_128x128", true),
    ];
    assert_eq!(chosen(&[stored.clone(), fused.clone(), added]), expected);
    let expected = [
        ("gemm_sm90_nt_swiglu_128x256", false),
        ("gemm_sm90_nt_128x256", true),
        ("gemm_sm90_nt_128x256", false),
    ];
    assert_eq!(chosen(&[stored]), expected, "by the tile of the plain product");
    let expected = [
        ("gemm_sm90_nt_swiglu_128x192", true),
        ("gemm_sm90_nt_128x192", false),
        ("gemm_sm90_nt_128x192", false),
    ];
    assert_eq!(chosen(&[fused]), expected, "by the tile of the one with SwiGLU");
}

#[test]
fn what_was_timed_elsewhere_or_is_not_in_the_build_leaves_it_to_the_model() {
    if !has_simt() {
        return;
    }
    let host = || Host::new(Options::default()).unwrap();
    let driver: &mut dyn Driver = &mut host();
    let machine = driver.properties().clone();
    let layout = Layout::Tn;
    let gemm = Gemm::new(driver, Dtype::Bf16, None).unwrap();
    let model = gemm.by_cost_model(layout, Output::plain(layout), SIZES).unwrap();
    let best = |splits| launched("gemm_sm90_tn_128x256", splits);
    let table = table(driver, Family::Sm90, layout, best(2));
    let chosen = |gemm: &Gemm, table: &Table| {
        gemm.clone()
            .with_table(&machine, table)
            .choose(layout, Output::plain(layout), SIZES)
            .unwrap()
    };
    assert_ne!(chosen(&gemm, &table), model);

    let other = |change: fn(&mut Machine)| {
        let mut table = table.clone();
        change(&mut table.machines[0]);
        chosen(&gemm, &table)
    };
    assert_eq!(other(|it| it.name = "NVIDIA H200".to_string()), model);
    assert_eq!(other(|it| it.multiprocessors += 1), model, "a part of the same machine");
    assert_eq!(other(|it| it.products[0].best.splits = 5), model, "there are four");
    assert_eq!(other(|it| it.products[0].best.splits = 0), model);
    assert_eq!(other(|it| it.products[0].best.kernel = "gemm_sm90_tn_1x1".to_string()), model);

    // A build without wgmma, or who asks for mma.sync.
    let lacking = &mut Counting { lacks: Some("gemm_sm90"), ..Counting::new(host()) };
    let gemm = Gemm::new(lacking, Dtype::Bf16, None).unwrap();
    let without = chosen(&gemm, &table);
    assert_eq!(
        (without, without.variant.family),
        (gemm.by_cost_model(layout, Output::plain(layout), SIZES).unwrap(), Family::Sm80)
    );
    let gemm = Gemm::new(driver, Dtype::Bf16, Some(Family::Sm80)).unwrap();
    assert_eq!(chosen(&gemm, &table).variant.family, Family::Sm80);
}

#[test]
fn a_table_is_text_that_can_be_put_after_another() {
    let entry = |layout, kernel: &str| Timed {
        family: Family::Sm90,
        layout,
        epilogue: Epilogue::Plain,
        m: 768,
        n: 768,
        k: 16384,
        best: launched(kernel, 1),
        model: Launched { microseconds: 13.25, ..launched(kernel, 1) },
    };
    let machine = |name: &str, products| Machine {
        name: name.to_string(),
        multiprocessors: 132,
        driver: "13.0".to_string(),
        commit: String::new(),
        products,
    };
    let nt = entry(Layout::Nt, "gemm_sm90_nt_128x192");
    let tn = entry(Layout::Tn, "gemm_sm90_tn_128x192");
    let first = Table { machines: vec![machine("NVIDIA \"H200\"", vec![nt.clone(), tn.clone()])] };
    let second = Table { machines: vec![machine("NVIDIA H100", vec![nt.clone()])] };
    let both: Table = format!("# timed\n{first}{second}").parse().unwrap();
    assert_eq!(both.machines, [first.machines.clone(), second.machines].concat());
    both.check().unwrap();
    assert_eq!(format!("{first}").lines().filter(|line| line.contains("layout")).count(), 2);
    assert_eq!("# nothing\n".parse::<Table>().unwrap(), Table::default());

    let wrong = |timed: Timed| Table { machines: vec![machine("a", vec![tn.clone(), timed])] };
    let with_splits = |splits| Launched { splits, ..tn.best.clone() };
    for (table, part) in [
        (wrong(entry(Layout::Nn, "gemm_sm90_nt_128x192")), "has no gemm_sm90_nt_128x192"),
        (wrong(Timed { epilogue: Epilogue::Rotary, ..nt.clone() }), "with this epilogue"),
        (wrong(Timed { family: Family::F32, ..nt.clone() }), "the family f32 has no"),
        (wrong(Timed { k: 0, ..tn.clone() }), "it is empty"),
        (wrong(Timed { n: 8, best: with_splits(0), ..tn.clone() }), "0 splits"),
        (wrong(Timed { n: 8, best: with_splits(23), ..tn.clone() }), "of 22 at most"),
        (wrong(Timed { n: 8, model: with_splits(23), ..tn.clone() }), "of 22 at most"),
        (
            wrong(Timed {
                n: 8,
                best: Launched { microseconds: f64::NAN, ..tn.best.clone() },
                ..tn.clone()
            }),
            "took NaN us",
        ),
        (wrong(tn.clone()), "twice"),
    ] {
        let error = table.check().unwrap_err();
        assert!(error.contains(part), "`{part}` is missing in: {error}");
        assert!(error.contains("K="), "{error}");
    }
    for text in ["[[machine]]\nname = \"a\"\n", "[machines]\n", "nonsense"] {
        assert!(text.parse::<Table>().is_err(), "{text}");
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tuned.toml");
    std::fs::write(&path, format!("{first}")).unwrap();
    assert_eq!(Table::read(&path).unwrap(), first);
    std::fs::write(&path, format!("{}", wrong(tn.clone()))).unwrap();
    let error = Table::read(&path).unwrap_err().to_string();
    assert!(error.contains("twice") && error.contains("--tune --out"), "{error}");
    let error = Table::read(&folder.path().join("none.toml")).unwrap_err().to_string();
    assert!(error.contains("none.toml"), "{error}");
}
