// The refinement loop on the device.
#include <cmath>
#include <cstring>

#include "common.cuh"
#include "conv.cuh"
#include "pixel.cuh"
#include "refiner.h"
#include "tensor.cuh"

namespace seg::cuda {
namespace {

constexpr int kAhead = 4;  // steps that the device may be behind the host
// Slopes are means', so that a gain of the number of pixels brings them near 1. These bits are for
// norms, which multiply them by up to 316, and for guides that know few pixels.
constexpr int kHeadroom = 7;
constexpr int kShares = 64;          // blocks that share a channel's sums
constexpr size_t kAlign = 64;        // floats
constexpr int kCaptureErrors = 900;  // cudaErrorStreamCaptureUnsupported and seven more

int blocks_of(size_t n, int threads) { return static_cast<int>((n + threads - 1) / threads); }

template <class T>
void copy(T* to, const T* from, size_t n, cudaStream_t stream) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDefault, stream));
}

}  // namespace

struct Refiner::Work {
  // Memory of the host that the device writes to: steps done, and whether they ended.
  struct Told {
    Told() {
      void* p = nullptr;
      CUDA_CHECK(cudaHostAlloc(&p, 2 * sizeof(int), cudaHostAllocMapped));
      host = static_cast<volatile int*>(p);
      CUDA_CHECK(cudaHostGetDevicePointer(&p, p, 0));
      device = static_cast<volatile int*>(p);
    }
    Told(const Told&) = delete;
    ~Told() { cudaFreeHost(const_cast<int*>(host)); }
    volatile int *host = nullptr, *device = nullptr;
  };
  struct OwnStream {
    OwnStream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
    OwnStream(const OwnStream&) = delete;
    ~OwnStream() { cudaStreamDestroy(stream); }
    cudaStream_t stream = nullptr;
  };
  struct Event {
    Event() { CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDefault)); }
    Event(const Event&) = delete;
    ~Event() { cudaEventDestroy(event); }
    cudaEvent_t event = nullptr;
  };
  struct Replay {  // of a step
    Replay() = default;
    Replay(const Replay&) = delete;
    ~Replay() { clear(); }
    void clear() {
      if (exec != nullptr) cudaGraphExecDestroy(exec);
      exec = nullptr;
    }
    cudaGraphExec_t exec = nullptr;
  };

  Work(const RefineOptions& options, int height, int width, bool tensor_cores);

  size_t layout(float* base);
  size_t layout_guide(float* base, const Guide& guide);
  void prepare(const float* image, const Guide& guide, int label_floor, int steps);
  void set_guide(const Guide& of);
  void forward(bool running);
  void losses();
  void backward();
  void step();
  void capture();
  void follow(cudaStream_t later, cudaStream_t earlier);
  void judge_step();
  void restore();
  int last_forward(bool running);
  Input feature() const;
  void list_packed(const Conv& conv, bool turned);
  void pack_weights();
  const Packed& packed_of(const Conv& conv, bool turned) const;
  void finish(const Norm& of, const NormState& state, bool running);

  bool residual() const { return options.objective == kResidual; }
  bool normed() const { return options.final_bn != kNormNone; }
  bool skips() const { return options.skip != kSkipNone; }

  // One of the network's convolutions, by the kernels that were chosen; Turned: the gradient by its
  // input.
  template <int Taps, bool Turned, class Source, class Emit>
  void convolve(const Emit& emit, const Source& source, const Conv& conv) {
    const Packed& weights = packed_of(conv, Turned);
    if (tensor_cores)
      run_conv_tensor<Taps>(emit, source, weights, Turned ? gain : 1.0f, s, over, stream);
    else
      run_conv<Taps>(emit, source, weights, s, over, stream);
  }
  // The gradients by its weights and bias, beside what the stream is given from now on.
  template <int Taps, int Ins>
  void differentiate(const Input& source, const Gradient& slope, const Conv& conv, bool add) {
    float* to = gradient + conv.weight;
    follow(side.stream, stream);
    if (tensor_cores)
      run_conv_gradient_tensor<Taps>(to, parts, source, slope, conv.in, conv.out, gain, add, s,
                                     over, side.stream);
    else
      run_conv_gradient<Taps, Ins>(to, parts, source, slope, conv.in, conv.out, add, s, over,
                                   side.stream);
  }

  RefineOptions options;
  bool tensor_cores;
  Network network;
  Extent s;
  size_t pixels;
  int blocks;           // of a kernel with a thread per pixel
  float gain;           // of slopes on tensor cores
  OwnStream own, side;  // side: what a step's backward pass need not wait for
  cudaStream_t stream;
  Event passed[kAhead], first, last, order;
  Told told;
  Replay replay;
  DeviceBuffer arena, guide_memory, record_memory;
  size_t arena_floats = 0, record_capacity = 0;
  Guide held;  // kind and classes of the guide that guide_memory is laid out for
  Control control{};
  int64_t batches = 0;

  float *parameters = nullptr, *momenta = nullptr, *buffers = nullptr;  // beside each other
  float *kept = nullptr, *gradient = nullptr;
  float *input = nullptr, *skip = nullptr, *head = nullptr;
  std::vector<float*> activation;
  float *d_response = nullptr, *d_feature = nullptr, *spare = nullptr;
  float *target = nullptr, *log_prior = nullptr, *mass = nullptr, *affinity = nullptr;
  float *class_weight = nullptr, *sums = nullptr, *parts = nullptr;
  double *loss_sums = nullptr, *moments = nullptr, *area = nullptr;
  Offset2* offsets = nullptr;
  std::vector<Offset2> offset_list;
  std::vector<NormState> norm;
  NormState head_norm{};
  PackedList packed{};
  int32_t *labels = nullptr, *checked = nullptr;
  int* present = nullptr;
  Control* on_device = nullptr;
  const int* over = nullptr;  // of the steps: those that were queued when the run ended
  GuideMemory guide{};
};

