//! Moments stored in bf16: the bits of a model of the kernel on the host, the mean and the spread
//! of what is drawn, and a second moment that follows where rounding to nearest would not.

use half::bf16;
use isobath::cuda::adamw::ROUNDING_STREAM;
use isobath::random::Philox;

use super::*;

const BF16: Dtype = Dtype::Bf16;
/// Of the normal distribution: what is drawn is the same every time, so this is no flaky bound.
const SIGMAS: f64 = 5.0;

#[derive(Clone, Copy)]
enum Moment {
    First,
    Second,
}

/// The 16 random bits of element `index` of the whole flat buffer.
fn drawn(seed: u64, update: u64, index: u64, moment: Moment) -> u32 {
    let block = Philox::new(seed, ROUNDING_STREAM ^ update).after_rounds(7, index / 4);
    let word = block[index as usize % 4];
    match moment {
        Moment::First => word & 0xffff,
        Moment::Second => word >> 16,
    }
}

/// A number above 0 and the one in bf16 that the kernel stores in its place.
fn stored(computed: f32, random: u32) -> bf16 {
    bf16::from_bits(((computed.to_bits() + random) >> 16) as u16)
}

/// Both moments are those of a kernel that stores f32, rounded as `stored` says: less than a step
/// of bf16 off. Returns what that kernel computes.
pub fn check_stored(
    driver: &mut dyn Driver,
    what: &str,
    case: &Case,
    inputs: &Flat,
    step: &AdamWStep,
    found: &Outputs,
) -> Outputs {
    let wide = Case { moments: F32, ..case.clone() };
    let device = OnDevice::new(driver, &wide, inputs);
    device.norm(driver);
    device.adamw.update(driver, StreamId::MAIN, step, &device.buffers()).unwrap();
    let computed = device.outputs(driver);
    device.release(driver);
    assert!(found[..2] == computed[..2], "{what}: stored moments change the norm or parameters");
    let mut moved = 0;
    for (i, moment) in [(2, Moment::First), (3, Moment::Second)] {
        for (at, (&found, &computed)) in found[i].iter().zip(&computed[i]).enumerate() {
            let random = drawn(step.seed, step.update, at as u64, moment);
            let expected = f64::from(stored(computed as f32, random));
            assert_eq!(found, expected, "{what}: {} {at} of {computed}", NAMES[i]);
            let allowed = computed.abs() * 2f64.powi(-7);
            assert!((found - computed).abs() < allowed, "{what}: {} {at}", NAMES[i]);
            moved += usize::from(found != computed);
        }
    }
    assert!(moved > 0, "{what}: nothing had to be rounded");
    computed
}

// ------------------------------------------------------------------ what is drawn

/// An optimizer whose first moment is the gradient itself, and whose second moment is beta2 times
/// the one before.
struct Rounding {
    device: OnDevice,
    elements: usize,
}

impl Rounding {
    fn new(driver: &mut dyn Driver, first: u64, gradients: Vec<f64>, moment2: Vec<f64>) -> Self {
        let elements = gradients.len();
        let case = Case {
            elements,
            decay: vec![],
            decoupled: true,
            clip: 0.0,
            working: false,
            moments: BF16,
        };
        let zeros = vec![0.0; elements];
        let inputs = [zeros.clone(), gradients, zeros, moment2];
        let mut device = OnDevice::new(driver, &case, &inputs);
        device.adamw = AdamW::new(driver, FlatPart { first, ..case.part() }, &[], &[]).unwrap();
        // No norm to clip by; that of all there is in bf16 is not finite.
        let (norm, to) = (1.0f32.to_le_bytes(), device.grad_norm.address);
        driver.to_device(StreamId::MAIN, &norm, to).unwrap();
        Rounding { device, elements }
    }

