//! src/optim: schedules, clipping, and what is updated when.

use isobath::backend::VectorCopy;
use isobath::config::Placement;
use isobath::config::{OptimizerConfig, ScheduleKind};
use isobath::model::parameters::ParameterTable;
use isobath::optim::{LayerSampling, UpdateGroup, UpdateTime, adamw_step, learning_rate};

use crate::support::{run_config, small_model};

const ALL: [ScheduleKind; 4] =
    [ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Wsd];

fn optimizer(schedule: ScheduleKind, warmup: u64) -> OptimizerConfig {
    // A product that is not exact: the floor has to be this very value.
    OptimizerConfig {
        schedule,
        warmup,
        lr: 3e-4,
        min_lr_ratio: 0.1,
        ..run_config(&small_model()).optimizer
    }
}

#[test]
fn every_schedule_goes_from_the_peak_to_the_floor() {
    for schedule in ALL {
        for (steps, warmup) in [(100, 10), (100, 0), (7, 3), (2, 1), (1000, 999)] {
            let config = optimizer(schedule, warmup);
            let rates: Vec<f64> = (1..=steps).map(|s| learning_rate(&config, s, steps)).collect();
            let what = format!("{schedule}, {warmup} of {steps}: {rates:?}");
            let warm = warmup as usize;
            for (i, rate) in rates[..warm].iter().enumerate() {
                assert_eq!(*rate, config.lr * (i + 1) as f64 / warmup as f64, "{what}");
            }
            if warm > 0 {
                assert_eq!(rates[warm - 1], config.lr, "peak of {what}");
            }
            let falling = &rates[warm.saturating_sub(1)..];
            assert!(falling.windows(2).all(|pair| pair[1] <= pair[0]), "{what}");
            let end = match schedule {
                ScheduleKind::Constant => config.lr,
                _ => config.lr * config.min_lr_ratio,
            };
            assert_eq!(rates[steps as usize - 1].to_bits(), end.to_bits(), "end of {what}");
            assert!(rates.iter().all(|rate| *rate > 0.0 && *rate <= config.lr), "{what}");
        }
    }
}

#[test]
fn a_single_step_has_a_rate() {
    for schedule in ALL {
        let alone = learning_rate(&optimizer(schedule, 0), 1, 1);
        let end = if schedule == ScheduleKind::Constant { 3e-4 } else { 3e-4 * 0.1 };
        assert_eq!(alone, end, "{schedule}");
        // The last step's rate is the schedule's, even if all of the run is warm-up.
        assert_eq!(learning_rate(&optimizer(schedule, 1), 1, 1), end, "{schedule}");
    }
}

#[test]
fn linear_and_cosine_are_halfway_in_the_middle_and_wsd_falls_at_the_end_only() {
    let (floor, middle) = (3e-4 * 0.1, 3e-4 * 0.55);
    for schedule in [ScheduleKind::Linear, ScheduleKind::Cosine] {
        let found = learning_rate(&optimizer(schedule, 20), 60, 100);
        assert!((found / middle - 1.0).abs() < 1e-12, "{schedule}: {found}");
    }
    let config = OptimizerConfig { decay_share: 0.2, ..optimizer(ScheduleKind::Wsd, 20) };
    assert!((20..=80).all(|step| learning_rate(&config, step, 100) == config.lr));
    let found = learning_rate(&config, 90, 100);
    assert!((found / ((config.lr + floor) / 2.0) - 1.0).abs() < 1e-12, "{found}");
}

#[test]
fn clipping_scales_to_the_norm_and_zero_turns_it_off() {
    let step = |clip| {
        let config = OptimizerConfig { clip, ..optimizer(ScheduleKind::Cosine, 0) };
        let time = UpdateTime { seed: 1, update: 5, count: 2 };
        adamw_step(&config, time, 1e-3, &[])
    };
    assert_eq!(step(0.0).gradient_scale(1e30), 1.0);
    assert_eq!(step(1.0).gradient_scale(0.0), 1.0);
    assert_eq!(step(1.0).gradient_scale(1.0), 1.0);
    for (clip, norm) in [(1.0, 4.0), (0.3, 7.7), (2.5, 1e12)] {
        let clipped = step(clip).gradient_scale(norm) * norm;
        assert!((clipped / clip - 1.0).abs() < 1e-15, "{clip} of {norm}");
    }
    let step = step(1.0);
    assert!((step.correction1 - (1.0 - 0.9f64.powi(2))).abs() < 1e-15);
    assert_eq!((step.seed, step.update), (1, 5), "the random bits are those of the run's update");
    assert!((step.correction2 - (1.0 - 0.95f64.powi(2))).abs() < 1e-15);
}

/// The layers that an update trains.
fn drawn(sampling: &LayerSampling, layers: usize) -> Vec<usize> {
    (1..=layers).filter(|&layer| sampling.count(layer).is_some()).collect()
}

