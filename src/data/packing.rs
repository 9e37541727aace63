//! Which examples share a row.

use std::collections::BTreeMap;

/// Puts items of the given lengths into rows of `capacity`, none cut: the longest first, each into
/// the row that it leaves the least room in (best fit decreasing: never more than 11/9 of the
/// fewest rows possible, and 4; Johnson et al. 1974). Equal lengths go in the order given. Returns
/// the items of each row in ascending order. O(n log n).
///
/// Panics if an item is longer than `capacity`.
pub fn best_fit(lengths: &[usize], capacity: usize) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.sort_by_key(|&item| std::cmp::Reverse(lengths[item as usize]));
    let mut rows: Vec<Vec<u32>> = vec![];
    // Rows that have so much room left.
    let mut with_room: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for item in order {
        let length = lengths[item as usize];
        assert!(length <= capacity, "an item of {length} for rows of {capacity}");
        let fitting = with_room.range(length..).next().map(|(&room, _)| room);
        let (room, row) = match fitting {
            None => {
                rows.push(vec![]);
                (capacity, rows.len() as u32 - 1)
            }
            Some(room) => {
                let candidates = with_room.entry(room).or_default();
                let row = candidates.pop().expect("no entry is empty");
                if candidates.is_empty() {
                    with_room.remove(&room);
                }
                (room, row)
            }
        };
        rows[row as usize].push(item);
        with_room.entry(room - length).or_default().push(row);
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows
}
