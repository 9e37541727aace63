//! Families of kernels: files that do the same on machines of one kind, products and attention
//! alike.

use super::Properties;
use crate::config::Dtype;
use crate::config::choice::choice;
use crate::error::{Error, Result};

choice! {
    #[derive(Hash)]
    pub enum Family {
        /// bf16 with mma.sync, from compute capability 8.0 on.
        Sm80 = "sm80",
        /// bf16 with wgmma and TMA, compute capability 9.0.
        Sm90 = "sm90",
        /// fp32 without tensor cores.
        F32 = "f32",
    }
}

impl Family {
    /// Those that compute in this type on a machine, the fastest first.
    ///
    /// Errors: a GPU that is too old for all.
    pub fn of(device: &str, machine: &Properties, dtype: Dtype) -> Result<&'static [Family]> {
        let (major, minor) = machine.compute_capability;
        match (dtype, (major, minor)) {
            _ if major < 8 => Err(refusal(
                device,
                format!("{} has compute capability {major}.{minor}", machine.name),
                "choose a GPU of compute capability 8.0 or more, or --device simt".to_string(),
            )),
            (Dtype::F32, _) => Ok(&[Family::F32]),
            // wgmma exists on 9.0 only, not above.
            (Dtype::Bf16, (9, 0)) => Ok(&[Family::Sm90, Family::Sm80]),
            (Dtype::Bf16, _) => Ok(&[Family::Sm80]),
        }
    }

    /// `choice` alone, or all of [`Family::of`]. Errors: as there; one that is not among them.
    pub fn chosen(
        device: &str,
        machine: &Properties,
        dtype: Dtype,
        choice: Option<Family>,
    ) -> Result<Vec<Family>> {
        let families = Family::of(device, machine, dtype)?;
        match choice {
            None => Ok(families.to_vec()),
            Some(chosen) if families.contains(&chosen) => Ok(vec![chosen]),
            Some(chosen) => {
                let (major, minor) = machine.compute_capability;
                let names: Vec<&str> = families.iter().map(|family| family.name()).collect();
                Err(refusal(
                    device,
                    format!(
                        "{} (compute capability {major}.{minor}) has no {dtype} kernels of the \
                         family {chosen}",
                        machine.name
                    ),
                    format!("choose {}, or leave the choice open", names.join(" or ")),
                ))
            }
        }
    }
}

fn refusal(device: &str, what: String, remedy: String) -> Error {
    Error::Device { device: device.to_string(), what, remedy }
}
