//! Launches kernels/gemm_sm90.cu: out = A B^T (+ residual) in bf16 with fp32 accumulation.
//!
//! [`Gemm`] knows the kernels of one machine. [`Gemm::plan`] checks a product, chooses a tile and
//! makes the tensor maps; the plan is then launched as often as wanted, for the values that lie at
//! its addresses at that time. Nothing is allocated on the device.

use super::{
    Arguments, DevicePointer, Driver, KernelId, Launch, StreamId, Swizzle, TensorMap,
    TensorMapSpec, TensorType,
};
use crate::error::{Error, Result};

/// What one block multiplies at once: [128 x columns] of the result. Each is a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tile {
    Columns128,
    Columns256,
}

const TILES: [Tile; 2] = [Tile::Columns256, Tile::Columns128];
const TILE_ROWS: u64 = 128;
/// Of the ring's stages, and of the boxes that are stored.
const TILE_DEPTH: u64 = 64;
const STORE_BOX: [u32; 2] = [64, 64];
const STORE_TILES_BYTES: u64 = 2 * 2 * 64 * 64 * BF16_BYTES;
const BF16_BYTES: u64 = 2;
const THREADS: u32 = 384;
/// Elements of 16 bytes: rows begin at multiples of this.
const ROW_MULTIPLE: u64 = 8;

impl Tile {
    fn columns(self) -> u64 {
        match self {
            Tile::Columns128 => 128,
            Tile::Columns256 => 256,
        }
    }

    /// Stages of the ring, as the kernel is compiled.
    pub fn stages(self) -> u64 {
        match self {
            Tile::Columns128 => 6,
            Tile::Columns256 => 4,
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Tile::Columns128 => "gemm_sm90_128x128",
            Tile::Columns256 => "gemm_sm90_128x256",
        }
    }

    /// Speed of a machine full of these tiles, relative to the fastest tile. An estimate, as long
    /// as no GPU has timed them: a stage of 128 columns brings 4/3 as many bytes for each product.
    fn relative_speed(self) -> f64 {
        match self {
            Tile::Columns128 => 0.75,
            Tile::Columns256 => 1.0,
        }
    }

    fn shared_bytes(self) -> u64 {
        let stage = (TILE_ROWS + self.columns()) * TILE_DEPTH * BF16_BYTES;
        self.stages() * stage + STORE_TILES_BYTES
    }

    fn count(self, m: u64, n: u64) -> u64 {
        m.div_ceil(TILE_ROWS) * n.div_ceil(self.columns())
    }
}

/// One product; row-major, rows without gaps.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// [M,K]
    pub a: DevicePointer,
    /// [N,K]
    pub b: DevicePointer,
    /// [M,N], added to the product before it is rounded.
    pub residual: Option<DevicePointer>,
    /// [M,N]
    pub out: DevicePointer,
}

/// The kernels of one machine.
#[derive(Clone, Debug)]
pub struct Gemm {
    device: &'static str,
    multiprocessors: u64,
    kernels: [(Tile, KernelId); TILES.len()],
}

/// A product that is ready to be launched.
pub struct GemmPlan {
    pub tile: Tile,
    launch: Launch,
    arguments: Arguments,
}

impl Gemm {
    /// Errors: a GPU without wgmma, or a build without the kernels.
    pub fn new(driver: &mut dyn Driver) -> Result<Self> {
        let device = driver.device();
        let properties = driver.properties();
        let (major, minor) = properties.compute_capability;
        if (major, minor) != (9, 0) {
            return Err(refusal(
                device,
                format!("{} has compute capability {major}.{minor}, not 9.0", properties.name),
                "choose a Hopper GPU (H100, H200, GH200), or --device simt".to_string(),
            ));
        }
        let multiprocessors = u64::from(properties.multiprocessors);
        let mut kernels = [(Tile::Columns128, KernelId(0)); TILES.len()];
        for (kernel, tile) in kernels.iter_mut().zip(TILES) {
            *kernel = (tile, driver.kernel(tile.kernel())?);
        }
        Ok(Gemm { device, multiprocessors, kernels })
    }

    /// The tile that fills this machine best for a result [M,N]: the least time of all waves.
    pub fn choose_tile(&self, m: usize, n: usize) -> Tile {
        let time = |tile: Tile| {
            let waves = tile.count(m as u64, n as u64).div_ceil(self.multiprocessors);
            (waves * tile.columns()) as f64 / tile.relative_speed()
        };
        TILES.into_iter().min_by(|&a, &b| time(a).total_cmp(&time(b))).unwrap_or(TILES[0])
    }

