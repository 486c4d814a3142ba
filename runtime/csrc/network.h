// The refinement network: its options, the position of each tensor in the flat state vectors, and
// the arguments and results of a run.
//
//    x_1 = norm(relu(conv3x3(input)))     norm: batch norm with the statistics of this picture
//    x_i = norm(relu(conv3x3(x_{i-1})))   i = 2 ... blocks
//    x   = x_blocks + skip                skip: 0, or conv3x3(input) with its own weights (own) or
//                                         with the weights of x_1 (shared)
//    r   = norm(conv1x1(x))               dynaguide, dynaseg; with final_bn none, without norm
//    r   = conv1x1(x) + log prior         residual
//
// The state is three flat float vectors, in the order and layout of PyTorch's state_dict:
// parameters (conv1, bn1, conv2.i, bn2.i, skip, conv3, bn3; weight then bias), momenta (the same),
// and buffers (bn1, bn2.i, bn3; running mean then running variance).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace seg {

// The numbers of the options (runtime/core/options.py explains the options). The last entry of each
// enumeration is the number of its options. kCluster is the objective of dynaguide and of dynaseg.
// Stop is the reason why a run ended.
enum Objective { kResidual = 0, kCluster = 1, kObjectives };
enum Skip { kSkipNone = 0, kSkipShared = 1, kSkipOwn = 2, kSkips };
enum Weighting { kFixed = 0, kFsf = 1, kScf = 2, kWeightings };
enum Mapping { kOverlap = 0, kIndexModulo = 1, kMappings };
enum FinalNorm { kNormNone = 0, kNormImage = 1, kNormRunning = 2, kFinalNorms };
enum Stop {
  kSteps = 0,       // all steps are done
  kMinLabels = 1,   // at most min_labels labels are left
  kSilhouette = 2,  // at most label_floor labels are left
  kConverged = 3,   // kChecks checks found no change
  kDiverged = 4,    // the loss is not finite
  kBudget = 5,      // after_step returned true
  kStops
};

// The constants of the algorithm. python/constants.h passes the constants to Python, where a test
// compares them with those of runtime/core/constants.py.
constexpr double kNormEps = 1e-5;      // is added to the variance in a batch norm
constexpr double kRunningShare = 0.1;  // share of a new picture in the running statistics
constexpr int kMappingSteps = 10;      // the overlap mapping is frozen after these steps
constexpr int kCheckEvery = 10;        // steps between two checks of early_stop
constexpr int kChecks = 3;             // this many consecutive checks without a change end the run
constexpr double kLossChange = 0.01;   // a smaller relative change of the loss counts as none
constexpr float kSmallestPrior = 1e-4f;   // smaller probabilities of a prior are raised to this
constexpr float kNever = -1e30f;          // the score of an extra channel (cpu/kernels.h)
constexpr double kLeastDeviation = 1e-3;  // smaller deviations of a picture are raised to this
constexpr double kLeastArea = 1e-3;       // smaller shares of a class are raised to this
constexpr double kLeastBalanced = 1e-12;  // a smaller sum of balanced shares is raised to this

// The offset from pixel (y, x) to its neighbour (y + dy, x + dx).
struct Offset {
  int dy, dx;
};

// Each list holds every pair of neighbours once. The spatial loss of dynaguide and dynaseg uses the
// first two offsets of kSpatialNeighbours, or all four with the option `diagonals`. residual uses
// all of kPairNeighbours and their opposites, multiplied by each of its distances.
constexpr Offset kSpatialNeighbours[4] = {{1, 0}, {0, 1}, {1, 1}, {1, -1}};
constexpr Offset kPairNeighbours[4] = {{0, 1}, {1, 0}, {1, 1}, {1, -1}};

// Returns the offsets of residual's pairs at the given distances. Each offset is followed by its
// opposite: d, -d.
inline std::vector<Offset> pair_offsets(const std::vector<int>& distances) {
  std::vector<Offset> offsets;
  for (const int s : distances)
    for (const Offset& o : kPairNeighbours)
      offsets.insert(offsets.end(), {{o.dy * s, o.dx * s}, {-o.dy * s, -o.dx * s}});
  return offsets;
}

