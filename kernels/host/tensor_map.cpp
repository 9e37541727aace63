// Tensor maps: the rules of cuTensorMapEncodeTiled, and what this machine keeps of a map.
#include "tensor_map.h"

#include <cstdio>
#include <cstring>
#include <string>

#include "abi.h"
#include "device_memory.h"
#include "fault.h"

namespace simt {

// By CUtensorMapDataType: UINT8, UINT16, UINT32, INT32, UINT64, INT64, FLOAT16, FLOAT32, FLOAT64,
// BFLOAT16, FLOAT32_FTZ, TFLOAT32, TFLOAT32_FTZ.
static constexpr uint8_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
// By CUtensorMapSwizzle: NONE, 32B, 64B, 128B.
static constexpr uint8_t SWIZZLE_BYTES[] = {0, 32, 64, 128};

static std::string encode(TensorMapFields& map, uint32_t data_type, uint32_t rank, void* address,
                          const uint64_t* dimensions, const uint64_t* strides, const uint32_t* box,
                          const uint32_t* element_strides, uint32_t interleave, uint32_t swizzle,
                          uint32_t l2_promotion, uint32_t fill) {
  if (data_type >= sizeof ELEMENT_BYTES) return format("there is no data type %u", data_type);
  if (rank < 1 || rank > 5) return format("rank %u: 1 to 5 are possible", rank);
  if (interleave) return "interleaved layouts are not supported";
  if (swizzle >= sizeof SWIZZLE_BYTES) return format("there is no swizzle %u", swizzle);
  if (l2_promotion > 3) return format("there is no L2 promotion %u", l2_promotion);
  if (fill > 1) return format("there is no out-of-bounds fill %u", fill);
  const auto start = reinterpret_cast<uintptr_t>(address);
  if (start % 16) return format("the address %p is not a multiple of 16", address);
  const uint32_t element = ELEMENT_BYTES[data_type];
  const bool floating = data_type >= 6;
  if (fill && !floating) return "only floating-point types can be filled with NaN";
  uint64_t last = 0;  // byte behind the last element
  for (uint32_t i = 0; i < rank; i++) {
    if (!dimensions[i] || dimensions[i] > uint64_t(1) << 32)
      return format("dimension %u is %llu: 1 to 2^32 are possible", i,
                    static_cast<unsigned long long>(dimensions[i]));
    if (!box[i] || box[i] > 256)
      return format("box dimension %u is %u: 1 to 256 are possible", i, box[i]);
    if (element_strides[i] != 1) return format("element stride %u must be 1", i);
    const uint64_t stride = i == 0 ? element : strides[i - 1];
    if (i > 0 && (stride % 16 || stride >= uint64_t(1) << 40))
      return format("stride %u is %llu bytes: a multiple of 16 below 2^40 is needed", i,
                    static_cast<unsigned long long>(stride));
    last += (dimensions[i] - 1) * stride;
  }
  last += element;
  const uint32_t inner = box[0] * element;
  if (inner % 16) return format("the box's inner %u bytes are not a multiple of 16", inner);
  const uint32_t span = SWIZZLE_BYTES[swizzle];
  if (span && inner > span)
    return format("the box's inner %u bytes exceed the swizzle's %u", inner, span);
  if (!owns(address, last))
    return format("the tensor's %llu bytes do not lie in one device buffer: it begins at %s",
                  static_cast<unsigned long long>(last), describe_global(address).c_str());
  map = {};
  map.magic = TensorMapFields::MAGIC;
  map.rank = uint8_t(rank);
  map.element_bytes = uint8_t(element);
  map.data_type = uint8_t(data_type);
  map.swizzle_bytes = uint8_t(span);
  map.address = start;
  map.nan_fill = uint8_t(fill);
  for (uint32_t i = 0; i < 5; i++) {
    map.dimensions[i] = i < rank ? dimensions[i] : 1;
    map.box[i] = uint16_t(i < rank ? box[i] : 1);
    if (i > 0) map.strides[i - 1] = i < rank ? strides[i - 1] : 0;
  }
  return "";
}

}  // namespace simt

using namespace simt;

extern "C" int simt_tensor_map(void* map, uint32_t data_type, uint32_t rank, void* address,
                               const uint64_t* dimensions, const uint64_t* stride_bytes,
                               const uint32_t* box, const uint32_t* element_strides,
                               uint32_t interleave, uint32_t swizzle, uint32_t l2_promotion,
                               uint32_t out_of_bounds_fill, char* why, size_t why_bytes) {
  TensorMapFields fields{};
  const std::string refusal =
      encode(fields, data_type, rank, address, dimensions, stride_bytes, box, element_strides,
             interleave, swizzle, l2_promotion, out_of_bounds_fill);
  if (!refusal.empty()) {
    std::snprintf(why, why_bytes, "%s", refusal.c_str());
    return 1;
  }
  std::memset(map, 0, sizeof(TensorMap));
  std::memcpy(map, &fields, sizeof fields);
  return 0;
}