#[test]
fn layers_are_drawn_for_an_interval_and_count_their_own_updates() {
    let (layers, sampled, interval) = (7, 3, 4);
    let mut sampling = LayerSampling::new(5, layers, sampled, interval);
    let mut updates = vec![0; layers];
    let mut history = vec![];
    for update in 1..=40u64 {
        sampling.go_to(update);
        let now = drawn(&sampling, layers);
        assert_eq!((now.len(), sampling.update()), (sampled, update));
        for &layer in &now {
            updates[layer - 1] += 1;
            assert_eq!(sampling.count(layer), Some(updates[layer - 1]));
        }
        history.push((now, sampling.clone()));
    }
    for interval in history.chunks(4) {
        assert!(interval.iter().all(|(now, _)| *now == interval[0].0), "within an interval");
    }
    let changes = history.windows(2).filter(|two| two[0].0 != two[1].0).count();
    assert!(changes > 5, "{changes} changes in 9 draws");
    // Wherever a process takes the run up.
    for (update, (_, then)) in (1..).zip(&history) {
        let mut fresh = LayerSampling::new(5, layers, sampled, interval);
        fresh.go_to(update);
        assert_eq!(fresh, *then, "straight to {update}");
        sampling.go_to(update);
        assert_eq!(sampling, *then, "back to {update}");
    }
    let mut other = LayerSampling::new(6, layers, sampled, interval);
    let another = |(update, (now, _)): (u64, &(Vec<usize>, LayerSampling))| {
        other.go_to(update);
        drawn(&other, layers) != *now
    };
    assert!((1..).zip(&history).any(another), "another seed draws other layers");
}

#[test]
fn every_layer_is_as_likely_as_any_other() {
    let (layers, sampled, draws) = (8, 2, 8000u64);
    let mut sampling = LayerSampling::new(1, layers, sampled, 1);
    let mut counts = vec![0.0; layers];
    for update in 1..=draws {
        sampling.go_to(update);
        drawn(&sampling, layers).iter().for_each(|layer| counts[layer - 1] += 1.0);
    }
    let expected = (draws as usize * sampled / layers) as f64;
    let chi: f64 = counts.iter().map(|count| (count - expected).powi(2) / expected).sum();
    // 7 degrees of freedom: above 35.3 once in 100,000 times.
    assert!(chi < 35.3, "chi-squared {chi:.1}: {counts:?}");
}

#[test]
fn groups_of_an_update_make_up_the_flat_buffer() {
    for placement in [Placement::Lns, Placement::Sandwich, Placement::Layerscale] {
        for tied in [false, true] {
            let mut model = small_model();
            (model.placement, model.tied, model.layers) = (placement, tied, 3);
            let table = ParameterTable::new(&model);
            let groups = UpdateGroup::blocks(&table);
            let layers: Vec<Option<usize>> = groups.iter().map(|group| group.layer).collect();
            assert_eq!(layers, [None, Some(1), Some(2), Some(3), None]);
            let mut end = 0;
            let mut decaying = vec![];
            let mut copies = vec![];
            for UpdateGroup { range, decay, vectors, layer } in &groups {
                assert_eq!(range.start, end);
                end = range.end;
                decaying
                    .extend(decay.iter().flat_map(|d| range.start + d.start..range.start + d.end));
                let place = |it: &VectorCopy| (range.start + it.from.start, it.from.len(), it.to);
                copies.extend(vectors.iter().map(place));
                for parameter in table.entries() {
                    let inside = range.contains(&parameter.offset);
                    assert!(!inside || parameter.range().end <= range.end, "{}", parameter.name);
                    let block = layer.map(|layer| format!("layers.{layer}."));
                    let named = block.is_some_and(|block| parameter.name.starts_with(&block));
                    assert_eq!(inside && layer.is_some(), named, "{}", parameter.name);
                }
            }
            assert_eq!(end, table.stored_elements());
            let whole: Vec<usize> =
                UpdateGroup::whole(&table).decay.into_iter().flatten().collect();
            assert_eq!(decaying, whole, "{placement}");
            // Every gain has a copy of its own, whose place is the same in whole and parts.
            let of_whole = UpdateGroup::whole(&table).vectors;
            let place = |it: &VectorCopy| (it.from.start, it.from.len(), it.to);
            assert_eq!(copies, of_whole.iter().map(place).collect::<Vec<_>>(), "{placement}");
            let gains = table.entries().iter().filter(|it| it.stored.sizes().len() == 1);
            let gains = gains.map(|it| (it.offset, it.stored.elements(), it.vector.unwrap()));
            assert_eq!(copies, gains.collect::<Vec<_>>(), "{placement}");
            let mut end = 0;
            for (_, elements, to) in copies {
                assert!(to >= end && to.is_multiple_of(64), "{placement}: a copy at {to}");
                end = to + elements;
            }
            assert!(end <= table.vector_elements());
        }
    }
}
