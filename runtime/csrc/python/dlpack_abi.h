// The structures that libraries exchange arrays with: DLPack 1.0 (VersionedTensor), and the form
// before version 1.0 (PlainTensor). Their layouts are those of dlpack.h; the names are ours.
#pragma once

#include <cstdint>

namespace seg::dlpack {

constexpr int32_t kCuda = 2;                                     // of Device::type
enum Code : uint8_t { kInt = 0, kUint = 1, kFloat = 2 };         // of DataType::code
constexpr uint64_t kCopied = 2;                                  // of VersionedTensor::flags
constexpr char kName[] = "dltensor", kUsed[] = "used_dltensor";  // of capsules
constexpr char kVersionedName[] = "dltensor_versioned",
               kVersionedUsed[] = "used_dltensor_versioned";

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};

struct PlainTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(PlainTensor*);
};

struct Version {
  uint32_t high, low;
};

struct VersionedTensor {
  Version version;
  void* context;
  void (*deleter)(VersionedTensor*);
  uint64_t flags;
  Tensor tensor;
};

}  // namespace seg::dlpack
