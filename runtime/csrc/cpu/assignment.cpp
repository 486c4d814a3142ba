// The Hungarian method by shortest augmenting paths. u_ and v_ are the potentials of rows and
// columns. row_of_ is the row that has each column. While a path is searched, used_ is 1 for the
// columns of the tree of shortest paths, least_ is the least reduced cost from the tree to each
// other column, and from_ is the column before each column on its path. Rows and columns count from
// 1; 0 stands for none.
#include "assignment.h"

#include <algorithm>
#include <limits>

namespace seg {

void Assignment::resize(int rows, int columns) {
  rows_ = rows;
  columns_ = columns;
  cost.assign(static_cast<size_t>(rows) * columns, 0.0);
  column.assign(rows, 0);
  u_.resize(rows + 1);
  v_.resize(columns + 1);
  least_.resize(columns + 1);
  row_of_.resize(columns + 1);
  from_.resize(columns + 1);
  used_.resize(columns + 1);
}

void Assignment::solve() {
  const double kFar = std::numeric_limits<double>::infinity();
  std::fill(u_.begin(), u_.end(), 0.0);
  std::fill(v_.begin(), v_.end(), 0.0);
  std::fill(row_of_.begin(), row_of_.end(), 0);
  for (int r = 1; r <= rows_; ++r) {
    row_of_[0] = r;
    int j = 0;
    std::fill(least_.begin(), least_.end(), kFar);
    std::fill(used_.begin(), used_.end(), 0);
    do {  // extend the tree of shortest paths until it contains a column without a row
      used_[j] = 1;
      const int i = row_of_[j];
      double delta = kFar;
      int next = 0;
      for (int k = 1; k <= columns_; ++k) {
        if (used_[k]) continue;
        const double reduced = cost[static_cast<size_t>(i - 1) * columns_ + k - 1] - u_[i] - v_[k];
        if (reduced < least_[k]) {
          least_[k] = reduced;
          from_[k] = j;
        }
        if (least_[k] < delta) {
          delta = least_[k];
          next = k;
        }
      }
      for (int k = 0; k <= columns_; ++k) {
        if (used_[k]) {
          u_[row_of_[k]] += delta;
          v_[k] -= delta;
        } else {
          least_[k] -= delta;
        }
      }
      j = next;
    } while (row_of_[j] != 0);
    for (; j != 0; j = from_[j]) row_of_[j] = row_of_[from_[j]];
  }
  for (int k = 1; k <= columns_; ++k)
    if (row_of_[k] > 0) column[row_of_[k] - 1] = k - 1;
}

}  // namespace seg
