//! Statements as the machine runs them: what an opcode is, with its operands in their places.
//!
//! An opcode that is not known here, or an operand of another kind than it takes, is an error:
//! nothing is left out in silence.

use std::collections::BTreeMap;

use super::arithmetic::{Arithmetic, arithmetic};
use super::memory::{PARAMETER_WINDOW, RESERVED_SHARED_BYTES, SHARED_WINDOW, to_shared};
use super::text::{self, Guard, Operand, Statement, Variable};

pub struct Kernel {
    pub name: String,
    pub max_threads: u32,
    /// Of a thread.
    pub registers: usize,
    /// Where each parameter begins among the launch's bytes, and its size.
    pub parameters: Vec<(u32, u32)>,
    pub parameter_bytes: u32,
    /// Static shared memory ends here; the launch's own begins at the next multiple of 1024.
    pub static_shared_end: u32,
    pub instructions: Vec<Instruction>,
}

impl Kernel {
    pub fn static_shared_bytes(&self) -> u32 {
        self.static_shared_end - RESERVED_SHARED_BYTES
    }
}

pub struct Instruction {
    pub guard: Option<Guard>,
    pub op: Op,
    /// Its registers; those of the first operand, which an instruction with a result writes, come
    /// first.
    pub registers: Vec<u32>,
    pub first_operand: usize,
    /// For messages.
    pub text: String,
    pub place: String,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value {
    Register(u32),
    Constant(u64),
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Address {
    pub base: Value,
    pub offset: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// Which one, the address says.
    Generic,
    Global,
    /// Of the block itself.
    Shared,
    /// Of any block of the cluster.
    SharedOfCluster,
    Parameter,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    RankInCluster,
    BlocksOfCluster,
    Lane,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shuffle {
    Butterfly,
    Up,
    Down,
    Index,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vote {
    Any,
    All,
    Ballot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Atomic {
    AddU32,
    AddF32,
    MaxU32,
    Exchange,
    CompareAndSwap,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reduce {
    F32,
    /// Rounded after each addition.
    Bf16,
}

#[derive(Clone, PartialEq, Debug)]
pub enum MatrixA {
    Registers([Value; 4]),
    Descriptor(Value),
}

pub enum Op {
    Compute {
        to: u32,
        function: Arithmetic,
        from: [Value; 4],
    },
    Special {
        to: u32,
        which: Special,
    },
    /// Several narrow values in one register, the lowest first, and back.
    Pack {
        to: u32,
        parts: Vec<Value>,
        bits: u32,
    },
    Unpack {
        to: Vec<Option<u32>>,
        from: Value,
        bits: u32,
    },
    /// Sign-extended to `signed` bits, else with zeros above. `acquire`: perhaps in a loop until a
    /// value is there.
    Load {
        space: Space,
        bytes: u32,
        signed: Option<u32>,
        to: Vec<u32>,
        at: Address,
        acquire: bool,
    },
    Store {
        space: Space,
        bytes: u32,
        at: Address,
        values: Vec<Value>,
    },
    Atomic {
        space: Space,
        which: Atomic,
        to: Option<u32>,
        at: Address,
        values: [Value; 2],
    },
    /// Adds in global memory, subnormal numbers as zeros; no result.
    ReduceAdd {
        at: Address,
        values: Vec<Value>,
    },
    Mapa {
        to: u32,
        from: Value,
        rank: Value,
    },
    Branch {
        target: usize,
    },
    Return,
    Trap,
    Nothing,
    /// Others may run first.
    Sleep,

    Shuffle {
        which: Shuffle,
        to: u32,
        valid: Option<u32>,
        value: Value,
        by: Value,
        bounds: Value,
        mask: Value,
    },
    Vote {
        which: Vote,
        to: u32,
        predicate: Value,
        mask: Value,
    },
    Elect {
        leader: u32,
        mask: Value,
    },
    WarpBarrier {
        mask: Value,
    },
    LoadMatrix {
        count: usize,
        transposed: bool,
        to: Vec<u32>,
        at: Address,
    },
    StoreMatrix {
        count: usize,
        transposed: bool,
        at: Address,
        values: Vec<Value>,
    },
    Mma {
        to: Vec<u32>,
        a: Vec<Value>,
        b: Vec<Value>,
        c: Vec<Value>,
    },

    Barrier {
        id: Value,
        threads: Option<Value>,
        waits: bool,
    },
    ClusterArrive,
    ClusterWait,

    MbarrierInit {
        at: Address,
        count: Value,
    },
    MbarrierInvalidate {
        at: Address,
    },
    /// With bytes to expect first.
    MbarrierArrive {
        space: Space,
        at: Address,
        expected: Option<Value>,
    },
    MbarrierExpect {
        at: Address,
        bytes: Value,
    },
    MbarrierTryWait {
        to: u32,
        at: Address,
        parity: Value,
    },

    CopyAsync {
        to: Address,
        from: Address,
        bytes: u32,
        of_source: Option<Value>,
    },
    CopyCommit,
    CopyWait {
        groups: usize,
    },
    BulkLoad {
        to: Address,
        from: Address,
        bytes: Value,
        barrier: Address,
        blocks: Option<Value>,
    },
    BulkToBlock {
        to: Address,
        from: Address,
        bytes: Value,
        barrier: Address,
    },
    BulkStore {
        to: Address,
        from: Address,
        bytes: Value,
        reduce: Option<Reduce>,
    },
    TensorLoad {
        to: Address,
        map: Value,
        coordinates: Vec<Value>,
        barrier: Address,
        blocks: Option<Value>,
    },
    TensorStore {
        map: Value,
        coordinates: Vec<Value>,
        from: Address,
        add: bool,
    },
    BulkCommit,
    BulkWait {
        groups: usize,
        read: bool,
    },

    Wgmma {
        d: Vec<u32>,
        n: usize,
        a: MatrixA,
        b: Value,
        add: Value,
        transposed: [bool; 2],
    },
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        groups: usize,
    },
    /// setmaxnreg: all warps of a warpgroup.
    SetMaxRegisters,
}

/// Errors name the kernel and the statement.
pub fn kernels(text: &str) -> Result<Vec<Kernel>, String> {
    text::kernels(text)?.into_iter().map(kernel).collect()
}

fn kernel(kernel: text::Kernel) -> Result<Kernel, String> {
    let mut symbols = BTreeMap::new();
    let mut parameters = vec![];
    let mut parameter_bytes = 0u32;
    for Variable { name, bytes, alignment } in &kernel.parameters {
        let at = parameter_bytes.next_multiple_of(*alignment);
        symbols.insert(name.as_str(), at);
        parameters.push((at, *bytes));
        parameter_bytes = at + bytes;
    }
    let mut end = RESERVED_SHARED_BYTES;
    for Variable { name, bytes, alignment } in kernel.shared.iter().filter(|it| it.bytes > 0) {
        let at = end.next_multiple_of(*alignment);
        symbols.insert(name.as_str(), at);
        end = at + bytes;
    }
    for Variable { name, alignment, .. } in kernel.shared.iter().filter(|it| it.bytes == 0) {
        let at = end.next_multiple_of(*alignment).next_multiple_of(1024);
        symbols.insert(name.as_str(), at);
    }
    let instructions = kernel.statements.iter().map(|statement| {
        let decoded = Decoder { statement, symbols: &symbols, registers: &kernel.registers }.op();
        let text = format!("{} {:?}", statement.opcode, statement.operands);
        let mut registers = vec![];
        let mut operands = statement.operands.iter();
        operands.by_ref().take(1).for_each(|it| it.registers(&mut registers));
        let first_operand = registers.len();
        operands.for_each(|it| it.registers(&mut registers));
        match decoded {
            Ok(op) => Ok(Instruction {
                guard: statement.guard,
                op,
                registers,
                first_operand,
                text: statement.opcode.clone(),
                place: statement.place.clone(),
            }),
            Err(why) => Err(format!("kernel {}, {}: {text}: {why}", kernel.name, statement.place)),
        }
    });
    Ok(Kernel {
        instructions: instructions.collect::<Result<_, String>>()?,
        name: kernel.name.clone(),
        max_threads: kernel.max_threads,
        registers: kernel.registers.len(),
        parameters,
        parameter_bytes,
        static_shared_end: end,
    })
}

struct Decoder<'a> {
    statement: &'a Statement,
    /// Places in shared memory, and among the parameters.
    symbols: &'a BTreeMap<&'a str, u32>,
    /// Bits.
    registers: &'a [u32],
}

type Decoded<T> = Result<T, String>;

impl Decoder<'_> {
    fn op(&self) -> Decoded<Op> {
        let opcode = self.statement.opcode.as_str();
        let parts: Vec<&str> = opcode.split('.').collect();
        let has = |part: &str| parts.contains(&part);
        let count = self.statement.operands.len();
        if let Some(op) = self.move_of_parts(&parts)? {
            return Ok(op);
        }
        if let Some(function) = arithmetic(opcode) {
            return self.compute(function);
        }
        match (parts[0], parts.get(1).copied().unwrap_or_default()) {
            ("cvta", _) => {
                // A generic address of global memory is its address; others carry their window.
                let window = match (has("to"), has("global"), has("shared"), has("param")) {
                    (true, true, ..) | (false, true, ..) => {
                        return self.compute(Arithmetic::One(|a| a));
                    }
                    (true, _, true, _) => {
                        return self.compute(Arithmetic::One(to_shared));
                    }
                    (false, _, true, _) => Arithmetic::One(|a| a | SHARED_WINDOW),
                    (false, _, _, true) => Arithmetic::One(|a| a | PARAMETER_WINDOW),
                    _ => return Err("unknown".to_string()),
                };
                self.compute(window)
            }
            ("ld", _) => {
                let at = self.address(1)?;
                let (bytes, signed) = width(parts[parts.len() - 1])?;
                let to = self.registers(0)?;
                let signed = signed.then(|| self.registers[to[0] as usize]);
                let (space, acquire) = (self.space(&parts)?, has("acquire"));
                Ok(Op::Load { space, bytes, signed, to, at, acquire })
            }
            ("st", _) => {
                let at = self.address(0)?;
                let (bytes, _) = width(parts[parts.len() - 1])?;
                let values = self.values(1)?;
                Ok(Op::Store { space: self.space(&parts)?, bytes, at, values })
            }
            ("red", _) if opcode == "red.relaxed.gpu.global.add.v2.f32" => {
                Ok(Op::ReduceAdd { at: self.address(0)?, values: self.values(1)? })
            }
            ("atom", _) => {
                let which = match (has("add"), has("max"), has("exch"), has("cas")) {
                    (true, ..) if has("u32") => Atomic::AddU32,
                    (true, ..) if has("f32") => Atomic::AddF32,
                    (_, true, ..) if has("u32") => Atomic::MaxU32,
                    (_, _, true, _) if has("b32") => Atomic::Exchange,
                    (_, _, _, true) if has("b32") => Atomic::CompareAndSwap,
                    _ => return Err("unknown".to_string()),
                };
                let at = self.address(1)?;
                let first = self.value(2)?;
                let second = if count > 3 { self.value(3)? } else { Value::Constant(0) };
                let space = self.space(&parts)?;
                let to = self.register_or_nothing(0)?;
                Ok(Op::Atomic { space, which, to, at, values: [first, second] })
            }
            ("mapa", _) => {
                Ok(Op::Mapa { to: self.register(0)?, from: self.value(1)?, rank: self.value(2)? })
            }
            ("bra", _) => match self.statement.operands.as_slice() {
                [Operand::Target(target)] => Ok(Op::Branch { target: *target }),
                _ => Err("no label".to_string()),
            },
            ("ret", _) | ("exit", _) => Ok(Op::Return),
            ("trap", _) => Ok(Op::Trap),
            ("nanosleep", _) => Ok(Op::Sleep),
            // The whole memory is in one order here.
            ("membar", _) | ("fence", _) | ("prefetch", _) | ("griddepcontrol", _) => {
                Ok(Op::Nothing)
            }
            ("setmaxnreg", _) => Ok(Op::SetMaxRegisters),

            ("shfl", "sync") => {
                let which = match parts[2] {
                    "bfly" => Shuffle::Butterfly,
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "idx" => Shuffle::Index,
                    _ => return Err("unknown".to_string()),
                };
                let (to, valid) = match self.operand(0)? {
                    Operand::Pair(to, valid) => {
                        (self.register_of(to)?, Some(self.register_of(valid)?))
                    }
                    to => (self.register_of(to)?, None),
                };
                let [value, by, bounds, mask] =
                    [self.value(1)?, self.value(2)?, self.value(3)?, self.value(4)?];
                Ok(Op::Shuffle { which, to, valid, value, by, bounds, mask })
            }
            ("vote", "sync") => {
                let which = match (parts[2], parts[3]) {
                    ("any", "pred") => Vote::Any,
                    ("all", "pred") => Vote::All,
                    ("ballot", "b32") => Vote::Ballot,
                    _ => return Err("unknown".to_string()),
                };
                let (to, predicate, mask) = (self.register(0)?, self.value(1)?, self.value(2)?);
                Ok(Op::Vote { which, to, predicate, mask })
            }
            ("elect", "sync") => match self.operand(0)? {
                Operand::Pair(lane, leader) if **lane == Operand::Nothing => {
                    Ok(Op::Elect { leader: self.register_of(leader)?, mask: self.value(1)? })
                }
                _ => Err("only whether a thread is elected is known here".to_string()),
            },
            ("bar", "warp") => Ok(Op::WarpBarrier { mask: self.value(0)? }),
            ("ldmatrix", _) => Ok(Op::LoadMatrix {
                count: self.registers(0)?.len(),
                transposed: has("trans"),
                to: self.registers(0)?,
                at: self.address(1)?,
            }),
            ("stmatrix", _) => Ok(Op::StoreMatrix {
                count: self.values(1)?.len(),
                transposed: has("trans"),
                at: self.address(0)?,
                values: self.values(1)?,
            }),
            ("mma", _) if opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => {
                Ok(Op::Mma {
                    to: self.registers(0)?,
                    a: self.values(1)?,
                    b: self.values(2)?,
                    c: self.values(3)?,
                })
            }

            ("bar" | "barrier", "sync" | "arrive") => {
                let threads = if count > 1 { Some(self.value(1)?) } else { None };
                Ok(Op::Barrier { id: self.value(0)?, threads, waits: parts[1] == "sync" })
            }
            ("barrier", "cluster") if has("arrive") => Ok(Op::ClusterArrive),
            ("barrier", "cluster") if has("wait") => Ok(Op::ClusterWait),

            ("mbarrier", "init") => {
                Ok(Op::MbarrierInit { at: self.address(0)?, count: self.value(1)? })
            }
            ("mbarrier", "inval") => Ok(Op::MbarrierInvalidate { at: self.address(0)? }),
            ("mbarrier", "arrive") => {
                let expected = if has("expect_tx") { Some(self.value(2)?) } else { None };
                let operands = if expected.is_some() { 3 } else { 2 };
                if *self.operand(0)? != Operand::Nothing || count != operands || has("noComplete") {
                    return Err("one arrival, whose state is not kept, is known here".to_string());
                }
                Ok(Op::MbarrierArrive {
                    space: self.space(&parts)?,
                    at: self.address(1)?,
                    expected,
                })
            }
            ("mbarrier", "expect_tx") => {
                Ok(Op::MbarrierExpect { at: self.address(0)?, bytes: self.value(1)? })
            }
            ("mbarrier", "try_wait") if has("parity") => Ok(Op::MbarrierTryWait {
                to: self.register(0)?,
                at: self.address(1)?,
                parity: self.value(2)?,
            }),

            ("cp", "async") if !has("bulk") => match parts[2] {
                "commit_group" => Ok(Op::CopyCommit),
                "wait_group" => Ok(Op::CopyWait { groups: self.constant(0)? as usize }),
                "ca" | "cg" => Ok(Op::CopyAsync {
                    to: self.address(0)?,
                    from: self.address(1)?,
                    bytes: self.constant(2)? as u32,
                    of_source: if count > 3 { Some(self.value(3)?) } else { None },
                }),
                _ => Err("unknown".to_string()),
            },
            ("cp", _) if has("commit_group") => Ok(Op::BulkCommit),
            ("cp", _) if has("wait_group") => {
                Ok(Op::BulkWait { groups: self.constant(0)? as usize, read: has("read") })
            }
            ("cp", _) if has("tensor") => self.tensor_copy(&parts),
            ("cp", _) => self.bulk_copy(opcode, &parts),

            ("wgmma", "mma_async") => self.wgmma(&parts),
            ("wgmma", "fence") => Ok(Op::WgmmaFence),
            ("wgmma", "commit_group") => Ok(Op::WgmmaCommit),
            ("wgmma", "wait_group") => Ok(Op::WgmmaWait { groups: self.constant(0)? as usize }),
            _ => Err("this machine does not know the opcode".to_string()),
        }
    }

    /// `mov` of a special register, a variable, or of several values.
    fn move_of_parts(&self, parts: &[&str]) -> Decoded<Option<Op>> {
        if parts[0] != "mov" {
            return Ok(None);
        }
        let bits = width(parts[1]).map_or(0, |(bytes, _)| 8 * bytes);
        Ok(match (self.operand(0)?, self.operand(1)?) {
            (Operand::Vector(to), from) => {
                let to = to.iter().map(|it| match it {
                    Operand::Nothing => Ok(None),
                    register => self.register_of(register).map(Some),
                });
                let to: Vec<Option<u32>> = to.collect::<Decoded<_>>()?;
                let bits = bits / to.len() as u32;
                Some(Op::Unpack { to, from: self.value_of(from)?, bits })
            }
            (to, Operand::Vector(parts)) => {
                let parts =
                    parts.iter().map(|it| self.value_of(it)).collect::<Decoded<Vec<_>>>()?;
                let bits = bits / parts.len() as u32;
                Some(Op::Pack { to: self.register_of(to)?, parts, bits })
            }
            (to, Operand::Special(name)) => {
                Some(Op::Special { to: self.register_of(to)?, which: special(name)? })
            }
            _ => None,
        })
    }

    fn compute(&self, function: Arithmetic) -> Decoded<Op> {
        let mut from = [Value::Constant(0); 4];
        let count = match function {
            Arithmetic::One(_) => 1,
            Arithmetic::Two(_) => 2,
            Arithmetic::Three(_) => 3,
            Arithmetic::Four(_) => 4,
        };
        if self.statement.operands.len() != count + 1 {
            return Err(format!("takes {count} operands"));
        }
        for (index, value) in from.iter_mut().take(count).enumerate() {
            *value = self.value(index + 1)?;
        }
        Ok(Op::Compute { to: self.register(0)?, function, from })
    }

    fn tensor_copy(&self, parts: &[&str]) -> Decoded<Op> {
        let tensor = |index: usize| -> Decoded<(Value, Vec<Value>)> {
            let Operand::Tensor(map, coordinates) = self.operand(index)? else {
                return Err("no tensor".to_string());
            };
            let values = coordinates.iter().map(|it| self.value_of(it)).collect::<Decoded<_>>()?;
            Ok((self.value_of(map)?, values))
        };
        if !parts.contains(&"tile") {
            return Err("only tiles".to_string());
        }
        if parts.contains(&"bulk_group") {
            let (map, coordinates) = tensor(0)?;
            let add = parts[1] == "reduce";
            if add && !parts.contains(&"add") {
                return Err("only add".to_string());
            }
            return Ok(Op::TensorStore { map, coordinates, from: self.address(1)?, add });
        }
        let (map, coordinates) = tensor(1)?;
        let blocks = match parts.contains(&"multicast::cluster") {
            true => Some(self.value(3)?),
            false => None,
        };
        let (to, barrier) = (self.address(0)?, self.address(2)?);
        Ok(Op::TensorLoad { to, map, coordinates, barrier, blocks })
    }

    fn bulk_copy(&self, opcode: &str, parts: &[&str]) -> Decoded<Op> {
        let (to, from, bytes) = (self.address(0)?, self.address(1)?, self.value(2)?);
        let reduce = match opcode {
            "cp.async.bulk.global.shared::cta.bulk_group" => None,
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32" => Some(Reduce::F32),
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16" => {
                Some(Reduce::Bf16)
            }
            _ if opcode.starts_with("cp.async.bulk.shared::cluster.") => {
                let barrier = self.address(3)?;
                if parts[4] == "shared::cta" {
                    return Ok(Op::BulkToBlock { to, from, bytes, barrier });
                }
                let blocks = match parts.contains(&"multicast::cluster") {
                    true => Some(self.value(4)?),
                    false => None,
                };
                return Ok(Op::BulkLoad { to, from, bytes, barrier, blocks });
            }
            _ => return Err("unknown".to_string()),
        };
        Ok(Op::BulkStore { to, from, bytes, reduce })
    }

    /// d, a, b, whether to add, scales of a and b, transpositions (of A only from shared memory).
    fn wgmma(&self, parts: &[&str]) -> Decoded<Op> {
        if parts[2..4] != ["sync", "aligned"] || parts[5..] != ["f32", "bf16", "bf16"] {
            return Err("unknown".to_string());
        }
        let n = parts[4].strip_prefix("m64n").and_then(|it| it.strip_suffix("k16"));
        let n = n.and_then(|n| n.parse().ok()).ok_or("no shape")?;
        let d = self.registers(0)?;
        if d.len() != n / 2 {
            return Err(format!("{} accumulators", d.len()));
        }
        let (a, in_registers) = match self.operand(1)? {
            Operand::Vector(_) => {
                let a = self.values(1)?.try_into().map_err(|_| "A has four registers")?;
                (MatrixA::Registers(a), true)
            }
            _ => (MatrixA::Descriptor(self.value(1)?), false),
        };
        if (self.constant(4)?, self.constant(5)?) != (1, 1) {
            return Err("only scales of 1".to_string());
        }
        let transposed = match in_registers {
            true => [false, self.constant(6)? == 1],
            false => [self.constant(6)? == 1, self.constant(7)? == 1],
        };
        Ok(Op::Wgmma { d, n, a, b: self.value(2)?, add: self.value(3)?, transposed })
    }

    fn space(&self, parts: &[&str]) -> Decoded<Space> {
        let named = parts.iter().find_map(|part| match *part {
            "global" => Some(Space::Global),
            "shared" | "shared::cta" => Some(Space::Shared),
            "shared::cluster" => Some(Space::SharedOfCluster),
            "param" => Some(Space::Parameter),
            _ => None,
        });
        if parts.contains(&"const") || parts.contains(&"local") {
            return Err("no such memory here".to_string());
        }
        Ok(named.unwrap_or(Space::Generic))
    }

    fn operand(&self, index: usize) -> Decoded<&Operand> {
        self.statement.operands.get(index).ok_or_else(|| format!("no operand {index}"))
    }

    fn register(&self, index: usize) -> Decoded<u32> {
        self.register_of(self.operand(index)?)
    }

    fn register_or_nothing(&self, index: usize) -> Decoded<Option<u32>> {
        match self.operand(index)? {
            Operand::Nothing => Ok(None),
            register => self.register_of(register).map(Some),
        }
    }

    fn register_of(&self, operand: &Operand) -> Decoded<u32> {
        match operand {
            Operand::Register(register) => Ok(*register),
            other => Err(format!("{other:?} is no register")),
        }
    }

    fn registers(&self, index: usize) -> Decoded<Vec<u32>> {
        match self.operand(index)? {
            Operand::Vector(registers) => registers.iter().map(|it| self.register_of(it)).collect(),
            register => Ok(vec![self.register_of(register)?]),
        }
    }

    fn value(&self, index: usize) -> Decoded<Value> {
        self.value_of(self.operand(index)?)
    }

    fn values(&self, index: usize) -> Decoded<Vec<Value>> {
        match self.operand(index)? {
            Operand::Vector(values) => values.iter().map(|it| self.value_of(it)).collect(),
            value => Ok(vec![self.value_of(value)?]),
        }
    }

    /// A constant has the width that the opcode ends with, zeros above.
    fn value_of(&self, operand: &Operand) -> Decoded<Value> {
        let kind = self.statement.opcode.rsplit('.').next().unwrap_or_default();
        let keep = match kind {
            "b16" | "u16" | "s16" => 0xffff,
            "b32" | "u32" | "s32" | "f32" if !self.statement.opcode.contains(".wide.") => {
                0xffff_ffff
            }
            _ => u64::MAX,
        };
        Ok(match operand {
            Operand::Register(register) => Value::Register(*register),
            Operand::Integer(value) => Value::Constant(*value as u64 & keep),
            Operand::Float(value) => Value::Constant(u64::from(value.to_bits())),
            Operand::Double(value) => Value::Constant(value.to_bits()),
            Operand::Variable(name) => {
                let at = self.symbols.get(name.as_str());
                Value::Constant(u64::from(*at.ok_or_else(|| format!("no `{name}`"))?))
            }
            other => return Err(format!("{other:?} is no value")),
        })
    }

    fn address(&self, index: usize) -> Decoded<Address> {
        match self.operand(index)? {
            Operand::Address(base, offset) => {
                Ok(Address { base: self.value_of(base)?, offset: *offset })
            }
            other => Err(format!("{other:?} is no address")),
        }
    }

    fn constant(&self, index: usize) -> Decoded<i64> {
        match self.operand(index)? {
            Operand::Integer(value) => Ok(*value),
            other => Err(format!("{other:?} is no constant")),
        }
    }
}

/// Bytes, and whether the sign is kept when a register is wider.
fn width(kind: &str) -> Decoded<(u32, bool)> {
    let bits = kind.trim_start_matches(|it: char| it.is_ascii_alphabetic());
    let bits: u32 = bits.parse().map_err(|_| format!("no width in `{kind}`"))?;
    Ok((bits / 8, kind.starts_with('s')))
}

fn special(name: &str) -> Decoded<Special> {
    let (name, axis) = match name.split_once('.') {
        Some((name, axis)) => {
            let axis = ["x", "y", "z"].iter().position(|it| *it == axis);
            (name, axis.ok_or("no such axis")?)
        }
        None => (name, 0),
    };
    Ok(match name {
        "%tid" => Special::Thread(axis),
        "%ntid" => Special::Threads(axis),
        "%ctaid" => Special::Block(axis),
        "%nctaid" => Special::Blocks(axis),
        "%cluster_ctarank" => Special::RankInCluster,
        "%cluster_nctarank" => Special::BlocksOfCluster,
        "%laneid" => Special::Lane,
        other => return Err(format!("the special register `{other}` is not known here")),
    })
}
