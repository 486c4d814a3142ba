// The refinement loop on the device.
#include <algorithm>
#include <cmath>

#include "control.h"
#include "conv.h"
#include "handles.cuh"
#include "losses.h"
#include "mapping.h"
#include "norm.h"
#include "pixels.cuh"
#include "preparation.h"
#include "refiner.h"
#include "tensor_conv.h"

namespace seg::cuda {
namespace {

constexpr int kAhead = 4;  // most steps that are queued and not yet done
// Gradients are divided by the number of pixels. The gain of tensor cores is that number, rounded
// up to a power of two and divided by 2^kHeadroom. The headroom is needed because batch norms
// multiply gradients by up to 316, and because guides with few known pixels have larger gradients.
constexpr int kHeadroom = 7;
constexpr size_t kAlign = 64;        // floats: arrays of the arena start at multiples
constexpr int kCaptureErrors = 900;  // cudaErrorStreamCaptureUnsupported and seven more

// Queues a copy of n values; both pointers may be host or device memory.
template <class T>
void copy(T* to, const T* from, size_t n, cudaStream_t stream) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDefault, stream));
}

}  // namespace

// The memory, the handles and the steps of a refiner.
struct Refiner::Work {
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
  void restore();
  int last_forward(bool running);
  Input feature() const;
  void list_packed(const Conv& conv, bool turned);
  void pack_weights();
  const Packed& packed_of(const Conv& conv, bool turned) const;

  bool normed() const { return options.final_bn != kNormNone; }
  bool skips() const { return options.skip != kSkipNone; }

  // Computes a convolution of the network, or with Turned the gradient by its input, with the
  // float32 or the tensor-core kernels.
  template <int Taps, bool Turned, class Source, class Emit>
  void convolve(const Emit& emit, const Source& source, const Conv& conv) {
    const Packed& weights = packed_of(conv, Turned);
    if (tensor_cores)
      run_conv_tensor<Taps>(emit, source, weights, Turned ? gain : 1.0f, s, over, stream);
    else
      run_conv<Taps>(emit, source, weights, s, over, stream);
  }
  // Computes the gradients by the weights and the bias of a convolution on the stream `side`, after
  // the work that is queued on `stream` now and at the same time as the work that is queued on
  // `stream` later.
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
  int blocks;           // blocks of a kernel with one thread per pixel
  float gain;           // of gradients on tensor cores
  OwnStream own, side;  // side: see backward()
  cudaStream_t stream;
  Event passed[kAhead], first, last, order;  // ends of steps; start, end of the run; of follow()
  Progress progress;
  Replay replay;
  DeviceBuffer arena, guide_memory, record_memory;
  size_t arena_floats = 0, record_capacity = 0;
  Guide held;  // the kind and the classes of the guide that guide_memory has room for
  Control control{};
  int64_t batches = 0;