Refiner::Work::Work(const RefineOptions& options, int height, int width, bool tensor_cores)
    : options(options),
      tensor_cores(tensor_cores),
      network(options),
      s{height, width, (width + kRun - 1) / kRun * kRun},
      pixels(static_cast<size_t>(height) * width),
      blocks(blocks_of(pixels, kThreads)),
      gain(std::exp2(std::ceil(std::log2(static_cast<float>(pixels))) - kHeadroom)),
      stream(own.stream) {
  if (residual()) {
    for (const int d : options.distances)
      for (const Offset2 o : {Offset2{0, d}, Offset2{d, 0}, Offset2{d, d}, Offset2{d, -d}})
        offset_list.insert(offset_list.end(), {o, Offset2{-o.dy, -o.dx}});
  }
  if (tensor_cores) {  // code for older GPUs has none, and would compute zeros
    cudaFuncAttributes code{};
    CUDA_CHECK(cudaFuncGetAttributes(&code, conv_tensor<1, 2, 4, Input, Forward>));
    if (code.ptxVersion < 75)
      throw std::invalid_argument(
          "this build has no code for tensor cores on this GPU; build for "
          "compute capability 7.5 or above");
  }
  for (const Conv& conv : network.conv) list_packed(conv, false);
  for (size_t i = 1; i < network.conv.size(); ++i) list_packed(network.conv[i], true);
  if (options.skip == kSkipOwn) list_packed(network.skip, false);
  list_packed(network.head, false);
  list_packed(network.head, true);
  activation.resize(options.blocks);
  norm.resize(options.blocks);
  arena_floats = layout(nullptr);
  arena = DeviceBuffer(arena_floats);
  layout(arena.get());
  CUDA_CHECK(cudaMemsetAsync(arena.get(), 0, arena_floats * sizeof(float), stream));
  copy(offsets, offset_list.data(), offset_list.size(), stream);
  const std::vector<float> ones(options.classes, 1.0f);  // of a head without norm
  copy(head_norm.scale, ones.data(), ones.size(), stream);
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Lays everything out after base and returns how many floats that takes.
size_t Refiner::Work::layout(float* base) {
  size_t used = 0;
  const auto take = [&](size_t n) {
    float* p = base + used;
    used += (n + kAlign - 1) / kAlign * kAlign;
    return p;
  };
  const auto take_doubles = [&](size_t n) { return reinterpret_cast<double*>(take(2 * n)); };
  const auto take_norm = [&](size_t n) {
    return NormState{take(n), take(n), take(n), take(n), take(n), take(n)};
  };
  const size_t c = options.channels, q = options.classes, plane = s.plane();
  const size_t state = 2 * network.parameters + network.buffers;
  parameters = take(state);
  momenta = parameters + network.parameters;
  buffers = momenta + network.parameters;
  kept = take(state);
  gradient = take(network.parameters);
  input = take(options.inputs() * plane);
  for (float*& a : activation) a = take(c * plane);
  if (skips()) skip = take(c * plane);
  head = take(q * plane);
  d_response = take(q * plane);
  d_feature = take(c * plane);
  spare = take(c * plane);
  if (residual()) {
    target = take(q * plane);
    log_prior = take(q * plane);
    mass = take(plane);
    affinity = take(offset_list.size() * plane);
    class_weight = take(q);
    area = take_doubles(q * kAreaShares);
    moments = take_doubles(6);
    offsets = reinterpret_cast<Offset2*>(take(2 * offset_list.size()));
  }
  for (NormState& n : norm) n = take_norm(c);
  head_norm = take_norm(q);
  sums = take(2 * std::max(c, q) * std::max(s.tiles(), kShares));
  loss_sums = take_doubles(static_cast<size_t>(kLosses) * blocks);
  size_t most = 0;
  const auto room = [&](const Conv& conv, int parts) {
    if (tensor_cores) parts = tensor_parts(conv.in, conv.out, s);
    most = std::max(
        most,
        parts * (static_cast<size_t>(conv.kernel) * conv.kernel * conv.in * conv.out + conv.out));
  };
  for (const Conv& conv : network.conv) room(conv, split_of<3, 1>(conv.in, conv.out, s).parts());
  if (skips()) room(network.skip, split_of<3, 1>(network.skip.in, network.skip.out, s).parts());
  room(network.head, split_of<1, 4>(network.head.in, network.head.out, s).parts());
  parts = take(most);
  for (Packed* p = packed.of; p != packed.of + packed.count; ++p) p->words = take(p->count());
  labels = reinterpret_cast<int32_t*>(take(pixels));
  checked = reinterpret_cast<int32_t*>(take(options.early_stop > 0 ? pixels : 0));
  present = reinterpret_cast<int*>(take(q));
  on_device = reinterpret_cast<Control*>(take(sizeof(Control) / sizeof(float)));
  return used;
}

// The same for what a cluster objective's guide takes.
size_t Refiner::Work::layout_guide(float* base, const Guide& of) {
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    float* p = base + used;
    used += (bytes / sizeof(float) + kAlign) / kAlign * kAlign;
    return static_cast<void*>(p);
  };
  const size_t k = of.classes, q = options.classes, most = std::max(k, q) + 1;
  guide = GuideMemory{};
  guide.classes = of.classes;
  guide.clusters = options.classes;
  if (of.hard != nullptr) guide.hard = static_cast<int32_t*>(take(pixels * sizeof(int32_t)));
  if (of.soft != nullptr) guide.soft = static_cast<float*>(take(pixels * k * sizeof(float)));
  guide.mapping = static_cast<int32_t*>(take(k * sizeof(int32_t)));
  guide.present = static_cast<int*>(take((k + 1) * sizeof(int)));
  guide.overlap = static_cast<unsigned long long*>(take(k * q * sizeof(unsigned long long)));
  guide.u = static_cast<double*>(take(most * sizeof(double)));
  guide.v = static_cast<double*>(take(most * sizeof(double)));
  guide.least = static_cast<double*>(take(most * sizeof(double)));
  guide.row_of = static_cast<int*>(take(most * sizeof(int)));
  guide.from = static_cast<int*>(take(most * sizeof(int)));
  guide.used = static_cast<int*>(take(most * sizeof(int)));
  guide.target = static_cast<int32_t*>(take(q * sizeof(int32_t)));
  return used;
}

