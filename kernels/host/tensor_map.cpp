// What this machine keeps of a tensor map.
#include "tensor_map.h"

#include <cstring>

#include "abi.h"

using namespace simt;

extern "C" void simt_tensor_map(void* map, uint32_t data_type, uint32_t element_bytes,
                                uint32_t rank, void* address, const uint64_t* dimensions,
                                const uint64_t* stride_bytes, const uint32_t* box,
                                uint32_t swizzle_bytes, uint32_t nan_fill) {
  TensorMapFields fields{};
  fields.magic = TensorMapFields::MAGIC;
  fields.rank = uint8_t(rank);
  fields.element_bytes = uint8_t(element_bytes);
  fields.data_type = uint8_t(data_type);
  fields.swizzle_bytes = uint8_t(swizzle_bytes);
  fields.address = reinterpret_cast<uintptr_t>(address);
  fields.nan_fill = uint8_t(nan_fill);
  for (uint32_t i = 0; i < 5; i++) {
    fields.dimensions[i] = i < rank ? dimensions[i] : 1;
    fields.box[i] = uint16_t(i < rank ? box[i] : 1);
    if (i > 0) fields.strides[i - 1] = i < rank ? stride_bytes[i - 1] : 0;
  }
  std::memset(map, 0, sizeof(TensorMap));
  std::memcpy(map, &fields, sizeof fields);
}