  float *parameters = nullptr, *momenta = nullptr, *buffers = nullptr;  // contiguous
  float *kept = nullptr, *gradient = nullptr;
  float *input = nullptr, *skip = nullptr, *head = nullptr;
  std::vector<float*> activation;
  float *d_response = nullptr, *d_feature = nullptr, *spare = nullptr;
  float *target = nullptr, *log_prior = nullptr, *mass = nullptr, *affinity = nullptr;
  float *class_weight = nullptr, *sums = nullptr, *parts = nullptr;
  double *loss_sums = nullptr, *moments = nullptr, *area = nullptr;
  Offset* offsets = nullptr;
  std::vector<Offset> offset_list;
  std::vector<NormState> norm;
  NormState head_norm{};
  PackedList packed{};
  int32_t *labels = nullptr, *checked = nullptr;
  int* present = nullptr;
  Control* on_device = nullptr;
  // &on_device->over during steps, otherwise null. With it, steps that were queued when the run
  // ended do nothing.
  const int* over = nullptr;
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
  if (options.channels_follow_classes()) offset_list = pair_offsets(options.distances);
  if (tensor_cores && !has_tensor_code())
    throw std::invalid_argument(
        "this build has no code for tensor cores on this GPU; build for "
        "compute capability 7.5 or above");
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
  const std::vector<float> ones(options.classes, 1.0f);  // the scale of a head without a norm
  copy(head_norm.scale, ones.data(), ones.size(), stream);
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Sets all pointers into the arena that starts at base, and returns the arena's floats. With a null
// base only the returned number counts.
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
  if (options.channels_follow_classes()) {
    target = take(q * plane);
    log_prior = take(q * plane);
    mass = take(plane);
    affinity = take(offset_list.size() * plane);
    class_weight = take(q);
    area = take_doubles(q * kAreaShares);
    moments = take_doubles(6);
    offsets = reinterpret_cast<Offset*>(take(2 * offset_list.size()));
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
  for (const Conv& conv : network.conv) room(conv, gradient_parts<3, 1>(conv.in, conv.out, s));
  if (skips()) room(network.skip, gradient_parts<3, 1>(network.skip.in, network.skip.out, s));
  room(network.head, gradient_parts<1, 4>(network.head.in, network.head.out, s));
  parts = take(most);
  for (Packed* p = packed.of; p != packed.of + packed.count; ++p) p->words = take(p->count());
  labels = reinterpret_cast<int32_t*>(take(pixels));
  checked = reinterpret_cast<int32_t*>(take(options.early_stop > 0 ? pixels : 0));
  present = reinterpret_cast<int*>(take(q));
  on_device = reinterpret_cast<Control*>(take(sizeof(Control) / sizeof(float)));
  return used;
}

// Sets the pointers of `guide`, for a cluster objective, to memory from base on, and returns the
// floats of that memory. With a null base only the returned number counts.
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

// Copies the guide of a cluster objective to `guide`, and sets the number of its known pixels in
// control. Allocates memory if the guide has another kind or number of classes than the last one.
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
    guide_memory = DeviceBuffer();  // frees the old memory first
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
    count_known(&on_device->same, guide, pixels, stream);
    copy(&known, &on_device->same, 1, stream);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    control.guide_pixels = static_cast<double>(known);
  }
  list_classes(guide, stream);
  CUDA_CHECK(cudaMemsetAsync(guide.mapping, 0, classes * sizeof(int32_t), stream));
}

// Fills the network's input, the control and the values that are constant during a run. image is
// [height][width][3].
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
  if (options.channels_follow_classes()) {
    measure_image(moments, loss_sums, image, pixels, stream);
    weigh_classes(class_weight, area, of.soft, pixels, options, stream);
    prepare_prior(log_prior, target, mass, affinity, of.soft, class_weight, image, offsets,
                  static_cast<int>(offset_list.size()), options, s, stream);
  } else {
    set_guide(of);
  }
  prepare_input(input, image, moments, s, stream);
  copy(on_device, &control, 1, stream);
  CUDA_CHECK(cudaMemsetAsync(present, 0, options.classes * sizeof(int), stream));
  progress.host[0] = progress.host[1] = 0;
}

// Appends a convolution's weights, in the form that its kernel reads, to the list.
void Refiner::Work::list_packed(const Conv& conv, bool turned) {
  const int in = turned ? conv.out : conv.in, out = turned ? conv.in : conv.out;
  Packed& p = packed.of[packed.count++];
  p = tensor_cores ? packed_for_tensor(conv.kernel, in, out)
                   : packed_for_conv(conv.kernel, in, out);
  p.weight = conv.weight;
  p.turned = turned;
}

// Returns the entry of a convolution in the list, for the forward pass or turned.
const Packed& Refiner::Work::packed_of(const Conv& conv, bool turned) const {
  return *std::find_if(packed.of, packed.of + packed.count, [&](const Packed& p) {
    return p.weight == conv.weight && p.turned == turned;
  });
}