    fn step(seed: u64, update: u64, beta2: f64) -> AdamWStep<'static> {
        AdamWStep {
            lr: 0.0,
            beta1: 0.0,
            beta2,
            // No moment divided by it leaves f32: the parameters stay 0.
            eps: 1.0,
            weight_decay: 0.0,
            decoupled: true,
            correction1: 1.0,
            correction2: 1.0,
            clip: 0.0,
            decay: &[],
            seed,
            update,
        }
    }

    /// Both moments after an update.
    fn update(&self, driver: &mut dyn Driver, step: &AdamWStep) -> [Vec<bf16>; 2] {
        let adamw = &self.device.adamw;
        adamw.update(driver, StreamId::MAIN, step, &self.device.buffers()).unwrap();
        [2, 3].map(|i: usize| driver.download(self.device.flat[i].address, self.elements).unwrap())
    }
}

/// The chance that a value is rounded away from zero.
fn chance(value: f32) -> f64 {
    f64::from(value.to_bits() & 0xffff) / 65536.0
}

/// Of one value, drawn for every element.
#[track_caller]
fn assert_drawn_around(value: f32, found: &[bf16]) {
    let below = bf16::from_bits((value.to_bits() >> 16) as u16);
    let above = bf16::from_bits(below.to_bits() + 1);
    let ups = found.iter().filter(|&&it| it.to_bits() == above.to_bits()).count();
    let downs = found.iter().filter(|&&it| it.to_bits() == below.to_bits()).count();
    assert_eq!(ups + downs, found.len(), "{value:e} became something other than a neighbour");
    let (count, chance) = (found.len() as f64, chance(value));
    // Of what happens once or never, the distribution has a longer tail.
    let spread = SIGMAS * (count * chance * (1.0 - chance)).max(1.0).sqrt();
    let off = (ups as f64 - count * chance).abs();
    assert!(off <= spread, "{value:e}: {ups} of {count} up, with a chance of {chance}");
    // What that means for the mean: the value itself, with a variance of s^2 p (1 - p) / N.
    let step = f64::from(above.to_f32()) - f64::from(below.to_f32());
    let mean = found.iter().map(|&it| f64::from(it)).sum::<f64>() / count;
    let error = (mean - f64::from(value)).abs();
    assert!(error <= step.abs() * spread / count * 1.000_001, "{value:e}: a mean of {mean:e}");
}

#[test]
fn a_value_becomes_its_neighbours_as_often_as_it_is_near_them() {
    // Fractions of a step between two values, of every size and sign.
    let uppers = [0x3f80, 0x3fff, 0xbf80, 0x4049, 0x0001, 0x007f, 0x8003, 0x0000, 0x7e12, 0x2345];
    let fractions = [1u32, 0x1000, 0x4000, 0x8000, 0xabcd, 0xffff];
    let values: Vec<f32> = uppers
        .iter()
        .flat_map(|upper| fractions.map(|fraction| f32::from_bits(upper << 16 | fraction)))
        .collect();
    // Neighbours in memory have different values, as parameters have.
    let (count, rounds) = (128, 64);
    let gradients: Vec<f64> =
        (0..count).flat_map(|_| values.iter().map(|&it| f64::from(it))).collect();
    let moment2 = vec![0.0; gradients.len()];
    on_each_machine(|driver| {
        let rounding = Rounding::new(driver, 0, gradients.clone(), moment2.clone());
        let mut found: Vec<Vec<bf16>> = vec![vec![]; values.len()];
        for update in 1..=rounds {
            let [first, _] = rounding.update(driver, &Rounding::step(7, update, 1.0));
            first.iter().enumerate().for_each(|(i, &it)| found[i % values.len()].push(it));
        }
        for (&value, found) in values.iter().zip(&found) {
            assert_eq!(found.len() as u64, count * rounds);
            assert_drawn_around(value, found);
        }
        rounding.device.release(driver);
    });
}