// Takes a cluster objective's guide; control learns how many of its pixels are known.
void Refiner::Work::set_guide(const Guide& of) {
  const bool any = of.hard != nullptr || of.soft != nullptr;
  const bool same = any && (of.hard != nullptr) == (held.hard != nullptr) &&
                    (of.soft != nullptr) == (held.soft != nullptr) && of.classes == held.classes;
  if (!any) {
    if (guide.classes != 0) replay.clear();
    guide = GuideMemory{};
    held = Guide{};
    return;
  }
  if (!same) {
    replay.clear();
    held = Guide{};
    guide_memory = DeviceBuffer();  // the old before the new
    guide_memory = DeviceBuffer(layout_guide(nullptr, of));
    layout_guide(guide_memory.get(), of);
    held = of;
  }
  const size_t classes = of.classes;
  CUDA_CHECK(cudaMemsetAsync(guide.overlap, 0,
                             classes * options.classes * sizeof(unsigned long long), stream));
  CUDA_CHECK(cudaMemsetAsync(guide.mapping, of.soft != nullptr, classes * sizeof(int32_t), stream));
  control.guide_pixels = static_cast<double>(pixels);
  if (of.soft != nullptr) {
    copy(const_cast<float*>(guide.soft), of.soft, pixels * classes, stream);
  } else {
    copy(const_cast<int32_t*>(guide.hard), of.hard, pixels, stream);
    unsigned long long known = 0;
    CUDA_CHECK(cudaMemsetAsync(&on_device->same, 0, sizeof(known), stream));
    SEG_LAUNCH(guide_census, dim3(blocks), dim3(kThreads), 0, stream, &on_device->same,
               guide.mapping, guide.hard, pixels);
    copy(&known, &on_device->same, 1, stream);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    control.guide_pixels = static_cast<double>(known);
  }
  SEG_LAUNCH(list_present, dim3(1), dim3(kJudges), 0, stream, guide);
  CUDA_CHECK(cudaMemsetAsync(guide.mapping, 0, classes * sizeof(int32_t), stream));
}

