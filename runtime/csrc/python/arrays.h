// Arrays of Python for the functions of runtime._cuda: NumPy's, arrays that lie on a GPU already,
// from any library, and the module's own. A Call takes the arguments of a function, makes its
// results and keeps what its work reads alive.
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

// The module of Python that turns codes of CUDA into errors.
constexpr char kFaults[] = "runtime.device.faults";

// Raises Python's InputError.
[[noreturn]] void refuse(const std::string& message, const char* fix = "");

// Raises Python's error for a failed call. A fault ends this process's use of the GPU.
[[noreturn]] void raise(const CudaError& error, int device);

// Raises Python's error for a GPU that an earlier fault has made unusable.
[[noreturn]] void raise_lost();

// ---- Lifetimes ---------------------------------------------------------------------------------

// Releases the owners of memory that no stream reads any more.
void sweep();

// Runs body with the device current; its failures become errors of Python.
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

// The module's own stream of the current device.
cudaStream_t own_stream(int device);

inline cudaStream_t as_stream(uintptr_t number) { return reinterpret_cast<cudaStream_t>(number); }

// Both protocols give the two default streams the numbers 1 and 2, and forbid 0.
inline uintptr_t as_number(cudaStream_t stream) {
  return stream == nullptr ? 1 : reinterpret_cast<uintptr_t>(stream);
}

// ---- Arrays ------------------------------------------------------------------------------------

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

// A shape as Python writes it.
std::string text(const Shape& shape);

// A C-contiguous array on a GPU.
struct Array {
  void* data = nullptr;
  Type type = kFloat;
  Shape shape;
  int device = 0;
  cudaStream_t stream = nullptr;        // the stream whose work writes it
  std::shared_ptr<const Moment> ready;  // passed once it is written
  std::shared_ptr<void> owner;          // of the memory
  Memory* memory = nullptr;             // the owner, if the module made it

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

// Whether it is an array on a GPU, from any library.
bool is_array(const py::handle& value);

// The arguments and results of one call on a device's stream.
class Call {
 public:
  Call(int device, const StreamArgument& stream)
      : device_(device), stream_(stream ? as_stream(*stream) : own_stream(device)) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  // Memory that the stream still uses is kept until its work is done; if that moment is not known,
  // the destructor waits for the stream.
  ~Call();
  cudaStream_t stream() const { return stream_; }

  // Any array on the device, not copied.
  Array view(const std::string& name, const py::object& value);

  // A copy of an array of NumPy. It goes through page-locked memory, so that the host does not wait
  // for the GPU; large arrays are copied by the driver.
  Array upload(const std::string& name, const py::array& from, Type type);

  // An argument of type T and so many dimensions, from the host or the device.
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

  // Memory for results, or for scratch.
  template <class T>
  Array make(const Shape& shape) {
    return make(kTypeOf<T>, shape);
  }
  Array make(Type type, const Shape& shape);
  float* scratch(size_t floats) {
    return make<float>({static_cast<py::ssize_t>(floats)}).as<float>();
  }

  // A result, once all work is queued: an array of NumPy if all arguments were such.
  py::object give(const Array& a);
  bool stays() const { return stays_; }
  // The array, complete when the work queued so far is done.
  Array keep(Array a);

 private:
  int device_;
  cudaStream_t stream_;
  bool stays_ = false;
  std::shared_ptr<const Moment> moment_;  // the end of the call's work, if it is not waited for
  std::vector<std::shared_ptr<Memory>> memories_;
  std::vector<std::shared_ptr<void>> owners_;  // of arguments
};

// ---- Methods of arrays -------------------------------------------------------------------------

py::array to_numpy(const Array& a);
py::array as_numpy(const Array& a, const py::object& dtype, const std::optional<bool>& copy);
Array reshape(const Array& a, const py::args& sizes);
py::dict cuda_array_interface(const Array& a);
py::object to_dlpack(const Array& self, const std::optional<int64_t>& stream,
                     const std::optional<std::pair<int, int>>& max_version,
                     const std::optional<std::pair<int, int>>& dl_device,
                     const std::optional<bool>& copy_asked);

}  // namespace seg::python
