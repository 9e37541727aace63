// What the host machine keeps in the 128 opaque bytes of a tensor map.
#pragma once
#include <cstdint>

#include "../isobath.cuh"

namespace simt {

struct TensorMapFields {
  static constexpr uint32_t MAGIC = 0x50414d54;
  uint32_t magic;
  uint8_t rank, element_bytes, data_type, swizzle_bytes;  // swizzle 0: none
  uint64_t address;
  uint64_t dimensions[5];  // innermost first
  uint64_t strides[4];     // bytes, of dimensions 1 to 4
  uint16_t box[5];
  uint8_t nan_fill;
};
static_assert(sizeof(TensorMapFields) <= sizeof(TensorMap));

constexpr uint8_t TENSOR_FLOAT32 = 7, TENSOR_BFLOAT16 = 9;  // CUtensorMapDataType

}  // namespace simt
