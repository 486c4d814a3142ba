// The guided filter on the device. Window sums slide down the columns and then along the rows, so
// the cost does not depend on the radius. Sums are float32. To keep their rounding errors small,
// the guidance is centred around zero and each chunk of pixels starts with a new sum.
//
// The classes are computed in turns. A turn computes as many classes as scratch memory has room
// for. Scratch memory holds planes [plane][height][width]: column sums, statistics and
// coefficients. "Lifted" in a name means: upsampled to full size.
#include <algorithm>

#include "common.cuh"
#include "guided_filter.h"
#include "place.cuh"

#ifndef SEG_FILTER_SCRATCH
#define SEG_FILTER_SCRATCH (64 << 20)  // bytes of the planes of a turn's classes; tests use fewer
#endif

namespace seg::cuda {
namespace {

constexpr int kColumns = 128;  // threads of a block; in sum_columns() one per column
constexpr int kChunk = 64;     // least rows, or columns, of a chunk (Size::chunk)
constexpr int kTile = 32;      // pixels of a warp's step along its rows
constexpr int kPitch = kTile + 1;
constexpr float kCentre = 0.5f;  // of guidance in [0, 1]: centred, its products cancel less

// The size of the picture and the radius of the windows.
struct Size {
  int height, width, radius;
  // Returns the number of rows, or columns, of a chunk: the pixels that one running sum slides
  // over. The start of a sum costs 2 radius additions, so chunks are longer for large radii.
  __host__ __device__ int chunk() const {
    const int most = height > width ? height : width, wanted = (4 * radius + 31) / 32 * 32;
    return wanted < kChunk ? kChunk : wanted < most ? wanted : (most + 31) / 32 * 32;
  }
  __device__ size_t at(int y, int x) const { return static_cast<size_t>(y) * width + x; }
  __host__ __device__ size_t plane() const { return static_cast<size_t>(height) * width; }
};

// A running sum with Kahan's correction (1965): `lost` is the part that rounding has removed. So
// the sum does not become less exact the further its window slides.
struct Sum {
  float value = 0, lost = 0;
  __device__ void add(float x) {
    const float corrected = x - lost, next = value + corrected;
    lost = (next - value) - corrected;
    value = next;
  }
};

// Returns 1 / the number of pixels of the window around (y, x).
__device__ float share(Size s, int y, int x) {
  const int rows = min(y + s.radius, s.height - 1) - max(y - s.radius, 0) + 1;
  const int columns = min(x + s.radius, s.width - 1) - max(x - s.radius, 0) + 1;
  return 1.0f / (static_cast<float>(rows) * columns);
}

// The features of a pixel: guidance [G], guidance products [G (G + 1) / 2], then for each class the
// value and guidance * value [1 + G]. guidance is [height][width][G], values is
// [height][width][classes]. A turn computes the classes first ... end - 1.
template <int G>
struct Features {
  static constexpr int kGuidance = G + G * (G + 1) / 2;
  const float *guidance, *values;
  int classes, first, end;
  Size size;
};

// A source of features for sum_columns(): load(out, group, y, x) writes the N features of a group
// at a pixel, first(group) returns the plane of the first feature, count(group) the number of
// planes that are written.
template <int G>
struct GuideFeatures {
  static constexpr int N = Features<G>::kGuidance;
  Features<G> of;

  __device__ void load(float* out, int, int y, int x) const {
    float* products = out + G;
    for (int g = 0; g < G; ++g) out[g] = of.guidance[of.size.at(y, x) * G + g] - kCentre;
    for (int i = 0; i < G; ++i)
      for (int j = i; j < G; ++j) *products++ = out[i] * out[j];
  }
  __device__ int first(int) const { return 0; }
  __device__ int count(int) const { return N; }
};

// The features of kTogether classes. The guidance of a pixel is read once for all these classes,
// and their values are neighbours in memory.
template <int G>
struct ClassFeatures {
  static constexpr int kTogether = 4, N = kTogether * (G + 1);
  Features<G> of;

