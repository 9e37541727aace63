//! Parameters stored as their bf16 copy and the lower halves of their bits: every bit of an update
//! of f32 parameters, and the f32 copies of vectors.

use isobath::backend::VectorCopy;
use isobath::cuda::halves;

use super::*;

#[test]
fn two_halves_are_every_bit() {
    let lower = [0, 1, 2, 0x1234, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xabcd, 0xfffe, 0xffff];
    let all = (0..=u16::MAX).flat_map(|upper| lower.map(|lower| u32::from(upper) << 16 | lower));
    for value in all.map(f32::from_bits) {
        let (upper, lower) = halves::split(value);
        let joined = halves::join(upper, lower);
        if value.is_nan() {
            assert!(upper.is_nan() && joined.is_nan(), "{:#x}", value.to_bits());
            continue;
        }
        assert_eq!(joined.to_bits(), value.to_bits(), "{value:e}");
        assert_eq!(upper, rounded_parameter(value), "{value:e}");
    }
}

/// What a vector's copy holds where nothing writes.
const UNTOUCHED: f32 = -7.0;

/// An optimizer of parameters in halves, with the inputs of an [`OnDevice`].
struct InHalves {
    adamw: AdamW,
    moments: Dtype,
    elements: usize,
    /// upper, lower, gradients, moment1, moment2
    flat: [Allocation; 5],
    vectors: Allocation,
    grad_norm: Allocation,
}

impl InHalves {
    fn new(driver: &mut dyn Driver, case: &Case, inputs: &Flat, vectors: &[VectorCopy]) -> Self {
        let (upper, lower): (Vec<bf16>, Vec<u16>) =
            inputs[0].iter().map(|&it| halves::split(it as f32)).unzip();
        let copies = vectors.iter().map(|it| it.to + it.from.len()).max().unwrap_or(0) + 4;
        let part = FlatPart { master: Master::Split, ..case.part() };
        InHalves {
            adamw: AdamW::new(driver, part, &case.decay, vectors).unwrap(),
            moments: case.moments,
            elements: case.elements,
            flat: [
                driver.upload("upper halves", &upper).unwrap(),
                driver.upload("lower halves", &lower).unwrap(),
                upload(driver, "gradients", F32, &inputs[1]),
                upload(driver, "moment1", case.moments, &inputs[2]),
                upload(driver, "moment2", case.moments, &inputs[3]),
            ],
            vectors: driver.upload("copies of vectors", &vec![UNTOUCHED; copies]).unwrap(),
            grad_norm: unwritten(driver, "grad_norm", F32, 1),
        }
    }

    fn buffers(&self) -> AdamWBuffers {
        let [working, parameters, gradients, moment1, moment2] = self.flat.map(|it| it.address);
        AdamWBuffers {
            parameters,
            gradients,
            moment1,
            moment2,
            working: Some(working),
            vectors: Some(self.vectors.address),
            grad_norm: self.grad_norm.address,
        }
    }

    fn update(&self, driver: &mut dyn Driver, step: &AdamWStep) {
        let (gradients, to) = (self.flat[2].address, self.grad_norm.address);
        self.adamw.gradient_norm(driver, StreamId::MAIN, gradients, to).unwrap();
        self.adamw.update(driver, StreamId::MAIN, step, &self.buffers()).unwrap();
    }

    fn parameters(&self, driver: &mut dyn Driver) -> Vec<f32> {
        let upper = driver.download::<bf16>(self.flat[0].address, self.elements).unwrap();
        let lower = driver.download::<u16>(self.flat[1].address, self.elements).unwrap();
        upper.into_iter().zip(lower).map(|(upper, lower)| halves::join(upper, lower)).collect()
    }

    fn copies(&self, driver: &mut dyn Driver) -> Vec<f32> {
        let count = self.vectors.bytes as usize / 4;
        driver.download::<f32>(self.vectors.address, count).unwrap()
    }

    fn release(self, driver: &mut dyn Driver) {
        self.adamw.release(driver).unwrap();
        for buffer in self.flat.into_iter().chain([self.vectors, self.grad_norm]) {
            driver.release(buffer).unwrap();
        }
    }
}

