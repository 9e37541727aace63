//! First values of the parameters: one random stream per parameter, addressed by element, so that
//! they are the same on every device and for any number of threads.

use rayon::prelude::*;

use super::parameters::{Init, ParameterTable};
use crate::random::Philox;

/// Elements that one task draws.
const ELEMENTS_PER_TASK: usize = 1 << 14;

/// The flat buffer at step 0; padding is zero. Parameter i of the table has random stream i.
pub fn initial_parameters(table: &ParameterTable, seed: u64) -> Vec<f32> {
    let mut flat = vec![0.0; table.stored_elements()];
    for (stream, parameter) in table.entries().iter().enumerate() {
        let values = &mut flat[parameter.range()];
        match parameter.init {
            Init::Ones => values.fill(1.0),
            Init::Normal { std } => {
                let generator = Philox::new(seed, stream as u64);
                let tasks = values.par_chunks_mut(ELEMENTS_PER_TASK).enumerate();
                tasks.for_each(|(task, values)| {
                    generator.fill_normal((task * ELEMENTS_PER_TASK) as u64, values);
                    values.iter_mut().for_each(|value| *value *= std as f32);
                });
                clear_padding(parameter, values);
            }
        }
    }
    flat
}

fn clear_padding(parameter: &super::parameters::Parameter, values: &mut [f32]) {
    let columns = parameter.stored.columns();
    for (row, values) in values.chunks_exact_mut(columns).enumerate() {
        let tensor = parameter
            .tensors
            .iter()
            .find(|t| (t.first_row..t.first_row + t.shape.rows()).contains(&row));
        values[tensor.map_or(0, |t| t.shape.columns())..].fill(0.0);
    }
}
