"""What setup.py builds of CUDA: a played driver, a played nvcc and played earlier builds decide."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import cases
import pytest
from cuda_build import load_setup
from planted_machines import compile_c

import setup_cuda

# FAKE_INIT is what cuInit returns. FAKE_GPUS lists the GPUs: "86 RTX 3060,87 Orin".
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static const char* gpu(int i) {
  const char* at = getenv("FAKE_GPUS");
  for (at = at && *at ? at : NULL; at && i--; at = at ? at + 1 : NULL) at = strchr(at, ',');
  return at;
}
int cuInit(unsigned flags) {
  if (getenv("FAKE_HANG")) sleep(60);
  if (getenv("FAKE_CRASH")) abort();
  return getenv("FAKE_INIT") ? atoi(getenv("FAKE_INIT")) : 0;
}
int cuDeviceGetCount(int* n) { for (*n = 0; gpu(*n);) ++*n; return 0; }
int cuDeviceGet(int* device, int i) { *device = 70 + i; return 0; }
int cuDeviceGetName(char* name, int n, int device) {
  snprintf(name, n, "%s", strchr(gpu(device - 70), ' ') + 1);
  if (strchr(name, ',')) *strchr(name, ',') = 0;
  return 0;
}
int cuDeviceGetAttribute(int* value, int what, int device) {
  const int capability = atoi(gpu(device - 70));
  *value = what == 75 ? capability / 10 : capability % 10;
  return getenv("FAKE_ATTRIBUTE") ? 999 : what != 75 && what != 76;
}
"""
NVCC_13 = (13, 0, (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120))
NVCC_11 = (11, 4, (35, 50, 70, 75, 80, 86, 87))
PLAYED = (
    *("FAKE_INIT", "FAKE_HANG", "FAKE_CRASH", "FAKE_ATTRIBUTE", "FAKE_GPUS"),
    *("SEG_CUDA", "SEG_CUDA_ARCHS", "SEG_CUDA_WITHOUT_GPU", "SEG_SANITIZE"),
)
EARLIER = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture(scope="session")
def driver_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    compile_c(DRIVER, folder / "libcuda.so.1", "-shared", "-fPIC")
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch, driver_folder):
    """Plays a machine: its driver, its nvcc, an earlier build and the environment."""
    for name in [*os.environ]:
        if name.startswith(("SEG_", "FAKE_", "CUDA_")):
            monkeypatch.delenv(name)

    def play(*, driver=True, nvcc=NVCC_13, earlier=None, **environment):
        monkeypatch.setattr(setup_cuda, "ROOT", tmp_path)
        folder = driver_folder if driver else tmp_path
        (tmp_path / "libcuda.so.1").write_text("no library")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
        monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: plant_nvcc(tmp_path, nvcc))
        (tmp_path / "runtime").mkdir(exist_ok=True)
        (tmp_path / "runtime" / EARLIER).unlink(missing_ok=True)
        if earlier is not None:
            (tmp_path / "runtime" / EARLIER).write_text("")
        monkeypatch.setattr(setup_cuda, "built_for", lambda module: list(earlier))
        for name in PLAYED:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return setup_cuda.choose()

    return play


def plant_nvcc(folder, what):
    """A command that answers as nvcc of this version, which knows these architectures."""
    if what is None:
        return None
    major, minor, known = what
    path = folder / "nvcc"
    lines = "\n".join(f"echo compute_{n}" for n in known)
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {major}.{minor}, V" && exit\n{lines}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_without_a_gpu_no_cuda_is_built(machine):
    """nvcc is not even started: the one that is planted here fails."""
    for case, given, why in (
        ("no driver", {"driver": False}, "no CUDA driver was found"),
        ("no GPU", {}, "the CUDA driver finds no GPU"),
        ("cuInit finds none", {"FAKE_INIT": "100"}, "the CUDA driver finds no GPU"),
        ("cuInit fails", {"FAKE_INIT": "803", "FAKE_GPUS": "86 X"}, "cuInit returns 803"),
        ("a call fails", {"FAKE_ATTRIBUTE": "1", "FAKE_GPUS": "86 X"}, "GetAttribute returns 999"),
        ("a crash", {"FAKE_CRASH": "1", "FAKE_GPUS": "86 X"}, "cannot describe the GPUs"),
    ):
        choice = machine(nvcc=(10, 0, ()), **given)
        assert choice.architectures == () and choice.nvcc is None, case
        assert choice.line.startswith("no, because ") and why in choice.line, case
        assert "SEG_CUDA_ARCHS=87 builds it for compute capability 8.7" in choice.line, case
        assert "\n" not in choice.line and not choice.removed, case
        choice = machine(nvcc=None, SEG_CUDA_WITHOUT_GPU="75", **given)
        assert choice.architectures == () and "nvcc was not found" in choice.line, case