// Fills the network's input and, for residual, all that stays the same from step to step.
void Refiner::Work::prepare(const float* image, const Guide& of, int label_floor, int steps) {
  if (static_cast<size_t>(steps) > record_capacity) {
    record_capacity = 0;
    const size_t n = std::max(steps, 16), floats = n * sizeof(StepRecord) / sizeof(float);
    record_memory = DeviceBuffer();
    record_memory = DeviceBuffer(floats);
    CUDA_CHECK(cudaMemsetAsync(record_memory.get(), 0, floats * sizeof(float), stream));
    record_capacity = n;
  }
  control = Control{};
  control.batches = batches;
  control.records = reinterpret_cast<StepRecord*>(record_memory.get());
  control.label_floor = label_floor;
  control.floor = std::max(options.min_labels, label_floor);
  const double count = static_cast<double>(pixels);
  const size_t shared = kJudges * sizeof(double);
  if (residual()) {
    const int some = std::min(blocks, 256);
    for (const bool deviation : {false, true}) {
      SEG_LAUNCH(image_sums, dim3(some), dim3(kThreads), shared, stream, loss_sums, image,
                 static_cast<const double*>(deviation ? moments : nullptr), pixels);
      SEG_LAUNCH(finish_image, dim3(1), dim3(kJudges), shared, stream, moments + 3 * deviation,
                 static_cast<const double*>(loss_sums), some, count, deviation);
    }
    SEG_LAUNCH(guide_area, dim3(kAreaShares, options.classes), dim3(kJudges), shared, stream, area,
               of.soft, pixels);
    SEG_LAUNCH(balance_classes, dim3(1), dim3(kJudges), shared, stream, class_weight,
               static_cast<const double*>(area), options.classes,
               static_cast<double>(options.balance), count);
    SEG_LAUNCH(set_prior, dim3(blocks), dim3(kThreads), 0, stream, log_prior, target, mass,
               affinity, of.soft, static_cast<const float*>(class_weight), image,
               static_cast<const Offset2*>(offsets), static_cast<int>(offset_list.size()),
               options.sigma, options.classes, s);
  } else {
    set_guide(of);
  }
  SEG_LAUNCH(seg::cuda::set_input, dim3(blocks), dim3(kThreads), 0, stream, input, image,
             static_cast<const double*>(moments), s);
  copy(on_device, &control, 1, stream);
  CUDA_CHECK(cudaMemsetAsync(present, 0, options.classes * sizeof(int), stream));
  told.host[0] = told.host[1] = 0;
}

