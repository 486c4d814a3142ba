// Finds out whether a JPEG file contains all blocks of its picture, without decoding pixels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace seg {

enum class JpegCoding { other, sequential, progressive, arithmetic, lossless };

enum class JpegProblem {
  none,
  header,      // a segment has a wrong length or wrong values
  table,       // a scan uses a Huffman table that is missing or impossible
  no_frame,    // a frame header or all scans are missing
  component,   // a component is in no scan
  blocks,      // coded data has ended before the last block
  end_marker,  // the file ends before its end marker
  code,        // no block is missing, but coded data contains a code that is in no table
};

struct JpegWalk {
  JpegCoding coding = JpegCoding::other;
  JpegProblem problem = JpegProblem::none;
  int width = 0, height = 0;      // of the frame header; 0 without one
  int64_t wanted = 0, found = 0;  // blocks of 8x8 coefficients, in sequential coding only
};

// Walks a JPEG file from its start to its end marker; bytes behind the end marker are not read.
// Sequential Huffman coding is decoded code by code, as libjpeg does: it loses the blocks from the
// end of the data to the next restart marker. Of other codings only the markers are read.
JpegWalk walk_jpeg(const uint8_t* data, size_t size);

// Returns the name of a coding, such as "sequential".
const char* name(JpegCoding coding);

// Returns a problem as the second half of a sentence about a file; "" for none.
const char* text(JpegProblem problem);

}  // namespace seg
