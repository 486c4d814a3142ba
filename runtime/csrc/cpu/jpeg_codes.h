// Reads the markers and the Huffman codes of a JPEG file. Numbers behind codes are skipped, because
// only their lengths matter to the walk over the file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace seg::jpeg {

constexpr int kBlock = 64;             // coefficients of a block
constexpr int kWindow = 12;            // bits by which tables are read
constexpr int kEnough = kWindow + 15;  // most bits of an entry: the window and the last number

// Markers: the byte behind 0xff.
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

// A file from its present position to the next marker.
struct Source {
  static constexpr int kChunk = 4096;

  const uint8_t* at;
  const uint8_t* end;
  int marker = kNone;         // read, but not used yet
  uint8_t chunk[kChunk + 8];  // coded data without stuffed bytes, and 8 zeros

  Source(const uint8_t* data, size_t size) : at(data), end(data + size) {}
  // Moves the data from first to last to the start of the chunk and appends coded data up to the
  // marker. Returns the end of the data.
  const uint8_t* fill_chunk(const uint8_t* first, const uint8_t* last);
  // Discards coded data up to the next marker, unless that marker is read already.
  void find_marker();
  // Finds the next marker and uses it.
  int take_marker();

 private:
  void find_marker_or_zero();
};

// Reads bits of coded data. Its functions are inlined, so that it can be kept in registers.
struct Bits {
  const uint8_t* at = nullptr;  // in the chunk of the source
  const uint8_t* end = nullptr;
  uint64_t buffer = 0;  // the next bits, from the highest bit downwards
  int count = 0;        // the number of valid bits in the buffer

  int window() const { return static_cast<int>(buffer >> (64 - kWindow)); }
  void drop(int n) {
    buffer <<= n;
    count -= n;
  }
  // Adds the bytes at the present position. Bits behind count are those of bytes that the next
  // call reads again.
  void add(int bytes) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word = word << 8 | at[i];
    buffer |= word >> count;
    at += bytes;
    count += 8 * bytes;
  }
  // Fills the buffer with 56 bits or more, or with all bits before the marker.
  void refill(Source& source) {
    const int wanted = (63 - count) >> 3;
    if (end - at >= 8) return add(wanted);
    end = source.fill_chunk(at, end);
    at = source.chunk;
    add(end - at < wanted ? static_cast<int>(end - at) : wanted);
  }
};

// A Huffman table. An entry of one or many describes what the next kWindow bits begin with, as
// bits | coefficients << 6 | flag << 13; bits counts codes together with the numbers behind them,
// which may end outside the window.
struct Table {
  static constexpr int kSize = 1 << kWindow;
  static constexpr unsigned kUnusable = kBlock << 6;
  static constexpr unsigned kEnd = 1u << 13;

  bool defined = false, built = false;
  uint8_t counts[17] = {};  // the number of codes of each length
  uint8_t values[256] = {};
  int32_t last[17];       // the last code of each length, -1 if there is none
  int32_t offset[17];     // the index in values of a code, minus the code
  uint16_t one[kSize];    // the first code, kBlock coefficients at the end of a block; 0 if longer
  uint16_t many[kSize];   // all whole codes up to the end of a block, where the flag is kEnd
  uint8_t length[kSize];  // the length of the first code

  // Fills the tables that decode from counts and values. Returns false if no such code exists.
  bool build(bool dc);

 private:
  void build_many();
};

// Reads one code and the number behind it. Returns the coefficients that it stands for, or 0 if
// the data ends before. A code that is in no table is taken as 0, as by libjpeg, and sets wrong.
int read_code(Bits& bits, const Table& table, bool dc, bool& wrong);

// The same. The address of a copy is passed on, so that bits can be kept in registers.
inline int read_one(Bits& bits, const Table& table, bool dc, bool& wrong) {
  Bits copy = bits;
  bool copy_of_wrong = wrong;
  const int coefficients = read_code(copy, table, dc, copy_of_wrong);
  bits = copy;
  wrong = copy_of_wrong;
  return coefficients;
}

// Reads the codes of one block. Returns false if the data ends before.
inline bool read_block(Bits& bits, Source& source, const Table& dc, const Table& ac, bool& wrong) {
  bits.refill(source);
  const unsigned first = dc.one[bits.window()];
  if (first != 0 && bits.count >= kEnough)
    bits.drop(first & 63);
  else if (read_one(bits, dc, true, wrong) == 0)
    return false;
  for (int next = 1; next < kBlock;) {
    bits.refill(source);
    if (bits.count >= 2 * kEnough) {
      unsigned entry = ac.many[bits.window()];
      unsigned after = next + (entry >> 6);
      if (after < kBlock) {
        bits.drop(entry & 63);
        next = after;
        entry = ac.many[bits.window()];
        after = next + (entry >> 6);
        if (after < kBlock) {
          bits.drop(entry & 63);
          next = after;
          continue;
        }
      }
      if (after >= 2 * kBlock && after - 2 * kBlock < kBlock) {  // the flag kEnd
        bits.drop(entry & 63);
        return true;
      }
    }
    // Near the end of the block or of the data, or a long code.
    bits.refill(source);
    const int coefficients = read_one(bits, ac, false, wrong);
    if (coefficients == 0) return false;
    next += coefficients;
  }
  return true;
}

}  // namespace seg::jpeg
