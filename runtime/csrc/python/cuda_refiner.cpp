// The class Refiner of runtime._cuda.
#include "cuda_refiner.h"

#include <pybind11/functional.h>

#include <memory>
#include <utility>

#include "../cuda/refiner.h"
#include "arrays.h"
#include "refiner.h"

namespace seg::python {

using namespace pybind11::literals;

namespace {

// A refiner and its device.
struct BoundRefiner {
  int device;
  std::unique_ptr<cuda::Refiner> refiner;

  BoundRefiner(int height, int width, const RefineOptions& options, int device, bool tensor_cores)
      : device(device) {
    on_device(device, [&] {
      refiner = std::make_unique<cuda::Refiner>(options, height, width, tensor_cores);
    });
  }
  BoundRefiner(BoundRefiner&&) noexcept = default;
  // After a fault CUDA cannot free memory: then the refiner is not destroyed.
  ~BoundRefiner() {
    if (refiner == nullptr) return;
    if (cuda::lost) {
      refiner.release();
      return;
    }
    try {
      const DeviceGuard guard(device);
      refiner.reset();
    } catch (const CudaError&) {
      refiner.release();
    }
  }
};

// As run() of core.cpp. If guide is labels, guide_classes is the number of their classes.
py::tuple run(BoundRefiner& self, const py::object& image, const py::object& guide, int label_floor,
              int steps, const std::function<bool(int)>& progress, int guide_classes) {
  return on_device(self.device, [&] {
    cuda::Refiner& refiner = *self.refiner;
    const int height = refiner.height(), width = refiner.width(),
              classes = refiner.options().classes;
    Call call(self.device, reinterpret_cast<uintptr_t>(refiner.stream()));
    const Array picture = call.take<float>("image", image, 3);
    Guide of;
    Array prior;
    const auto fits = [&](const Array& a) { return a.shape[0] == height && a.shape[1] == width; };
    if (!guide.is_none() && py::cast<int>(guide.attr("ndim")) == 2) {
      prior = call.take<int32_t>("guide", guide, 2);
      of.hard = prior.as<int32_t>();
      of.classes = guide_classes;
    } else if (!guide.is_none()) {
      prior = call.take<float>("guide", guide, 3);
      of.soft = prior.as<float>();
      of.classes = static_cast<int>(prior.shape[2]);
    }
    if (!fits(picture) || picture.shape[2] != 3 || (!guide.is_none() && !fits(prior)))
      throw std::invalid_argument("runtime._cuda: image or guide has another size");
    if (of.hard != nullptr && of.classes <= 0)
      throw std::invalid_argument("runtime._cuda: labels need the number of their classes");
    if (refiner.options().channels_follow_classes() &&
        (of.soft == nullptr || of.classes != classes))
      throw std::invalid_argument("runtime._cuda: residual needs probabilities of its classes");
    const Array scores = call.make<float>({height, width, classes});
    const Array labels = call.make<int32_t>({height, width});
    std::vector<StepRecord> records(steps);
    RunResult result;
    {
      const py::gil_scoped_release release;
      result = refiner.run(
          scores.as<float>(), labels.as<int32_t>(), records.data(), picture.as<float>(), of,
          label_floor, steps,
          [&](int done) {
            const py::gil_scoped_acquire acquire;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            if (!progress) return false;
            const bool end = progress(done);
            CUDA_CHECK(cudaSetDevice(self.device));  // progress may have changed the device
            return end;
          },
          static_cast<bool>(progress));
    }
    const auto [losses, clusters] = to_arrays(records, result);
    const auto give = [&](const Array& a) -> py::object {
      if (!call.stays()) return call.give(a);
      // run() has waited, so the array is complete. It may exist longer than the refiner's stream.
      Array out = call.keep(a);
      out.stream = own_stream(self.device);
      return py::cast(out);
    };
    return py::make_tuple(give(scores), give(labels), losses, clusters, result.steps, result.stop,
                          result.clusters);
  });
}

py::dict state(const BoundRefiner& self) {
  return on_device(self.device, [&] {
    const cuda::Refiner::State s = self.refiner->state();
    const auto array = [](const std::vector<float>& v) {
      return py::array_t<float>(v.size(), v.data());
    };
    return py::dict("parameters"_a = array(s.parameters), "momenta"_a = array(s.momenta),
                    "buffers"_a = array(s.buffers), "batches"_a = s.batches);
  });
}

void set_state(BoundRefiner& self, const std::vector<float>& parameters,
               const std::vector<float>& momenta, const std::vector<float>& buffers,
               int64_t batches) {
  on_device(self.device, [&] { self.refiner->set_state({parameters, momenta, buffers, batches}); });
}

}  // namespace

void bind_refiner(py::module_& m) {
  py::class_<BoundRefiner>(m, "Refiner", py::module_local())
      .def(py::init([](int height, int width, const py::dict& options, int, const std::string&,
                       int device, bool tensor_cores) {
             return BoundRefiner(height, width, to_options(options), device, tensor_cores);
           }),
           "height"_a, "width"_a, "options"_a, "threads"_a, "isa"_a = "", "device"_a = 0,
           "tensor_cores"_a = false)
      .def("run", run, "image"_a, "guide"_a, "label_floor"_a, "steps"_a, "progress"_a,
           "guide_classes"_a = 0)
      .def("state", state)
      .def("set_state", set_state, "parameters"_a, "momenta"_a, "buffers"_a, "batches"_a)
      .def("arena_bytes", [](const BoundRefiner& self) { return self.refiner->arena_bytes(); })
      .def("milliseconds", [](const BoundRefiner& self) {
        return on_device(self.device, [&] { return self.refiner->milliseconds(); });
      });
}

}  // namespace seg::python
