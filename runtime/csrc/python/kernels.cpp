// Single kernels of runtime._core on one thread, for tests and measurements. Functions with the
// name of one of runtime/core/reference.py have its shapes. Sums over pixels and vectors over
// channels are (c,), maps are (h, w, c).
#include <algorithm>
#include <vector>

#include "../cpu/assignment.h"
#include "numpy.h"

namespace seg::python {

using namespace pybind11::literals;

namespace {

// The memory of a Map for one kernel. Its channels are padded to padded(channels). A bare map has
// unpadded channels and a border of one zero pixel.
class PaddedMap {
 public:
  PaddedMap(int height, int width, int channels, bool bare = false)
      : stride_(bare ? channels : padded(channels)), border_(bare) {
    pitch_ = static_cast<ptrdiff_t>(width + 2 * border_) * stride_;
    data_.assign(static_cast<size_t>(pitch_) * (height + 2 * border_), 0.0f);
  }
  explicit PaddedMap(const Floats& a, bool bare = false)
      : PaddedMap(static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1)),
                  static_cast<int>(a.shape(2)), bare) {
    copy(a.data(), a.shape(0), a.shape(1), a.shape(2));
  }
  Map map() { return {data_.data() + (border_ ? pitch_ + stride_ : 0), pitch_, stride_}; }
  Map row(int y) { return map().from(y, 0); }
  Floats array(py::ssize_t height, py::ssize_t width, py::ssize_t channels) {
    Floats out({height, width, channels});
    copy(out.mutable_data(), height, width, channels);
    return out;
  }

 private:
  template <class T>
  void copy(T* flat, py::ssize_t height, py::ssize_t width, py::ssize_t channels) {
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        float* p = map().at(y, x);
        for (int c = 0; c < channels; ++c, ++flat) {
          if constexpr (std::is_const_v<T>)
            p[c] = *flat;
          else
            *flat = p[c];
        }
      }
    }
  }
  ptrdiff_t stride_, pitch_ = 0;
  bool border_;
  std::vector<float> data_;
};

// Returns n values and zeros up to padded(n).
std::vector<float> pad(const float* values, int n) {
  std::vector<float> out(padded(n), 0.0f);
  std::copy(values, values + n, out.begin());
  return out;
}

// `repeats` is the number of times that the kernels run on the same memory; sums grow each time.
// The time of n repeats minus the time of 0 repeats is the time of the kernels alone.

// Returns the convolution (h, w, out) of x (h, w, in). A 3x3 convolution is computed by
// Kernels::conv3, or with `few` by Kernels::conv. norm, which only conv3 applies, is (3, in), mean,
// scale and shift, or empty.
Floats conv(const Floats& x, const Floats& weight, const Floats& bias, bool relu, bool few,
            const Floats& norm, const std::string& isa, int repeats) {
  const Kernels& k = kernels(isa);
  const int h = x.shape(0), w = x.shape(1), in = x.shape(2), out = weight.shape(0),
            kernel = weight.shape(2), size = kernel * kernel;
  const bool tiles = kernel == 3 && !few;
  require(weight.shape(1) == in && bias.shape(0) == out, "conv: shapes differ");
  std::vector<float> packed(static_cast<size_t>(16) * in * padded(out), 0.0f);
  for (int o = 0; o < out; ++o) {
    for (int c = 0; c < in; ++c) {
      const float* taps = weight.data() + (static_cast<size_t>(o) * in + c) * size;
      float u[16];
      if (tiles) to_tiles(u, taps);
      for (int t = 0; t < (tiles ? 16 : size); ++t)
        packed[(static_cast<size_t>(t) * in + c) * padded(out) + o] = tiles ? u[t] : taps[t];
    }
  }
  const std::vector<float> b = pad(bias.data(), out);
  std::vector<float> affine[3], scratch(strip_floats(in, out));
  if (norm.size() > 0)
    for (int i = 0; i < 3; ++i) affine[i] = pad(norm.data() + i * in, in);
  const Affine a =
      norm.size() > 0 ? Affine{affine[0].data(), affine[1].data(), affine[2].data()} : Affine{};
  PaddedMap input(x, few), result(h, w, out);
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; y += tiles ? 2 : 1) {
      if (!tiles)
        k.conv(result.row(y), input.row(y), packed.data(), b.data(), Map{}, w, kernel, in, out,
               relu);
      for (int first = 0; tiles && first < w; first += 2 * kStrip)
        k.conv3(result.map(), input.map(), a, packed.data(), b.data(), relu, y, first,
                std::min(kStrip, (w - first + 1) / 2), h, w, in, out, scratch.data());
    }
  return result.array(h, w, out);
}

