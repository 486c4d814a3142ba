"""The build of the CUDA module: compilers, architectures, and what is compiled again."""

from pathlib import Path

import pytest
from cases import case

# The architectures that setup.py chooses

LISTED_BY_13 = "".join(f"compute_{n}\n" for n in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120))
LISTED_BY_11 = "".join(f"compute_{n}\n" for n in (35, 50, 70, 72, 75, 80, 86, 87))


CHOICES = [
    (LISTED_BY_13, None, [75, 80, 86, 87, 89, 90, 100, 110, 120]),
    (LISTED_BY_13, "", [75, 80, 86, 87, 89, 90, 100, 110, 120]),
    (LISTED_BY_11, None, [75, 80, 86, 87]),
    (LISTED_BY_13, "87", [87]),
    (LISTED_BY_13, "90,80,90", [80, 90]),
    (LISTED_BY_13, "110", [110]),  # known to nvcc is enough
    (LISTED_BY_11, "70", [70]),
]


def test_choice_of_architectures(project):
    for listed, wanted, chosen in CHOICES:
        with case(listed[-12:], wanted):
            assert project.architectures(listed, wanted) == chosen


def test_code_is_made_for_each_architecture_and_ptx_of_the_newest(project):
    assert project.code_flags([87]) == ["-gencode=arch=compute_87,code=[sm_87,compute_87]"]
    assert project.code_flags([80, 90]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert project.capabilities([87, 90, 120]) == "8.7 9.0 12.0 12.0+ptx"


def test_malformed_architectures(project):
    for wanted in ("8.7", "sm_87", "87,", "80;90", " ", "all"):
        with case(wanted):
            with pytest.raises(
                SystemExit, match=r"SEG_CUDA_ARCHS is .*\n  fix: SEG_CUDA_ARCHS=87, or 80"
            ):
                project.architectures(LISTED_BY_13, wanted)


def test_architectures_that_this_nvcc_does_not_know(project):
    message = r"names \[70, 300\], which .* it knows \[75, 80.*\n  fix: .* SEG_CUDA=0 builds"
    with pytest.raises(SystemExit, match=message):
        project.architectures(LISTED_BY_13, "70,87,300")


def test_versions_of_nvcc(project):
    assert project.cuda_version("Cuda compilation tools, release 11.4, V11.4.48") == (11, 4)
    assert project.cuda_version("Cuda compilation tools, release 13.0, V13.0.88") == (13, 0)
    for told in ("Cuda compilation tools, release 11.3, V11.3.109", "no version here"):
        with pytest.raises(SystemExit, match=rf"wanted CUDA 11.4 .*{told}\n  fix: .*SEG_CUDA=0"):
            project.cuda_version(told)


def plant_nvcc(folder, script):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_where_nvcc_is_searched(project, monkeypatch, tmp_path):
    found = {name: plant_nvcc(tmp_path / name / "bin", "exit 0") for name in ("home", "path", "in")}
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(tmp_path / "in/bin"))
    assert project.find_nvcc() == found["home"]
    monkeypatch.setenv("CUDA_HOME", "")
    assert project.find_nvcc() == found["path"]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "nowhere"))
    assert project.find_nvcc() == found["in"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project.find_nvcc() in (None, "/usr/local/cuda/bin/nvcc")


def test_folders_are_those_of_nvcc(project):
    plan = (
        '#$ INCLUDES="-I/opt/cuda 13/bin/../include"  \n#$ SYSTEM_INCLUDES="-isystem" "/x/cccl" \n'
        '#$ LIBRARIES=  "-L/opt/cuda/lib64/stubs" "-L/opt/cuda/lib64"\n#$ gcc -I/elsewhere\n'
    )
    assert project.folders(plan, "INCLUDES") == ["/opt/cuda 13/bin/../include"]
    assert project.folders(plan, "LIBRARIES") == ["/opt/cuda/lib64/stubs", "/opt/cuda/lib64"]
    assert project.folders("#$ LIBRARIES=\n", "INCLUDES") == []  # Debian's are where all are


def test_an_error_of_nvcc_names_a_fix(project, tmp_path):
    nvcc = plant_nvcc(tmp_path, "echo 'nvcc fatal: no g++' >&2; exit 1")
    message = r"nvcc --dryrun fails: nvcc fatal: no g\+\+\n  fix: SEG_CUDA=0 .*-ccbin"
    with pytest.raises(SystemExit, match=message):
        project.ask(nvcc, "--dryrun")


@pytest.fixture
def build(project, monkeypatch, tmp_path):
    """A build command whose nvcc copies its source, and writes a line into ``calls``."""
    from setuptools import Distribution

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(project, "headers", ["x.h"])
    Path("x.h").write_text("")
    Path("x.cu").write_text("one")
    build = project.Build(Distribution())
    build.nvcc = (plant_nvcc(tmp_path / "bin", 'echo >>calls; cp "$3" "$5"'), "-O3")
    return build


def test_only_what_has_changed_is_compiled(build, monkeypatch):
    def compiled():
        Path("calls").write_text("")
        build.compile_cuda("x.o", "x.cu")
        return Path("calls").read_text() == "\n", Path("x.o").read_text()

    assert compiled() == (True, "one")
    assert compiled() == (False, "one")
    Path("x.cu").write_text("two")
    assert compiled() == (True, "two")
    Path("x.h").write_text("a header")
    assert compiled() == (True, "two")
    build.nvcc = (*build.nvcc[:1], "-O2")
    assert compiled() == (True, "two")
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-ccbin g++")
    assert compiled() == (True, "two")
    assert compiled() == (False, "two")


def test_a_source_that_nvcc_does_not_compile(build, tmp_path):
    from setuptools.errors import CompileError

    plant_nvcc(tmp_path / "bin", "exit 1")
    with pytest.raises(CompileError, match=r"cannot compile x.cu.*\n  fix: SEG_CUDA=0 .*-ccbin"):
        build.compile_cuda("x.o", "x.cu")
    assert not Path("x.o").exists() and not Path("build/nvcc").exists()
