"""The C++ core without Python: all of csrc/cpu compiles, links and runs as a plain program."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "runtime/csrc"
COMPILER = os.environ.get("CXX", "g++")

# Two halves of different colours; the prior is sure of both, so the labels are the halves.
PROGRAM = """
#include <algorithm>

#include "cpu/guided_filter.h"
#include "cpu/refiner.h"
#include "cpu/regions.h"

int main() {
  const int h = 12, w = 16, n = h * w;
  const seg::Kernels& kernels = seg::default_kernels();
  std::vector<float> image(3 * n), guide(2 * n), scores(2 * n), filtered(2 * n);
  std::vector<int32_t> labels(n), regions(n);
  for (int i = 0; i < n; ++i) {
    const bool right = i % w >= w / 2;
    for (int c = 0; c < 3; ++c) image[3 * i + c] = right ? 0.8f : 0.2f;
    guide[2 * i] = right ? 0.1f : 0.9f;
    guide[2 * i + 1] = 1 - guide[2 * i];
  }
  seg::RefineOptions options;
  options.channels = 8;
  seg::Refiner refiner(options, h, w, 2, kernels);
  for (size_t i = 0; i < refiner.parameters.size(); ++i)
    refiner.parameters[i] = static_cast<float>(i % 7) / 100 - 0.03f;
  std::vector<seg::StepRecord> records(3);
  const seg::RunResult result =
      refiner.run(scores.data(), labels.data(), records.data(), image.data(),
                  seg::Guide{nullptr, guide.data(), 2}, 0, 3, nullptr);
  if (result.steps != 3 || result.clusters != 2) return 1;
  for (int i = 0; i < n; ++i)
    if (labels[i] != (i % w >= w / 2)) return 2;
  seg::guided_filter(filtered.data(), image.data(), scores.data(), h, w, 3, 2, 2, 1e-3, 2, kernels);
  for (int i = 0; i < n; ++i)
    if ((filtered[2 * i + 1] > filtered[2 * i]) != (i % w >= w / 2)) return 3;
  return seg::connected_regions(regions.data(), labels.data(), h, w, 0) == 2 ? 0 : 4;
}
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER}")
def test_the_cpu_folder_is_a_library_without_python(tmp_path):
    (tmp_path / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O0", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    sources = [tmp_path / "main.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    assert len(sources) > 5
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    command = [COMPILER, *flags, "-I", CSRC, "-MMD", "-c"]
    running = [
        subprocess.Popen([*command, source, "-o", object_])
        for source, object_ in zip(sources, objects, strict=True)
    ]
    assert [r.wait() for r in running] == [0] * len(running)
    for object_ in objects:  # the headers that the compiler has read
        headers = object_.with_suffix(".d").read_text()
        assert "pybind11" not in headers and "Python.h" not in headers, object_.name
    program = tmp_path / "program"
    subprocess.run([COMPILER, "-pthread", *objects, "-o", program], check=True)
    assert subprocess.run([program], timeout=60).returncode == 0