// Makes room for a convolution's weights, as its kernel wants them, in the list.
void Refiner::Work::list_packed(const Conv& conv, bool turned) {
  const int in = turned ? conv.out : conv.in, out = turned ? conv.in : conv.out;
  Packed& p = packed.of[packed.count++];
  p = tensor_cores ? packed_for_tensor(conv.kernel, in, out)
                   : packed_for_conv(conv.kernel, in, out);
  p.weight = conv.weight;
  p.turned = turned;
}

const Packed& Refiner::Work::packed_of(const Conv& conv, bool turned) const {
  return *std::find_if(packed.of, packed.of + packed.count, [&](const Packed& p) {
    return p.weight == conv.weight && p.turned == turned;
  });
}

void Refiner::Work::pack_weights() {
  int most = 0;
  for (int i = 0; i < packed.count; ++i) most = std::max(most, packed.of[i].count());
  const dim3 grid(blocks_of(most, kThreads), packed.count);
  const float* weights = parameters;
  if (tensor_cores)
    SEG_LAUNCH(pack_halves, grid, dim3(kThreads), 0, stream, packed, weights);
  else
    SEG_LAUNCH(pack, grid, dim3(kThreads), 0, stream, packed, weights);
}

// What the head reads: the last block after its norm, with the skip.
Input Refiner::Work::feature() const { return {activation.back(), norm.back(), skip, s.plane()}; }

void Refiner::Work::finish(const Norm& of, const NormState& state, bool running) {
  SEG_LAUNCH(finish_norm, dim3(of.channels), dim3(kThreads), kThreads * sizeof(double), stream,
             state, static_cast<const float*>(running ? nullptr : sums),
             static_cast<const float*>(parameters + of.gamma),
             static_cast<const float*>(parameters + of.beta),
             static_cast<const float*>(buffers + of.mean), s);
}

// From the input to the labels; residual: and the soft-max and the guide term.
void Refiner::Work::forward(bool running) {
  const Input picture{input, NormState{}, nullptr, s.plane()};
  Input x = picture;
  pack_weights();
  for (int i = 0; i < options.blocks; ++i) {
    const Conv& conv = network.conv[i];
    convolve<3, false>(
        Forward{activation[i], parameters + conv.bias, nullptr, sums, conv.out, true, s}, x, conv);
    finish(network.norm[i], norm[i], running);
    x = {activation[i], norm[i], nullptr, s.plane()};
  }
  if (skips()) {
    const Conv& conv = network.skip;
    convolve<3, false>(Forward{skip, parameters + conv.bias, nullptr, nullptr, conv.out, false, s},
                       picture, conv);
  }
  const Conv& conv = network.head;
  convolve<1, false>(Forward{head, parameters + conv.bias, log_prior, normed() ? sums : nullptr,
                             conv.out, false, s},
                     feature(), conv);
  if (normed()) finish(network.head_norm, head_norm, running);
  if (residual())
    SEG_LAUNCH(soften, dim3(blocks), dim3(kThreads), kThreads * sizeof(double), stream, head,
               labels, present, static_cast<const float*>(target), loss_sums, options.classes, s);
  else
    SEG_LAUNCH(seg::cuda::find_labels, dim3(blocks), dim3(kThreads), 0, stream, labels, present,
               (Input{head, head_norm, nullptr, s.plane()}), options.classes, s);
}

// What `later` is given from now on waits for what `earlier` was given so far.
void Refiner::Work::follow(cudaStream_t later, cudaStream_t earlier) {
  CUDA_CHECK(cudaEventRecord(order.event, earlier));
  CUDA_CHECK(cudaStreamWaitEvent(later, order.event, 0));
}