// Returns dx, dw and db. For 3x3, dx is computed by Kernels::conv3, and dw by Kernels::conv3_dw, or
// with `few` by Kernels::conv_dw.
py::tuple conv_backward(const Floats& dy, const Floats& x, const Floats& weight, bool few,
                        const std::string& isa, int repeats) {
  const Kernels& k = kernels(isa);
  const int h = x.shape(0), w = x.shape(1), in = x.shape(2), out = weight.shape(0),
            kernel = weight.shape(2), size = kernel * kernel;
  const bool tiles = kernel == 3 && !few;
  Floats turned({in, out, kernel, kernel}), none(in), no_norm(0), db(out);
  for (int o = 0; o < out; ++o)
    for (int c = 0; c < in; ++c)
      for (int t = 0; t < size; ++t)
        turned.mutable_data()[(static_cast<size_t>(c) * out + o) * size + size - 1 - t] =
            weight.data()[(static_cast<size_t>(o) * in + c) * size + t];
  std::fill(none.mutable_data(), none.mutable_data() + in, 0.0f);
  std::vector<float> packed(static_cast<size_t>(16) * in * padded(out), 0.0f),
      sum(padded(out), 0.0f), scratch(strip_floats(in, out));
  PaddedMap input(x, few), grad(dy);
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; ++y) {
      k.sums(sum.data(), grad.row(y), w, out);
      for (int first = 0; !tiles && first < w; first += kRun)
        k.conv_dw(packed.data(), input.map().from(y, first), grad.map().from(y, first),
                  std::min(kRun, w - first), kernel, in, out);
      for (int first = 0; tiles && y % 2 == 0 && first < w; first += 2 * kStrip)
        k.conv3_dw(packed.data(), input.map(), Affine{}, grad.map(), y, first,
                   std::min(kStrip, (w - first + 1) / 2), h, w, in, out, scratch.data());
    }
  Floats dw({out, in, kernel, kernel});
  for (int o = 0; o < out; ++o) {
    db.mutable_data()[o] = sum[o];
    for (int c = 0; c < in; ++c) {
      double u[16], taps[9];
      for (int t = 0; t < (tiles ? 16 : size); ++t)
        u[t] = packed[(static_cast<size_t>(t) * in + c) * padded(out) + o];
      if (tiles) from_tiles(taps, u);
      for (int t = 0; t < size; ++t)
        dw.mutable_data()[(static_cast<size_t>(o) * in + c) * size + t] =
            static_cast<float>(tiles ? taps[t] : u[t]);
    }
  }
  return py::make_tuple(conv(dy, turned, none, false, false, no_norm, isa, repeats), dw, db);
}

// Returns the sums of x - reference and of its square. x is one row, (1, n, c).
py::tuple moments(const Floats& x, const Floats& reference, const std::string& isa) {
  const int n = x.shape(1), c = x.shape(2);
  PaddedMap map(x);
  std::vector<float> sum(padded(c)), square(padded(c));
  kernels(isa).moments(sum.data(), square.data(), pad(reference.data(), c).data(), map.map(), n, c);
  return py::make_tuple(Floats(c, sum.data()), Floats(c, square.data()));
}

// Returns (x - mean) * scale + shift.
Floats normalize(const Floats& x, const Floats& mean, const Floats& scale, const Floats& shift,
                 const std::string& isa) {
  PaddedMap map(x);
  const int h = x.shape(0), w = x.shape(1), c = x.shape(2);
  const auto m = pad(mean.data(), c), s = pad(scale.data(), c), b = pad(shift.data(), c);
  for (int y = 0; y < h; ++y)
    kernels(isa).normalize(map.row(y), map.row(y), {m.data(), s.data(), b.data()}, w, c);
  return map.array(h, w, c);
}

// Returns the sums of dy and of dy * (x - mean) over all pixels.
py::tuple bn_sums(const Floats& dy, const Floats& x, const Floats& mean, const std::string& isa) {
  PaddedMap d(dy), map(x);
  const int h = x.shape(0), w = x.shape(1), c = x.shape(2);
  const auto m = pad(mean.data(), c);
  std::vector<float> a(padded(c)), b(padded(c));
  for (int y = 0; y < h; ++y)
    kernels(isa).bn_sums(a.data(), b.data(), d.row(y), map.row(y), m.data(), w, c);
  return py::make_tuple(Floats(c, a.data()), Floats(c, b.data()));
}

// Returns dx and its sum over all pixels.
py::tuple bn_backward(const Floats& dy, const Floats& x, const Floats& mean, const Floats& scale,
                      const Floats& a, const Floats& b, bool relu, const std::string& isa,
                      int repeats) {
  PaddedMap d(dy), map(x);
  const int h = x.shape(0), w = x.shape(1), c = x.shape(2);
  const auto m = pad(mean.data(), c), s = pad(scale.data(), c), pa = pad(a.data(), c),
             pb = pad(b.data(), c);
  std::vector<float> sum(padded(c));
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; ++y)
      kernels(isa).bn_backward(d.row(y), sum.data(), d.row(y), map.row(y), m.data(), s.data(),
                               pa.data(), pb.data(), w, c, relu);
  return py::make_tuple(d.array(h, w, c), Floats(c, sum.data()));
}

