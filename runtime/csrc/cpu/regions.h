// Connected regions of a label map.
#pragma once

#include <cstdint>

namespace seg {

// Writes regions [height][width]: the 4-connected regions of equal label, numbered 1, 2, ... in the
// order of their first pixel. Returns the number of regions.
//
// A region of less than min_area pixels is merged into the neighbour with the longest common border
// and takes that neighbour's label; of equal borders the larger neighbour is chosen, of equal areas
// the neighbour with the lower number. The smallest region is merged first. labels [height][width]
// is read and receives the merged labels. min_area 0 or 1 merges nothing.
int32_t connected_regions(int32_t* regions, int32_t* labels, int height, int width,
                          int64_t min_area);

}  // namespace seg
