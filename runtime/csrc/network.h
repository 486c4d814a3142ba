// The refinement network: its options, where each tensor lies in the flat state vectors, and what a
// run takes and gives.
//
//   x_1 = norm(relu(conv3x3(input)))             norm is batch norm with this picture's statistics
//   x_i = norm(relu(conv3x3(x_{i-1})))           i = 2 .. blocks
//   x   = x_blocks + skip                        skip: own conv3x3(input), conv1(input) or nothing
//   r   = norm(conv1x1(x))                       dynaguide, dynaseg
//   r   = conv1x1(x) + log prior                 residual
//
// The state is three flat float vectors, in the order and layout of PyTorch's state_dict:
// parameters (conv1, bn1, conv2.i, bn2.i, skip, conv3, bn3; weight then bias), momenta (the same),
// and buffers (bn1, bn2.i, bn3; running mean then running variance).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace seg {

// The numbers of the options. The last entry of each enumeration is the number of options.
// kCluster is the objective of dynaguide and of dynaseg.
enum Objective { kResidual = 0, kCluster = 1, kObjectives };
enum Skip { kSkipNone = 0, kSkipShared = 1, kSkipOwn = 2, kSkips };
enum Weighting { kFixed = 0, kFsf = 1, kScf = 2, kWeightings };
enum Mapping { kOverlap = 0, kIndexModulo = 1, kMappings };
enum FinalNorm { kNormNone = 0, kNormImage = 1, kNormRunning = 2, kFinalNorms };
enum Stop {
  kSteps = 0,
  kMinLabels = 1,
  kSilhouette = 2,
  kConverged = 3,
  kDiverged = 4,
  kBudget = 5,
  kStops
};

// The constants of the algorithm. python/constants.h makes them known to Python; a test compares
// them with Python's own.
constexpr double kNormEps = 1e-5;         // is added to the variance in a batch norm
constexpr double kRunningShare = 0.1;     // share of a new picture in the running statistics
constexpr int kMappingSteps = 10;         // the overlap mapping is frozen after these steps
constexpr int kCheckEvery = 10;           // steps between two early-stop checks
constexpr int kChecks = 3;                // consecutive checks without a change stop the loop
constexpr double kLossChange = 0.01;      // a smaller relative change of the loss is no change
constexpr float kSmallestPrior = 1e-4f;   // smaller probabilities of a prior are raised to this
constexpr float kNever = -1e30f;          // the score of a channel that only pads a pixel
constexpr double kLeastDeviation = 1e-3;  // smaller standard deviations of a picture are raised
constexpr double kLeastArea = 1e-3;       // smaller shares of a class in a picture are raised
constexpr double kLeastBalanced = 1e-12;  // a smaller sum of balanced shares is raised

// A neighbour of a pixel: pixel (y, x) with pixel (y + dy, x + dx).
struct Offset {
  int dy, dx;
};

// Each pair of neighbours once: the spatial loss of dynaguide and dynaseg uses the first two, or
// with diagonals all four; residual uses all four at each of its distances, and the opposite ones.
constexpr Offset kSpatialNeighbours[4] = {{1, 0}, {0, 1}, {1, 1}, {1, -1}};
constexpr Offset kPairNeighbours[4] = {{0, 1}, {1, 0}, {1, 1}, {1, -1}};

// The offsets of residual's pairs at these distances; each is followed by its opposite.
inline std::vector<Offset> pair_offsets(const std::vector<int>& distances) {
  std::vector<Offset> offsets;
  for (const int s : distances)
    for (const Offset& o : kPairNeighbours)
      offsets.insert(offsets.end(), {{o.dy * s, o.dx * s}, {-o.dy * s, -o.dx * s}});
  return offsets;
}

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
  int min_labels = 0;    // stop once at most this many labels are left, 0 = never
  float early_stop = 0;  // stop when this share of the labels stays, 0 = never
  float lr = 0.05f;
  float momentum = 0.9f;
  float mu = 1.0f;
  float beta = 15.0f;
  float lambda = 4.0f;
  float sigma = 0.08f;
  float balance = 0.25f;
  std::vector<int> distances = {1, 2};

  // Whether the response map has one channel for each class of the guide, which it corrects and
  // needs. Otherwise its channels are clusters without a meaning, and a guide is mapped to them.
  // Code that computes no loss asks this and compares the objective with no name.
  bool channels_follow_classes() const { return objective == kResidual; }
  // Channels of the network's input: the colours, and perhaps the coordinates.
  int inputs() const { return channels_follow_classes() ? 5 : 3; }
};

struct Conv {
  int kernel, in, out;
  size_t weight, bias;  // offsets into parameters
};

struct Norm {
  int channels;
  size_t gamma, beta;  // offsets into parameters
  size_t mean, var;    // offsets into buffers
};

struct Network {
  std::vector<Conv> conv;  // the blocks
  std::vector<Norm> norm;
  Conv skip{};
  Conv head{};
  Norm head_norm{};
  size_t parameters = 0, buffers = 0;

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

struct StepRecord {
  double total, first, spatial, guide;  // first: similarity, or the guide term of residual
  int32_t clusters;                     // distinct labels before the update
};

// What the prior says: hard [height][width] (-1 = unknown), soft [height][width][classes], or none.
struct Guide {
  const int32_t* hard = nullptr;
  const float* soft = nullptr;
  int classes = 0;
};

struct RunResult {
  int steps = 0;
  int stop = kSteps;
  int clusters = 0;  // in the labels returned
};

}  // namespace seg