// Returns a map of the scores r, whose extra channels are kNever.
PaddedMap scores_map(const Floats& r) {
  PaddedMap map(r);
  for (int y = 0; y < r.shape(0); ++y)
    for (int x = 0; x < r.shape(1); ++x)
      for (int c = r.shape(2); c < padded(r.shape(2)); ++c) map.map().at(y, x)[c] = kNever;
  return map;
}

// Returns the probabilities (h, w, c), the log-sum-exp (h, w) and the labels (h, w).
py::tuple softmax(const Floats& r, const std::string& isa, int repeats) {
  const int h = r.shape(0), w = r.shape(1), c = r.shape(2);
  PaddedMap map = scores_map(r), p(h, w, c);
  Floats lse({h, w});
  Ints labels({h, w});
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; ++y) {
      kernels(isa).softmax(p.row(y), lse.mutable_data() + y * w, map.row(y), w, c);
      kernels(isa).argmax(labels.mutable_data() + y * w, map.row(y), w, c);
    }
  return py::make_tuple(p.array(h, w, c), lse, labels);
}

// Returns dr, the sum of the similarity losses and the sum of the guide losses.
py::tuple cluster_loss(const Floats& r, const Ints& labels, const py::object& guide,
                       const Ints& table, float self_weight, float guide_weight,
                       const std::string& isa, int repeats) {
  const int h = r.shape(0), w = r.shape(1), c = r.shape(2);
  PaddedMap map = scores_map(r), dr(h, w, c);
  Ints hard;
  Floats soft;
  const bool has = !guide.is_none(), is_soft = has && py::array(guide).ndim() == 3;
  if (is_soft) soft = py::cast<Floats>(guide);
  if (has && !is_soft) hard = py::cast<Ints>(guide);
  const int classes = is_soft ? soft.shape(2) : table.shape(0);
  double losses[2] = {};
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; ++y)
      kernels(isa).cluster_loss(
          dr.row(y), losses, map.row(y), labels.data() + y * w,
          has && !is_soft ? hard.data() + y * w : nullptr,
          is_soft ? soft.data() + static_cast<size_t>(y) * w * classes : nullptr, classes,
          table.data(), self_weight, guide_weight, w, c);
  return py::make_tuple(dr.array(h, w, c), losses[0], losses[1]);
}

// Returns dr and the loss, which is not multiplied by weight. The scores are gain * r.
py::tuple spatial_loss(const Floats& r, const Floats& gain, float weight, const Floats& scale,
                       bool huber, const std::string& isa, int repeats) {
  const int h = r.shape(0), w = r.shape(1), c = r.shape(2);
  PaddedMap map(r), dr(h, w, c);
  const auto g = pad(gain.data(), c);
  double loss = 0;
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; ++y)
      for (int x = 0; x < w; x += kRun)
        kernels(isa).spatial_loss(dr.map(), &loss, map.map(), g.data(), weight, scale.data(), huber,
                                  y, x, std::min(kRun, w - x), h, w, c);
  return py::make_tuple(dr.array(h, w, c), loss);
}

// Returns each offset (dy, dx) followed by its opposite.
std::vector<Offset> both_ways(const Ints& offsets) {
  std::vector<Offset> out;
  for (int i = 0; i < offsets.shape(0); ++i) {
    const int dy = offsets.data()[2 * i], dx = offsets.data()[2 * i + 1];
    out.insert(out.end(), {Offset{dy, dx}, Offset{-dy, -dx}});
  }
  return out;
}

// Returns (offsets, 2, h, w): the affinities with the pixels at each offset and at its opposite.
Floats affinity(const Floats& image, const Ints& offsets, float sigma, const std::string& isa) {
  const int h = image.shape(0), w = image.shape(1);
  const auto list = both_ways(offsets);
  const int count = static_cast<int>(list.size());
  const std::vector<float> scale(count, 1.0f);
  std::vector<float> row(static_cast<size_t>(w) * count);
  Floats out({count / 2, 2, h, w});
  for (int y = 0; y < h; ++y) {
    kernels(isa).affinity(row.data(), image.data(), list.data(), scale.data(), count, sigma, y, h,
                          w);
    for (int x = 0; x < w; ++x)
      for (int i = 0; i < count; ++i)
        out.mutable_data()[(static_cast<size_t>(i) * h + y) * w + x] = row[x * count + i];
  }
  return out;
}