// Copies all weights into the forms that the kernels of this step read.
void Refiner::Work::pack_weights() {
  if (tensor_cores)
    pack_for_tensor(packed, parameters, stream);
  else
    pack_for_conv(packed, parameters, stream);
}

// Returns the head's input: the last block after its norm, plus the skip.
Input Refiner::Work::feature() const { return {activation.back(), norm.back(), skip, s.plane()}; }

// Runs the network from the input to the labels, with this picture's statistics or the running
// ones. For residual also computes the soft-max and the guide loss.
void Refiner::Work::forward(bool running) {
  const Input picture{input, NormState{}, nullptr, s.plane()};
  Input x = picture;
  const auto norm_of = [&](const Norm& of, const NormState& state) {
    set_norm(state, running ? nullptr : sums, of, parameters, buffers, s, stream);
  };
  pack_weights();
  for (int i = 0; i < options.blocks; ++i) {
    const Conv& conv = network.conv[i];
    convolve<3, false>(
        Forward{activation[i], parameters + conv.bias, nullptr, sums, conv.out, true, s}, x, conv);
    norm_of(network.norm[i], norm[i]);
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
  if (normed()) norm_of(network.head_norm, head_norm);
  if (options.channels_follow_classes())
    soften_scores(head, labels, present, target, loss_sums, options.classes, s, stream);
  else
    label_pixels(labels, present, Input{head, head_norm, nullptr, s.plane()}, options.classes, s,
                 stream);
}

// Makes the work that is queued on `later` from now on wait for the work that is queued on
// `earlier` up to now.
void Refiner::Work::follow(cudaStream_t later, cudaStream_t earlier) {
  CUDA_CHECK(cudaEventRecord(order.event, earlier));
  CUDA_CHECK(cudaStreamWaitEvent(later, order.event, 0));
}

// Computes the mapping of the guide, the losses and d_response.
void Refiner::Work::losses() {
  const Control* c = on_device;
  start_step(on_device, present, options, stream);
  if (options.channels_follow_classes()) {
    residual_loss(d_response, loss_sums, head, target, mass, affinity, offsets,
                  static_cast<int>(offset_list.size()), options, s, stream);
    return;
  }
  if (guide.classes > 0 && options.mapping == kIndexModulo)
    set_modulo_mapping(guide, c, present, stream);
  else if (guide.classes > 0)
    set_overlap_mapping(guide, c, labels, pixels, stream);
  cluster_loss(d_response, loss_sums, head, head_norm, labels, guide, c, options, s, stream);
}

// Computes gradient from d_response. `stream` computes the gradients by the inputs of the layers,
// from the last layer to the first. At the same time the stream `side` computes the gradients by
// the weights. At the end `stream` waits for `side`.
void Refiner::Work::backward() {
  const int last_block = options.blocks - 1;
  const double count = static_cast<double>(pixels);
  const size_t plane = s.plane();
  const auto norm_gradient = [&](const Norm& of, const NormState& state, int shares) {
    set_norm_gradient(gradient, state, of, sums, shares, count, stream);
  };
  const Input picture{input, NormState{}, nullptr, plane};
  const Conv& top = network.head;
  Gradient slope{d_response, nullptr, NormState{}, false, plane};
  if (normed()) {
    sum_channels(sums, d_response, head, head_norm.mean, top.out, s, stream);
    norm_gradient(network.head_norm, head_norm, kShares);
    slope = {d_response, head, head_norm, false, plane};
  }
  differentiate<1, 4>(feature(), slope, top, false);
  convolve<1, true>(
      Backward{d_feature, activation[last_block], norm[last_block].mean, sums, top.in, s}, slope,
      top);
  norm_gradient(network.norm[last_block], norm[last_block], s.tiles());
  if (skips())  // a shared skip is conv[0]: its gradient is added below
    differentiate<3, 1>(picture, Gradient{d_feature, nullptr, NormState{}, false, plane},
                        network.skip, false);
  float *d = d_feature, *other = spare;
  for (int i = last_block; i >= 0; --i) {
    const Conv& conv = network.conv[i];
    slope = {d, activation[i], norm[i], true, plane};
    const Input x = i > 0 ? Input{activation[i - 1], norm[i - 1], nullptr, plane} : picture;
    if (0 < i && i < last_block) follow(stream, side.stream);  // `side` must have read `other`
    differentiate<3, 1>(x, slope, conv, i == 0 && options.skip == kSkipShared);
    if (i == 0) break;
    convolve<3, true>(Backward{other, activation[i - 1], norm[i - 1].mean, sums, conv.in, s}, slope,
                      conv);
    norm_gradient(network.norm[i - 1], norm[i - 1], s.tiles());
    std::swap(d, other);
  }
  follow(stream, side.stream);
}

// Queues one step.
void Refiner::Work::step() {
  over = &on_device->over;
  forward(false);
  losses();
  follow(side.stream, stream);  // the losses are recorded during the backward pass
  record_losses(on_device, loss_sums, blocks, static_cast<double>(pixels), options, side.stream);
  backward();
  const int n = static_cast<int>(network.parameters);
  update_state(on_device, parameters, kept, gradient, n, options, stream);
  if (options.early_stop > 0) check_labels(on_device, checked, labels, pixels, stream);
  Norms all{};
  for (int i = 0; i < options.blocks; ++i) {
    all.norm[all.count] = network.norm[i];
    all.state[all.count++] = norm[i];
  }
  if (normed()) {
    all.norm[all.count] = network.head_norm;
    all.state[all.count++] = head_norm;
  }
  finish_step(on_device, all, buffers, kept + 2 * n, present, static_cast<double>(pixels), options,
              progress.device, stream);
}

// Records a step as a graph. If another thread disturbs the recording, replay remains empty.
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
    cudaGetLastError();  // another thread waited for the device; the next step records again
    return;
  }
  const cudaError_t error = cudaGraphInstantiateWithFlags(&replay.exec, graph, 0);
  cudaGraphDestroy(graph);
  cuda_check(error, "cudaGraphInstantiateWithFlags");
}

