//! How optimizer state is stored: whole runs with parameters in halves give the bits of those in f32.

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

/// Losses, gradients and norms of each of ten steps, then parameters and moments. Placements have
/// vectors of C and of one element; layers at rest are updated in parts.
#[test]
fn ten_steps_in_halves_give_the_bits_of_f32() {
    let cases = [
        ("plain", placed(Placement::Lns)),
        ("sampled layers", with_sampled_layers(config(Dtype::Bf16, 2))),
        ("moments in bf16", with_narrow_moments(with_sampled_layers(config(Dtype::Bf16, 1)))),
        ("gains of channels", placed(Placement::Layerscale)),
        ("gains of one element", placed(Placement::Skipinit)),
        ("norms of branches", placed(Placement::Sandwich)),
    ];
    for (what, mut config) in cases {
        for (of_halves, of_f32) in machines().into_iter().zip(machines()) {
            let [of_halves, of_f32] =
                [of_halves, of_f32].map(|machine| Cuda::new(machine, config.dtype, None).unwrap());
            let whole = trained(&config, STEPS, of_f32);
            config.optimizer.master = Master::Split;
            assert_same(what, &trained(&config, STEPS, of_halves), &whole);
            config.optimizer.master = Master::F32;
        }
    }
}