// The record of the step, beside its backward pass.
void Refiner::Work::judge_step() {
  follow(side.stream, stream);
  SEG_LAUNCH(judge, dim3(1), dim3(kJudges), kJudges * sizeof(double), side.stream, on_device,
             static_cast<const double*>(loss_sums), blocks, static_cast<double>(pixels), residual(),
             options.lambda);
}

// The mapping and d_response.
void Refiner::Work::losses() {
  const size_t shared = kJudges * (sizeof(double) + sizeof(int));
  SEG_LAUNCH(begin_step, dim3(1), dim3(kJudges), shared, stream, on_device,
             static_cast<const int*>(present), options.classes, options.weighting, options.mu,
             options.beta);
  const Control* c = on_device;
  if (residual()) {
    SEG_LAUNCH(residual_losses, dim3(blocks), dim3(kThreads), shared, stream, d_response, loss_sums,
               static_cast<const float*>(head), static_cast<const float*>(target),
               static_cast<const float*>(mass), static_cast<const float*>(affinity),
               static_cast<const Offset2*>(offsets), static_cast<int>(offset_list.size()),
               options.lambda, options.classes, s);
  } else {
    const int32_t* own_labels = labels;
    if (guide.classes > 0 && options.mapping == kIndexModulo) {
      SEG_LAUNCH(map_modulo, dim3(1), dim3(kJudges), 0, stream, guide, c,
                 static_cast<const int*>(present));
    } else if (guide.classes > 0) {
      SEG_LAUNCH(measure_overlap, dim3(blocks), dim3(kThreads), 0, stream, guide, c, own_labels,
                 pixels);
      SEG_LAUNCH(assign_overlap, dim3(1), dim3(kJudges), shared, stream, guide, c);
    }
    SpatialLoss spatial{};
    spatial.huber = options.huber;
    for (int d = 0; d < 4; ++d) {
      const double pairs =
          static_cast<double>(d == 1 ? s.height : s.height - 1) * (d == 0 ? s.width : s.width - 1);
      if (pairs > 0 && (d < 2 || options.diagonals))
        spatial.scale[d] = static_cast<float>(1.0 / (pairs * options.classes));
    }
    SEG_LAUNCH(cluster_losses, dim3(blocks), dim3(kThreads), shared, stream, d_response, loss_sums,
               static_cast<const float*>(head), head_norm, own_labels, guide, c, spatial,
               options.classes, s);
  }
}

// From d_response to gradient. The stream goes down the network; what it leaves behind, weights'
// gradients and the losses' judgement, is made on the side, and is there when the stream goes on.
void Refiner::Work::backward() {
  const int last_block = options.blocks - 1;
  const double count = static_cast<double>(pixels);
  const size_t shared = kThreads * sizeof(double), plane = s.plane();
  const auto norm_gradient = [&](const Norm& of, const NormState& state, int shares) {
    SEG_LAUNCH(finish_norm_gradient, dim3(of.channels), dim3(kThreads), shared, stream,
               gradient + of.gamma, gradient + of.beta, state, static_cast<const float*>(sums),
               shares, count);
  };
  const Input picture{input, NormState{}, nullptr, plane};
  const Conv& top = network.head;
  Gradient slope{d_response, nullptr, NormState{}, false, plane};
  if (normed()) {
    SEG_LAUNCH(channel_sums, dim3(kShares, top.out), dim3(kThreads), shared, stream, sums,
               static_cast<const float*>(d_response), static_cast<const float*>(head),
               static_cast<const float*>(head_norm.mean), s);
    norm_gradient(network.head_norm, head_norm, kShares);
    slope = {d_response, head, head_norm, false, plane};
  }
  differentiate<1, 4>(feature(), slope, top, false);
  convolve<1, true>(
      Backward{d_feature, activation[last_block], norm[last_block].mean, sums, top.in, s}, slope,
      top);
  norm_gradient(network.norm[last_block], norm[last_block], s.tiles());
  if (skips())  // a shared skip is conv1, whose own share comes on top
    differentiate<3, 1>(picture, Gradient{d_feature, nullptr, NormState{}, false, plane},
                        network.skip, false);
  float *d = d_feature, *other = spare;
  for (int i = last_block; i >= 0; --i) {
    const Conv& conv = network.conv[i];
    slope = {d, activation[i], norm[i], true, plane};
    const Input x = i > 0 ? Input{activation[i - 1], norm[i - 1], nullptr, plane} : picture;
    if (0 < i && i < last_block) follow(stream, side.stream);  // the side has read `other`
    differentiate<3, 1>(x, slope, conv, i == 0 && options.skip == kSkipShared);
    if (i == 0) break;
    convolve<3, true>(Backward{other, activation[i - 1], norm[i - 1].mean, sums, conv.in, s}, slope,
                      conv);
    norm_gradient(network.norm[i - 1], norm[i - 1], s.tiles());
    std::swap(d, other);
  }
  follow(stream, side.stream);
}

