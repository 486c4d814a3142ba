// Connected regions of a label map.
#pragma once

#include <cstdint>

namespace seg {

// 4-connected regions of equal label, numbered 1, 2, ... in the order of their first pixel. Regions
// under min_area pixels join the neighbour with the longest common border (ties: the larger, then
// the one numbered first), smallest region first, and take its label. Returns the number of
// regions.
int32_t connected_regions(int32_t* regions, int32_t* labels, int height, int width,
                          int64_t min_area);

}  // namespace seg
