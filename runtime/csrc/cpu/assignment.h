// The assignment problem.
#pragma once

#include <cstdint>
#include <vector>

namespace seg {

// Assigns to each row a column of its own, so that the sum of the chosen costs is least. The method
// is shortest augmenting paths, O(rows^2 columns). Only resize() allocates.
class Assignment {
 public:
  // Sets the size, rows <= columns, and fills cost and column with zeros.
  void resize(int rows, int columns);
  // Fills column from cost. cost is not changed.
  void solve();
  std::vector<double> cost;     // [rows][columns]
  std::vector<int32_t> column;  // [rows]: the column of each row

 private:
  int rows_ = 0, columns_ = 0;
  std::vector<double> u_, v_, least_;
  std::vector<int> row_of_, from_;
  std::vector<char> used_;
};

}  // namespace seg
