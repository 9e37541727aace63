use isobath::config::*;
use isobath::cpu::Cpu;
use isobath::engine::*;
use std::time::Instant;
fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    let (hidden, layers, heads, ffn, vocab, b, s) = (a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    let c = Config {
        name: "x".into(),
        seed: 1,
        dtype: Dtype::F32,
        device: DeviceKind::Cpu,
        model: ModelConfig {
            hidden,
            layers,
            heads,
            kv_heads: heads,
            ffn,
            vocab,
            max_sequence: s,
            norm: NormKind::Rms,
            placement: Placement::Lns,
            norm_eps: 1e-6,
            rope_theta: 1e4,
            tied: false,
            init: InitKind::Normal,
            init_std: 0.02,
            embedding_std: 0.02,
        },
        data: DataConfig {
            train: vec![],
            valid: vec![],
            held_out: 0.1,
            tokenizer: "bytes".into(),
            field: "text".into(),
            rows: Rows::Packed,
            sequence: s,
        },
        train: TrainConfig {
            steps: 10,
            micro_batch: b,
            grad_accumulation: 1,
            recompute: Recompute::None,
            eval_every: 0,
            eval_tokens: 0,
            sample_every: 0,
            z_loss: 0.0,
            init_from: None,
        },
        optimizer: OptimizerConfig {
            kind: OptimizerKind::Adamw,
            lr: 4e-3,
            min_lr_ratio: 0.1,
            warmup: 2,
            schedule: ScheduleKind::Cosine,
            decay_share: 0.2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
        },
        checkpoint: CheckpointConfig { every: 0, keep_last: 1, keep_every: 0 },
    };
    let cpu = Cpu::<f32>::new();
    let plan = Plan::new(&c, &cpu).unwrap();
    println!("{}", plan.memory_table());
    let mut t = Trainer::new(plan, &c, cpu).unwrap();
    let n = t.table().stored_elements();
    let mut p = vec![0f32; n];
    let mut x = 12345u64;
    for v in &mut p {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *v = ((x >> 40) as f32 / 16777216.0 - 0.5) * 0.07;
    }
    for e in t.table().entries() {
        if e.stored.sizes().len() == 1 {
            p[e.range()].fill(1.0);
        }
    }
    t.set_parameters(&p).unwrap();
    let tokens: Vec<i32> = (0..b * s)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % vocab as u64) as i32
        })
        .collect();
    let targets: Vec<i32> = (0..b * s)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % vocab as u64) as i32
        })
        .collect();
    let mut times = vec![];
    for i in 1..=20 {
        let s0 = Instant::now();
        let o = t
            .accumulate([isobath::engine::Rows { tokens: &tokens, targets: &targets }].into_iter())
            .unwrap();
        t.update(&c.optimizer, i, 4e-3, o.grad_norm).unwrap();
        let d = s0.elapsed().as_secs_f64();
        times.push(d);
        if i % 5 == 0 {
            println!("{i} loss {:.4} norm {:.4} {:.1} ms", o.loss, o.grad_norm, d * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    println!("median {:.1} ms, {:.0} tok/s", times[10] * 1e3, (b * s) as f64 / times[10]);
}