#[test]
fn what_bf16_can_hold_never_moves() {
    // All but infinities and NaNs, which no finite gradient gives.
    let all = (0..0xff80u16).map(bf16::from_bits).filter(|it| it.is_finite());
    let all: Vec<f64> = all.map(f64::from).collect();
    let second: Vec<f64> = all.iter().map(|it| it.abs()).collect();
    let same = |found: &[bf16], values: &[f64]| {
        found.iter().zip(values).position(|(found, &value)| f64::from(*found) != value)
    };
    on_each_machine(|driver| {
        let rounding = Rounding::new(driver, 0, all.clone(), second.clone());
        for update in 1..=5 {
            let [first, _] = rounding.update(driver, &Rounding::step(7, update, 1.0));
            assert_eq!(same(&first, &all), None, "update {update}");
        }
        rounding.device.release(driver);

        let values: Vec<f64> = second.iter().copied().chain([f64::INFINITY; 3]).collect();
        let still = vec![0.0; values.len()];
        let rounding = Rounding::new(driver, 0, still, values.clone());
        for update in 1..=5 {
            let [_, second] = rounding.update(driver, &Rounding::step(7, update, 1.0));
            assert_eq!(same(&second, &values), None, "update {update}");
        }
        rounding.device.release(driver);
    });
}

/// Whether each element of one value was rounded up, and the chance of it.
struct Draws {
    up: Vec<bool>,
    chance: f64,
}

impl Draws {
    fn of(value: f32, found: &[bf16]) -> Self {
        let up = found.iter().map(|it| it.to_f32() > value).collect();
        Draws { up, chance: chance(value) }
    }
}

/// Element i of one agrees with element i + shift of the other as often as if they had nothing to
/// do with each other.
#[track_caller]
fn assert_independent(what: &str, one: &Draws, other: &Draws, shift: usize) {
    let pairs = one.up.iter().zip(&other.up[shift..]);
    let count = pairs.len() as f64;
    let agreed = pairs.filter(|(one, other)| one == other).count() as f64;
    let agree = one.chance * other.chance + (1.0 - one.chance) * (1.0 - other.chance);
    let spread = SIGMAS * (count * agree * (1.0 - agree)).sqrt();
    assert!((agreed - count * agree).abs() <= spread, "{what}: {agreed} of {count} agree");
}

#[test]
fn draws_of_moments_updates_elements_and_seeds_are_independent() {
    // The gradient lies in the middle between two values, its square at 0.75 of a step.
    let (gradient, count) = (1.5f32 + 2f32.powi(-8), 1 << 15);
    on_each_machine(|driver| {
        let gradients = vec![f64::from(gradient); count];
        let rounding = Rounding::new(driver, 0, gradients, vec![0.0; count]);
        let mut of = |seed, update| -> [Draws; 2] {
            let [first, second] = rounding.update(driver, &Rounding::step(seed, update, 0.0));
            [Draws::of(gradient, &first), Draws::of(gradient * gradient, &second)]
        };
        let [first, second] = of(7, 1);
        assert!(first.chance == 0.5 && (0.7..0.8).contains(&second.chance));
        assert_independent("both moments", &first, &second, 0);
        for shift in 1..=5 {
            assert_independent(&format!("{shift} elements on"), &first, &first, shift);
            assert_independent(&format!("{shift} elements on"), &first, &second, shift);
        }
        let others =
            [("the next update", 7, 2), ("another seed", 8, 1), ("a far seed", 7 << 40, 1)];
        for (what, seed, update) in others {
            let [other_first, other_second] = of(seed, update);
            assert_independent(what, &first, &other_first, 0);
            assert_independent(what, &second, &other_second, 0);
            assert_independent(what, &first, &other_second, 0);
        }
        rounding.device.release(driver);
    });
}

