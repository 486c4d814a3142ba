// The module runtime._cuda: most functions of runtime._core on a GPU, and operations on guides, for
// NumPy arrays and for arrays on the GPU. Python has checked every argument. Shapes are those of
// _cuda.pyi.
#include <algorithm>
#include <array>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "../cuda/guide.h"
#include "../cuda/guided_filter.h"
#include "../cuda/picture.h"
#include "arrays.h"
#include "constants.h"
#include "cuda_refiner.h"

namespace cuda = seg::cuda;
namespace python = seg::python;
namespace py = pybind11;
using namespace pybind11::literals;
using python::Array;
using python::Call;
using python::on_device;
using python::StreamArgument;

namespace {

// Throws std::invalid_argument unless ok. This check is for errors of the project's own code:
// Python has checked the arguments of users, with better messages.
void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("runtime._cuda: ") + what);
}

// Returns a copy of a NumPy array on the device.
Array to_device(const py::array& array, int device, const StreamArgument& stream) {
  const auto name = py::str(array.dtype().attr("name")).cast<std::string>();
  const auto* type = std::find(std::begin(python::kNames), std::end(python::kNames), name);
  if (type == std::end(python::kNames))
    python::refuse("array has dtype " + name + "; wanted " + python::kTypes);
  const auto compact = py::array::ensure(array, py::array::c_style);
  return on_device(device, [&] {
    Call call(device, stream);
    return call.keep(
        call.upload("array", compact, static_cast<python::Type>(type - python::kNames)));
  });
}

// Returns an Array of the same memory as `value`, an array of any library on the device.
Array as_array(const py::object& value, const std::string& name, int device,
               const StreamArgument& stream) {
  if (!python::is_array(value)) python::refuse(name + " is not an array on a GPU");
  return on_device(device, [&] {
    Call call(device, stream);
    return call.keep(call.view(name, value));
  });
}

// The unnamed arguments are threads and isa of the same functions of runtime._core. They are not
// used.

py::object guided_coefficients(const py::object& guidance, const py::object& values, int radius,
                               double eps, int, const std::string&, int device,
                               const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array g = call.take<float>("guidance", guidance, 3),
                v = call.take<float>("values", values, 3);
    const int height = g.shape[0], width = g.shape[1], channels = g.shape[2], k = v.shape[2];
    require((channels == 1 || channels == 3) && v.shape[0] == height && v.shape[1] == width,
            "guided_coefficients: shapes differ");
    const Array out = call.make<float>({height, channels + 1, k, width});
    float* scratch = call.scratch(cuda::filter_scratch(height, width, channels, k));
    cuda::guided_coefficients(out.as<float>(), scratch, g.as<float>(), v.as<float>(), height, width,
                              channels, k, radius, static_cast<float>(eps), call.stream());
    return call.give(out);
  });
}

py::object guided_filter(const py::object& guidance, const py::object& values, int radius,
                         double eps, int, const std::string&, int device,
                         const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array g = call.take<float>("guidance", guidance, 3),
                v = call.take<float>("values", values, 3);
    const int height = g.shape[0], width = g.shape[1], channels = g.shape[2], k = v.shape[2];
    require((channels == 1 || channels == 3) && v.shape[0] == height && v.shape[1] == width,
            "guided_filter: shapes differ");
    const Array out = call.make<float>({height, width, k});
    float* scratch = call.scratch(cuda::filter_scratch(height, width, channels, k));
    cuda::guided_filter(out.as<float>(), scratch, g.as<float>(), v.as<float>(), height, width,
                        channels, k, radius, static_cast<float>(eps), call.stream());
    return call.give(out);
  });
}

py::object apply_coefficients(const py::object& coefficients, const py::object& guidance, int,
                              const std::string&, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array c = call.take<float>("coefficients", coefficients, 4),
                g = call.take<float>("guidance", guidance, 3);
    const int low_height = c.shape[0], k = c.shape[2], low_width = c.shape[3];
    const int height = g.shape[0], width = g.shape[1], channels = g.shape[2];
    require((channels == 1 || channels == 3) && c.shape[1] == channels + 1 &&
                low_height <= height && low_width <= width,
            "apply_coefficients: shapes differ");
    const Array out = call.make<float>({height, width, k});
    cuda::apply_coefficients(out.as<float>(), c.as<float>(), g.as<float>(), low_height, low_width,
                             height, width, channels, k, call.stream());
    return call.give(out);
  });
}

