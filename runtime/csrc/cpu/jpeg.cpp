// The walk over a JPEG file, as ITU-T T.81 describes such files. Where a file breaks the standard,
// the walk does what libjpeg-turbo does, because OpenCV decodes with that library.
#include "jpeg.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "jpeg_codes.h"

namespace seg {
namespace {

using namespace jpeg;

constexpr int kMostComponents = 4;  // libjpeg finds no others in the header of a scan
constexpr int kMostBlocks = 10;     // of an MCU, by the standard

bool is_restart(int marker) { return marker >= kRst0 && marker <= kRst7; }

// The Huffman tables of Annex K in the form of a DHT segment. Frames of Motion JPEG files lack
// them.
constexpr uint8_t kStandardTables[] = {
    0x00, 0x00, 0x01, 0x05, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x00, 0x02,
    0x01, 0x03, 0x03, 0x02, 0x04, 0x03, 0x05, 0x05, 0x04, 0x04, 0x00, 0x00, 0x01, 0x7d, 0x01, 0x02,
    0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71,
    0x14, 0x32, 0x81, 0x91, 0xa1, 0x08, 0x23, 0x42, 0xb1, 0xc1, 0x15, 0x52, 0xd1, 0xf0, 0x24, 0x33,
    0x62, 0x72, 0x82, 0x09, 0x0a, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2a,
    0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53,
    0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73,
    0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x92,
    0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9,
    0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7,
    0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe1, 0xe2, 0xe3, 0xe4,
    0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa,
    0x01, 0x00, 0x03, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x11, 0x00, 0x02,
    0x01, 0x02, 0x04, 0x04, 0x03, 0x04, 0x07, 0x05, 0x04, 0x04, 0x00, 0x01, 0x02, 0x77, 0x00, 0x01,
    0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22,
    0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xa1, 0xb1, 0xc1, 0x09, 0x23, 0x33, 0x52, 0xf0, 0x15, 0x62,
    0x72, 0xd1, 0x0a, 0x16, 0x24, 0x34, 0xe1, 0x25, 0xf1, 0x17, 0x18, 0x19, 0x1a, 0x26, 0x27, 0x28,
    0x29, 0x2a, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a,
    0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a,
    0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89,
    0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7,
    0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3, 0xc4, 0xc5,
    0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe2, 0xe3,
    0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa};

struct Component {
  int id = 0, h = 0, v = 0;  // sampling factors
  int dc = 0, ac = 0;        // the tables of the latest scan
  bool scanned = false;
};

JpegCoding coding_of(int frame) {
  if (frame == kSof0 || frame == kSof1) return JpegCoding::sequential;
  if (frame == kSof2) return JpegCoding::progressive;
  if (frame == kSof3) return JpegCoding::lossless;
  if (frame == kSof9 || frame == kSof10) return JpegCoding::arithmetic;
  return JpegCoding::other;
}

class Walk {
 public:
  Walk(const uint8_t* data, size_t size) : data_(data), source_(data, size) {}
  JpegWalk run();

 private:
  struct Segment {
    const uint8_t* data;
    int size;
  };
  bool read_header(int marker);
  bool read_segment(Segment& segment);
  bool read_tables(Segment segment, bool standard);
  bool read_frame(Segment segment, int marker);
  bool read_scan(Segment segment);
  bool find_components(const uint8_t* pairs);
  bool build_tables();
  void skip_scan();
  void walk_scan();
  int64_t walk_mcus(int64_t count);
  void restart(int expected);
  void finish();
  bool fail(JpegProblem problem) {
    out_.problem = problem;
    return false;
  }
  int64_t blocks(int size, int factor, int most) const {
    return (static_cast<int64_t>(size) * factor + 8 * most - 1) / (8 * most);
  }

