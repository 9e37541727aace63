//! Which examples share a row.

use isobath::data::packing::best_fit;
use isobath::random::Philox;

#[test]
fn the_longest_go_first_into_the_row_that_they_fill_best() {
    // 6, 6 and 5 begin rows; 5 fills the third, 4 the second, 3 and 1 the first.
    let rows = best_fit(&[3, 6, 5, 4, 1, 5, 6], 10);
    assert_eq!(rows, [vec![0, 1, 4], vec![3, 6], vec![2, 5]]);
    // First fit would put the 3 beside the 6.
    assert_eq!(best_fit(&[6, 7, 3], 10), [vec![1, 2], vec![0]]);
    assert_eq!(best_fit(&[], 10), Vec::<Vec<u32>>::new());
    assert_eq!(best_fit(&[10, 10], 10), [[0], [1]]);
}

#[test]
fn every_item_is_in_one_row_no_row_overflows_and_few_rows_are_needed() {
    for (seed, capacity) in [(1, 64), (2, 256), (3, 2048)] {
        let random = Philox::new(seed, 0);
        let lengths: Vec<usize> = (0..3000)
            .map(|i| 1 + (random.uniform_f64(i).powi(2) * capacity as f64) as usize)
            .collect();
        let rows = best_fit(&lengths, capacity);
        let mut items: Vec<u32> = rows.iter().flatten().copied().collect();
        items.sort_unstable();
        assert_eq!(items, (0..3000).collect::<Vec<u32>>());
        let filled = |row: &Vec<u32>| row.iter().map(|&item| lengths[item as usize]).sum::<usize>();
        assert!(rows.iter().all(|row| filled(row) <= capacity));
        let least = lengths.iter().sum::<usize>().div_ceil(capacity);
        let most = (least as f64 * 11.0 / 9.0) as usize + 4;
        assert!((least..=most).contains(&rows.len()), "{} rows, at least {least}", rows.len());
        // Nothing that stands alone would have fitted elsewhere.
        let rooms: Vec<usize> = rows.iter().map(|row| capacity - filled(row)).collect();
        let alone = rows.iter().position(|row| row.len() == 1 && filled(row) <= capacity / 2);
        assert!(alone.is_none_or(|row| {
            rooms.iter().enumerate().all(|(other, &room)| other == row || room < filled(&rows[row]))
        }));
    }
}

#[test]
#[should_panic(expected = "an item of 11 for rows of 10")]
fn an_item_longer_than_a_row_is_no_item() {
    best_fit(&[11], 10);
}
