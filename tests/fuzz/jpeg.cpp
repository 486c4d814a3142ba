// Fuzzes the walk over JPEG files with libFuzzer; tests/rules/fuzz.sh builds and runs this file.
#include "../../runtime/csrc/cpu/jpeg.h"

#include <cstdlib>
#include <vector>

namespace {

void require(bool ok) {
  if (!ok) std::abort();
}

bool same(const seg::JpegWalk& a, const seg::JpegWalk& b) {
  return a.coding == b.coding && a.problem == b.problem && a.width == b.width &&
         a.height == b.height && a.wanted == b.wanted && a.found == b.found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using seg::JpegProblem;
  const seg::JpegWalk walk = seg::walk_jpeg(data, size);
  require(walk.found >= 0 && walk.found <= walk.wanted);
  require(walk.wanted == 0 || walk.coding == seg::JpegCoding::sequential);
  require(walk.problem != JpegProblem::none || walk.found == walk.wanted);
  require(walk.problem != JpegProblem::blocks || walk.found < walk.wanted);
  require(seg::name(walk.coding) != nullptr && seg::text(walk.problem) != nullptr);

  // A second walk has the same result.
  require(same(walk, seg::walk_jpeg(data, size)));

  // Bytes behind the place where the walk ended are not read.
  std::vector<uint8_t> longer(data, data + size);
  longer.insert(longer.end(), {0xff, 0xd9, 0x00, 0xff, 0xd8, 0xff});
  const seg::JpegWalk more = seg::walk_jpeg(longer.data(), longer.size());
  require(walk.problem == JpegProblem::end_marker || same(walk, more));

  // A part of the file does not contain more blocks than the file.
  const std::vector<uint8_t> part(data, data + size / 2);
  require(seg::walk_jpeg(part.data(), part.size()).found <= walk.found);
  return 0;
}