fn f32s(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|value| value as f32).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Updates of both, one after the other: equal parameters, working copies and moments, and of every
/// vector a copy.
fn check_halves(driver: &mut dyn Driver, case: &Case, vectors: &[VectorCopy]) -> Vec<u8> {
    let inputs = inputs(case.elements, case.moments);
    let whole = OnDevice::new(driver, case, &inputs);
    let halves = InHalves::new(driver, case, &inputs, vectors);
    let (mut all, mut before) = (vec![], vec![]);
    for update in 1..=3 {
        let step = AdamWStep { lr: 1e-3, update, ..case.step(40.0) };
        let what = format!("{case:?}, update {update}");
        whole.norm(driver);
        whole.adamw.update(driver, StreamId::MAIN, &step, &whole.buffers()).unwrap();
        halves.update(driver, &step);

        let [_, expected, moment1, moment2] = whole.outputs(driver);
        let (expected, found) = (f32s(expected), halves.parameters(driver));
        assert!(bits(&found) == bits(&expected), "{what}: parameters");
        assert_ne!(found, before, "{what}: nothing moved");
        let [upper, _, _, found1, found2] = halves.flat;
        let working = download(driver, Dtype::Bf16, whole.working.unwrap());
        assert!(download(driver, Dtype::Bf16, upper) == working, "{what}: working copies");
        for (found, expected) in [(found1, moment1), (found2, moment2)] {
            assert!(download(driver, halves.moments, found) == expected, "{what}: moments");
        }
        let mut copies = vec![UNTOUCHED; halves.vectors.bytes as usize / 4];
        for VectorCopy { from, to } in vectors {
            copies[*to..to + from.len()].copy_from_slice(&expected[from.clone()]);
        }
        let found_copies = halves.copies(driver);
        assert!(bits(&found_copies) == bits(&copies), "{what}: copies of {vectors:?}");
        all.extend(found.iter().flat_map(|value| value.to_bits().to_le_bytes()));
        before = found;
    }
    whole.release(driver);
    halves.release(driver);
    all
}

fn vector(from: Range<usize>, to: usize) -> VectorCopy {
    VectorCopy { from, to }
}

#[test]
fn halves_give_the_bits_of_f32_at_every_size() {
    let sizes = [1, 2, 3, 4, 5, 63, 1023, 2047, 2048, 2049, 4097, 10_243];
    let cases: Vec<Case> = sizes
        .into_iter()
        .enumerate()
        .map(|(index, elements)| Case {
            elements,
            decay: vec![0..elements / 2, elements / 2 + elements / 7..elements],
            decoupled: index % 2 == 0,
            clip: [0.0, 0.3, 2.0][index % 3],
            working: true,
            moments: DTYPES[index / 2 % 2],
        })
        .collect();
    on_every_machine(|driver| {
        cases.iter().flat_map(|case| check_halves(driver, case, &[])).collect()
    });
}

/// Vectors that begin and end in every place of a vector of four and of a block, that touch, that
/// are one element long, that span blocks, whose copies lie in another order; and a block without
/// any.
#[test]
fn vectors_have_their_copies_wherever_they_lie() {
    let elements = 4 * 2048 + 77;
    let all = [
        vec![vector(0..1, 0), vector(2..3, 64), vector(5..9, 8), vector(9..16, 128)],
        vec![vector(2047..2049, 64), vector(2049..2050, 0), vector(6144..elements, 128)],
        vec![vector(0..elements, 3)],
        vec![
            vector(2048..4096, 4),
            vector(8192..8192 + 64, 5000),
            vector(elements - 1..elements, 0),
        ],
        (0..elements / 20).map(|i| vector(20 * i + i % 5..20 * i + 7 + i % 9, 32 * i)).collect(),
    ];
    let case = |index: usize| Case {
        elements,
        decay: vec![100..3000, 4096..8000],
        decoupled: true,
        clip: 0.5,
        working: true,
        moments: DTYPES[index % 2],
    };
    on_every_machine(|driver| {
        let each = all.iter().enumerate();
        each.flat_map(|(index, vectors)| check_halves(driver, &case(index), vectors)).collect()
    });
}

#[test]
fn a_norm_that_is_not_finite_changes_neither_halves_nor_copies() {
    on_each_machine(|driver| {
        let case = Case {
            elements: 2048 + 7,
            decay: vec![0..100],
            decoupled: true,
            clip: 1.0,
            working: true,
            moments: Dtype::Bf16,
        };
        let mut inputs = inputs(case.elements, case.moments);
        inputs[1][2050] = f64::INFINITY;
        let halves = InHalves::new(driver, &case, &inputs, &[vector(64..300, 0)]);
        let before = (halves.parameters(driver), halves.copies(driver));
        halves.update(driver, &case.step(1.0));
        assert!((halves.parameters(driver), halves.copies(driver)) == before);
        halves.release(driver);
    });
}

#[test]
fn what_halves_cannot_be_updated_without_is_refused() {
    on_each_machine(|driver| {
        let part = FlatPart { master: Master::Split, ..f32_part(64) };
        for (vectors, why) in [
            (vec![vector(60..65, 0)], "end within the buffer"),
            (vec![vector(0..4, 0), vector(3..5, 64)], "the vector 3..5"),
        ] {
            let error = AdamW::new(driver, part, &[], &vectors).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let case = Case {
            elements: 64,
            decay: vec![],
            decoupled: true,
            clip: 0.0,
            working: true,
            moments: F32,
        };
        let halves = InHalves::new(driver, &case, &inputs(64, F32), &[]);
        let buffers = halves.buffers();
        for args in
            [AdamWBuffers { working: None, ..buffers }, AdamWBuffers { vectors: None, ..buffers }]
        {
            let error = halves.adamw.launch(driver, StreamId::MAIN, &args).unwrap_err();
            assert!(error.to_string().contains("give both buffers"), "{error}");
        }
        halves.release(driver);
    });
}