  __device__ void load(float* out, int group, int y, int x) const {
    const size_t n = of.size.at(y, x);
    const int first = of.first + group * kTogether;
    const float* values = of.values + n * of.classes + first;
    for (int k = 0; k < kTogether; ++k) {
      const float v = first + k < of.end ? values[k] : 0.0f;
      out[k * (G + 1)] = v;
      for (int g = 0; g < G; ++g) out[k * (G + 1) + 1 + g] = v * (of.guidance[n * G + g] - kCentre);
    }
  }
  __device__ int first(int group) const { return Features<G>::kGuidance + group * N; }
  __device__ int count(int group) const {
    return min(N, (of.end - of.first - group * kTogether) * (G + 1));
  }
};

// Planes as features: each is a group of its own.
struct Planes {
  static constexpr int N = 1;
  const float* data;
  Size size;
  __device__ void load(float* out, int plane, int y, int x) const {
    *out = data[plane * size.plane() + size.at(y, x)];
  }
  __device__ int first(int plane) const { return plane; }
  __device__ int count(int) const { return 1; }
};

// Writes out[plane][y][x] = the sum over the rows of the window around y. A thread slides down a
// chunk of rows in one column. The grid is (group, columns, chunk), so that blocks which run
// together read the same pixels, which are then in the cache.
template <class Source>
__global__ void sum_columns(float* out, Source source, Size s) {
  const int x = blockIdx.y * blockDim.x + threadIdx.x, group = blockIdx.x;
  const int begin = blockIdx.z * s.chunk(), end = min(begin + s.chunk(), s.height);
  if (x >= s.width) return;
  Sum sum[Source::N];
  const auto add = [&](int y, float sign) {
    float value[Source::N];
    source.load(value, group, y, x);
    for (int i = 0; i < Source::N; ++i) sum[i].add(sign * value[i]);
  };
  float* const planes = out + source.first(group) * s.plane();
  const int count = source.count(group);
  for (int y = max(begin - s.radius, 0); y < min(begin + s.radius, s.height); ++y) add(y, 1);
  for (int y = begin; y < end; ++y) {
    if (y + s.radius < s.height) add(y + s.radius, 1);
    for (int i = 0; i < Source::N; ++i)
      if (i < count) planes[i * s.plane() + s.at(y, x)] = sum[i].value;
    if (y >= s.radius) add(y - s.radius, -1);
  }
}

// Calls emit(group, y, x, sums) with the window sums of N planes, computed from column sums. A
// block is one warp. It slides along a chunk of columns in kTile rows, one row per lane, kTile
// columns at a time. Each tile is transposed in shared memory, so that lanes read and write
// neighbouring pixels. The grid is (group, chunk, rows).
template <int N, class Emit>
__global__ void sum_rows(const float* columns, Emit emit, Size s) {
  SEG_SHARED(tile);  // [N][kTile rows][kPitch]
  const int lane = threadIdx.x, group = blockIdx.x, top = blockIdx.z * kTile;
  const int begin = blockIdx.y * s.chunk(), end = min(begin + s.chunk(), s.width);
  const int rows = min(kTile, s.height - top);
  const float* plane = columns + static_cast<size_t>(group) * N * s.plane();
  const int before = (2 * s.radius + kTile - 1) / kTile * kTile;  // columns of the first window
  Sum sum[N];
  for (int left = begin - before; left < end; left += kTile) {
    const int count = min(kTile, end - left);
    const int ahead = left + lane + s.radius, behind = left + lane - s.radius - 1;
    const bool enters = lane < count && ahead >= max(begin - s.radius, 0) && ahead < s.width,
               leaves = lane < count && behind >= 0 && left + lane > begin;
    for (int n = 0; n < N; ++n)
      for (int row = 0; row < rows; ++row) {
        const float* p = plane + n * s.plane() + s.at(top + row, 0);
        float change = 0;
        if (enters) change += p[ahead];
        if (leaves) change -= p[behind];
        tile[(n * kTile + row) * kPitch + lane] = change;
      }
    __syncwarp();
    for (int n = 0; n < N; ++n)
      for (int i = 0; i < count; ++i) {
        float* at = tile + (n * kTile + lane) * kPitch + i;
        if (lane >= rows) break;
        sum[n].add(*at);
        *at = sum[n].value;
      }
    __syncwarp();
    if (lane < count && left >= begin)
      for (int row = 0; row < rows; ++row) {
        float window[N];
        for (int n = 0; n < N; ++n) window[n] = tile[(n * kTile + row) * kPitch + lane];
        emit(group, top + row, left + lane, window);
      }
    __syncwarp();
  }
}

// Writes planes from the window sums of the guidance: its mean [G] and the inverse of its
// covariance + eps I [G (G + 1) / 2], the upper triangle row by row.
template <int G>
struct Statistics {
  float* out;
  float eps;
  Size size;