    /// A plan with the tile that [`Gemm::choose_tile`] finds. Errors: as [`Gemm::plan_with`].
    pub fn plan(&self, driver: &mut dyn Driver, product: &Product) -> Result<GemmPlan> {
        self.plan_with(driver, self.choose_tile(product.m, product.n), product)
    }

    /// Errors: an empty product; rows of K or N that are no multiple of 16 bytes; sizes beyond an
    /// i32; addresses that are not aligned to 16 bytes or buffers that are too small.
    pub fn plan_with(
        &self,
        driver: &mut dyn Driver,
        tile: Tile,
        product: &Product,
    ) -> Result<GemmPlan> {
        let &Product { a, b, residual, out, .. } = product;
        let [m, n, k] = self.check(tile, product)?;
        let residual = residual.unwrap_or_default();
        if residual.0 % 16 != 0 {
            return Err(refusal(
                self.device,
                format!("the residual's address {:#x} is no multiple of 16", residual.0),
                "begin the residual at a multiple of 16 bytes in its buffer".to_string(),
            ));
        }
        let depth = TILE_DEPTH as u32;
        let map_a = matrix(driver, a, [k, m], [depth, TILE_ROWS as u32])?;
        let map_b = matrix(driver, b, [k, n], [depth, tile.columns() as u32])?;
        let map_out = matrix(driver, out, [n, m], STORE_BOX)?;
        let arguments = Arguments::new()
            .with(map_a)
            .with(map_b)
            .with(map_out)
            .with(residual)
            .with(m as i32)
            .with(n as i32)
            .with(k as i32);
        let kernel = self.kernels.iter().find(|(other, _)| *other == tile);
        let (_, kernel) = *kernel.expect("every tile has a kernel");
        let blocks = tile.count(m, n).min(self.multiprocessors) as u32;
        let launch = Launch::new(kernel, [blocks, 1, 1], [THREADS, 1, 1])
            .shared_bytes(tile.shared_bytes() as u32);
        Ok(GemmPlan { tile, launch, arguments })
    }

    fn check(&self, tile: Tile, product: &Product) -> Result<[u64; 3]> {
        let sizes = [product.m, product.n, product.k].map(|size| size as u64);
        let [m, n, k] = sizes;
        let name = format!("A [{m},{k}] times B [{n},{k}]^T");
        if sizes.contains(&0) {
            return Err(refusal(
                self.device,
                format!("{name} is empty"),
                "launch nothing for an empty product; an empty sum is zero".to_string(),
            ));
        }
        if !n.is_multiple_of(ROW_MULTIPLE) || !k.is_multiple_of(ROW_MULTIPLE) {
            return Err(refusal(
                self.device,
                format!("{name}: TMA needs N and K as multiples of {ROW_MULTIPLE}"),
                format!(
                    "choose model.hidden, model.ffn and the head size as multiples of \
                     {ROW_MULTIPLE}, and pad the vocabulary to one"
                ),
            ));
        }
        // The last tile's end, and the step to the tile behind the last, stay within an i32.
        let most = i32::MAX as u64 - 256;
        if sizes.iter().any(|&size| size > most) || tile.count(m, n) > most - self.multiprocessors {
            return Err(refusal(
                self.device,
                format!("{name}: an i32 has to count rows, columns and tiles"),
                "split the product".to_string(),
            ));
        }
        Ok(sizes)
    }
}

impl GemmPlan {
    /// Errors: what the driver finds wrong.
    pub fn launch(&self, driver: &mut dyn Driver, stream: StreamId) -> Result<()> {
        driver.launch(&self.launch.on(stream), &self.arguments)
    }
}

/// A bf16 matrix [rows, columns] and its boxes; both innermost first, as TMA counts.
fn matrix(
    driver: &mut dyn Driver,
    address: DevicePointer,
    dimensions: [u64; 2],
    box_dimensions: [u32; 2],
) -> Result<TensorMap> {
    let row_bytes = [dimensions[0] * BF16_BYTES];
    driver.tensor_map(&TensorMapSpec::matrix(
        TensorType::Bf16,
        address,
        &dimensions,
        &row_bytes,
        &box_dimensions,
        Swizzle::Bytes128,
    ))
}

fn refusal(device: &str, what: String, remedy: String) -> Error {
    Error::Launch { kernel: "gemm_sm90".to_string(), device: device.to_string(), what, remedy }
}