def test_a_driver_that_hangs_does_not_block_the_build(machine, monkeypatch):
    """Neither does a process that cannot be killed, because it hangs in the kernel."""
    started = []
    real = subprocess.Popen

    class Child(real):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Child)
    assert setup_cuda.DRIVER_LIMIT == 5.0
    monkeypatch.setattr(setup_cuda, "DRIVER_LIMIT", 0.7)
    for case in ("killed", "cannot be killed"):
        begin = time.monotonic()
        choice = machine(FAKE_HANG="1", FAKE_GPUS="86 X")
        assert time.monotonic() - begin < 10, case
        assert "the CUDA driver did not answer within 0.7 s" in choice.line, case
        assert choice.architectures == (), case
        if case == "killed":
            assert started[0].wait(10) == -signal.SIGKILL
            monkeypatch.setattr(Child, "kill", lambda self: None)
        else:
            assert started[-1].poll() is None
            os.kill(started[-1].pid, signal.SIGKILL)
            started[-1].wait(10)


def test_for_the_gpus_of_this_machine(machine):
    for case, gpus, nvcc, chosen, said in (
        ("one GPU", "87 Orin", NVCC_13, (87,), "8.7, because this machine has a GPU (Orin, 8.7)"),
        ("two kinds", "90 H200,86 RTX 3060", NVCC_13, (86, 90), "has 2 GPUs (H200, 9.0; RTX 3060,"),
        ("two alike", "90 H200,90 H200", NVCC_13, (90,), "has 2 GPUs (H200, 9.0)"),
        ("not in the usual list", "103 B300", NVCC_13, (103,), "10.3, because"),
        ("newer than nvcc", "120 RTX 5090", NVCC_11, (87,), "CUDA 11.4 does not know RTX 5090, 12"),
        ("too old for the core", "61 GTX 1080", NVCC_11, (), "no: this machine has a GPU (GTX"),
        ("too old for nvcc", "61 GTX 1080", NVCC_13, (), "needs compute capability 7.5 or newer"),
        ("one too old", "61 GTX,86 X", NVCC_13, (86,), "without code for GTX, 6.1, which is too"),
    ):  # fmt: skip
        choice = machine(FAKE_GPUS=gpus, nvcc=nvcc, SEG_CUDA_WITHOUT_GPU="75")
        assert choice.architectures == chosen and said in choice.line, (case, choice)
        assert bool(choice.nvcc) == bool(chosen) and "\n" not in choice.line, case
    with pytest.raises(SystemExit, match=r"too old, wanted CUDA 11.4 .*\n  fix: .*SEG_CUDA=0"):
        machine(FAKE_GPUS="87 Orin", nvcc=(10, 2, (53, 62, 72)))


def test_a_gpu_without_nvcc_is_said_with_the_fix(machine):
    choice = machine(FAKE_GPUS="90 H200", nvcc=None)
    assert choice.architectures == () and choice.nvcc is None
    assert choice.line == (
        "no, because nvcc was not found, although this machine has a GPU (H200, 9.0); fix: install "
        "the CUDA toolkit, version 11.4 or newer, or set CUDA_HOME, and repeat this command"
    )


