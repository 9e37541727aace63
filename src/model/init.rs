//! First values of the parameters: one random stream per matrix, addressed by element, so that
//! they are the same on every device and for any number of threads.

use rayon::prelude::*;

use super::parameters::{Init, Parameter, ParameterTable};
use crate::random::Philox;

/// Elements that one task draws.
const ELEMENTS_PER_TASK: usize = 1 << 14;

/// The flat buffer at step 0; padding is zero.
pub fn initial_parameters(table: &ParameterTable, seed: u64) -> Vec<f32> {
    let mut flat = vec![0.0; table.stored_elements()];
    for parameter in table.entries() {
        draw(parameter, seed, &mut flat[parameter.range()]);
    }
    flat
}

/// The first values of one parameter, all of which `values` has room for.
pub fn draw(parameter: &Parameter, seed: u64, values: &mut [f32]) {
    let columns = parameter.stored.columns();
    let (std, rows) = match parameter.init {
        Init::Constant(value) => return values.fill(value as f32),
        Init::Normal { std } => ([std; 3], [usize::MAX; 2]),
        Init::NormalRows { std, rows } => (std, rows),
    };
    let generator = Philox::new(seed, parameter.stream);
    let tasks = values.par_chunks_mut(ELEMENTS_PER_TASK).enumerate();
    tasks.for_each(|(task, values)| {
        let first = task * ELEMENTS_PER_TASK;
        generator.fill_normal(first as u64, values);
        for (at, value) in values.iter_mut().enumerate() {
            let row = (first + at) / columns;
            let part = rows.iter().filter(|&&begin| row >= begin).count();
            *value *= std[part] as f32;
        }
    });
    clear_padding(parameter, values);
}

fn clear_padding(parameter: &Parameter, values: &mut [f32]) {
    let columns = parameter.stored.columns();
    for (row, values) in values.chunks_exact_mut(columns).enumerate() {
        let tensor = parameter
            .tensors
            .iter()
            .find(|t| (t.first_row..t.first_row + t.shape.rows()).contains(&row));
        values[tensor.map_or(0, |t| t.shape.columns())..].fill(0.0);
    }
}
