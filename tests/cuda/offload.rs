//! Moments in host memory: the bits of moments on the device, and streams that wait for each other.

use std::cell::RefCell;
use std::rc::Rc;

use isobath::backend::{Backend, FlatBuffers};
use isobath::config::{Config, Dtype, Master};
use isobath::cuda::Cuda;
use isobath::cuda::host::{Host, Options};
use isobath::optim::{UpdateTime, adamw_step};
use isobath::tensor::{Kind, Shape, View};

use super::counting::Counting;
use super::machines::*;
use super::order::Order;
use super::replay::{assert_same, config, trained, with_narrow_moments, with_sampled_layers};
use crate::support::normals;

/// Parts and wholes of a few chunks, the last one not full, and one of less than one.
#[test]
fn steps_with_moments_on_the_host_give_the_bits_of_moments_on_the_device() {
    let halves = |mut config: Config| {
        config.optimizer.master = Master::Split;
        config
    };
    let cases = [
        ("plain", config(Dtype::F32, 1)),
        ("sampled layers", with_sampled_layers(config(Dtype::Bf16, 2))),
        ("narrow", halves(with_narrow_moments(config(Dtype::Bf16, 1)))),
    ];
    for (what, config) in cases {
        for (on_host, on_device) in machines().into_iter().zip(machines()) {
            let [on_host, on_device] =
                [on_host, on_device].map(|it| Cuda::new(it, config.dtype, None).unwrap());
            let expected = trained(&config, 4, on_device);
            let mut config = config.clone();
            config.optimizer.offload = true;
            let found = trained(&config, 4, on_host.with_offload_chunk(1 << 13));
            assert_same(what, &found, &expected);
        }
    }
}

/// Three updates of four chunks, then what they made of the moments. `without`: a wait to leave
/// out.
fn updates(without: Option<u64>) -> (Vec<String>, u64, [Vec<f32>; 2]) {
    let elements = 3 * 1024 + 60;
    let order = Rc::new(RefCell::new(Order::new(without)));
    let host = Host::new(Options { workers: 1, ..Options::default() }).unwrap();
    let driver = Counting { order: Some(order.clone()), ..Counting::new(host) };
    let mut backend =
        Cuda::new(Box::new(driver), Dtype::F32, None).unwrap().with_offload_chunk(1024);
    let view = |buffer, elements| View {
        buffer,
        offset: 0,
        kind: Kind::Statistic,
        shape: Shape::new(&[elements]),
    };
    let bytes = 4 * elements;
    let mut of_device = |elements| view(backend.allocate("flat", 4 * elements).unwrap(), elements);
    let [parameters, gradients] = [(); 2].map(|()| of_device(elements));
    let grad_norm = of_device(1);
    let [moment1, moment2] =
        [(); 2].map(|()| view(backend.allocate_host("moment", bytes).unwrap(), elements));
    let flat = FlatBuffers {
        parameters,
        working: None,
        vectors: None,
        gradients,
        moment1,
        moment2,
        grad_norm,
        first: 0,
    };
    backend.prepare_optimizer(&flat, &[], &[]).unwrap();
    let optimizer = config(Dtype::F32, 1).optimizer;
    for update in 1..=3 {
        let drawn: Vec<f32> = normals(update, elements).into_iter().map(|it| it as f32).collect();
        backend.write(gradients, &drawn).unwrap();
        backend.gradient_norm(&flat).unwrap();
        let time = UpdateTime { seed: 1, update, count: update };
        backend.adamw(&flat, &adamw_step(&optimizer, time, 1e-3, &[])).unwrap();
    }
    let moments = [moment1, moment2].map(|view| {
        let mut values = vec![0.0; elements];
        backend.read(view, &mut values).unwrap();
        values
    });
    let order = order.borrow();
    (order.races.clone(), order.waits, moments)
}

/// Every access of copies and kernels is ordered, and each of the waits of the second update is
/// needed for that, but the first one: the copy of the scalars has waited for the update before
/// already.
#[test]
fn the_waits_between_the_streams_suffice_and_are_needed() {
    if !has_simt() {
        return;
    }
    let (races, waits, moments) = updates(None);
    assert_eq!(races, [""; 0]);
    assert!(moments.iter().all(|values| values.iter().all(|value| *value != 0.0)), "no update");
    let of_update = waits / 3;
    assert_eq!(waits, 3 * (1 + 2 + 4 + 4 + 1), "four chunks in two slots");
    let unnoticed: Vec<u64> = (of_update..2 * of_update)
        .filter(|&wait| updates(Some(wait)).0.is_empty())
        .map(|wait| wait - of_update)
        .collect();
    assert_eq!(unnoticed, [0], "waits that nothing needs");
}
