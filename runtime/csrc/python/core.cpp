// The module runtime._core: the refinement and the filter on the CPU. Python has checked every
// argument. Each function converts arrays to pointers, releases the GIL and calls the code of cpu/.
// Shapes are those of _core.pyi.
#include <pybind11/functional.h>

#include <algorithm>

#include "../cpu/dense_crf.h"
#include "../cpu/guided_filter.h"
#include "../cpu/jpeg.h"
#include "../cpu/refiner.h"
#include "../cpu/regions.h"
#include "constants.h"
#include "numpy.h"
#include "refiner.h"

using namespace pybind11::literals;
using namespace seg::python;

namespace {

// Returns coefficients (h, g + 1, k, w).
Floats guided_coefficients(const Floats& guidance, const Floats& values, int radius, double eps,
                           int threads, const std::string& isa) {
  const int h = guidance.shape(0), w = guidance.shape(1), g = guidance.shape(2),
            k = values.shape(2);
  require(values.shape(0) == h && values.shape(1) == w, "guided_coefficients: shapes differ");
  Floats out({h, g + 1, k, w});
  float* data = out.mutable_data();
  const seg::Kernels& table = kernels(isa);
  py::gil_scoped_release release;
  seg::guided_coefficients(data, guidance.data(), values.data(), h, w, g, k, radius, eps, threads,
                           table);
  return out;
}

// In the templates below, guidance or planes are Bytes or Floats. PYBIND11_MODULE lists the
// function for Bytes first and converts nothing to Bytes, so only arrays of uint8 are passed as
// Bytes.

// Returns (height, width, k): the means of planes (h, w, k) over the area of each pixel of the
// result.
template <class Planes>
Floats shrink(const Planes& planes, int height, int width, int threads, const std::string& isa) {
  const int h = planes.shape(0), w = planes.shape(1), k = planes.shape(2);
  require(height <= h && width <= w, "shrink: the result is larger than the planes");
  Floats out({height, width, k});
  float* data = out.mutable_data();
  const seg::Kernels& table = kernels(isa);
  py::gil_scoped_release release;
  seg::shrink(data, planes.data(), height, width, h, w, k, threads, table);
  return out;
}

// Returns the result array (h, w, k): out itself, which must be C-contiguous float32 of this shape,
// or a new array if out is None.
Floats result(const py::object& out, int h, int w, int k) {
  if (out.is_none()) return Floats({h, w, k});
  require(py::isinstance<py::array_t<float, py::array::c_style>>(out),
          "out is not a C-contiguous float32 array of the result's shape");
  Floats floats = Floats::ensure(out);
  require(floats.ndim() == 3 && floats.shape(0) == h && floats.shape(1) == w &&
              floats.shape(2) == k && floats.ptr() == out.ptr(),
          "out is not a C-contiguous float32 array of the result's shape");
  return floats;
}

// Returns the filtered values (h, w, k).
template <class Guidance>
Floats guided_filter(const Guidance& guidance, const Floats& values, int radius, double eps,
                     int threads, const std::string& isa, const py::object& given) {
  const int h = guidance.shape(0), w = guidance.shape(1), g = guidance.shape(2),
            k = values.shape(2);
  require(values.shape(0) == h && values.shape(1) == w, "guided_filter: shapes differ");
  Floats out = result(given, h, w, k);
  float* data = out.mutable_data();
  const seg::Kernels& table = kernels(isa);
  py::gil_scoped_release release;
  seg::guided_filter(data, guidance.data(), values.data(), h, w, g, k, radius, eps, threads, table);
  return out;
}

// Returns values (h, w, k) from coefficients (lh, g + 1, k, lw) and guidance (h, w, g).
template <class Guidance>
Floats apply_coefficients(const Floats& coefficients, const Guidance& guidance, int threads,
                          const std::string& isa, const py::object& given) {
  const int lh = coefficients.shape(0), lw = coefficients.shape(3), g = guidance.shape(2),
            k = coefficients.shape(2), h = guidance.shape(0), w = guidance.shape(1);
  require(coefficients.shape(1) == g + 1 && lh <= h && lw <= w,
          "apply_coefficients: shapes differ");
  Floats out = result(given, h, w, k);
  float* data = out.mutable_data();
  const seg::Kernels& table = kernels(isa);
  py::gil_scoped_release release;
  seg::apply_coefficients(data, coefficients.data(), guidance.data(), lh, lw, h, w, g, k, threads,
                          table);
  return out;
}

// Returns labels (h, w) and confidence (h, w) for image (h, w, 3). coefficients are (lh, 4, k, lw)
// for guided upsampling, (lh, 1, k, lw) for bilinear upsampling.
py::tuple joint_upsample(const Floats& coefficients, const Bytes& image, int threads,
                         const std::string& isa) {
  const int lh = coefficients.shape(0), lw = coefficients.shape(3),
            g = static_cast<int>(coefficients.shape(1)) - 1, k = coefficients.shape(2),
            h = image.shape(0), w = image.shape(1);
  require((g == 0 || g == 3) && image.shape(2) == 3 && lh <= h && lw <= w,
          "joint_upsample: shapes differ");
  Ints labels({h, w});
  Floats confidence({h, w});
  int32_t* l = labels.mutable_data();
  float* c = confidence.mutable_data();
  const seg::Kernels& table = kernels(isa);
  {
    py::gil_scoped_release release;
    seg::joint_upsample(l, c, coefficients.data(), image.data(), lh, lw, h, w, g, k, threads,
                        table);
  }
  return py::make_tuple(labels, confidence);
}

// Returns the distributions (h, w, k) for image (h, w, 3), probabilities (h, w, k) and the
// compatibility (k, k) or None.
Floats dense_crf(const Bytes& image, const Floats& probabilities, int steps, float bilateral_weight,
                 float bilateral_sxy, float bilateral_srgb, float gaussian_weight,
                 float gaussian_sxy, float floor, const py::object& compatibility, int threads,
                 const std::string& isa, const py::object& given) {
  const int h = image.shape(0), w = image.shape(1), k = probabilities.shape(2);
  require(image.shape(2) == 3 && probabilities.shape(0) == h && probabilities.shape(1) == w,
          "dense_crf: shapes differ");
  Floats penalty;
  if (!compatibility.is_none()) {
    penalty = py::cast<Floats>(compatibility);
    require(penalty.shape(0) == k && penalty.shape(1) == k, "dense_crf: shapes differ");
  }
  Floats out = result(given, h, w, k);
  float* data = out.mutable_data();
  const seg::CrfOptions options{steps,
                                {bilateral_weight, bilateral_sxy, bilateral_srgb},
                                {gaussian_weight, gaussian_sxy, 0},
                                floor};
  const float* const matrix = compatibility.is_none() ? nullptr : penalty.data();
  const seg::Kernels& table = kernels(isa);
  py::gil_scoped_release release;
  seg::dense_crf(data, image.data(), probabilities.data(), h, w, k, options, matrix, threads, table,
                 [] {
                   py::gil_scoped_acquire acquire;
                   if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                 });
  return out;
}

// Returns regions (h, w), merged labels (h, w) and the number of regions, for labels (h, w). The
// labels are not changed.
py::tuple connected_regions(const Ints& labels, int64_t min_area) {
  const int h = labels.shape(0), w = labels.shape(1);
  Ints regions({h, w}), merged({h, w});
  int32_t *r = regions.mutable_data(), *m = merged.mutable_data();
  std::copy(labels.data(), labels.data() + labels.size(), m);
  int32_t count = 0;
  {
    py::gil_scoped_release release;
    count = seg::connected_regions(r, m, h, w, min_area);
  }
  return py::make_tuple(regions, merged, count);
}

// Takes any C-contiguous buffer of bytes.
seg::JpegWalk walk_jpeg(const py::buffer& data) {
  const py::buffer_info bytes = data.request();
  require(bytes.itemsize == 1 && bytes.ndim == 1 && (bytes.size < 2 || bytes.strides[0] == 1),
          "walk_jpeg: data is no contiguous buffer of bytes");
  py::gil_scoped_release release;
  return seg::walk_jpeg(static_cast<const uint8_t*>(bytes.ptr), bytes.size);
}

// Returns scores, labels, losses, clusters, steps, the number of the stop reason and the number of
// distinct labels of the returned map. progress(steps done) returns true to end the run.
py::tuple run(seg::Refiner& self, const Floats& image, const py::object& guide, int label_floor,
              int steps, const std::function<bool(int)>& progress) {
  const int h = self.height(), w = self.width(), classes = self.options().classes;
  require(image.shape(0) == h && image.shape(1) == w && image.shape(2) == 3,
          "run: the image has another size");
  Ints hard;
  Floats soft;
  seg::Guide g;
  if (!guide.is_none()) {
    if (py::array(guide).ndim() == 3) {
      soft = py::cast<Floats>(guide);
      require(soft.shape(0) == h && soft.shape(1) == w, "run: the guide has another size");
      g.soft = soft.data();
      g.classes = soft.shape(2);
    } else {
      hard = py::cast<Ints>(guide);
      require(hard.shape(0) == h && hard.shape(1) == w, "run: the guide has another size");
      g.hard = hard.data();
      g.classes = 1 + *std::max_element(hard.data(), hard.data() + hard.size());
    }
  }
  require(!self.options().channels_follow_classes() || (g.soft != nullptr && g.classes == classes),
          "run: residual needs probabilities of its classes");
  Floats scores({h, w, classes});
  Ints labels({h, w});
  std::vector<seg::StepRecord> records(steps);
  float* s = scores.mutable_data();
  int32_t* l = labels.mutable_data();
  seg::RunResult result;
  {
    py::gil_scoped_release release;
    result = self.run(s, l, records.data(), image.data(), g, label_floor, steps, [&](int done) {
      py::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return progress && progress(done);
    });
  }
  const auto [losses, clusters] = to_arrays(records, result);
  return py::make_tuple(scores, labels, losses, clusters, result.steps, result.stop,
                        result.clusters);
}

py::dict state(const seg::Refiner& self) {
  const auto array = [](const std::vector<float>& v) { return Floats(v.size(), v.data()); };
  return py::dict("parameters"_a = array(self.parameters), "momenta"_a = array(self.momenta),
                  "buffers"_a = array(self.buffers), "batches"_a = self.batches);
}

void set_state(seg::Refiner& self, const Floats& parameters, const Floats& momenta,
               const Floats& buffers, int64_t batches) {
  require(static_cast<size_t>(parameters.size()) == self.parameters.size() &&
              static_cast<size_t>(momenta.size()) == self.momenta.size() &&
              static_cast<size_t>(buffers.size()) == self.buffers.size(),
          "set_state: sizes differ");
  std::copy(parameters.data(), parameters.data() + parameters.size(), self.parameters.begin());
  std::copy(momenta.data(), momenta.data() + momenta.size(), self.momenta.begin());
  std::copy(buffers.data(), buffers.data() + buffers.size(), self.buffers.begin());
  self.batches = batches;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core. Call it through runtime, which checks.";
  m.def("isas", [] {
    const char* names[4];
    const int count = seg::usable_kernels(names);
    return std::vector<std::string>(names, names + count);
  });
  m.def("isa", [] { return std::string(seg::default_kernels().name); });
  m.def(
      "lanes", [](const std::string& t) { return kernels(t).lanes; }, "isa"_a = "");

  m.def("constants", constants);
  bind_kernels(m);

  m.def("guided_coefficients", guided_coefficients, "guidance"_a, "values"_a, "radius"_a, "eps"_a,
        "threads"_a, "isa"_a = "");
  m.def("guided_filter", guided_filter<Bytes>, "guidance"_a.noconvert(), "values"_a, "radius"_a,
        "eps"_a, "threads"_a, "isa"_a = "", "out"_a = py::none());
  m.def("guided_filter", guided_filter<Floats>, "guidance"_a, "values"_a, "radius"_a, "eps"_a,
        "threads"_a, "isa"_a = "", "out"_a = py::none());
  m.def("apply_coefficients", apply_coefficients<Bytes>, "coefficients"_a, "guidance"_a.noconvert(),
        "threads"_a, "isa"_a = "", "out"_a = py::none());
  m.def("apply_coefficients", apply_coefficients<Floats>, "coefficients"_a, "guidance"_a,
        "threads"_a, "isa"_a = "", "out"_a = py::none());
  m.def("shrink", shrink<Bytes>, "planes"_a.noconvert(), "height"_a, "width"_a, "threads"_a,
        "isa"_a = "");
  m.def("shrink", shrink<Floats>, "planes"_a, "height"_a, "width"_a, "threads"_a, "isa"_a = "");
  m.def("joint_upsample", joint_upsample, "coefficients"_a, "image"_a, "threads"_a, "isa"_a = "");
  m.def("dense_crf", dense_crf, "image"_a, "probabilities"_a, "steps"_a, "bilateral_weight"_a,
        "bilateral_sxy"_a, "bilateral_srgb"_a, "gaussian_weight"_a, "gaussian_sxy"_a, "floor"_a,
        "compatibility"_a, "threads"_a, "isa"_a = "", "out"_a = py::none());
  m.def("connected_regions", connected_regions, "labels"_a, "min_area"_a);

  using seg::JpegWalk;
  py::class_<JpegWalk>(m, "JpegWalk")
      .def_property_readonly("coding", [](const JpegWalk& self) { return seg::name(self.coding); })
      .def_property_readonly("problem",
                             [](const JpegWalk& self) { return seg::text(self.problem); })
      .def_readonly("width", &JpegWalk::width)
      .def_readonly("height", &JpegWalk::height)
      .def_readonly("wanted", &JpegWalk::wanted)
      .def_readonly("found", &JpegWalk::found);
  m.def("walk_jpeg", walk_jpeg, "data"_a);

  py::class_<seg::Refiner>(m, "Refiner")
      .def(py::init([](int height, int width, const py::dict& options, int threads,
                       const std::string& isa) {
             return seg::Refiner(to_options(options), height, width, threads, kernels(isa));
           }),
           "height"_a, "width"_a, "options"_a, "threads"_a, "isa"_a = "")
      .def("run", run, "image"_a, "guide"_a, "label_floor"_a, "steps"_a, "progress"_a)
      .def("state", state)
      .def("set_state", set_state, "parameters"_a, "momenta"_a, "buffers"_a, "batches"_a)
      .def("arena_bytes", &seg::Refiner::arena_bytes);
}