  __device__ void operator()(int, int y, int x, const float* sums) const {
    const float n = share(size, y, x);
    float* p = out + size.at(y, x);
    const size_t step = size.plane();
    if constexpr (G == 1) {
      const float mean = sums[0] * n;
      p[0] = mean;
      p[step] = 1.0f / (sums[1] * n - mean * mean + eps);
    } else {
      const float m0 = sums[0] * n, m1 = sums[1] * n, m2 = sums[2] * n;
      const float c0 = sums[3] * n - m0 * m0 + eps, c1 = sums[4] * n - m0 * m1,
                  c2 = sums[5] * n - m0 * m2, c3 = sums[6] * n - m1 * m1 + eps,
                  c4 = sums[7] * n - m1 * m2, c5 = sums[8] * n - m2 * m2 + eps;
      const float i0 = c3 * c5 - c4 * c4, i1 = c2 * c4 - c1 * c5, i2 = c1 * c4 - c2 * c3;
      const float r = 1.0f / (c0 * i0 + c1 * i1 + c2 * i2);
      p[0] = m0, p[step] = m1, p[2 * step] = m2;
      p[3 * step] = i0 * r, p[4 * step] = i1 * r, p[5 * step] = i2 * r;
      p[6 * step] = (c0 * c5 - c2 * c2) * r;
      p[7 * step] = (c1 * c2 - c0 * c4) * r;
      p[8 * step] = (c0 * c3 - c1 * c1) * r;
    }
  }
};

// Writes the coefficients a [G] and b of a class, planes [class][G + 1], from its window sums and
// the planes of Statistics.
template <int G>
struct Solution {
  float* out;
  const float* statistics;
  Size size;

  __device__ void operator()(int k, int y, int x, const float* sums) const {
    const float n = share(size, y, x), mean = sums[0] * n;
    const size_t step = size.plane(), at = size.at(y, x);
    const float* s = statistics + at;
    float* p = out + k * (G + 1) * step + at;
    if constexpr (G == 1) {
      const float a = (sums[1] * n - s[0] * mean) * s[step];
      p[0] = a;
      p[step] = mean - a * s[0];
    } else {
      float c[3];
      for (int g = 0; g < 3; ++g) c[g] = sums[1 + g] * n - s[g * step] * mean;
      const float i0 = s[3 * step], i1 = s[4 * step], i2 = s[5 * step], i3 = s[6 * step],
                  i4 = s[7 * step], i5 = s[8 * step];
      const float a0 = i0 * c[0] + i1 * c[1] + i2 * c[2], a1 = i1 * c[0] + i3 * c[1] + i4 * c[2],
                  a2 = i2 * c[0] + i4 * c[1] + i5 * c[2];
      p[0] = a0, p[step] = a1, p[2 * step] = a2;
      p[3 * step] = mean - a0 * s[0] - a1 * s[step] - a2 * s[2 * step];
    }
  }
};

// Writes the mean coefficients of the window, converted to guidance that is not centred: out
// [height][G + 1][classes][width].
template <int G>
struct Store {
  float* out;
  int classes, first;
  Size size;

