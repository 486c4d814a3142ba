// The markers, tables and codes of JPEG files.
#include "jpeg.h"

namespace seg {

JpegWalk walk_jpeg(const uint8_t*, size_t) { return {}; }

const char* name(JpegCoding coding) {
  switch (coding) {
    case JpegCoding::sequential:
      return "sequential";
    case JpegCoding::progressive:
      return "progressive";
    case JpegCoding::arithmetic:
      return "arithmetic";
    case JpegCoding::lossless:
      return "lossless";
    case JpegCoding::other:
      break;
  }
  return "other";
}

const char* text(JpegProblem problem) {
  switch (problem) {
    case JpegProblem::header:
      return "its header is damaged";
    case JpegProblem::table:
      return "a Huffman table is missing or damaged";
    case JpegProblem::no_frame:
      return "it contains no picture data";
    case JpegProblem::component:
      return "a colour channel is missing";
    case JpegProblem::blocks:
      return "a part of its picture data is missing";
    case JpegProblem::end_marker:
      return "its end marker is missing";
    case JpegProblem::code:
      return "its picture data contains a wrong code";
    case JpegProblem::none:
      break;
  }
  return "";
}

}  // namespace seg
