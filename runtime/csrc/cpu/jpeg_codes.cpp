// Markers, coded data and Huffman tables of JPEG files.
#include "jpeg_codes.h"

#include <algorithm>
#include <cstring>

namespace seg::jpeg {
namespace {

// The entry of a code without flag. Of a DC code, only the bits are meant.
unsigned entry_of(int length, int value, bool dc) {
  const int size = value & 15, run = value >> 4;
  const int coefficients = dc ? 1 : size > 0 || run == 15 ? run + 1 : kBlock;
  return (length + size) | coefficients << 6;
}

}  // namespace

// Reads the bytes 0xff at the present position and the byte behind them.
void Source::find_marker_or_zero() {
  while (at < end && *at == 0xff) ++at;
  marker = at < end ? *at++ : int{kEndOfFile};
}

void Source::find_marker() {
  while (marker == kNone) {
    at = std::find(at, end, uint8_t{0xff});
    find_marker_or_zero();
  }
}

int Source::take_marker() {
  find_marker();
  const int found = marker;
  marker = kNone;
  return found;
}

const uint8_t* Source::fill_chunk(const uint8_t* first, const uint8_t* last) {
  uint8_t* out = std::copy(first, last, chunk);
  while (marker == kNone && out < chunk + kChunk) {
    const size_t most = std::min(chunk + kChunk - out, end - at);
    const void* found = most > 0 ? std::memchr(at, 0xff, most) : nullptr;
    const uint8_t* stop = found != nullptr ? static_cast<const uint8_t*>(found) : at + most;
    out = std::copy(at, stop, out);
    at = stop;
    if (found != nullptr || at == end) {
      find_marker_or_zero();
      if (marker == kNone) *out++ = 0xff;  // 0xff 0x00 stands for a data byte 0xff
    }
  }
  std::fill_n(out, 8, uint8_t{0});
  return out;
}

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
      std::fill_n(one + first, count, static_cast<uint16_t>(entry_of(l, values[n], dc)));
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
      const int count = one[rest] >> 6;
      if (one[rest] == 0 || length[rest] > kWindow - bits) break;
      if (count == kBlock)
        end = kEnd;
      else if (coefficients + count >= kBlock)
        break;
      else
        coefficients += count;
      bits += one[rest] & 63;
    }
    many[window] = static_cast<uint16_t>(bits == 0 ? kUnusable : bits | coefficients << 6 | end);
  }
}

int read_code(Bits& bits, const Table& table, bool dc, bool& wrong) {
  unsigned found = table.one[bits.window()];
  if (found == 0) {
    int length = kWindow + 1;
    const auto code = [&] { return static_cast<int32_t>(bits.buffer >> (64 - length)); };
    while (length <= 16 && code() > table.last[length]) ++length;
    const bool unknown = length > 16;
    found = entry_of(length, unknown ? 0 : table.values[code() + table.offset[length]], dc);
    wrong |= unknown && length <= bits.count;
  }
  const int used = found & 63;
  if (used > bits.count) return 0;
  bits.drop(used);
  return found >> 6;
}

}  // namespace seg::jpeg