  __device__ void operator()(int k, int y, int x, const float* sums) const {
    const float n = share(size, y, x);
    float b = sums[G] * n;
    for (int g = 0; g <= G; ++g) {
      const float a = g < G ? sums[g] * n : b;
      b -= kCentre * a;
      out[((static_cast<size_t>(y) * (G + 1) + g) * classes + first + k) * size.width + x] = a;
    }
  }
};

// Writes the filtered values out [height][width][classes].
template <int G>
struct Apply {
  float* out;
  const float* guidance;
  int classes, first;
  Size size;

  __device__ void operator()(int k, int y, int x, const float* sums) const {
    const float n = share(size, y, x);
    const size_t at = size.at(y, x);
    float v = sums[G] * n;
    for (int g = 0; g < G; ++g) v += sums[g] * n * (guidance[at * G + g] - kCentre);
    out[at * classes + first + k] = v;
  }
};

// Returns a . guidance + b of class k at a full-size pixel, interpolated from coefficients
// [low_height][G + 1][classes][low_width]. level [G] is the guidance of that pixel.
template <int G>
struct Lifted {
  const float* coefficients;
  int low_height, low_width, height, width, classes;

  __device__ float operator()(const Place& y, const Place& x, int k, const float* level) const {
    float v = 0;
    for (int g = 0; g <= G; ++g) {
      const float* above = row(y.low, g, k);
      const float* below = row(y.high, g, k);
      const float left = above[x.low] + y.weight * (below[x.low] - above[x.low]);
      const float right = above[x.high] + y.weight * (below[x.high] - above[x.high]);
      const float c = left + x.weight * (right - left);
      v += g < G ? c * level[g] : c;
    }
    return v;
  }
  __device__ const float* row(int y, int g, int k) const {
    return coefficients + ((static_cast<size_t>(y) * (G + 1) + g) * classes + k) * low_width;
  }
};

// Does the work of apply_coefficients(). One thread per pixel; neighbouring threads read the same
// coefficients.
template <int G>
__global__ void apply_lifted(float* values, Lifted<G> lifted, const float* guidance) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x >= lifted.width) return;
  const Place at_y(y, lifted.height, lifted.low_height), at_x(x, lifted.width, lifted.low_width);
  const size_t n = static_cast<size_t>(y) * lifted.width + x;
  for (int k = 0; k < lifted.classes; ++k)
    values[n * lifted.classes + k] = lifted(at_y, at_x, k, guidance + n * G);
}

// Does the work of joint_upsample(). One thread per pixel.
template <int G>
__global__ void best_lifted(int32_t* labels, float* confidence, Lifted<G> lifted,
                            const uint8_t* guidance) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x >= lifted.width) return;
  const Place at_y(y, lifted.height, lifted.low_height), at_x(x, lifted.width, lifted.low_width);
  const size_t n = static_cast<size_t>(y) * lifted.width + x;
  float level[G + 1];
  for (int g = 0; g < G; ++g) level[g] = guidance[n * G + g] * (1.0f / 255);
  float best = -3.0e38f;
  int32_t label = 0;
  for (int k = 0; k < lifted.classes; ++k) {
    const float v = lifted(at_y, at_x, k, level);
    if (v > best) best = v, label = k;
  }
  labels[n] = label;
  confidence[n] = min(max(best, 0.0f), 1.0f);
}

// Does the work of shrink(). One thread per channel of a low pixel.
__global__ void mean_areas(float* out, const float* picture, int low_height, int low_width,
                           int height, int width, int channels) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (i >= low_width * channels) return;
  const int x = i / channels, c = i % channels;
  const double tall = static_cast<double>(height) / low_height,
               wide = static_cast<double>(width) / low_width;
  const double top = y * tall, left = x * wide;
  float sum = 0;
  for (int v = static_cast<int>(top); v < height && v < top + tall - 1e-6; ++v) {
    const float rows = static_cast<float>((min(top + tall, v + 1.0) - max(top, 1.0 * v)) / tall);
    float line = 0;
    for (int u = static_cast<int>(left); u < width && u < left + wide - 1e-6; ++u) {
      const double part = min(left + wide, u + 1.0) - max(left, 1.0 * u);
      line += static_cast<float>(part / wide) *
              picture[(static_cast<size_t>(v) * width + u) * channels + c];
    }
    sum += rows * line;
  }
  out[static_cast<size_t>(y) * low_width * channels + i] = sum;
}