void Refiner::Work::step() {
  over = &on_device->over;
  forward(false);
  losses();
  judge_step();
  backward();
  const int n = static_cast<int>(network.parameters);
  const Control* c = on_device;
  SEG_LAUNCH(update, dim3(blocks_of(n, kThreads)), dim3(kThreads), 0, stream, c, parameters,
             momenta, kept, kept + n, static_cast<const float*>(gradient), options.lr,
             options.momentum, n);
  if (options.early_stop > 0)
    SEG_LAUNCH(compare_labels, dim3(blocks), dim3(kThreads), 0, stream, on_device, checked,
               static_cast<const int32_t*>(labels), pixels);
  Norms all{};
  for (int i = 0; i < options.blocks; ++i) {
    all.norm[all.count] = network.norm[i];
    all.state[all.count++] = norm[i];
  }
  if (normed()) {
    all.norm[all.count] = network.head_norm;
    all.state[all.count++] = head_norm;
  }
  SEG_LAUNCH(end_step, dim3(1), dim3(kJudges), 0, stream, on_device, all, buffers, kept + 2 * n,
             present, options.classes, static_cast<double>(pixels), options.min_labels,
             options.early_stop, told.device);
}

// Records a step.
void Refiner::Work::capture() {
  cudaGraph_t graph = nullptr;
  try {
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      step();
    } catch (const CudaError&) {
      if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
      throw;
    }
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  } catch (const CudaError& error) {
    if (error.code < kCaptureErrors || error.code >= kCaptureErrors + 8) throw;
    cudaGetLastError();  // another thread has waited for the device; the next step tries again
    return;
  }
  const cudaError_t error = cudaGraphInstantiateWithFlags(&replay.exec, graph, 0);
  cudaGraphDestroy(graph);
  cuda_check(error, "cudaGraphInstantiateWithFlags");
}

// The state before the last update.
void Refiner::Work::restore() {
  copy(parameters, static_cast<const float*>(kept), 2 * network.parameters + network.buffers,
       stream);
  batches = control.batches - 1;
}