  const uint8_t* data_;
  JpegWalk out_;
  Source source_;
  int marker_of_frame_ = kNone, restart_interval_ = 0;
  int components_ = 0, in_scan_ = 0, most_h_ = 1, most_v_ = 1;
  bool scanned_ = false, one_scan_ = false, wrong_code_ = false;
  Component component_[kMostComponents];
  Component* scan_[kMostComponents];   // its first in_scan_ components
  const Component* mcu_[kMostBlocks];  // the component of each block of an MCU
  int in_mcu_ = 0;
  Table dc_[4], ac_[4];
};

JpegWalk Walk::run() {
  if (source_.take_marker() != kSoi || source_.at - 2 != data_) {
    fail(JpegProblem::header);
    return out_;
  }
  for (;;) {
    const int marker = source_.take_marker();
    if (marker == kTem || is_restart(marker)) continue;
    if (marker == kEndOfFile) fail(JpegProblem::end_marker);
    if (marker == kEoi) finish();
    if (marker == kEndOfFile || marker == kEoi || !read_header(marker)) return out_;
  }
}

// Reads what follows a marker. Returns false where the walk ends.
bool Walk::read_header(int marker) {
  const bool frame = marker >= kSof0 && marker <= kSof15 && marker != kDht && marker != kDac;
  const bool known = (marker >= kSof0 && marker <= kSof15) || (marker >= kSos && marker <= kDri) ||
                     (marker >= kApp0 && marker <= kApp15) || marker == kCom;
  if (!known) return fail(JpegProblem::header);
  Segment segment;
  if (!read_segment(segment)) return fail(JpegProblem::end_marker);
  if (frame) return read_frame(segment, marker);
  if (marker == kSos) return read_scan(segment);
  if (marker == kDht) return read_tables(segment, false) || fail(JpegProblem::table);
  if (marker == kDri) {
    if (segment.size != 2) return fail(JpegProblem::header);
    restart_interval_ = segment.data[0] << 8 | segment.data[1];
  }
  return true;
}

// Returns false if the file ends within the segment.
bool Walk::read_segment(Segment& segment) {
  if (source_.end - source_.at < 2) return false;
  const int size = std::max(source_.at[0] << 8 | source_.at[1], 2);
  if (source_.end - source_.at < size) return false;
  segment = {source_.at + 2, size - 2};
  source_.at += size;
  return true;
}

// Reads Huffman tables; the standard ones only where the file defines none. Returns false if they
// are impossible.
bool Walk::read_tables(Segment segment, bool standard) {
  while (segment.size > 16) {
    const int index = segment.data[0];
    const uint8_t *counts = segment.data + 1, *values = segment.data + 17;
    const int total = std::accumulate(counts, counts + 16, 0);
    if (total > 256 || total > segment.size - 17 || (index & ~0x10) > 3) return false;
    Table& table = ((index & 0x10) != 0 ? ac_ : dc_)[index & 3];
    if (!standard || !table.defined) {
      std::copy_n(counts, 16, table.counts + 1);
      std::copy_n(values, total, table.values);
      table.defined = true;
      table.built = false;
    }
    segment = {values + total, segment.size - 17 - total};
  }
  return segment.size == 0;
}

bool Walk::read_frame(Segment segment, int marker) {
  if (marker_of_frame_ != kNone || segment.size < 6) return fail(JpegProblem::header);
  marker_of_frame_ = marker;
  const uint8_t* data = segment.data;
  const int precision = data[0];
  out_.height = data[1] << 8 | data[2];
  out_.width = data[3] << 8 | data[4];
  components_ = data[5];
  if (segment.size != 6 + 3 * components_ || components_ == 0 || out_.width == 0)
    return fail(JpegProblem::header);
  const JpegCoding coding = coding_of(marker);
  // libjpeg does not read a height that follows the first scan.
  if (coding == JpegCoding::other || components_ > kMostComponents || out_.height == 0)
    return false;
  out_.coding = coding;
  if (coding != JpegCoding::lossless && precision != 8 && precision != 12)
    return fail(JpegProblem::header);
  for (int i = 0; i < components_; ++i) {
    Component& c = component_[i];
    c.id = data[6 + 3 * i];
    c.h = data[7 + 3 * i] >> 4;
    c.v = data[7 + 3 * i] & 15;
    if (c.h < 1 || c.h > 4 || c.v < 1 || c.v > 4) return fail(JpegProblem::header);
    most_h_ = std::max(most_h_, c.h);
    most_v_ = std::max(most_v_, c.v);
  }
  return true;
}

// Reads the header of a scan and the scan.
bool Walk::read_scan(Segment segment) {
  const uint8_t* data = segment.data;
  if (marker_of_frame_ == kNone || segment.size < 1) return fail(JpegProblem::header);
  in_scan_ = data[0];
  if (in_scan_ < 1 || in_scan_ > kMostComponents || segment.size != 4 + 2 * in_scan_)
    return fail(JpegProblem::header);
  if (!find_components(data + 1)) return fail(JpegProblem::header);
  const bool progressive = marker_of_frame_ == kSof2 || marker_of_frame_ == kSof10;
  const uint8_t* spectral = data + 1 + 2 * in_scan_;  // first and last coefficient, bit positions
  const bool dc = spectral[0] == 0 && spectral[2] >> 4 == 0;
  if (!scanned_) {
    read_tables({kStandardTables, sizeof kStandardTables}, true);
    one_scan_ = in_scan_ == components_ && !progressive;
    scanned_ = true;
  }
  for (int i = 0; i < in_scan_; ++i)
    if (!progressive || dc) scan_[i]->scanned = true;
  if (out_.coding == JpegCoding::sequential) {
    if (!build_tables()) return fail(JpegProblem::table);
    walk_scan();
  } else {
    skip_scan();
  }
  if (!one_scan_) return true;
  // libjpeg reads nothing behind such a scan that matters to the picture.
  int marker = source_.take_marker();
  while (marker != kEoi && marker != kEndOfFile) marker = source_.take_marker();
  if (marker == kEndOfFile) return fail(JpegProblem::end_marker);
  finish();
  return false;
}

// Fills scan_ from pairs (component, tables). Several components can have the same number: each is
// taken once, in order, as by libjpeg.
bool Walk::find_components(const uint8_t* pairs) {
  std::fill_n(scan_, kMostComponents, nullptr);
  int blocks = 0;
  for (int i = 0; i < in_scan_; ++i) {
    int n = 0;
    while (n < components_ && (component_[n].id != pairs[2 * i] || scan_[n] != nullptr)) ++n;
    if (n == components_) return false;
    Component* found = &component_[n];
    if (std::find(scan_, scan_ + i, found) != scan_ + i) return false;
    found->dc = pairs[2 * i + 1] >> 4;
    found->ac = pairs[2 * i + 1] & 15;
    scan_[i] = found;
    blocks += found->h * found->v;
  }
  return in_scan_ == 1 || blocks <= kMostBlocks;
}

bool Walk::build_tables() {
  for (int i = 0; i < in_scan_; ++i) {
    if (scan_[i]->dc > 3 || scan_[i]->ac > 3) return false;
    Table &dc = dc_[scan_[i]->dc], &ac = ac_[scan_[i]->ac];
    if (!dc.defined || !(dc.built || dc.build(true))) return false;
    if (!ac.defined || !(ac.built || ac.build(false))) return false;
  }
  return true;
}

void Walk::skip_scan() {
  do {
    source_.marker = kNone;
    source_.find_marker();
  } while (source_.marker < kSof0 || is_restart(source_.marker));
}

// Walks a scan of Huffman codes and counts its blocks.
void Walk::walk_scan() {
  const bool one = in_scan_ == 1;
  const int h = one ? scan_[0]->h : 1, v = one ? scan_[0]->v : 1;
  int64_t left = blocks(out_.width, h, most_h_) * blocks(out_.height, v, most_v_);
  in_mcu_ = 0;
  for (int i = 0; i < in_scan_; ++i)
    for (int n = one ? 1 : scan_[i]->h * scan_[i]->v; n > 0; --n) mcu_[in_mcu_++] = scan_[i];
  out_.wanted += left * in_mcu_;
  bool missing = false;
  for (int expected = 0;; expected = (expected + 1) & 7) {
    const int64_t interval =
        restart_interval_ > 0 ? std::min<int64_t>(left, restart_interval_) : left;
    if (!missing) {
      const int64_t found = walk_mcus(interval);
      out_.found += found * in_mcu_;
      missing = found < interval;
    }
    left -= interval;
    if (left == 0) return;
    restart(expected);
    if (source_.marker == kNone)
      missing = false;
    else if (!is_restart(source_.marker))
      return;  // the scan ends here
  }
}

// Returns the number of MCUs that are complete, at most count.
int64_t Walk::walk_mcus(int64_t count) {
  Bits bits;
  bool wrong = false, whole = true;
  const Table *dc[kMostBlocks], *ac[kMostBlocks];
  for (int i = 0; i < in_mcu_; ++i) dc[i] = &dc_[mcu_[i]->dc], ac[i] = &ac_[mcu_[i]->ac];
  int64_t found = 0;
  while (found < count) {
    for (int i = 0; i < in_mcu_ && whole; ++i)
      whole = read_block(bits, source_, *dc[i], *ac[i], wrong);
    if (!whole) break;
    ++found;
  }
  wrong_code_ |= wrong;
  return found;
}

// Advances to the data behind a restart marker. If the marker is not the expected one, libjpeg's
// rule decides; a marker that is kept means that the next interval is missing.
void Walk::restart(int expected) {
  for (;;) {
    source_.find_marker();
    const int ahead = (source_.marker - kRst0 - expected) & 7;
    if (source_.marker >= kSof0) {
      if (!is_restart(source_.marker) || ahead == 1 || ahead == 2) return;  // it is kept
      if (ahead < 6) break;
    }
    source_.marker = kNone;  // not a marker, or an earlier one
  }
  source_.marker = kNone;
}

// Judges a file that has its end marker.
void Walk::finish() {
  if (!scanned_) return void(fail(JpegProblem::no_frame));
  if (wrong_code_) fail(JpegProblem::code);
  const bool blocks_missing = out_.found < out_.wanted;
  for (int i = 0; i < components_; ++i) {
    const Component& c = component_[i];
    if (c.scanned) continue;
    fail(JpegProblem::component);
    if (out_.coding == JpegCoding::sequential)
      out_.wanted += blocks(out_.width, c.h, most_h_) * blocks(out_.height, c.v, most_v_);
  }
  if (blocks_missing) fail(JpegProblem::blocks);
}

}  // namespace

JpegWalk walk_jpeg(const uint8_t* data, size_t size) {
  return std::make_unique<Walk>(data, size)->run();
}

const char* name(JpegCoding coding) {
  constexpr const char* kNames[] = {"other", "sequential", "progressive", "arithmetic", "lossless"};
  return kNames[static_cast<int>(coding)];
}

const char* text(JpegProblem problem) {
  constexpr const char* kTexts[] = {"",
                                    "its header is damaged",
                                    "a Huffman table is missing or damaged",
                                    "it contains no picture data",
                                    "a colour channel is missing",
                                    "a part of its picture data is missing",
                                    "its end marker is missing",
                                    "its picture data contains a wrong code"};
  return kTexts[static_cast<int>(problem)];
}

}  // namespace seg
