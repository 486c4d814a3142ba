// The markers, tables and codes of JPEG files, as ITU-T T.81 describes them. Where a file breaks
// the standard, the walk does what libjpeg-turbo does, because OpenCV decodes with that library.
#include "jpeg.h"

#include <algorithm>
#include <memory>
#include <numeric>

namespace seg {
namespace {

constexpr int kBlock = 64;          // coefficients of a block
constexpr int kMostComponents = 4;  // of a scan; libjpeg finds no others
constexpr int kMostBlocks = 10;     // of an MCU, by the standard
constexpr int kWindow = 11;         // bits by which tables are read
constexpr int kEnough = 32;         // a code has at most 16 bits, its number at most 15

// Markers: the byte after 0xff.
enum Marker : int {
  kNone = 0,
  kTem = 0x01,
  kSof0 = 0xc0,
  kSof1 = 0xc1,
  kSof2 = 0xc2,
  kSof3 = 0xc3,
  kDht = 0xc4,
  kSof9 = 0xc9,
  kSof10 = 0xca,
  kDac = 0xcc,
  kSof15 = 0xcf,
  kRst0 = 0xd0,
  kRst7 = 0xd7,
  kSoi = 0xd8,
  kEoi = 0xd9,
  kSos = 0xda,
  kDqt = 0xdb,
  kDnl = 0xdc,
  kDri = 0xdd,
  kApp0 = 0xe0,
  kApp15 = 0xef,
  kCom = 0xfe,
  kEndOfFile = 0x100,
};

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

// A Huffman table. An entry of one or many describes what the next kWindow bits begin with, as
// bits | coefficients << 5 | flag << 12; bits counts codes together with the numbers behind them,
// which may end outside the window.
struct Table {
  static constexpr int kSize = 1 << kWindow;
  static constexpr unsigned kUnusable = 127u << 5;
  static constexpr unsigned kEnd = 1u << 12;

  bool defined = false, built = false;
  uint8_t counts[17] = {};  // the number of codes of each length
  uint8_t values[256] = {};
  int32_t last[17];       // the last code of each length, -1 if there is none
  int32_t offset[17];     // the index in values of a code, minus the code
  uint16_t one[kSize];    // the first code, kBlock coefficients at the end of a block; 0 if longer
  uint16_t many[kSize];   // all whole codes up to the end of a block, where the flag is kEnd
  uint8_t length[kSize];  // the length of the first code

  bool build(bool dc);
  void build_many();
};

// The entry of a code without flag. Of a DC code, only the bits are meant.
unsigned entry(int length, int value, bool dc) {
  const int size = value & 15, run = value >> 4;
  const int coefficients = dc ? 1 : size > 0 || run == 15 ? run + 1 : kBlock;
  return (length + size) | coefficients << 5;
}

// Fills the tables that decode. Returns false if no such code exists.
bool Table::build(bool dc) {
  std::fill_n(one, kSize, uint16_t{0});
  for (int l = 1, code = 0, n = 0; l <= 16; ++l, code <<= 1) {
    offset[l] = n - code;
    last[l] = counts[l] > 0 ? code + counts[l] - 1 : -1;
    if (counts[l] > 0 && last[l] >= (1 << l) - 1) return false;  // all ones is not a code
    for (const int end = n + counts[l]; n < end; ++n, ++code) {
      if (dc && values[n] > 15) return false;
      if (l > kWindow) continue;
      const int first = code << (kWindow - l), count = 1 << (kWindow - l);
      std::fill_n(one + first, count, static_cast<uint16_t>(entry(l, values[n], dc)));
      std::fill_n(length + first, count, static_cast<uint8_t>(l));
    }
  }
  if (!dc) build_many();
  built = true;
  return true;
}

void Table::build_many() {
  for (int window = 0; window < kSize; ++window) {
    int bits = 0, coefficients = 0;
    unsigned end = 0;
    while (bits < kWindow && end == 0) {
      const int rest = (window << bits) & (kSize - 1);
      const int count = one[rest] >> 5;
      if (one[rest] == 0 || length[rest] > kWindow - bits) break;
      if (count == kBlock)
        end = kEnd;
      else if (coefficients + count >= kBlock)
        break;
      else
        coefficients += count;
      bits += one[rest] & 31;
    }
    many[window] = static_cast<uint16_t>(bits == 0 ? kUnusable : bits | coefficients << 5 | end);
  }
}

// Reads bits of coded data up to a marker, which is kept.
struct Bits {
  const uint8_t* at;
  const uint8_t* end;
  uint64_t buffer = 0;  // the next bits, from the highest bit downwards
  int count = 0;        // the number of valid bits in the buffer
  int marker = kNone;   // where the data ends