py::object shrink(const py::object& planes, int height, int width, int, const std::string&,
                  int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array p = call.take<float>("planes", planes, 3);
    const int full_height = p.shape[0], full_width = p.shape[1], k = p.shape[2];
    require(height > 0 && width > 0 && height <= full_height && width <= full_width,
            "shrink: the result is empty or larger than the planes");
    const Array out = call.make<float>({height, width, k});
    cuda::shrink(out.as<float>(), p.as<float>(), height, width, full_height, full_width, k,
                 call.stream());
    return call.give(out);
  });
}

py::tuple joint_upsample(const py::object& coefficients, const py::object& image, int,
                         const std::string&, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array c = call.take<float>("coefficients", coefficients, 4),
                i = call.take<uint8_t>("image", image, 3);
    const int low_height = c.shape[0], channels = static_cast<int>(c.shape[1]) - 1, k = c.shape[2],
              low_width = c.shape[3], height = i.shape[0], width = i.shape[1];
    require((channels == 0 || channels == 3) && i.shape[2] == 3 && low_height <= height &&
                low_width <= width,
            "joint_upsample: shapes differ");
    const Array labels = call.make<int32_t>({height, width}),
                confidence = call.make<float>({height, width});
    cuda::joint_upsample(labels.as<int32_t>(), confidence.as<float>(), c.as<float>(),
                         i.as<uint8_t>(), low_height, low_width, height, width, channels, k,
                         call.stream());
    return py::make_tuple(call.give(labels), call.give(confidence));
  });
}

// Returns the coefficients (h, 1, k, w) for bilinear upsampling of scores (h, w, k).
py::object bilinear_coefficients(const py::object& scores, int device,
                                 const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array s = call.take<float>("scores", scores, 3);
    const int height = s.shape[0], width = s.shape[1], k = s.shape[2];
    const Array out = call.make<float>({height, 1, k, width});
    cuda::bilinear_coefficients(out.as<float>(), s.as<float>(), height, width, k, call.stream());
    return call.give(out);
  });
}

// Returns the picture (h, w, c) uint8 resized to (height, width, c) float32 in [0, 1].
py::object working_picture(const py::object& picture, int height, int width, int device,
                           const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array p = call.take<uint8_t>("picture", picture, 3);
    const int channels = p.shape[2];
    require((channels == 1 || channels == 3) && height > 0 && width > 0,
            "working_picture: shapes differ");
    const Array out = call.make<float>({height, width, channels});
    cuda::working_picture(out.as<float>(), p.as<uint8_t>(), height, width, p.shape[0], p.shape[1],
                          channels, call.stream());
    return call.give(out);
  });
}

// Returns the picture (h, w, 3) uint8 resized and normalised as (1, 3, height, width) float32: in
// `to`, an array on the device, or in a new array if `to` is None.
py::object network_input(const py::object& picture, int height, int width,
                         const std::array<float, 3>& mean, const std::array<float, 3>& std,
                         bool bgr, const py::object& to, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array p = call.take<uint8_t>("picture", picture, 3);
    const python::Shape shape{1, 3, height, width};
    require(p.shape[2] == 3 && height > 0 && width > 0, "network_input: shapes differ");
    const Array out = to.is_none() ? call.make<float>(shape) : call.take<float>("to", to, 4);
    require(out.shape == shape, "network_input: shapes differ");
    cuda::network_input(out.as<float>(), p.as<uint8_t>(), height, width, p.shape[0], p.shape[1],
                        mean.data(), std.data(), bgr, call.stream());
    return call.give(out);
  });
}