// The options of a refinement, as in runtime/core/options.py. There lambda is called lam, distances
// is called offsets, and huber is a value of continuity.
struct RefineOptions {
  int objective = kResidual;
  int classes = 2;  // channels of the response map
  int channels = 32;
  int blocks = 2;
  int skip = kSkipNone;
  int final_bn = kNormNone;
  int weighting = kFixed;
  int mapping = kOverlap;
  bool huber = false;
  bool diagonals = false;
  int min_labels = 0;    // end the run at this many labels or fewer; 0: never
  float early_stop = 0;  // share of equal labels of an unchanged check; 0: no checks
  float lr = 0.05f;
  float momentum = 0.9f;
  float mu = 1.0f;
  float beta = 15.0f;
  float lambda = 4.0f;
  float sigma = 0.08f;
  float balance = 0.25f;
  std::vector<int> distances = {1, 2};

  // Returns whether channel k of the response map is class k of the guide. An objective for which
  // this is true corrects the guide and needs one. The channels of the other objectives are
  // clusters without a fixed meaning, and the classes of a guide are mapped to the clusters. Code
  // outside the losses calls this function instead of comparing `objective`.
  bool channels_follow_classes() const { return objective == kResidual; }
  // Returns the number of channels of the network's input: three colours, and for residual the two
  // coordinates of the pixel as well.
  int inputs() const { return channels_follow_classes() ? 5 : 3; }
};

// A convolution: its kernel is kernel x kernel (1 or 3), with `in` input and `out` output channels.
struct Conv {
  int kernel, in, out;
  size_t weight, bias;  // offsets into parameters
};

// A batch norm over `channels` channels.
struct Norm {
  int channels;
  size_t gamma, beta;  // offsets into parameters
  size_t mean, var;    // offsets into buffers
};

// All layers of the network that the options describe. skip and head_norm are zero where the
// options use none; with a shared skip, skip equals conv[0].
struct Network {
  std::vector<Conv> conv;  // of each block
  std::vector<Norm> norm;  // of each block
  Conv skip{};
  Conv head{};
  Norm head_norm{};
  size_t parameters = 0, buffers = 0;  // the lengths of these vectors

  explicit Network(const RefineOptions& o) {
    for (int i = 0; i < o.blocks; ++i) {
      conv.push_back(add_conv(3, i == 0 ? o.inputs() : o.channels, o.channels));
      norm.push_back(add_norm(o.channels));
    }
    if (o.skip == kSkipShared) skip = conv[0];
    if (o.skip == kSkipOwn) skip = add_conv(3, o.inputs(), o.channels);
    head = add_conv(1, o.channels, o.classes);
    if (o.final_bn != kNormNone) head_norm = add_norm(o.classes);
  }

 private:
  Conv add_conv(int kernel, int in, int out) {
    const size_t weight = parameters;
    parameters += static_cast<size_t>(kernel) * kernel * in * out + out;
    return {kernel, in, out, weight, parameters - out};
  }
  Norm add_norm(int channels) {
    const size_t gamma = parameters, mean = buffers;
    parameters += 2 * channels;
    buffers += 2 * channels;
    return {channels, gamma, gamma + channels, mean, mean + channels};
  }
};

// The losses of one step. first is the similarity loss of the cluster objectives; for residual it
// is 0. spatial is the pair loss for residual.
struct StepRecord {
  double total, first, spatial, guide;
  int32_t clusters;  // number of distinct labels before the update
};

// The prior's output: labels hard [height][width] below `classes`, with -1 for unknown, or
// probabilities soft [height][width][classes], or neither. At most one of the two pointers is set.
struct Guide {
  const int32_t* hard = nullptr;
  const float* soft = nullptr;
  int classes = 0;
};

struct RunResult {
  int steps = 0;      // steps that changed the weights
  int stop = kSteps;  // why the run ended, a Stop
  int clusters = 0;   // number of distinct labels of the returned map
};

}  // namespace seg