/// An element's draws depend on its place in the whole, not on what it is updated together with.
#[test]
fn parts_give_the_bits_of_the_whole() {
    let elements = 2 * 2048 + 77;
    let case =
        Case { elements, decay: vec![], decoupled: true, clip: 0.0, working: true, moments: BF16 };
    let flat = inputs(elements, BF16);
    on_each_machine(|driver| {
        let whole = OnDevice::new(driver, &case, &flat);
        whole.norm(driver);
        let step = case.step(1.0);
        whole.adamw.update(driver, StreamId::MAIN, &step, &whole.buffers()).unwrap();
        let expected = whole.outputs(driver);
        for cut in [4, 64, 2048, 3000] {
            let mut found: [Vec<f64>; 3] = Default::default();
            for range in [0..cut, cut..elements] {
                let case = Case { elements: range.len(), ..case.clone() };
                let part = flat.clone().map(|it| it[range.clone()].to_vec());
                let mut device = OnDevice::new(driver, &case, &part);
                let first = range.start as u64;
                device.adamw =
                    AdamW::new(driver, FlatPart { first, ..case.part() }, &[], &[]).unwrap();
                // The norm is that of the whole, but nothing is clipped.
                device.norm(driver);
                device.adamw.update(driver, StreamId::MAIN, &step, &device.buffers()).unwrap();
                let [_, outputs @ ..] = device.outputs(driver);
                found.iter_mut().zip(outputs).for_each(|(all, part)| all.extend(part));
                device.release(driver);
            }
            for (i, found) in found.iter().enumerate() {
                assert!(*found == expected[i + 1], "cut at {cut}: other {}", NAMES[i + 1]);
            }
        }
        whole.release(driver);
    });
}

// ------------------------------------------------------------------ what does not stall

const BETA2: f64 = 0.999;
const UPDATES: u64 = 700;

/// v of every update, from `start` on under gradients whose square is `square`, in exact numbers.
fn average(start: f64, square: f64) -> f64 {
    square + (start - square) * BETA2.powi(UPDATES as i32)
}

/// Whether the mean is the moving average: within its spread, of at most half a step of each of as
/// many elements in each of 1 / (1 - beta2^2) updates, and what f32 makes of beta2.
fn follows(mean: f64, expected: f64, elements: usize, largest: f64) -> bool {
    let step = largest * 2f64.powi(-7);
    let updates = 1.0 / (1.0 - BETA2 * BETA2);
    let spread = SIGMAS * step / 2.0 * (updates / elements as f64).sqrt();
    (mean - expected).abs() <= spread + largest * 1e-4
}

/// A moving average with beta2 = 0.999 moves by a thousandth, which is less than half a step of
/// bf16: rounded to nearest it stands still, and drawn it arrives where it should.
#[test]
fn the_second_moment_follows_where_rounding_to_nearest_stalls() {
    let elements = 4096;
    for (start, square) in [(1.0, 0.0), (1.0, 2.0), (1e-9, 1.5e-9)] {
        let (expected, largest) = (average(start, square), f64::max(start, square));
        let start = rounded(BF16, start);
        let nearest =
            (0..UPDATES).fold(start, |v, _| rounded(BF16, BETA2 * v + (1.0 - BETA2) * square));
        assert_eq!(nearest, start, "it would not stall");
        assert!(!follows(nearest, expected, elements, largest), "a stall would not be seen");
        on_each_machine(|driver| {
            let gradients = vec![f64::from(square.sqrt() as f32); elements];
            let rounding = Rounding::new(driver, 0, gradients, vec![start; elements]);
            let mut found = vec![];
            for update in 1..=UPDATES {
                let step = Rounding::step(7, update, BETA2);
                [_, found] = rounding.update(driver, &step);
            }
            let mean = found.iter().map(|&it| f64::from(it)).sum::<f64>() / elements as f64;
            println!("{start:e} to {square:e}: {mean:e}, expected {expected:e}");
            assert!(follows(mean, expected, elements, largest), "{mean:e} for {expected:e}");
            rounding.device.release(driver);
        });
    }
}