// Restores the state before the last update.
void Refiner::Work::restore() {
  copy(parameters, static_cast<const float*>(kept), 2 * network.parameters + network.buffers,
       stream);
  batches = control.batches - 1;
}

// Runs a forward pass outside the steps and returns the number of its distinct labels.
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
  int reported = 0;  // steps for which after_step was called
  w.prepare(image, guide, label_floor, steps);
  CUDA_CHECK(cudaEventRecord(w.first.event, w.stream));
  try {
    for (int step = 0; step < steps && !ended; ++step) {
      cudaEvent_t passed = w.passed[step % kAhead].event;
      if (step >= kAhead) CUDA_CHECK(cudaEventSynchronize(passed));
      if (w.progress.host[1]) break;
      if (w.replay.exec != nullptr) {
        CUDA_CHECK(cudaGraphLaunch(w.replay.exec, w.stream));
      } else {
        w.step();  // the first step also loads the kernels
        w.capture();
      }
      CUDA_CHECK(cudaEventRecord(passed, w.stream));
      if (in_step) CUDA_CHECK(cudaEventSynchronize(passed));
      while (after_step && !ended && reported < w.progress.host[0]) ended = after_step(++reported);
    }
    CUDA_CHECK(cudaEventRecord(w.last.event, w.stream));
    copy(&w.control, static_cast<const Control*>(w.on_device), 1, w.stream);
    CUDA_CHECK(cudaStreamSynchronize(w.stream));
    while (after_step && !ended && reported < w.control.step) ended = after_step(++reported);
  } catch (...) {  // the caller may free the arrays: no work may use them after this call
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
  const bool soft = w.options.channels_follow_classes();  // the head holds the soft-max
  const Input response{w.head, soft ? NormState{} : w.head_norm, nullptr, w.s.plane()};
  copy_scores(scores, response, !soft, w.options.classes, w.s, w.stream);
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
