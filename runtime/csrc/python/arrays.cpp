// Arrays of Python on a GPU, by DLPack and by __cuda_array_interface__.
#include "arrays.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <type_traits>

namespace seg::python {

using namespace pybind11::literals;

namespace {

constexpr dl::DataType kFormats[] = {{dl::kFloat, 32, 1}, {dl::kInt, 32, 1}, {dl::kUint, 8, 1}};
constexpr size_t kMostStaged = size_t{1} << 25;  // bytes: more than a 4K picture has

[[noreturn]] void raise(const py::object& error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

// Returns the text of the fault that made the GPU unusable.
std::string& first_fault() {
  static std::string& text = *new std::string;
  return text;
}

// Owners of memory that queued work still reads. The list is used under the GIL only and is never
// destroyed, because Python ends before static objects are destroyed.
struct Kept {
  std::shared_ptr<const Moment> until;
  std::vector<std::shared_ptr<void>> owners;
};
std::list<Kept>& kept() {
  static std::list<Kept>& list = *new std::list<Kept>;
  return list;
}

// Copies between host memory and the memory of an array, and waits until the copy is done.
void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const py::gil_scoped_release release;
  CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, kind, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Returns a NumPy copy of an array. The stream must have waited for the array's `ready`, or must be
// the one that writes the array.
py::array download(const Array& a, cudaStream_t stream) {
  py::array out(py::dtype(kNames[a.type]), a.shape);
  copy(out.mutable_data(), a.data, a.bytes(), cudaMemcpyDeviceToHost, stream);
  return out;
}

// Returns the DLPack number of the kind of device that value is on, 0 without DLPack.
int dlpack_type(const py::handle& value) {
  if (!py::hasattr(value, "__dlpack_device__")) return 0;
  return value.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>();
}

// The checks below raise InputError. `strides` and `item`, the size of an element, have the same
// unit: elements or bytes.

void check_compact(const std::string& name, const Shape& shape, const std::vector<int64_t>& strides,
                   int64_t item) {
  int64_t wanted = item;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && strides.at(i) != wanted)
      refuse(name + " is not C-contiguous; arrays on a GPU are not copied",
             "call x.contiguous() in PyTorch, or cupy.ascontiguousarray(x) in CuPy");
    wanted *= shape[i];
  }
}

void check_filled(const std::string& name, const Shape& shape) {
  for (const py::ssize_t n : shape)
    if (n < 1) refuse(name + " has shape " + text(shape) + ", which holds nothing");
}

void check_type(const std::string& name, const std::string& dtype, bool ok) {
  if (!ok)
    refuse(name + " has dtype " + dtype + " on the GPU; wanted " + kTypes,
           "convert it first: arrays on a GPU are not converted");
}

void check_place(const std::string& name, int device, int wanted) {
  if (device != wanted)
    refuse(name + " is on GPU " + std::to_string(device) + "; wanted GPU " + std::to_string(wanted),
           "name its GPU, as in device='cuda:1', or copy it to the other GPU");
}

// Returns the array of a DLPack capsule, and renames the capsule to `used`. The array's owner calls
// the tensor's deleter.
template <class Tensor>
Array adopt(const std::string& name, const py::capsule& capsule, const char* used, int device) {
  auto* tensor = static_cast<Tensor*>(capsule.get_pointer());
  PyCapsule_SetName(capsule.ptr(), used);
  Array a;
  a.owner = std::shared_ptr<void>(tensor, [](void* p) {
    auto* t = static_cast<Tensor*>(p);
    if (t->deleter != nullptr) t->deleter(t);
  });
  if constexpr (std::is_same_v<Tensor, dl::VersionedTensor>)
    if (tensor->version.high != 1)
      refuse(name + " has DLPack version " + std::to_string(tensor->version.high) + "; wanted 1");
  const dl::Tensor& t = tensor->tensor;
  if (t.device.type != dl::kCuda) refuse(name + " is not in the memory of a GPU");
  check_place(name, t.device.id, device);
  a.shape.assign(t.shape, t.shape + t.ndim);
  const auto same = [&](const dl::DataType& d) {
    return d.code == t.dtype.code && d.bits == t.dtype.bits && d.lanes == t.dtype.lanes;
  };
  const auto* format = std::find_if(std::begin(kFormats), std::end(kFormats), same);
  static const char* const codes[] = {"int",    "uint",    "float", "opaque",
                                      "bfloat", "complex", "bool"};
  check_type(name,
             (t.dtype.code < 7 ? codes[t.dtype.code] : "float") + std::to_string(t.dtype.bits),
             format != std::end(kFormats));
  a.type = static_cast<Type>(format - kFormats);
  if (t.strides != nullptr) check_compact(name, a.shape, {t.strides, t.strides + t.ndim}, 1);
  a.data = static_cast<char*>(t.data) + t.byte_offset;
  return a;
}

// Returns the array of a value with __dlpack__. The producer makes the given stream wait for the
// data.
Array from_dlpack(const std::string& name, const py::object& value, int device,
                  cudaStream_t stream) {
  py::object made;
  const py::object give = value.attr("__dlpack__");
  try {
    made = give("stream"_a = as_number(stream), "max_version"_a = py::make_tuple(1, 0),
                "copy"_a = false);
  } catch (const py::error_already_set& error) {
    // Before DLPack 1.0 the only argument was the stream.
    if (!error.matches(PyExc_TypeError)) throw;
    made = give("stream"_a = as_number(stream));
  }
  if (PyCapsule_IsValid(made.ptr(), dl::kVersionedName))
    return adopt<dl::VersionedTensor>(name, made.cast<py::capsule>(), dl::kVersionedUsed, device);
  if (PyCapsule_IsValid(made.ptr(), dl::kName))
    return adopt<dl::PlainTensor>(name, made.cast<py::capsule>(), dl::kUsed, device);
  refuse(name + " returned no DLPack capsule that can be used; wanted one named " + dl::kName +
         " or " + dl::kVersionedName);
}

// Returns the array of a value with __cuda_array_interface__. If the interface names a stream, the
// given stream waits for it.
Array from_interface(const std::string& name, const py::object& value, int device,
                     cudaStream_t stream) {
  const auto face = value.attr("__cuda_array_interface__").cast<py::dict>();
  const auto entry = [&](const char* key) {
    return face.contains(key) ? py::object(face[key]) : py::none();
  };
  const int version = py::cast<int>(face["version"]);
  if (version < 2 || version > 3)
    refuse(name + " has version " + std::to_string(version) +
           " of __cuda_array_interface__; wanted 2 or 3");
  if (!entry("mask").is_none()) refuse(name + " is masked; wanted a plain array");
  Array a;
  a.shape = face["shape"].cast<Shape>();
  check_filled(name, a.shape);
  a.data = reinterpret_cast<void*>(face["data"].cast<py::tuple>()[0].cast<uintptr_t>());
  const py::dtype dtype(face["typestr"].cast<std::string>());
  const auto dtype_name = py::str(dtype.attr("name")).cast<std::string>();
  const auto* type = std::find(std::begin(kNames), std::end(kNames), dtype_name);
  check_type(name, dtype_name, type != std::end(kNames) && dtype.attr("isnative").cast<bool>());
  a.type = static_cast<Type>(type - kNames);
  if (const py::object strides = entry("strides"); !strides.is_none())
    check_compact(name, a.shape, strides.cast<std::vector<int64_t>>(), dtype.itemsize());
  cudaPointerAttributes where{};
  CUDA_CHECK(cudaPointerGetAttributes(&where, a.data));
  if (where.type == cudaMemoryTypeUnregistered) refuse(name + " is not in the memory of a GPU");
  check_place(name, where.device, device);
  if (const py::object filled = entry("stream"); !filled.is_none()) {
    const auto number = filled.cast<uintptr_t>();
    if (number == 0) refuse(name + " names stream 0, which __cuda_array_interface__ forbids");
    if (number != as_number(stream)) Moment(as_stream(number)).hold(stream);
  }
  a.owner = std::shared_ptr<void>(new py::object(value), [](void* p) {
    const py::gil_scoped_acquire acquire;
    delete static_cast<py::object*>(p);
  });
  return a;
}

// An array that another library uses, and the stream on which the library uses it.
template <class Tensor>
struct Export {
  Tensor tensor{};
  Array array;
  std::vector<int64_t> shape, strides;
  std::optional<cudaStream_t> stream;
};

// The deleter of an exported tensor. Other libraries call it from any thread, without the GIL. The
// memory is reused only after the library's work on its stream is done.
template <class Tensor>
void release(Tensor* tensor) {
  const std::unique_ptr<Export<Tensor>> held(static_cast<Export<Tensor>*>(tensor->context));
  if (!held->stream || held->array.memory == nullptr || cuda::lost) return;
  try {
    const DeviceGuard guard(held->array.device);
    held->array.memory->used(std::make_shared<Moment>(*held->stream));
  } catch (const CudaError&) {  // the library has destroyed the stream
    cudaGetLastError();
    cudaDeviceSynchronize();
  }
}

// Returns a DLPack capsule of the array, with this name, for a library that uses the array on the
// stream, if one is named. `copied` states that the array is a copy.
template <class Tensor>
py::object export_as(const Array& a, const std::optional<cudaStream_t>& stream, bool copied,
                     const char* name) {
  auto held = std::make_unique<Export<Tensor>>();
  held->array = a;
  held->stream = stream;
  held->shape.assign(a.shape.begin(), a.shape.end());
  held->strides.assign(a.shape.size(), 1);
  for (size_t i = a.shape.size(); i-- > 1;)
    held->strides[i - 1] = held->strides[i] * held->shape[i];
  Tensor& t = held->tensor;
  if constexpr (std::is_same_v<Tensor, dl::VersionedTensor>) {
    t.version = {1, 0};
    t.flags = copied ? dl::kCopied : 0;
  }
  t.context = held.get();
  t.deleter = release<Tensor>;
  t.tensor = {a.data,
              {dl::kCuda, a.device},
              static_cast<int32_t>(a.shape.size()),
              kFormats[a.type],
              held->shape.data(),
              held->strides.data(),
              0};
  PyObject* capsule = PyCapsule_New(&t, name, [](PyObject* c) {
    for (const char* unused : {dl::kName, dl::kVersionedName})
      if (PyCapsule_IsValid(c, unused))
        release(static_cast<Tensor*>(PyCapsule_GetPointer(c, unused)));
  });
  if (capsule == nullptr) throw py::error_already_set();
  held.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

// ---- Errors ------------------------------------------------------------------------------------

void refuse(const std::string& message, const char* fix) {
  raise(py::module_::import("runtime.errors").attr("InputError")(message, "fix"_a = fix));
}

void raise(const CudaError& error, int device) {
  const py::module_ table = py::module_::import(kFaults);
  const int of = error.device >= 0 ? error.device : device;
  const py::object made = table.attr("cuda_error")(error.code, error.what(), of);
  if (table.attr("CUDA_FAULTS").contains(error.code)) {
    first_fault() = error.what();
    cuda::lost = true;
  } else {
    cudaGetLastError();  // otherwise the next launch would report the error
  }
  raise(made);
}

void raise_lost() { raise(py::module_::import(kFaults).attr("cuda_lost")(first_fault())); }

// ---- Lifetimes ---------------------------------------------------------------------------------

void sweep() {
  // The owners are released after the loop, because that may run Python code which calls this
  // function again.
  std::list<Kept> done;
  for (auto k = kept().begin(); k != kept().end();) {
    const auto next = std::next(k);
    if (k->until->passed()) done.splice(done.end(), kept(), k);
    k = next;
  }
}

cudaStream_t own_stream(int device) {
  static std::map<int, cudaStream_t>& streams = *new std::map<int, cudaStream_t>;
  const auto found = streams.find(device);
  if (found != streams.end()) return found->second;
  cudaStream_t made = nullptr;
  CUDA_CHECK(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
  return streams[device] = made;
}

// ---- Calls -------------------------------------------------------------------------------------

std::string text(const Shape& shape) {
  return py::str(py::tuple(py::cast(shape))).cast<std::string>();
}

bool is_array(const py::handle& value) {
  return py::isinstance<Array>(value) || dlpack_type(value) == dl::kCuda ||
         py::hasattr(value, "__cuda_array_interface__");
}

Call::~Call() {
  if (moment_ == nullptr) {
    cudaStreamSynchronize(stream_);
    return;
  }
  for (const auto& memory : memories_) memory->used(moment_);
  if (!owners_.empty()) kept().push_back({moment_, std::move(owners_)});
}

Array Call::view(const std::string& name, const py::object& value) {
  Array a;
  if (py::isinstance<Array>(value)) {
    a = value.cast<Array>();
    check_place(name, a.device, device_);
    if (a.stream != stream_) a.ready->hold(stream_);
  } else if (dlpack_type(value) == dl::kCuda) {
    a = from_dlpack(name, value, device_, stream_);
  } else {
    a = from_interface(name, value, device_, stream_);
  }
  a.device = device_;
  owners_.push_back(a.owner);
  check_filled(name, a.shape);
  if (reinterpret_cast<uintptr_t>(a.data) % kBytes[a.type] != 0)
    refuse(name +
           " begins at an address that is not a multiple of its dtype's size; wanted an aligned "
           "array");
  stays_ = true;
  a.stream = stream_;
  return a;
}

Array Call::upload(const std::string& name, const py::array& from, Type type) {
  const Shape shape(from.shape(), from.shape() + from.ndim());
  check_filled(name, shape);
  Array a = make(type, shape);
  if (a.bytes() > kMostStaged) {
    copy(a.data, from.data(), a.bytes(), cudaMemcpyHostToDevice, stream_);
    return a;
  }
  const void* data = from.data();
  const py::gil_scoped_release release;
  Memory staged(cuda::Pool::get().take_pinned(a.bytes()));
  std::memcpy(staged.data(), data, a.bytes());
  CUDA_CHECK(cudaMemcpyAsync(a.data, staged.data(), a.bytes(), cudaMemcpyHostToDevice, stream_));
  try {
    staged.used(std::make_shared<Moment>(stream_));
  } catch (...) {
    cudaStreamSynchronize(stream_);  // before another call reuses the memory
    throw;
  }
  return a;
}

Array Call::make(Type type, const Shape& shape) {
  Array a;
  a.type = type;
  a.shape = shape;
  a.device = device_;
  a.stream = stream_;
  const auto memory = std::make_shared<Memory>(a.bytes(), device_, stream_);
  memories_.push_back(memory);
  a.data = memory->data();
  a.memory = memory.get();
  a.owner = memory;
  return a;
}

py::object Call::give(const Array& a) {
  if (stays_) return py::cast(keep(a));
  return download(a, stream_);
}

Array Call::keep(Array a) {
  if (moment_ == nullptr) moment_ = std::make_shared<Moment>(stream_);
  a.ready = moment_;
  return a;
}

// ---- Methods of arrays -------------------------------------------------------------------------

py::array to_numpy(const Array& a) {
  return on_device(a.device, [&] {
    const cudaStream_t stream = own_stream(a.device);
    a.ready->hold(stream);
    py::array out = download(a, stream);
    sweep();
    return out;
  });
}

py::array as_numpy(const Array& a, const py::object& dtype, const std::optional<bool>& copy) {
  if (copy && !*copy)
    throw py::value_error(
        "an array on a GPU cannot become a NumPy array without a copy; leave copy=False out");
  const py::array out = to_numpy(a);
  return dtype.is_none() ? out : out.attr("astype")(dtype, "copy"_a = false).cast<py::array>();
}

Array reshape(const Array& a, const py::args& sizes) {
  Array out = a;
  out.shape = py::cast<Shape>(sizes);
  if (out.size() != a.size())
    refuse("an array of shape " + text(a.shape) + " cannot have shape " + text(out.shape));
  return out;
}

py::dict cuda_array_interface(const Array& a) {
  const py::dtype dtype(kNames[a.type]);
  return py::dict("shape"_a = py::tuple(py::cast(a.shape)), "typestr"_a = dtype.attr("str"),
                  "data"_a = py::make_tuple(reinterpret_cast<uintptr_t>(a.data), false),
                  "strides"_a = py::none(), "stream"_a = as_number(a.stream), "version"_a = 3);
}

py::object to_dlpack(const Array& self, const std::optional<int64_t>& stream,
                     const std::optional<std::pair<int, int>>& max_version,
                     const std::optional<std::pair<int, int>>& dl_device,
                     const std::optional<bool>& copy_asked) {
  const bool copy = copy_asked.value_or(false);
  if (dl_device && *dl_device != std::make_pair(static_cast<int>(dl::kCuda), self.device))
    throw py::buffer_error("dl_device is " + py::str(py::cast(*dl_device)).cast<std::string>() +
                           "; wanted (2, " + std::to_string(self.device) +
                           "): an array is exported on its own GPU only, and numpy() copies it to "
                           "the host");
  if (stream && (*stream == 0 || *stream < -1))
    throw py::value_error("stream is " + std::to_string(*stream) +
                          "; DLPack forbids it; wanted None, -1, or the number of a stream");
  return on_device(self.device, [&] {
    Array a = self;
    std::optional<cudaStream_t> consumer;  // unset for -1: the caller orders the streams
    if (!stream || *stream != -1) consumer = as_stream(stream ? *stream : 1);
    if (copy) {
      Call call(self.device, std::nullopt);
      const Array from = call.view("array", py::cast(self));
      a = call.make(from.type, from.shape);
      CUDA_CHECK(
          cudaMemcpyAsync(a.data, from.data, a.bytes(), cudaMemcpyDeviceToDevice, call.stream()));
      a = call.keep(a);
    }
    if (consumer && *consumer != a.stream) a.ready->hold(*consumer);
    const bool versioned = max_version && max_version->first >= 1;
    return versioned ? export_as<dl::VersionedTensor>(a, consumer, copy, dl::kVersionedName)
                     : export_as<dl::PlainTensor>(a, consumer, copy, dl::kName);
  });
}

}  // namespace seg::python