def test_the_environment_decides_first(machine):
    usual = (75, 80, 86, 87, 89, 90, 100, 110, 120)
    gpu = {"FAKE_GPUS": "90 H200", "earlier": [75]}
    for given, chosen, said in (
        ({"SEG_CUDA": "1"}, usual, "because SEG_CUDA=1"),
        ({"SEG_CUDA": "1", "nvcc": NVCC_11}, (75, 80, 86, 87), "because SEG_CUDA=1"),
        ({"SEG_CUDA_ARCHS": "87"}, (87,), "because SEG_CUDA_ARCHS=87"),
        ({"SEG_CUDA_ARCHS": "90,80", "SEG_CUDA": "1"}, (80, 90), "because SEG_CUDA_ARCHS=90,80"),
        ({"SEG_CUDA": "0"}, (), "no, because SEG_CUDA=0"),
        ({"SEG_CUDA": "0", "SEG_CUDA_ARCHS": "87"}, (), "no, because SEG_CUDA=0"),
        ({"SEG_SANITIZE": "address"}, (), "no, because SEG_SANITIZE is set"),
    ):
        choice = machine(**gpu | given)
        assert choice.architectures == chosen and said in choice.line, given
        assert "\n" not in choice.line, given


def test_wishes_that_cannot_be_fulfilled_are_refused_with_a_fix(machine):
    for given, message in (
        ({"SEG_CUDA": "yes"}, r"SEG_CUDA is 'yes'; wanted 0 or 1\n  fix: SEG_CUDA=0 \(without"),
        (
            {"SEG_CUDA_ARCHS": "8.7"},
            r"SEG_CUDA_ARCHS is '8.7'; wanted .*\n  fix: SEG_CUDA_ARCHS=87, or",
        ),
        ({"SEG_CUDA_ARCHS": "sm_87"}, r"SEG_CUDA_ARCHS is 'sm_87'"),
        ({"SEG_CUDA_ARCHS": "70"}, r"SEG_CUDA_ARCHS names \[70\], .* it knows \[75, .*\n  fix: "),
        ({"SEG_CUDA_WITHOUT_GPU": "x"}, r"SEG_CUDA_WITHOUT_GPU is 'x'; .*\n  fix: SEG_CUDA_WITH"),
        ({"SEG_CUDA": "1", "nvcc": None}, r"SEG_CUDA=1 needs nvcc, .* not found\n  fix: install"),
        ({"SEG_CUDA_ARCHS": "87", "nvcc": None}, r"ARCHS=87 needs nvcc.*\n  fix: .*SEG_CUDA=0"),
        ({"SEG_CUDA": "1", "nvcc": (11, 3, (75,))}, r"too old, wanted CUDA 11.4"),
    ):
        with cases.case(given), pytest.raises(SystemExit, match=message):
            machine(**given)


def test_an_earlier_build_is_neither_lost_nor_left_stale(machine, tmp_path):
    orin = {"FAKE_GPUS": "87 Orin"}
    kept = f"{EARLIER} of an earlier build is not changed, SEG_CUDA=0 removes it"
    for case, given, chosen, said in (
        ("built again", {"earlier": [75]}, (75,), "7.5, as in the earlier build in runtime/"),
        ("not the default", {"earlier": [87, 90], "SEG_CUDA_WITHOUT_GPU": "75"}, (87, 90), "as in"),
        ("the default", {"SEG_CUDA_WITHOUT_GPU": "75"}, (75,), "because SEG_CUDA_WITHOUT_GPU=75"),
        ("nvcc knows a part", {"earlier": [70, 75]}, (75,), "as in the earlier build"),
        ("a GPU", {"earlier": [75]} | orin, (87,), "; this replaces an earlier build for 7.5"),
        ("no nvcc", {"earlier": [75], "nvcc": None}, (), kept),
        ("broken", {"earlier": []}, (), kept),
        ("a GPU, no nvcc", {"earlier": [75], "nvcc": None} | orin, (), kept),
    ):
        choice = machine(**given)
        assert choice.architectures == chosen and said in choice.line, (case, choice)
        assert choice.removed == () and "\n" not in choice.line, case
    choice = machine(earlier=[87], FAKE_GPUS="87 Orin")
    assert choice.architectures == (87,) and "earlier" not in choice.line
    (tmp_path / "runtime" / "_cuda.cpython-27-other.so").write_text("")
    choice = machine(earlier=[75], SEG_CUDA="0")
    assert choice.line == "no, because SEG_CUDA=0; runtime._cuda of an earlier build is removed"
    assert [p.name for p in choice.removed] == sorted(["_cuda.cpython-27-other.so", EARLIER])


