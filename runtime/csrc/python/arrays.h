// The arrays that runtime._cuda reads and returns: arrays of NumPy, arrays of any library on a GPU,
// and the module's own class Array. A Call converts the arguments of one function, allocates its
// results, and keeps the memory that its work uses alive until the work is done.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/memory.h"
#include "dlpack_abi.h"

namespace seg::python {

namespace py = pybind11;
namespace dl = seg::dlpack;

using cuda::DeviceGuard;
using cuda::Memory;
using cuda::Moment;

using Shape = std::vector<py::ssize_t>;
using StreamArgument = std::optional<uintptr_t>;

// ---- Errors ------------------------------------------------------------------------------------

// The Python module that converts codes of CUDA to errors.
constexpr char kFaults[] = "runtime.device.faults";

// Raises Python's InputError with this message and fix.
[[noreturn]] void refuse(const std::string& message, const char* fix = "");

// Raises the error of Python for a failed call of CUDA, whose device is `device` unless the error
// names one. If the error is a fault, sets cuda::lost: this process cannot use the GPU any more.
[[noreturn]] void raise(const CudaError& error, int device);

// Raises the error of Python for a GPU that an earlier fault has made unusable.
[[noreturn]] void raise_lost();

// ---- Lifetimes ---------------------------------------------------------------------------------

// Releases the owners of memory whose work is done.
void sweep();

// Calls body while the device is the current one, and returns its result. Raises an error of Python
// for a CudaError, or if the GPU is lost.
template <class Body>
auto on_device(int device, const Body& body) {
  if (cuda::lost) raise_lost();
  try {
    const DeviceGuard guard(device);
    sweep();
    return body();
  } catch (const CudaError& error) {
    raise(error, device);
  }
}

// Returns the module's own stream of the device, which must be current.
cudaStream_t own_stream(int device);

inline cudaStream_t as_stream(uintptr_t number) { return reinterpret_cast<cudaStream_t>(number); }

// Converts a stream to its number. DLPack and __cuda_array_interface__ number the two default
// streams 1 and 2, and forbid 0.
inline uintptr_t as_number(cudaStream_t stream) {
  return stream == nullptr ? 1 : reinterpret_cast<uintptr_t>(stream);
}

// ---- Arrays ------------------------------------------------------------------------------------

// The dtypes of arrays, with their names and sizes.
enum Type { kFloat, kInt, kByte };
template <class T>
inline constexpr Type kTypeOf = kFloat;
template <>
inline constexpr Type kTypeOf<int32_t> = kInt;
template <>
inline constexpr Type kTypeOf<uint8_t> = kByte;
constexpr const char* kNames[] = {"float32", "int32", "uint8"};
constexpr const char* kTypes = "float32, int32 or uint8";
constexpr size_t kBytes[] = {4, 4, 1};

// Returns a shape in Python's notation.
std::string text(const Shape& shape);

// A C-contiguous array on a GPU.
struct Array {
  void* data = nullptr;
  Type type = kFloat;
  Shape shape;
  int device = 0;
  cudaStream_t stream = nullptr;        // the stream whose work writes it
  std::shared_ptr<const Moment> ready;  // passes when the array is written
  std::shared_ptr<void> owner;          // keeps the memory alive
  Memory* memory = nullptr;             // the owner if the module allocated the memory, else null

  size_t size() const {
    size_t n = 1;
    for (const py::ssize_t s : shape) n *= static_cast<size_t>(s);
    return n;
  }
  size_t bytes() const { return size() * kBytes[type]; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Returns whether value is an array of any library on a GPU.
bool is_array(const py::handle& value);

// The arguments and results of one call on a device's stream.
class Call {
 public:
  Call(int device, const StreamArgument& stream)
      : device_(device), stream_(stream ? as_stream(*stream) : own_stream(device)) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  // Keeps the memory that the stream still uses until that work is done. If no result was kept
  // (keep()), waits for the stream instead.
  ~Call();
  cudaStream_t stream() const { return stream_; }

  // Returns `value`, which must be an array on the device, as an Array of the same memory. Raises
  // InputError if value is on another device, is empty, is not C-contiguous, or has another dtype
  // than those of Type.
  Array view(const std::string& name, const py::object& value);

  // Returns a copy on the device of a NumPy array, which must be C-contiguous and of this type.
  // Arrays of up to 32 MiB are copied through page-locked memory, so the host does not wait for the
  // GPU. For larger ones the host waits.
  Array upload(const std::string& name, const py::array& from, Type type);

  // Returns an argument on the device, an array of type T with so many dimensions. A NumPy array is
  // converted to T and uploaded. Raises InputError for another dtype on the device, or another
  // number of dimensions.
  template <class T>
  Array take(const std::string& name, const py::object& value, size_t dimensions) {
    using Host = py::array_t<T, py::array::c_style | py::array::forcecast>;
    const Array a =
        is_array(value) ? view(name, value) : upload(name, value.cast<Host>(), kTypeOf<T>);
    if (a.type != kTypeOf<T> || a.shape.size() != dimensions)
      refuse(name + " has shape " + text(a.shape) + " and dtype " + kNames[a.type] + "; wanted " +
             std::to_string(dimensions) + " dimensions of " + kNames[kTypeOf<T>]);
    return a;
  }

  // Returns an uninitialised array: a result, or scratch memory.
  template <class T>
  Array make(const Shape& shape) {
    return make(kTypeOf<T>, shape);
  }
  Array make(Type type, const Shape& shape);
  float* scratch(size_t floats) {
    return make<float>({static_cast<py::ssize_t>(floats)}).as<float>();
  }

  // Converts a result for Python: to a NumPy array if all arguments were NumPy arrays, otherwise to
  // an Array. All work of the call must be queued before.
  py::object give(const Array& a);
  // Returns whether an argument was on the device, so that results remain on the device.
  bool stays() const { return stays_; }
  // Returns the array with `ready` set to the end of the call's work. All work of the call must be
  // queued before the first call of keep(), because all results have the same moment.
  Array keep(Array a);

 private:
  int device_;
  cudaStream_t stream_;
  bool stays_ = false;
  std::shared_ptr<const Moment> moment_;  // the end of the call's work, if a result was kept
  std::vector<std::shared_ptr<Memory>> memories_;
  std::vector<std::shared_ptr<void>> owners_;  // of arguments
};

// ---- Methods of arrays -------------------------------------------------------------------------

// The methods of the Python class Array, with their names in Python or similar ones.

py::array to_numpy(const Array& a);
py::array as_numpy(const Array& a, const py::object& dtype, const std::optional<bool>& copy);
Array reshape(const Array& a, const py::args& sizes);
py::dict cuda_array_interface(const Array& a);
py::object to_dlpack(const Array& self, const std::optional<int64_t>& stream,
                     const std::optional<std::pair<int, int>>& max_version,
                     const std::optional<std::pair<int, int>>& dl_device,
                     const std::optional<bool>& copy_asked);

}  // namespace seg::python
