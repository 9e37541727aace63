//! The memory plan: lifetimes of values decide offsets in one arena.
//!
//! A value lives from its first to its last step; values that never live at the same time may
//! share memory. Larger values are placed first, each at the lowest offset that is free for its
//! whole life.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::{Role, Step, Value, ValueId};
use crate::tensor::Kind;

/// Offsets are multiples of this: a GPU's 128-byte lines and TMA's alignment.
const ALIGNMENT: usize = 256;

/// One line of the memory table: all values of one name.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MemoryLine {
    pub name: String,
    /// Tensors of this name that live at the fullest step, and all there are.
    pub live: usize,
    pub tensors: usize,
    /// Bytes at the fullest step.
    pub live_bytes: usize,
    /// Bytes if nothing shared memory.
    pub bytes: usize,
}

#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// value -> byte offset in the arena
    offsets: BTreeMap<ValueId, usize>,
    pub arena_bytes: usize,
    pub lines: Vec<MemoryLine>,
}

#[derive(Clone, Copy)]
struct Placed {
    id: ValueId,
    first: usize,
    last: usize,
    bytes: usize,
    offset: usize,
}

impl MemoryPlan {
    /// `kept` values, and inputs, live to the end; those that are `spared` nowhere.
    pub(super) fn new(
        steps: &[Step<ValueId>],
        values: &[Value],
        kept: &[ValueId],
        spared: &HashSet<ValueId>,
        element_bytes: impl Fn(Kind) -> usize,
    ) -> Self {
        let end = steps.len();
        let mut lives: BTreeMap<ValueId, (usize, usize)> = BTreeMap::new();
        for (at, step) in steps.iter().enumerate() {
            for (id, _) in step.operands() {
                let outside = matches!(values[id.0].role, Role::External(_));
                if !outside && !spared.contains(&id) {
                    lives.entry(id).or_insert((at, at)).1 = at;
                }
            }
        }
        for (id, life) in &mut lives {
            if values[id.0].role == Role::Input {
                *life = (0, end);
            } else if kept.contains(id) {
                life.1 = end;
            }
        }
        let mut waiting: Vec<Placed> = lives
            .iter()
            .map(|(&id, &(first, last))| {
                let value = &values[id.0];
                let bytes = value.shape.elements() * element_bytes(value.kind);
                Placed { id, first, last, bytes: bytes.next_multiple_of(ALIGNMENT), offset: 0 }
            })
            .collect();
        waiting.sort_by_key(|p| (std::cmp::Reverse(p.bytes), p.first, p.id));

        let mut placed: Vec<Placed> = Vec::with_capacity(waiting.len()); // ascending offsets
        for mut value in waiting {
            for other in &placed {
                if other.last < value.first || value.last < other.first {
                    continue;
                }
                if value.offset + value.bytes <= other.offset {
                    break;
                }
                value.offset = value.offset.max(other.offset + other.bytes);
            }
            let at = placed.partition_point(|p| p.offset <= value.offset);
            placed.insert(at, value);
        }
        let arena_bytes = placed.iter().map(|p| p.offset + p.bytes).max().unwrap_or(0);
        let lines = lines(&placed, values, end);
        let offsets = placed.iter().map(|p| (p.id, p.offset)).collect();
        MemoryPlan { offsets, arena_bytes, lines }
    }

    pub(super) fn offset(&self, id: ValueId) -> Option<usize> {
        self.offsets.get(&id).copied()
    }
}

fn lines(placed: &[Placed], values: &[Value], end: usize) -> Vec<MemoryLine> {
    let live_bytes = |step: usize| -> usize {
        placed.iter().filter(|p| p.first <= step && step <= p.last).map(|p| p.bytes).sum()
    };
    let fullest = (0..=end).max_by_key(|&step| live_bytes(step)).unwrap_or(0);
    let mut lines: BTreeMap<&str, MemoryLine> = BTreeMap::new();
    for p in placed {
        let name = values[p.id.0].name;
        let line = lines.entry(name).or_insert_with(|| MemoryLine {
            name: name.to_string(),
            live: 0,
            tensors: 0,
            live_bytes: 0,
            bytes: 0,
        });
        line.tensors += 1;
        line.bytes += p.bytes;
        if p.first <= fullest && fullest <= p.last {
            line.live += 1;
            line.live_bytes += p.bytes;
        }
    }
    let mut lines: Vec<MemoryLine> = lines.into_values().collect();
    lines.sort_by_key(|line| std::cmp::Reverse(line.live_bytes));
    lines
}