def test_a_built_module_tells_its_architectures(tmp_path):
    """It is loaded in another process, so that a broken one does no harm."""
    for case, body, found in (
        ("two", 'return Py_BuildValue("[sss]", "8.7", "12.0", "12.0+ptx");', [87, 120]),
        ("it crashes", "abort();", []),
    ):
        path = tmp_path / f"{case.partition(' ')[0]}.so"
        source = (
            "#include <Python.h>\n#include <stdlib.h>\n"
            f"static PyObject* told(PyObject* m, PyObject* n) {{ {body} }}\n"
            'static PyMethodDef all[] = {{"architectures", told, METH_NOARGS, ""}, {0}};\n'
            'static struct PyModuleDef made = {PyModuleDef_HEAD_INIT, "_cuda", "", -1, all};\n'
            "PyObject* PyInit__cuda(void) { return PyModule_Create(&made); }\n"
        )
        include = sysconfig.get_paths()["include"]
        compile_c(source, path, "-shared", "-fPIC", f"-I{include}")
        assert setup_cuda.built_for(path) == found, case
    (tmp_path / "none.so").write_text("no module")
    assert setup_cuda.built_for(tmp_path / "none.so") == []


def test_the_command_prints_one_line(driver_folder):
    """It needs no package: make runs it before anything is installed."""
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(driver_folder), "SEG_CUDA": "0"}
    path = Path(setup_cuda.__file__)
    command = [sys.executable, "-I", "-S", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr
    assert (
        done.stdout.startswith("CUDA core: no, because SEG_CUDA=0") and done.stdout.count("\n") == 1
    )
    done = subprocess.run(command, capture_output=True, text=True, env={"SEG_CUDA": "x"})
    assert (
        done.returncode == 1 and "SEG_CUDA is 'x'; wanted 0 or" in done.stderr and not done.stdout
    )


def test_setup_py_builds_what_is_chosen(monkeypatch, capsys, tmp_path):
    """pip runs setup.py three times; only the command that builds asks and prints."""
    project = load_setup()
    chosen = setup_cuda.Choice("no, for a test")
    monkeypatch.setattr(project, "choose", lambda: chosen)
    for command in ("egg_info", "dist_info", "sdist"):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        assert project.extensions() == [project.core], command
        assert not capsys.readouterr().err, command
    for command in ("build_ext", "editable_wheel", "bdist_wheel"):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        assert project.extensions() == [project.core], command
        assert capsys.readouterr().err == "CUDA core: no, for a test\n", command
    (tmp_path / "old.so").write_text("")
    chosen = setup_cuda.Choice("no", removed=(tmp_path / "old.so",))
    assert project.extensions() == [project.core] and not (tmp_path / "old.so").exists()
    chosen = setup_cuda.Choice("yes", (75, 87), "/opt/nvcc", "release 13.0")
    monkeypatch.setattr(project, "ask", lambda *command: '#$ INCLUDES="-I/opt/include"\n')
    monkeypatch.chdir(Path(setup_cuda.__file__).parent)
    _, made = project.extensions()
    assert made.define_macros[0] == ("SEG_CUDA_ARCHITECTURES", '"7.5 8.7 8.7+ptx"')
    assert "/opt/include" in made.include_dirs and project.Build.nvcc_version == "release 13.0"
    assert project.Build.nvcc[0] == "/opt/nvcc"
    assert "-gencode=arch=compute_87,code=[sm_87,compute_87]" in project.Build.nvcc