// Returns dz, the guide loss and the pair loss. affinity is (offsets, h, w), with each offset's
// scale.
py::tuple residual_loss(const Floats& z, const Floats& q, const Floats& confidence,
                        const Floats& class_weight, const Floats& affinity, const Ints& offsets,
                        float lambda, const std::string& isa, int repeats) {
  const Kernels& k = kernels(isa);
  const int h = z.shape(0), w = z.shape(1), c = z.shape(2);
  PaddedMap zm = scores_map(z), p(h, w, c), t(q), dz(h, w, c);
  const auto list = both_ways(offsets);
  const int count = static_cast<int>(list.size());
  const size_t pixels = static_cast<size_t>(h) * w;
  std::vector<float> lse(w), mass(pixels), e(pixels * count);
  double guide = 0, pair = 0;
  for (int y = 0; y < h; ++y) {
    for (int x = 0; x < w; ++x) {
      const size_t n = static_cast<size_t>(y) * w + x;
      for (int i = 0; i < c; ++i) {
        float& target_of = t.map().at(y, x)[i];
        target_of *= confidence.data()[n] * class_weight.data()[i] / static_cast<float>(pixels);
        mass[n] += target_of;
      }
      for (int i = 0; i < count; ++i) {
        const int y1 = y + list[i].dy, x1 = x + list[i].dx;
        if (y1 < 0 || y1 >= h || x1 < 0 || x1 >= w) continue;
        const size_t m = i % 2 == 0 ? n : static_cast<size_t>(y1) * w + x1;
        e[n * count + i] = affinity.data()[(i / 2) * pixels + m];
      }
    }
    k.softmax(p.row(y), lse.data(), zm.row(y), w, c);
    guide += k.cross_entropy(zm.row(y), lse.data(), t.row(y), w, c);
  }
  for (int n = 0; n < repeats; ++n)
    for (int y = 0; y < h; ++y)
      pair += k.residual_loss(dz.map(), p.map(), t.map(), mass.data(), e.data(), list.data(), count,
                              lambda, y, 0, w, h, w, c);
  return py::make_tuple(dz.array(h, w, c), guide, pair);
}

// Returns the new weights and momenta.
py::tuple sgd_step(const Floats& w, const Floats& v, const Floats& dw, float lr, float momentum,
                   const std::string& isa) {
  const size_t n = w.size();
  Floats w1(n, w.data()), v1(n, v.data());
  kernels(isa).sgd(w1.mutable_data(), v1.mutable_data(), dw.data(), n, lr, momentum);
  return py::make_tuple(w1, v1);
}

// Returns the column of each row of cost (rows, columns).
Ints assign(const py::array_t<double, py::array::c_style | py::array::forcecast>& cost) {
  Assignment a;
  a.resize(cost.shape(0), cost.shape(1));
  std::copy(cost.data(), cost.data() + cost.size(), a.cost.begin());
  a.solve();
  return Ints(a.column.size(), a.column.data());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("conv", conv, "x"_a, "weight"_a, "bias"_a, "relu"_a = false, "few"_a = false,
        "norm"_a = Floats(0), "isa"_a = "", "repeats"_a = 1);
  m.def("conv_backward", conv_backward, "dy"_a, "x"_a, "weight"_a, "few"_a = false, "isa"_a = "",
        "repeats"_a = 1);
  m.def("moments", moments, "x"_a, "reference"_a, "isa"_a = "");
  m.def("normalize", normalize, "x"_a, "mean"_a, "scale"_a, "shift"_a, "isa"_a = "");
  m.def("bn_sums", bn_sums, "dy"_a, "x"_a, "mean"_a, "isa"_a = "");
  m.def("bn_backward", bn_backward, "dy"_a, "x"_a, "mean"_a, "scale"_a, "a"_a, "b"_a, "relu"_a,
        "isa"_a = "", "repeats"_a = 1);
  m.def("softmax", softmax, "r"_a, "isa"_a = "", "repeats"_a = 1);
  m.def("cluster_loss", cluster_loss, "r"_a, "labels"_a, "guide"_a, "table"_a, "self_weight"_a,
        "guide_weight"_a, "isa"_a = "", "repeats"_a = 1);
  m.def("spatial_loss", spatial_loss, "r"_a, "gain"_a, "weight"_a, "scale"_a, "huber"_a,
        "isa"_a = "", "repeats"_a = 1);
  m.def("affinity", affinity, "image"_a, "offsets"_a, "sigma"_a, "isa"_a = "");
  m.def("residual_loss", residual_loss, "z"_a, "q"_a, "confidence"_a, "class_weight"_a,
        "affinity"_a, "offsets"_a, "lam"_a, "isa"_a = "", "repeats"_a = 1);
  m.def("sgd_step", sgd_step, "w"_a, "v"_a, "dw"_a, "lr"_a, "momentum"_a, "isa"_a = "");
  m.def("assign", assign, "cost"_a);
}

}  // namespace seg::python