// Does the work of bilinear_coefficients(). One thread per class of a pixel.
__global__ void lay_rows(float* coefficients, const float* scores, size_t pixels, int width,
                         int classes) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= pixels * classes) return;
  const size_t n = i / classes, y = n / width;
  coefficients[(y * classes + i % classes) * width + n % width] = scores[i];
}

template <int G>
void apply_of(float* values, const Lifted<G>& lifted, const float* guidance, Stream stream) {
  const dim3 grid((lifted.width + kColumns - 1) / kColumns, lifted.height);
  SEG_LAUNCH(apply_lifted<G>, grid, dim3(kColumns), 0, stream, values, lifted, guidance);
}

template <int G>
void upsample(int32_t* labels, float* confidence, const Lifted<G>& lifted, const uint8_t* guidance,
              Stream stream) {
  const dim3 grid((lifted.width + kColumns - 1) / kColumns, lifted.height);
  SEG_LAUNCH(best_lifted<G>, grid, dim3(kColumns), 0, stream, labels, confidence, lifted, guidance);
}

template <class Source>
void columns(float* out, const Source& source, Size s, int groups, Stream stream) {
  const dim3 grid(groups, (s.width + kColumns - 1) / kColumns,
                  (s.height + s.chunk() - 1) / s.chunk());
  SEG_LAUNCH(sum_columns<Source>, grid, dim3(kColumns), 0, stream, out, source, s);
}

template <int N, class Emit>
void rows(const float* columns, const Emit& emit, Size s, int groups, Stream stream) {
  const dim3 grid(groups, (s.width + s.chunk() - 1) / s.chunk(), (s.height + kTile - 1) / kTile);
  const size_t shared = sizeof(float) * N * kTile * kPitch;
  SEG_LAUNCH((sum_rows<N, Emit>), grid, dim3(kTile), shared, stream, columns, emit, s);
}

// Returns the number of classes of a turn. SEG_FILTER_SCRATCH limits the memory of their planes,
// whatever the number of classes is. A turn has at least eight classes (or all), because eight
// values share a sector of memory.
int classes_of_a_turn(size_t pixels, int guidance_channels, int classes) {
  const size_t eight = 8 * 2 * sizeof(float) * (guidance_channels + 1) * pixels;
  return static_cast<int>(
      std::min<size_t>(classes, 8 * std::max<size_t>(1, SEG_FILTER_SCRATCH / eight)));
}

// Runs both passes of the filter, turn by turn, and calls emit with the window sums of the
// coefficients. emit.first is set to the first class of the turn.
template <int G, class Emit>
void filter(float* scratch, Features<G> features, Emit emit, float eps, Stream stream) {
  const Size s = features.size;
  const int turn = classes_of_a_turn(s.plane(), G, features.classes);
  constexpr int kGuidance = Features<G>::kGuidance, kTogether = ClassFeatures<G>::kTogether;
  float* const sums = scratch;  // planes of the guidance and of the turn
  float* const statistics =
      sums + (kGuidance + (G + 1) * turn) * s.plane();    // planes of the guidance
  float* const raw = statistics + kGuidance * s.plane();  // planes of the turn
  columns(sums, GuideFeatures<G>{features}, s, 1, stream);
  rows<kGuidance>(sums, Statistics<G>{statistics, eps, s}, s, 1, stream);
  for (int first = 0; first < features.classes; first += turn) {
    emit.first = features.first = first;
    features.end = std::min(first + turn, features.classes);
    const int count = features.end - first;
    columns(sums, ClassFeatures<G>{features}, s, (count + kTogether - 1) / kTogether, stream);
    rows<G + 1>(sums + kGuidance * s.plane(), Solution<G>{raw, statistics, s}, s, count, stream);
    columns(sums, Planes{raw, s}, s, (G + 1) * count, stream);
    rows<G + 1>(sums, emit, s, count, stream);
  }
}