  Bits(const uint8_t* data, size_t size) : at(data), end(data + size) {}
  int window() const { return static_cast<int>(buffer >> (64 - kWindow)); }
  void drop(int n) {
    buffer <<= n;
    count -= n;
  }
  void clear() {
    buffer = 0;
    count = 0;
  }
  void refill();
  void refill_bytes();
  void find_marker();
  int take_marker();
};

// Called with less than kEnough bits. Fills the buffer with more, or with all bits before the
// marker.
inline void Bits::refill() {
  if (marker != kNone) return;
  if (end - at < 8) return refill_bytes();
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word = word << 8 | at[i];
  constexpr uint64_t kLow = 0x0101010101010101, kHigh = 0x8080808080808080;
  if (((~word - kLow) & word & kHigh) != 0) return refill_bytes();  // a byte is 0xff
  // Bits behind count are those of bytes that are read again by the next call.
  buffer |= word >> count;
  const int bytes = (63 - count) >> 3;
  at += bytes;
  count += 8 * bytes;
}

void Bits::refill_bytes() {
  while (count <= 56 && marker == kNone) {
    if (at == end) {
      marker = kEndOfFile;
      return;
    }
    uint64_t byte = *at++;
    if (byte == 0xff) {  // a marker, or 0xff 0x00 for a byte of 0xff
      while (at < end && *at == 0xff) ++at;
      marker = at < end ? *at++ : int{kEndOfFile};
      if (marker != kNone) return;
    }
    buffer |= byte << (56 - count);
    count += 8;
  }
}

// Discards coded data up to the next marker.
void Bits::find_marker() {
  clear();
  while (marker == kNone) {
    at = std::find(at, end, uint8_t{0xff});
    while (at < end && *at == 0xff) ++at;
    marker = at < end ? *at++ : int{kEndOfFile};
  }
}

int Bits::take_marker() {
  find_marker();
  const int found = marker;
  marker = kNone;
  return found;
}

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
  Walk(const uint8_t* data, size_t size) : data_(data), bits_(data, size) {}
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
  Bits bits_;
  int marker_of_frame_ = kNone, restart_interval_ = 0;
  int components_ = 0, in_scan_ = 0, most_h_ = 1, most_v_ = 1;
  bool scanned_ = false, one_scan_ = false, wrong_code_ = false;
  Component component_[kMostComponents];
  Component* scan_[kMostComponents];   // its first in_scan_ components
  const Component* mcu_[kMostBlocks];  // the component of each block of an MCU
  int in_mcu_ = 0;
  Table dc_[4], ac_[4];
};

// Reads one code and the number behind it. Returns the coefficients that it stands for, or 0 if
// the data ends before. A code that is in no table is taken as 0, like libjpeg does, and sets
// wrong.
int read_code(Bits& bits, const Table& table, bool dc, bool& wrong) {
  if (bits.count < kEnough) bits.refill();
  unsigned found = table.one[bits.window()];
  if (found == 0) {
    int length = kWindow + 1;
    const auto code = [&] { return static_cast<int32_t>(bits.buffer >> (64 - length)); };
    while (length <= 16 && code() > table.last[length]) ++length;
    const bool unknown = length > 16;
    found = entry(length, unknown ? 0 : table.values[code() + table.offset[length]], dc);
    wrong |= unknown && length <= bits.count;
  }
  const int used = found & 31;
  if (used > bits.count) return 0;
  bits.drop(used);
  return found >> 5;
}

// Reads the codes of one block. Returns false if the data ends before.
inline bool walk_block(Bits& bits, const Table& dc, const Table& ac, bool& wrong) {
  if (read_code(bits, dc, true, wrong) == 0) return false;
  for (int next = 1; next < kBlock;) {
    if (bits.count < kEnough) bits.refill();
    const unsigned found = ac.many[bits.window()];
    const int after = next + (found >> 5 & 127);
    if (after < kBlock && bits.count >= kEnough) {
      bits.drop(found & 31);
      if ((found & Table::kEnd) != 0) return true;
      next = after;
    } else {  // near the end of the block or of the data, or a long code
      const int coefficients = read_code(bits, ac, false, wrong);
      if (coefficients == 0) return false;
      next += coefficients;
    }
  }
  return true;
}

JpegWalk Walk::run() {
  if (bits_.take_marker() != kSoi || bits_.at - 2 != data_) {
    fail(JpegProblem::header);
    return out_;
  }
  for (;;) {
    const int marker = bits_.take_marker();
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
  if (bits_.end - bits_.at < 2) return false;
  const int size = std::max(bits_.at[0] << 8 | bits_.at[1], 2);
  if (bits_.end - bits_.at < size) return false;
  segment = {bits_.at + 2, size - 2};
  bits_.at += size;
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
  const bool first_coefficients = data[1 + 2 * in_scan_] == 0;
  if (!scanned_) {
    read_tables({kStandardTables, sizeof kStandardTables}, true);
    one_scan_ = in_scan_ == components_ && !progressive;
    scanned_ = true;
  }
  for (int i = 0; i < in_scan_; ++i)
    if (!progressive || first_coefficients) scan_[i]->scanned = true;
  if (out_.coding == JpegCoding::sequential) {
    if (!build_tables()) return fail(JpegProblem::table);
    walk_scan();
  } else {
    skip_scan();
  }
  if (!one_scan_) return true;
  // libjpeg reads nothing behind such a scan that matters to the picture.
  int marker = bits_.take_marker();
  while (marker != kEoi && marker != kEndOfFile) marker = bits_.take_marker();
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
    bits_.marker = kNone;
    bits_.find_marker();
  } while (bits_.marker < kSof0 || is_restart(bits_.marker));
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
  bits_.clear();
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
    if (bits_.marker == kNone)
      missing = false;
    else if (!is_restart(bits_.marker))
      return;  // the scan ends here
  }
}

// Returns the number of MCUs that are there, at most count.
int64_t Walk::walk_mcus(int64_t count) {
  Bits bits = bits_;
  bool wrong = false, whole = true;
  int64_t found = 0;
  while (found < count) {
    for (int i = 0; i < in_mcu_ && whole; ++i)
      whole = walk_block(bits, dc_[mcu_[i]->dc], ac_[mcu_[i]->ac], wrong);
    if (!whole) break;
    ++found;
  }
  bits_ = bits;
  wrong_code_ |= wrong;
  return found;
}

// Advances to the data behind a restart marker. Where it is not the expected one, libjpeg's rule
// decides; a marker that is kept means that the next interval is missing.
void Walk::restart(int expected) {
  for (;;) {
    bits_.find_marker();
    const int ahead = (bits_.marker - kRst0 - expected) & 7;
    if (bits_.marker >= kSof0) {
      if (!is_restart(bits_.marker) || ahead == 1 || ahead == 2) return;  // it is kept
      if (ahead < 6) break;
    }
    bits_.marker = kNone;  // not a marker, or an earlier one
  }
  bits_.marker = kNone;
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
