//! What an instruction computes that reads registers and writes one: a function from bits to bits.
//!
//! A register holds 64 bits; a value of fewer lies in the lowest, with zeros above. Predicates are
//! 0 and 1. Source: PTX ISA 9.0, sections 9.7.1 to 9.7.9. Approximate instructions are rounded from
//! f64 here, so that they are a little better than a GPU's.

use std::cmp::Ordering;

#[derive(Clone, Copy)]
pub enum Arithmetic {
    One(fn(u64) -> u64),
    Two(fn(u64, u64) -> u64),
    Three(fn(u64, u64, u64) -> u64),
    Four(fn(u64, u64, u64, u64) -> u64),
}
use Arithmetic::{Four, One, Three, Two};

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn of_f(value: f32) -> u64 {
    u64::from(value.to_bits())
}

fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// `.ftz`: subnormal numbers are zeros of their sign.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

fn approximate(bits: u64, function: impl Fn(f64) -> f64) -> u64 {
    of_f(flush(function(f64::from(flush(f(bits)))) as f32))
}

/// The nearest bf16, of two the even one; every NaN is 0x7fff (PTX ISA, cvt).
pub fn bf16(value: f32) -> u64 {
    if value.is_nan() {
        return 0x7fff;
    }
    let bits = value.to_bits();
    u64::from((bits + 0x7fff + (bits >> 16 & 1)) >> 16)
}

/// The largest f32 that is not above a b + c, where that is exact in f64, as in the exponential
/// function, which alone asks for it.
fn multiply_add_down(a: f32, b: f32, c: f32) -> f32 {
    let exact = f64::from(a) * f64::from(b) + f64::from(c);
    let nearest = exact as f32;
    if f64::from(nearest) > exact { nearest.next_down() } else { nearest }
}

/// PTX ISA, prmt: each of four selectors names a byte of {b, a}, or its sign.
fn permute(a: u64, b: u64, selectors: u64) -> u64 {
    let bytes = a & 0xffff_ffff | b << 32;
    (0..4).fold(0, |all, place| {
        let selector = selectors >> (4 * place);
        let byte = bytes >> (8 * (selector & 7)) & 0xff;
        let byte = match selector & 8 {
            0 => byte,
            _ => 0xff * (byte >> 7),
        };
        all | byte << (8 * place)
    })
}

/// PTX ISA, bfi: the lowest `length` bits of `a` at `position` of `b`.
fn insert(a: u64, b: u64, position: u64, length: u64, width: u64) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    (0..length).filter(|bit| position + bit < width).fold(b, |all, bit| {
        let place = position + bit;
        all & !(1 << place) | (a >> bit & 1) << place
    })
}