// Returns a guide (h, w, c) of probabilities from a network's scores (1, c, h, w).
py::object soft_guide(const py::object& scores, bool exponents, int device,
                      const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array s = call.take<float>("scores", scores, 4);
    require(s.shape[0] == 1, "soft_guide: shapes differ");
    const int k = s.shape[1], height = s.shape[2], width = s.shape[3];
    const Array out = call.make<float>({height, width, k});
    cuda::soft_guide(out.as<float>(), s.as<float>(), height, width, k, exponents, call.stream());
    return call.give(out);
  });
}

py::object resize_planes(const py::object& planes, int height, int width, int device,
                         const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array p = call.take<float>("planes", planes, 3);
    require(height > 0 && width > 0, "resize_planes: shapes differ");
    const int from_height = p.shape[0], from_width = p.shape[1], k = p.shape[2];
    const Array out = call.make<float>({height, width, k});
    cuda::resize_planes(out.as<float>(), p.as<float>(), height, width, from_height, from_width, k,
                        call.stream());
    return call.give(out);
  });
}

// Returns (c, parts): the sums of a guide (h, w, c) over parts of its pixels.
py::object class_sums(const py::object& guide, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array g = call.take<float>("guide", guide, 3);
    const Array out = call.make<float>({g.shape[2], cuda::kSumParts});
    cuda::class_sums(out.as<float>(), g.as<float>(), g.shape[0] * g.shape[1], g.shape[2],
                     call.stream());
    return call.give(out);
  });
}

py::object take_classes(const py::object& guide, const py::array_t<int32_t>& classes,
                        bool normalised, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array g = call.take<float>("guide", guide, 3),
                columns = call.upload("classes", classes, python::kInt);
    const Array out = call.make<float>({g.shape[0], g.shape[1], columns.shape[0]});
    cuda::take_classes(out.as<float>(), g.as<float>(), columns.as<int32_t>(),
                       g.shape[0] * g.shape[1], g.shape[2], columns.shape[0], normalised,
                       call.stream());
    return call.give(out);
  });
}

// Returns (c,) int32: 1 for each class that is the first largest one of some pixel of scores (h, w,
// c).
py::object winners(const py::object& scores, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array s = call.take<float>("scores", scores, 3);
    const Array out = call.make<int32_t>({s.shape[2]});
    cuda::winners(out.as<int32_t>(), s.as<float>(), s.shape[0] * s.shape[1], s.shape[2],
                  call.stream());
    return call.give(out);
  });
}

// Returns labels (h, w) int32 of a guide (h, w, c), and the guide's largest values (h, w) float32.
py::tuple hard_labels(const py::object& guide, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array g = call.take<float>("guide", guide, 3);
    const Array labels = call.make<int32_t>({g.shape[0], g.shape[1]}),
                shares = call.make<float>({g.shape[0], g.shape[1]});
    cuda::hard_labels(labels.as<int32_t>(), shares.as<float>(), g.as<float>(),
                      g.shape[0] * g.shape[1], g.shape[2], call.stream());
    return py::make_tuple(call.give(labels), call.give(shares));
  });
}

// Returns (clusters, classes) int32: the pixels with each pair of labels (h, w) and hard (h, w).
py::object pair_counts(const py::object& labels, const py::object& hard, int clusters, int classes,
                       int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array l = call.take<int32_t>("labels", labels, 2),
                h = call.take<int32_t>("hard", hard, 2);
    require(l.shape == h.shape && clusters > 0 && classes > 0, "pair_counts: shapes differ");
    const Array out = call.make<int32_t>({clusters, classes});
    cuda::pair_counts(out.as<int32_t>(), l.as<int32_t>(), h.as<int32_t>(), l.shape[0] * l.shape[1],
                      clusters, classes, call.stream());
    return call.give(out);
  });
}

// Returns (h, w, count): column k of scores (h, w, c) is added to column to[k], unless to[k] is
// negative.
py::object merge_classes(const py::object& scores, const py::array_t<int32_t>& to, int count,
                         int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array s = call.take<float>("scores", scores, 3), t = call.upload("to", to, python::kInt);
    require(t.shape[0] == s.shape[2] && count > 0 &&
                *std::max_element(to.data(), to.data() + to.size()) < count,
            "merge_classes: shapes differ");
    const Array out = call.make<float>({s.shape[0], s.shape[1], count});
    cuda::merge_classes(out.as<float>(), s.as<float>(), t.as<int32_t>(), s.shape[0] * s.shape[1],
                        s.shape[2], count, call.stream());
    return call.give(out);
  });
}