template <int G>
void coefficients_of(float* out, float* scratch, const Features<G>& features, float eps,
                     Stream stream) {
  filter(scratch, features, Store<G>{out, features.classes, 0, features.size}, eps, stream);
}

template <int G>
void filter_of(float* out, float* scratch, const Features<G>& features, float eps, Stream stream) {
  filter(scratch, features, Apply<G>{out, features.guidance, features.classes, 0, features.size},
         eps, stream);
}

}  // namespace

size_t filter_scratch(int height, int width, int guidance_channels, int classes) {
  const size_t guidance = guidance_channels * (guidance_channels + 3) / 2,
               pixels = static_cast<size_t>(height) * width;
  return 2 *
         (guidance +
          (guidance_channels + 1) * classes_of_a_turn(pixels, guidance_channels, classes)) *
         pixels;
}

void guided_coefficients(float* coefficients, float* scratch, const float* guidance,
                         const float* values, int height, int width, int guidance_channels,
                         int classes, int radius, float eps, Stream stream) {
  const Size s{height, width, std::min(radius, std::max(height, width))};
  if (guidance_channels == 1)
    coefficients_of(coefficients, scratch, Features<1>{guidance, values, classes, 0, classes, s},
                    eps, stream);
  else
    coefficients_of(coefficients, scratch, Features<3>{guidance, values, classes, 0, classes, s},
                    eps, stream);
}

void guided_filter(float* out, float* scratch, const float* guidance, const float* values,
                   int height, int width, int guidance_channels, int classes, int radius, float eps,
                   Stream stream) {
  const Size s{height, width, std::min(radius, std::max(height, width))};
  if (guidance_channels == 1)
    filter_of(out, scratch, Features<1>{guidance, values, classes, 0, classes, s}, eps, stream);
  else
    filter_of(out, scratch, Features<3>{guidance, values, classes, 0, classes, s}, eps, stream);
}

void apply_coefficients(float* values, const float* coefficients, const float* guidance,
                        int low_height, int low_width, int height, int width, int guidance_channels,
                        int classes, Stream stream) {
  if (guidance_channels == 1)
    apply_of(values, Lifted<1>{coefficients, low_height, low_width, height, width, classes},
             guidance, stream);
  else
    apply_of(values, Lifted<3>{coefficients, low_height, low_width, height, width, classes},
             guidance, stream);
}

void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guidance, int low_height, int low_width, int height, int width,
                    int guidance_channels, int classes, Stream stream) {
  if (guidance_channels == 0)
    upsample(labels, confidence,
             Lifted<0>{coefficients, low_height, low_width, height, width, classes}, guidance,
             stream);
  else
    upsample(labels, confidence,
             Lifted<3>{coefficients, low_height, low_width, height, width, classes}, guidance,
             stream);
}

void bilinear_coefficients(float* coefficients, const float* scores, int height, int width,
                           int classes, Stream stream) {
  const size_t pixels = static_cast<size_t>(height) * width, n = pixels * classes;
  SEG_LAUNCH(lay_rows, dim3(static_cast<unsigned>((n + kColumns - 1) / kColumns)), dim3(kColumns),
             0, stream, coefficients, scores, pixels, width, classes);
}

void shrink(float* out, const float* picture, int low_height, int low_width, int height, int width,
            int channels, Stream stream) {
  const dim3 grid((low_width * channels + kColumns - 1) / kColumns, low_height);
  SEG_LAUNCH(mean_areas, grid, dim3(kColumns), 0, stream, out, picture, low_height, low_width,
             height, width, channels);
}

}  // namespace seg::cuda
