//! Long series, thinned: what a reader could see of them stays.

/// A point of the drawing.
pub(super) type Place = (f64, f64);

/// Of the points whose first coordinates share a unit of the drawing, the first, the last and the
/// two extremes, in their order: the path through them covers what the path through all would.
/// Points that go back to the left are all kept.
pub(super) fn thin(points: &[Place]) -> Vec<Place> {
    let mut kept = Vec::new();
    let mut rest = points;
    while let Some((first, _)) = rest.first() {
        let column = first.floor();
        let count = rest.iter().take_while(|(x, _)| x.floor() == column).count();
        let (here, behind) = rest.split_at(count);
        rest = behind;
        let by_height = |a: &usize, b: &usize| here[*a].1.total_cmp(&here[*b].1);
        let lowest = (0..count).min_by(by_height).unwrap_or(0);
        let highest = (0..count).max_by(by_height).unwrap_or(0);
        let mut chosen = [0, lowest, highest, count - 1];
        chosen.sort_unstable();
        for (i, index) in chosen.into_iter().enumerate() {
            if i == 0 || chosen[i - 1] != index {
                kept.push(here[index]);
            }
        }
    }
    kept
}

/// The same for a band (x, low, high): one entry per unit of the drawing, its extremes.
pub(super) fn thin_band(band: &[(f64, f64, f64)]) -> Vec<(f64, f64, f64)> {
    let mut kept: Vec<(f64, f64, f64)> = Vec::new();
    for &(x, low, high) in band {
        match kept.last_mut() {
            Some((last, l, h)) if last.floor() == x.floor() => {
                (*l, *h) = (l.min(low), h.max(high));
            }
            _ => kept.push((x, low, high)),
        }
    }
    kept
}