// Copies guide (h, w, c) to scores (h, w, c), which must be on the device, at the pixels where mask
// (h, w) is not zero. Returns scores.
py::object keep_pixels(const py::object& scores, const py::object& guide,
                       const py::array_t<uint8_t>& mask, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array s = call.take<float>("scores", scores, 3), g = call.take<float>("guide", guide, 3),
                m = call.upload("mask", mask, python::kByte);
    require(s.shape == g.shape && m.shape.size() == 2 && m.shape[0] == s.shape[0] &&
                m.shape[1] == s.shape[1] && call.stays(),
            "keep_pixels: shapes differ");
    cuda::keep_pixels(s.as<float>(), g.as<float>(), m.as<uint8_t>(), s.shape[0] * s.shape[1],
                      s.shape[2], call.stream());
    return call.give(s);
  });
}

// Returns (512,) int32: the number of pixels of each of 8 x 8 x 8 colours, of a picture (h, w, 3)
// float32 in [0, 1].
py::object colour_counts(const py::object& picture, int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    Call call(device, stream);
    const Array p = call.take<float>("picture", picture, 3);
    require(p.shape[2] == 3, "colour_counts: shapes differ");
    const Array out = call.make<int32_t>({cuda::kColours});
    cuda::colour_counts(out.as<int32_t>(), p.as<float>(), p.shape[0] * p.shape[1], call.stream());
    return call.give(out);
  });
}

// Returns the module's own cudaStream_t as a number, for other libraries to queue work on.
uintptr_t stream_of(int device) {
  return on_device(device, [&] { return python::as_number(python::own_stream(device)); });
}

// The time at which a stream has done all work that was queued before the mark.
struct Mark {
  int device;
  std::shared_ptr<CUevent_st> event;
};

// Returns a mark of the work that is queued now.
Mark mark(int device, const StreamArgument& stream) {
  return on_device(device, [&] {
    const cudaStream_t on = stream ? python::as_stream(*stream) : python::own_stream(device);
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDefault));
    Mark made{device, {event, [](cudaEvent_t e) {
                         if (!cuda::lost) cudaEventDestroy(e);
                       }}};
    CUDA_CHECK(cudaEventRecord(event, on));
    return made;
  });
}

// Returns the milliseconds between two marks by the device's clock; waits for the second mark.
float milliseconds(const Mark& from, const Mark& to) {
  return on_device(to.device, [&] {
    float out = 0;
    {
      const py::gil_scoped_release release;
      CUDA_CHECK(cudaEventSynchronize(to.event.get()));
    }
    CUDA_CHECK(cudaEventElapsedTime(&out, from.event.get(), to.event.get()));
    return out;
  });
}

// Returns the architectures that the module was built for.
std::vector<std::string> architectures() {
#ifdef SEG_CUDA_ARCHITECTURES
  std::istringstream list(SEG_CUDA_ARCHITECTURES);
#else
  std::istringstream list;
#endif
  return {std::istream_iterator<std::string>(list), {}};
}

