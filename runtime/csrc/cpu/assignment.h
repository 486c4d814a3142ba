// The assignment problem.
#pragma once

#include <cstdint>
#include <vector>

namespace seg {

// Rectangular assignment of rows to columns (rows <= columns) of least total cost [rows][columns].
// Shortest augmenting paths, O(rows^2 columns). Allocates in resize() only.
class Assignment {
 public:
  void resize(int rows, int columns);
  void solve();
  std::vector<double> cost;
  std::vector<int32_t> column;  // of each row

 private:
  int rows_ = 0, columns_ = 0;
  std::vector<double> u_, v_, least_;
  std::vector<int> row_of_, from_;
  std::vector<char> used_;
};

}  // namespace seg
