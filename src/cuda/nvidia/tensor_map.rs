//! The words of cuTensorMapEncodeTiled.

use cudarc::driver::sys;

use crate::cuda::driver::{Fill, L2Promotion, Swizzle, TensorType};

pub(super) fn data_type(kind: TensorType) -> sys::CUtensorMapDataType {
    use sys::CUtensorMapDataType as To;
    match kind {
        TensorType::U8 => To::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        TensorType::U16 => To::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        TensorType::U32 => To::CU_TENSOR_MAP_DATA_TYPE_UINT32,
        TensorType::I32 => To::CU_TENSOR_MAP_DATA_TYPE_INT32,
        TensorType::U64 => To::CU_TENSOR_MAP_DATA_TYPE_UINT64,
        TensorType::I64 => To::CU_TENSOR_MAP_DATA_TYPE_INT64,
        TensorType::F16 => To::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        TensorType::F32 => To::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        TensorType::F64 => To::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        TensorType::Bf16 => To::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }
}

pub(super) fn swizzle(swizzle: Swizzle) -> sys::CUtensorMapSwizzle {
    use sys::CUtensorMapSwizzle as To;
    match swizzle {
        Swizzle::None => To::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes32 => To::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => To::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => To::CU_TENSOR_MAP_SWIZZLE_128B,
    }
}

pub(super) fn l2_promotion(promotion: L2Promotion) -> sys::CUtensorMapL2promotion {
    use sys::CUtensorMapL2promotion as To;
    match promotion {
        L2Promotion::None => To::CU_TENSOR_MAP_L2_PROMOTION_NONE,
        L2Promotion::Bytes64 => To::CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
        L2Promotion::Bytes128 => To::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        L2Promotion::Bytes256 => To::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    }
}

pub(super) fn fill(fill: Fill) -> sys::CUtensorMapFloatOOBfill {
    use sys::CUtensorMapFloatOOBfill as To;
    match fill {
        Fill::Zeros => To::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        Fill::Nans => To::CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA,
    }
}