/// The function of an opcode without its operands; `None`: it is no such instruction, or not known.
pub fn arithmetic(opcode: &str) -> Option<Arithmetic> {
    // One line for each pair of operation and type; `as` cuts and extends.
    macro_rules! integer {
        ($kind:ident, |$($name:ident),+| $result:expr) => {
            integer!(@ ($($name),+) $kind, $result)
        };
        (@ ($a:ident) $kind:ident, $result:expr) => {
            One(|a| { let $a = a as $kind; ($result) as u64 })
        };
        (@ ($a:ident, $b:ident) $kind:ident, $result:expr) => {
            Two(|a, b| { let ($a, $b) = (a as $kind, b as $kind); ($result) as u64 })
        };
        (@ ($a:ident, $b:ident, $c:ident) $kind:ident, $result:expr) => {
            Three(|a, b, c| {
                let ($a, $b, $c) = (a as $kind, b as $kind, c as $kind);
                ($result) as u64
            })
        };
    }
    macro_rules! float {
        (|$($name:ident),+| $result:expr) => { float!(@ ($($name),+) $result) };
        (@ ($a:ident) $result:expr) => { One(|a| { let $a = f(a); of_f($result) }) };
        (@ ($a:ident, $b:ident) $result:expr) => {
            Two(|a, b| { let ($a, $b) = (f(a), f(b)); of_f($result) })
        };
        (@ ($a:ident, $b:ident, $c:ident) $result:expr) => {
            Three(|a, b, c| { let ($a, $b, $c) = (f(a), f(b), f(c)); of_f($result) })
        };
    }
    macro_rules! double {
        (|$a:ident| $result:expr) => {
            One(|a| {
                let $a = d(a);
                ($result).to_bits()
            })
        };
        (|$a:ident, $b:ident| $result:expr) => {
            Two(|a, b| {
                let ($a, $b) = (d(a), d(b));
                ($result).to_bits()
            })
        };
        (|$a:ident, $b:ident, $c:ident| $result:expr) => {
            Three(|a, b, c| {
                let ($a, $b, $c) = (d(a), d(b), d(c));
                ($result).to_bits()
            })
        };
    }
    if let Some(compare) = opcode.strip_prefix("setp.") {
        return compared(compare);
    }
    if opcode.starts_with("selp.") {
        return Some(Three(|a, b, choose| if choose == 1 { a } else { b }));
    }
    Some(match opcode {
        "mov.b16" | "mov.u16" | "mov.s16" | "mov.b32" | "mov.u32" | "mov.s32" | "mov.f32"
        | "mov.b64" | "mov.u64" | "mov.s64" | "mov.f64" => One(|a| a),
        "mov.pred" => One(|a| u64::from(a != 0)),

        "add.s16" | "add.u16" => integer!(u16, |a, b| a.wrapping_add(b)),
        "add.s32" | "add.u32" => integer!(u32, |a, b| a.wrapping_add(b)),
        "add.s64" | "add.u64" => integer!(u64, |a, b| a.wrapping_add(b)),
        "sub.s16" | "sub.u16" => integer!(u16, |a, b| a.wrapping_sub(b)),
        "sub.s32" | "sub.u32" => integer!(u32, |a, b| a.wrapping_sub(b)),
        "sub.s64" | "sub.u64" => integer!(u64, |a, b| a.wrapping_sub(b)),
        "neg.s32" => integer!(u32, |a| a.wrapping_neg()),
        "neg.s64" => integer!(u64, |a| a.wrapping_neg()),
        "mul.lo.s16" | "mul.lo.u16" => integer!(u16, |a, b| a.wrapping_mul(b)),
        "mul.lo.s32" | "mul.lo.u32" => integer!(u32, |a, b| a.wrapping_mul(b)),
        "mul.lo.s64" | "mul.lo.u64" => integer!(u64, |a, b| a.wrapping_mul(b)),
        "mul.hi.s32" => integer!(i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as u32),
        "mul.hi.u32" => integer!(u32, |a, b| (u64::from(a) * u64::from(b)) >> 32),
        "mul.wide.s16" => integer!(i16, |a, b| (i32::from(a) * i32::from(b)) as u32),
        "mul.wide.u16" => integer!(u16, |a, b| u32::from(a) * u32::from(b)),
        "mul.wide.s32" => integer!(i32, |a, b| i64::from(a) * i64::from(b)),
        "mul.wide.u32" => integer!(u32, |a, b| u64::from(a) * u64::from(b)),
        "mad.lo.s32" | "mad.lo.u32" => {
            integer!(u32, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        "mad.lo.s64" | "mad.lo.u64" => {
            integer!(u64, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        "mad.wide.s32" => Three(|a, b, c| {
            (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64
        }),
        "mad.wide.u32" => Three(|a, b, c| (a as u32 as u64 * (b as u32 as u64)).wrapping_add(c)),
        // By zero, a GPU gives an unspecified value.
        "div.s32" => {
            integer!(i32, |a, b| if b == 0 { u32::MAX } else { a.wrapping_div(b) as u32 })
        }
        "div.u32" => integer!(u32, |a, b| a.checked_div(b).unwrap_or(u32::MAX)),
        "div.u64" => integer!(u64, |a, b| a.checked_div(b).unwrap_or(u64::MAX)),
        "div.s64" => {
            integer!(i64, |a, b| if b == 0 { u64::MAX } else { a.wrapping_div(b) as u64 })
        }
        "rem.s32" => integer!(i32, |a, b| if b == 0 { a as u32 } else { a.wrapping_rem(b) as u32 }),
        "rem.u32" => integer!(u32, |a, b| a.checked_rem(b).unwrap_or(a)),
        "rem.u64" => integer!(u64, |a, b| a.checked_rem(b).unwrap_or(a)),
        "min.s32" => integer!(i32, |a, b| a.min(b) as u32),
        "max.s32" => integer!(i32, |a, b| a.max(b) as u32),
        "min.u32" => integer!(u32, |a, b| a.min(b)),
        "max.u32" => integer!(u32, |a, b| a.max(b)),
        "min.s64" => integer!(i64, |a, b| a.min(b)),
        "max.s64" => integer!(i64, |a, b| a.max(b)),
        "min.u64" => integer!(u64, |a, b| a.min(b)),
        "max.u64" => integer!(u64, |a, b| a.max(b)),
        "abs.s32" => integer!(i32, |a| a.unsigned_abs()),

        "and.b16" | "and.b32" | "and.b64" | "and.pred" => Two(|a, b| a & b),
        "or.b16" | "or.b32" | "or.b64" | "or.pred" => Two(|a, b| a | b),
        "xor.b16" | "xor.b32" | "xor.b64" | "xor.pred" => Two(|a, b| a ^ b),
        "not.b16" => integer!(u16, |a| !a),
        "not.b32" => integer!(u32, |a| !a),
        "not.b64" => integer!(u64, |a| !a),
        "not.pred" => One(|a| a ^ 1),
        // Shifts by more than the width count as shifts by the width.
        "shl.b16" => Two(|a, by| u64::from((a as u16).checked_shl(by as u32).unwrap_or(0))),
        "shl.b32" => Two(|a, by| u64::from((a as u32).checked_shl(by as u32).unwrap_or(0))),
        "shl.b64" => Two(|a, by| a.checked_shl(by as u32).unwrap_or(0)),
        "shr.u16" | "shr.b16" => {
            Two(|a, by| u64::from((a as u16).checked_shr(by as u32).unwrap_or(0)))
        }
        "shr.u32" | "shr.b32" => {
            Two(|a, by| u64::from((a as u32).checked_shr(by as u32).unwrap_or(0)))
        }
        "shr.u64" | "shr.b64" => Two(|a, by| a.checked_shr(by as u32).unwrap_or(0)),
        "shr.s32" => Two(|a, by| (a as i32 >> (by as u32).min(31)) as u32 as u64),
        "shr.s64" => Two(|a, by| (a as i64 >> (by as u32).min(63)) as u64),
        "shf.l.wrap.b32" => Three(|low, high, by| (low | high << 32) << (by & 31) >> 32),
        "shf.r.wrap.b32" => Three(|low, high, by| ((low | high << 32) >> (by & 31)) as u32 as u64),
        "popc.b32" => integer!(u32, |a| a.count_ones()),
        "clz.b32" => integer!(u32, |a| a.leading_zeros()),
        "brev.b32" => integer!(u32, |a| a.reverse_bits()),
        // How far the highest bit must be shifted to the left end.
        "bfind.shiftamt.u32" => {
            integer!(u32, |a| if a == 0 { u32::MAX } else { a.leading_zeros() })
        }
        "bfi.b32" => Four(|a, b, position, length| insert(a, b, position, length, 32)),
        "bfi.b64" => Four(|a, b, position, length| insert(a, b, position, length, 64)),
        "prmt.b32" => Three(permute),

        "add.f32" | "add.rn.f32" => float!(|a, b| a + b),
        "sub.f32" | "sub.rn.f32" => float!(|a, b| a - b),
        "mul.f32" | "mul.rn.f32" => float!(|a, b| a * b),
        "fma.rn.f32" => float!(|a, b, c| a.mul_add(b, c)),
        "fma.rm.f32" => float!(|a, b, c| multiply_add_down(a, b, c)),
        "div.rn.f32" => float!(|a, b| a / b),
        "sqrt.rn.f32" => float!(|a| a.sqrt()),
        "rcp.rn.f32" => float!(|a| 1.0 / a),
        "neg.f32" => One(|a| a ^ 0x8000_0000),
        "abs.f32" => One(|a| a & 0x7fff_ffff),
        // Of a number and a NaN, the number.
        "min.f32" => float!(|a, b| a.min(b)),
        "max.f32" => float!(|a, b| a.max(b)),
        "add.f64" | "add.rn.f64" => double!(|a, b| a + b),
        "sub.f64" | "sub.rn.f64" => double!(|a, b| a - b),
        "mul.f64" | "mul.rn.f64" => double!(|a, b| a * b),
        "fma.rn.f64" => double!(|a, b, c| a.mul_add(b, c)),
        "div.rn.f64" => double!(|a, b| a / b),
        "sqrt.rn.f64" => double!(|a| a.sqrt()),
        "neg.f64" => double!(|a| -a),
        "ex2.approx.ftz.f32" => One(|a| approximate(a, f64::exp2)),
        "lg2.approx.ftz.f32" => One(|a| approximate(a, f64::log2)),
        "rcp.approx.ftz.f32" => One(|a| approximate(a, f64::recip)),
        "rsqrt.approx.ftz.f32" => One(|a| approximate(a, |a| a.sqrt().recip())),
        "tanh.approx.f32" => One(|a| of_f(f64::from(f(a)).tanh() as f32)),

        "cvt.u16.u32" => One(|a| u64::from(a as u16)),
        "cvt.u32.u16" => One(|a| a),
        "cvt.u32.u64" | "cvt.s32.s64" => One(|a| u64::from(a as u32)),
        "cvt.u64.u32" => One(|a| a),
        "cvt.s64.s32" => One(|a| i64::from(a as i32) as u64),
        "cvt.s32.s16" => One(|a| i32::from(a as i16) as u32 as u64),
        "cvt.rn.f32.s32" => One(|a| of_f(a as i32 as f32)),
        "cvt.rn.f32.u32" => One(|a| of_f(a as u32 as f32)),
        "cvt.f64.f32" => One(|a| f64::from(f(a)).to_bits()),
        "cvt.rn.f32.f64" => One(|a| of_f(d(a) as f32)),
        "cvt.rn.bf16.f32" => One(|a| bf16(f(a))),
        // The first source is the upper half.
        "cvt.rn.bf16x2.f32" => Two(|high, low| bf16(f(high)) << 16 | bf16(f(low))),
        // To 0 .. 1; a NaN is 0.
        "cvt.sat.f32.f32" => float!(|a| if a > 0.0 { a.min(1.0) } else { 0.0 }),
        _ => return None,
    })
}

/// `lt.s32`, `leu.f32`
fn compared(opcode: &str) -> Option<Arithmetic> {
    macro_rules! by_type {
        (|$a:ident, $b:ident| $result:expr) => {
            match opcode.split_once('.')?.1 {
                "s16" => Two(|a, b| {
                    let ($a, $b) = (a as i16, b as i16);
                    u64::from($result)
                }),
                "s32" => Two(|a, b| {
                    let ($a, $b) = (a as i32, b as i32);
                    u64::from($result)
                }),
                "s64" => Two(|a, b| {
                    let ($a, $b) = (a as i64, b as i64);
                    u64::from($result)
                }),
                "u16" | "b16" => Two(|a, b| {
                    let ($a, $b) = (a as u16, b as u16);
                    u64::from($result)
                }),
                "u32" | "b32" => Two(|a, b| {
                    let ($a, $b) = (a as u32, b as u32);
                    u64::from($result)
                }),
                "u64" | "b64" => Two(|$a, $b| u64::from($result)),
                "f32" => Two(|a, b| {
                    let ($a, $b) = (f(a), f(b));
                    u64::from($result)
                }),
                "f64" => Two(|a, b| {
                    let ($a, $b) = (d(a), d(b));
                    u64::from($result)
                }),
                _ => return None,
            }
        };
    }
    // With a NaN, the comparisons of floats that end with `u` are true, and the others false.
    macro_rules! unordered {
        (|$order:ident| $result:expr) => {
            match opcode.split_once('.')?.1 {
                "f32" => Two(|a, b| {
                    let $order = f(a).partial_cmp(&f(b));
                    u64::from($result)
                }),
                _ => return None,
            }
        };
    }
    Some(match opcode.split_once('.')?.0 {
        "eq" => by_type!(|a, b| a == b),
        "ne" if opcode.contains(".f") => unordered!(|it| it.is_some_and(Ordering::is_ne)),
        "ne" => by_type!(|a, b| a != b),
        "lt" => by_type!(|a, b| a < b),
        "le" => by_type!(|a, b| a <= b),
        "gt" => by_type!(|a, b| a > b),
        "ge" => by_type!(|a, b| a >= b),
        "equ" => unordered!(|it| it.is_none_or(Ordering::is_eq)),
        "neu" => unordered!(|it| it.is_none_or(Ordering::is_ne)),
        "ltu" => unordered!(|it| it.is_none_or(Ordering::is_lt)),
        "leu" => unordered!(|it| it.is_none_or(Ordering::is_le)),
        "gtu" => unordered!(|it| it.is_none_or(Ordering::is_gt)),
        "geu" => unordered!(|it| it.is_none_or(Ordering::is_ge)),
        _ => return None,
    })
}