// A forward pass outside the steps; returns its distinct labels.
int Refiner::Work::last_forward(bool running) {
  over = nullptr;
  forward(running);
  std::vector<int> found(options.classes);
  copy(found.data(), static_cast<const int*>(present), found.size(), stream);
  CUDA_CHECK(cudaMemsetAsync(present, 0, found.size() * sizeof(int), stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
  return static_cast<int>(std::count(found.begin(), found.end(), 1));
}

Refiner::Refiner(const RefineOptions& options, int height, int width, bool tensor_cores)
    : work_(std::make_unique<Work>(options, height, width, tensor_cores)) {}
Refiner::Refiner(Refiner&&) noexcept = default;
Refiner::~Refiner() = default;

RunResult Refiner::run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                       const Guide& guide, int label_floor, int steps,
                       const std::function<bool(int)>& after_step, bool in_step) {
  Work& w = *work_;
  RunResult result;
  bool ended = false;
  int heard = 0;
  w.prepare(image, guide, label_floor, steps);
  CUDA_CHECK(cudaEventRecord(w.first.event, w.stream));
  try {
    for (int step = 0; step < steps && !ended; ++step) {
      cudaEvent_t passed = w.passed[step % kAhead].event;
      if (step >= kAhead) CUDA_CHECK(cudaEventSynchronize(passed));
      if (w.told.host[1]) break;
      if (w.replay.exec != nullptr) {
        CUDA_CHECK(cudaGraphLaunch(w.replay.exec, w.stream));
      } else {
        w.step();  // which loads the kernels
        w.capture();
      }
      CUDA_CHECK(cudaEventRecord(passed, w.stream));
      if (in_step) CUDA_CHECK(cudaEventSynchronize(passed));
      while (after_step && !ended && heard < w.told.host[0]) ended = after_step(++heard);
    }
    CUDA_CHECK(cudaEventRecord(w.last.event, w.stream));
    copy(&w.control, static_cast<const Control*>(w.on_device), 1, w.stream);
    CUDA_CHECK(cudaStreamSynchronize(w.stream));
    while (after_step && !ended && heard < w.control.step) ended = after_step(++heard);
  } catch (...) {  // the arrays are the caller's: nothing may run on them when this returns
    cudaStreamSynchronize(w.side.stream);
    cudaStreamSynchronize(w.stream);
    copy(&w.control, static_cast<const Control*>(w.on_device), 1, w.stream);
    cudaStreamSynchronize(w.stream);
    w.batches = w.control.batches;
    throw;
  }
  const Control& c = w.control;
  w.batches = c.batches;
  result.steps = c.step;
  result.stop = c.stopped ? c.stop : ended && c.step < steps ? kBudget : kSteps;
  if (result.stop == kDiverged && c.have_kept) w.restore();
  CUDA_CHECK(cudaMemsetAsync(w.present, 0, w.options.classes * sizeof(int), w.stream));
  result.clusters = w.last_forward(false);
  if (label_floor > 0 && result.clusters < label_floor && c.have_kept) {
    w.restore();
    result.clusters = w.last_forward(false);
    result.stop = kSilhouette;
  }
  if (w.options.final_bn == kNormRunning) result.clusters = w.last_forward(true);
  const Input response = w.residual() ? Input{w.head, NormState{}, nullptr, w.s.plane()}
                                      : Input{w.head, w.head_norm, nullptr, w.s.plane()};
  SEG_LAUNCH(write_scores, dim3(w.blocks), dim3(kThreads), 0, w.stream, scores, response,
             !w.residual(), w.options.classes, w.s);
  copy(labels, static_cast<const int32_t*>(w.labels), w.pixels, w.stream);
  const int written = std::min(result.steps + (result.stop == kDiverged), steps);
  copy(records, static_cast<const StepRecord*>(c.records), written, w.stream);
  CUDA_CHECK(cudaStreamSynchronize(w.stream));
  return result;
}

Refiner::State Refiner::state() const {
  const Work& w = *work_;
  State out{std::vector<float>(w.network.parameters), std::vector<float>(w.network.parameters),
            std::vector<float>(w.network.buffers), w.batches};
  copy(out.parameters.data(), static_cast<const float*>(w.parameters), out.parameters.size(),
       w.stream);
  copy(out.momenta.data(), static_cast<const float*>(w.momenta), out.momenta.size(), w.stream);
  copy(out.buffers.data(), static_cast<const float*>(w.buffers), out.buffers.size(), w.stream);
  CUDA_CHECK(cudaStreamSynchronize(w.stream));
  return out;
}

void Refiner::set_state(const State& state) {
  Work& w = *work_;
  copy(w.parameters, state.parameters.data(), w.network.parameters, w.stream);
  copy(w.momenta, state.momenta.data(), w.network.parameters, w.stream);
  copy(w.buffers, state.buffers.data(), w.network.buffers, w.stream);
  CUDA_CHECK(cudaStreamSynchronize(w.stream));
  w.batches = state.batches;
}

const RefineOptions& Refiner::options() const { return work_->options; }
int Refiner::height() const { return work_->s.height; }
int Refiner::width() const { return work_->s.width; }
size_t Refiner::arena_bytes() const { return work_->arena_floats * sizeof(float); }
Stream Refiner::stream() const { return work_->stream; }
float Refiner::milliseconds() const {
  float out = 0;
  CUDA_CHECK(cudaEventElapsedTime(&out, work_->first.event, work_->last.event));
  return out;
}

}  // namespace seg::cuda
