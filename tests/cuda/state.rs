//! How optimizer state is stored: whole runs with parameters in halves give the bits of those in
//! f32.

use isobath::config::{Config, Dtype, Master, Placement};
use isobath::cuda::Cuda;

use super::machines::*;
use super::replay::{
    STEPS, assert_same, config, trained, with_narrow_moments, with_sampled_layers,
};

fn placed(placement: Placement) -> Config {
    let mut config = config(Dtype::Bf16, 2);
    config.model.placement = placement;
    config
}

/// Losses, gradients and norms of each step, then parameters and moments. Placements have vectors
/// of C and of one element; with frozen layers it is updated in parts.
#[test]
fn steps_in_halves_give_the_bits_of_f32() {
    let cases = [
        ("plain", STEPS, placed(Placement::Lns)),
        ("sampled layers", STEPS, with_sampled_layers(config(Dtype::Bf16, 2))),
        ("moments in bf16", 3, with_narrow_moments(with_sampled_layers(config(Dtype::Bf16, 1)))),
        ("gains of channels", 3, placed(Placement::Layerscale)),
        ("gains of one element", 3, placed(Placement::Skipinit)),
        ("norms of branches", 3, placed(Placement::Sandwich)),
    ];
    for (what, steps, mut config) in cases {
        for (of_halves, of_f32) in machines().into_iter().zip(machines()) {
            let [of_halves, of_f32] =
                [of_halves, of_f32].map(|machine| Cuda::new(machine, config.dtype, None).unwrap());
            let whole = trained(&config, steps, of_f32);
            config.optimizer.master = Master::Split;
            assert_same(what, &trained(&config, steps, of_halves), &whole);
            config.optimizer.master = Master::F32;
        }
    }
}