// Returns the version of the CUDA runtime, 0 if it is unknown.
int runtime_version() {
  int version = 0;
  const cudaError_t error = cudaRuntimeGetVersion(&version);  // needs no device
  return error == cudaSuccess ? version : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The functions of runtime._core on a GPU. Call them through runtime, which checks.";
  m.def("architectures", architectures);
  m.def("runtime_version", runtime_version);
  m.def("constants", python::constants);

  py::class_<Array>(m, "Array", py::module_local())
      .def_property_readonly("shape", [](const Array& a) { return py::tuple(py::cast(a.shape)); })
      .def_property_readonly("dtype",
                             [](const Array& a) { return py::dtype(python::kNames[a.type]); })
      .def_property_readonly("ndim", [](const Array& a) { return a.shape.size(); })
      .def_property_readonly("nbytes", &Array::bytes)
      .def_readonly("device", &Array::device)
      .def_property_readonly("__cuda_array_interface__", python::cuda_array_interface)
      .def("__dlpack__", python::to_dlpack, py::kw_only(), "stream"_a = py::none(),
           "max_version"_a = py::none(), "dl_device"_a = py::none(), "copy"_a = py::none())
      .def("__dlpack_device__",
           [](const Array& a) {
             return std::make_pair(static_cast<int>(python::dl::kCuda), a.device);
           })
      .def("numpy", python::to_numpy)
      .def("__array__", python::as_numpy, "dtype"_a = py::none(), "copy"_a = py::none())
      .def("reshape", python::reshape)
      .def("__repr__", [](const Array& a) {
        return "Array(" + python::text(a.shape) + ", " + python::kNames[a.type] + ", GPU " +
               std::to_string(a.device) + ")";
      });
  py::class_<Mark>(m, "Mark", py::module_local()).def("until", milliseconds, "later"_a);
  m.def("mark", mark, "device"_a = 0, "stream"_a = py::none());
  m.def("to_device", to_device, "array"_a, "device"_a = 0, "stream"_a = py::none());
  m.def("as_array", as_array, "value"_a, "name"_a = "array", "device"_a = 0,
        "stream"_a = py::none());

  m.def("guided_coefficients", guided_coefficients, "guidance"_a, "values"_a, "radius"_a, "eps"_a,
        "threads"_a, "isa"_a = "", py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("guided_filter", guided_filter, "guidance"_a, "values"_a, "radius"_a, "eps"_a, "threads"_a,
        "isa"_a = "", py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("apply_coefficients", apply_coefficients, "coefficients"_a, "guidance"_a, "threads"_a,
        "isa"_a = "", py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("shrink", shrink, "planes"_a, "height"_a, "width"_a, "threads"_a, "isa"_a = "",
        py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("joint_upsample", joint_upsample, "coefficients"_a, "image"_a, "threads"_a, "isa"_a = "",
        py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("bilinear_coefficients", bilinear_coefficients, "scores"_a, py::kw_only(), "device"_a = 0,
        "stream"_a = py::none());

  m.def("working_picture", working_picture, "picture"_a, "height"_a, "width"_a, py::kw_only(),
        "device"_a = 0, "stream"_a = py::none());

  m.def("network_input", network_input, "picture"_a, "height"_a, "width"_a, "mean"_a, "std"_a,
        "bgr"_a, "to"_a = py::none(), py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("soft_guide", soft_guide, "scores"_a, "exponents"_a, py::kw_only(), "device"_a = 0,
        "stream"_a = py::none());
  m.def("resize_planes", resize_planes, "planes"_a, "height"_a, "width"_a, py::kw_only(),
        "device"_a = 0, "stream"_a = py::none());
  m.def("class_sums", class_sums, "guide"_a, py::kw_only(), "device"_a = 0,
        "stream"_a = py::none());
  m.def("take_classes", take_classes, "guide"_a, "classes"_a, "normalised"_a, py::kw_only(),
        "device"_a = 0, "stream"_a = py::none());
  m.def("winners", winners, "scores"_a, py::kw_only(), "device"_a = 0, "stream"_a = py::none());
  m.def("hard_labels", hard_labels, "guide"_a, py::kw_only(), "device"_a = 0,
        "stream"_a = py::none());
  m.def("pair_counts", pair_counts, "labels"_a, "hard"_a, "clusters"_a, "classes"_a, py::kw_only(),
        "device"_a = 0, "stream"_a = py::none());
  m.def("merge_classes", merge_classes, "scores"_a, "to"_a, "count"_a, py::kw_only(),
        "device"_a = 0, "stream"_a = py::none());
  m.def("keep_pixels", keep_pixels, "scores"_a, "guide"_a, "mask"_a, py::kw_only(), "device"_a = 0,
        "stream"_a = py::none());
  m.def("colour_counts", colour_counts, "picture"_a, py::kw_only(), "device"_a = 0,
        "stream"_a = py::none());
  m.def("stream", stream_of, "device"_a = 0);

  seg::give_memory_back = [] { cuda::Pool::get().empty(); };
  python::bind_refiner(m);
}
