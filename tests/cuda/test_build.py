"""The CUDA module's build: what it is built for, who may use it, and what its kernels take.

    python tests/cuda/test_build.py

writes tests/support/cuda_kernels.json afresh: registers and static shared memory of every kernel.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_module
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/support/cuda_kernels.json"
BUILT_FOR = (75, 87, 90)
MORE_REGISTERS = 8  # than the table says, which a small change may take
AGAIN = "if that is meant: python tests/cuda/test_build.py"


def load_setup():
    spec = importlib.util.spec_from_file_location("setup_of_the_project", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project():
    return load_setup()


# What the kernels take


def plain_name(demangled):
    """A kernel's name and template arguments, without result, namespaces and parameters."""
    text = re.sub(r"\(anonymous namespace\)::|\bseg::(cuda::)?", "", demangled)
    text = re.sub(r">\s+(?=>)", ">", text.removeprefix("void "))
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:i]
    return text


def parse_usage(told):
    """Mangled name -> registers, static shared memory and spilled bytes, from ptxas -v."""
    kernels = {}
    for found in re.finditer(
        r"Compiling entry function '(\S+)' for 'sm_\d+'\n.*Function properties for \1\n"
        r".* (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers(.*)",
        told,
    ):
        name, stores, loads, registers, rest = found.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        assert name not in kernels, name
        kernels[name] = {
            "registers": int(registers),
            "shared": int(shared[1]) if shared else 0,
            "spills": int(stores) + int(loads),
        }
    assert len(kernels) == told.count("Compiling entry function"), told
    return kernels


def compile_kernels(nvcc, folder):
    """What each kernel takes, by names such as "guided_filter.cu sm_90 sum_rows<4, Apply<3>>"."""

    def compile_one(job):
        arch, source = job
        command = [nvcc, "-std=c++17", "-O3", "--Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source)]
        command += ["-o", str(folder / f"{source.stem}.{arch}.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return parse_usage(done.stdout + done.stderr)

    sources = sorted((ROOT / "runtime/csrc/cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)
    jobs = [(arch, source) for source in sources for arch in BUILT_FOR]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usages = list(pool.map(compile_one, jobs))
    mangled = [name for usage in usages for name in usage]
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = dict(zip(mangled, map(plain_name, demangled), strict=True))
    kernels = {}
    for (arch, source), usage in zip(jobs, usages, strict=True):
        for name, taken in usage.items():
            key = f"{source.name} sm_{arch} {names[name]}"
            assert key not in kernels, f"two kernels are called {key}"
            kernels[key] = taken
    return kernels


def compare(kernels, table):
    """What is wrong, a line each."""
    wrong = []
    for key in sorted({*kernels, *table}):
        if key not in table:
            wrong.append(f"{key} is not in the table")
        elif key not in kernels:
            wrong.append(f"{key} is in the table, but there is no such kernel")
        elif kernels[key]["registers"] > table[key]["registers"] + MORE_REGISTERS:
            had = table[key]["registers"]
            wrong.append(f"{key} takes {kernels[key]['registers']} registers; it took {had}")
        elif kernels[key]["shared"] > table[key]["shared"]:
            had = table[key]["shared"]
            wrong.append(f"{key} takes {kernels[key]['shared']} bytes shared; it took {had}")
    wrong += [f"{key} spills {kernels[key]['spills']} bytes" for key in spilling(kernels)]
    return wrong


def spilling(kernels):
    return [key for key, taken in sorted(kernels.items()) if taken["spills"]]


def write_table():
    project = load_setup()
    nvcc = project.find_nvcc() or sys.exit("no nvcc")
    version = project.cuda_version(project.ask(nvcc, "--version"))
    folder = ROOT / "build/cubin"
    folder.mkdir(parents=True, exist_ok=True)
    kernels = compile_kernels(nvcc, folder)
    lines = [
        f'  {json.dumps(key)}: {{"registers": {v["registers"]}, "shared": {v["shared"]}}}'
        for key, v in sorted(kernels.items())
    ]
    module, played = cuda_module.loaded(cuda_module.built(folder))
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda_module.install(monkeypatch, module)
        launches = json.dumps(shared_memory_of_launches(played), indent=1, sort_keys=True)
    head = '{{\n"nvcc": "{}.{}",\n"launches": {},\n"kernels": {{\n'.format(*version, launches)
    TABLE.write_text(head + ",\n".join(lines) + "\n}\n}\n")
    print(f"{TABLE}: {len(kernels)} kernels")
    for key in spilling(kernels):
        print(f"{key} spills {kernels[key]['spills']} bytes, which the test refuses")


def shared_memory_of_launches(played):
    """Bytes that launches ask for, by kernel, of everything the module does: with the channels of
    the presets, for what a launch takes grows with them, up to a bound."""
    import runtime
    from runtime import gpu

    played.shared_memory()
    rng = np.random.default_rng(0)
    image = rng.random((9, 37, 3), np.float32)
    soft = rng.random((9, 37, 14), np.float32) + 0.1
    hard = soft.argmax(-1).astype(np.int32)
    published = {"objective": "dynaguide", "early_stop": 0.9}
    for precision in ("fp32", "fp16"):
        how = {"device": "cuda", "precision": precision, "steps": 2}
        runtime.refine(image, soft, **how)
        runtime.refine(image, soft, channels=200, blocks=3, **how)
        runtime.refine(image, hard, **published, channels=100, skip="own", **how)
        runtime.refine(image, hard, **published, mapping="index_modulo", channels=7, **how)
    for guide in (image, image[..., :1].copy()):
        runtime.guided_filter(guide, soft, radius=2, device="cuda")
        runtime.guided_filter(guide, soft[::3, ::3].copy(), radius=1, device="cuda")
    picture = (image * 255).astype(np.uint8)
    low = {"low_image": image[::3, ::3].copy()}
    for more in (low, {}):
        runtime.lift(picture, soft[::3, ::3].copy(), radius=1, eps=1e-3, device="cuda", **more)
    there = gpu.upload(picture, "cuda")
    gpu.working_picture(there, 5, 20)
    rule = np.zeros(3, np.float32), np.ones(3, np.float32)
    scores = gpu.network_input(there, (5, 20), *rule, False)
    guide = gpu.resized(gpu.soft_guide(scores, True, 0), (9, 37))
    gpu.class_shares(guide)
    gpu.winners(guide)
    labels, _ = gpu.hard_labels(guide)
    gpu.pair_counts(labels, labels, 3, 3)
    gpu.merge_classes(guide, np.array([0, 1, 0]), 2)
    gpu.keep_pixels(guide, gpu.take_classes(guide, np.arange(3), True), hard > 3)
    gpu.colour_counts(gpu.working_picture(there, 5, 20))
    return played.shared_memory()


def test_launches_ask_for_the_shared_memory_of_the_table(cuda, cudart):
    """It is not static, so that ptxas says nothing of it."""
    found, table = shared_memory_of_launches(cudart), json.loads(TABLE.read_text())["launches"]
    assert found == table, AGAIN
    assert max(found.values()) <= 48 * 1024  # what a launch may have without asking first


def test_kernels_take_what_the_table_says_and_spill_nothing(project, tmp_path):
    nvcc = project.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    table = json.loads(TABLE.read_text())
    version = "{}.{}".format(*project.cuda_version(project.ask(nvcc, "--version")))
    if version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}; here is {version}")
    wrong = compare(compile_kernels(nvcc, tmp_path), table["kernels"])
    assert not wrong, "\n".join([*wrong, AGAIN])


# The tests of this test

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compile time = 14.361 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90'
ptxas info    : Function properties for _Z1bPf
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16896 bytes smem, 400 bytes cmem[0]
"""


def test_usage_is_read_from_what_ptxas_says():
    assert parse_usage(PTXAS) == {
        "_Z1aPf": {"registers": 40, "shared": 0, "spills": 0},
        "_Z1bPf": {"registers": 255, "shared": 16896, "spills": 48},
    }
    with pytest.raises(AssertionError):
        parse_usage(PTXAS.replace("bytes spill stores", "bytes of something new"))


@pytest.mark.parametrize(
    "demangled, name",
    [
        ("seg::cuda::(anonymous namespace)::mean_areas(float*, int)", "mean_areas"),
        (
            "void seg::cuda::(anonymous namespace)::sum_rows<4, seg::cuda::(anonymous "
            "namespace)::Apply<3> >(float const*, seg::cuda::(anonymous namespace)::Apply<3>)",
            "sum_rows<4, Apply<3>>",
        ),
        ("void seg::step<(seg::Kind)1, A<B<2> > >(int)", "step<(Kind)1, A<B<2>>>"),
    ],
)
def test_names_of_kernels(demangled, name):
    assert plain_name(demangled) == name


def test_differences_from_the_table_are_told():
    def taken(registers, shared=0, spills=0):
        return {"registers": registers, "shared": shared, "spills": spills}

    table = {"a": taken(40), "b": taken(40), "c": taken(40, 100), "d": taken(40), "e": taken(40)}
    kernels = {"a": taken(48), "b": taken(49), "c": taken(20, 101), "d": taken(40, 0, 8)}
    assert compare({**kernels, "f": taken(1)}, table) == [
        "b takes 49 registers; it took 40",
        "c takes 101 bytes shared; it took 100",
        "e is in the table, but there is no such kernel",
        "f is not in the table",
        "d spills 8 bytes",
    ]


# What setup.py builds for

LISTED_BY_13 = "".join(f"compute_{n}\n" for n in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120))
LISTED_BY_11 = "".join(f"compute_{n}\n" for n in (35, 50, 70, 72, 75, 80, 86, 87))


@pytest.mark.parametrize(
    "listed, wanted, chosen",
    [
        (LISTED_BY_13, None, [75, 80, 86, 87, 89, 90, 100, 110, 120]),
        (LISTED_BY_13, "", [75, 80, 86, 87, 89, 90, 100, 110, 120]),
        (LISTED_BY_11, None, [75, 80, 86, 87]),
        (LISTED_BY_13, "87", [87]),
        (LISTED_BY_13, "90,80,90", [80, 90]),
        (LISTED_BY_13, "110", [110]),  # known to nvcc is enough
        (LISTED_BY_11, "70", [70]),
    ],
)
def test_choice_of_architectures(project, listed, wanted, chosen):
    assert project.architectures(listed, wanted) == chosen


def test_code_is_made_for_each_architecture_and_ptx_of_the_newest(project):
    assert project.code_flags([87]) == ["-gencode=arch=compute_87,code=[sm_87,compute_87]"]
    assert project.code_flags([80, 90]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert project.capabilities([87, 90, 120]) == "8.7 9.0 12.0 12.0+ptx"


@pytest.mark.parametrize("wanted", ["8.7", "sm_87", "87,", "80;90", " ", "all"])
def test_architectures_that_are_none(project, wanted):
    with pytest.raises(SystemExit, match=r"SEG_CUDA_ARCHS is .*\n  fix: SEG_CUDA_ARCHS=87, or 80"):
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


def test_where_nvcc_is_looked_for(project, monkeypatch, tmp_path):
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


def test_folders_come_from_what_nvcc_would_do(project):
    plan = (
        '#$ INCLUDES="-I/opt/cuda 13/bin/../include"  \n#$ SYSTEM_INCLUDES="-isystem" "/x/cccl" \n'
        '#$ LIBRARIES=  "-L/opt/cuda/lib64/stubs" "-L/opt/cuda/lib64"\n#$ gcc -I/elsewhere\n'
    )
    assert project.folders(plan, "INCLUDES") == ["/opt/cuda 13/bin/../include"]
    assert project.folders(plan, "LIBRARIES") == ["/opt/cuda/lib64/stubs", "/opt/cuda/lib64"]
    assert project.folders("#$ LIBRARIES=\n", "INCLUDES") == []  # Debian's are where all are


def test_what_nvcc_refuses_is_told_with_the_way_out(project, tmp_path):
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


# Who may use the module

ALL = ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0", "12.0+ptx"]


def gpu(capability, index=0, name="Some GPU"):
    from runtime.device import CudaDevice

    return CudaDevice(index, name, capability, 2**33, 2**32)


@pytest.mark.parametrize(
    "capability, compiled, runs",
    [
        *[(c, ALL, True) for c in ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "12.0")],
        ("10.3", ALL, True),  # machine code of the same major version, an older minor one
        ("12.1", ALL, True),
        ("13.0", ALL, True),  # by PTX
        ("7.0", ALL, False),
        ("11.0", ALL, False),  # 10.0 is another major version, and the PTX is newer
        ("8.6", ["8.7", "8.7+ptx"], False),
        ("8.9", ["8.7"], True),
        ("9.0", ["8.7"], False),
        ("9.0", ["8.7", "8.7+ptx"], True),
        ("10.0", ["9.0", "9.0+ptx"], True),  # as numbers, not as text
        ("9.0", ["10.0", "10.0+ptx"], False),
        ("9.0", [], False),
    ],
)
def test_which_gpu_can_run_what(capability, compiled, runs):
    from runtime.backend import no_code_for

    assert bool(no_code_for(gpu(capability), compiled)) != runs


def test_a_gpu_without_code_is_told_why():
    from runtime.backend import no_code_for

    assert no_code_for(gpu("7.0", 1, "Tesla V100"), ALL) == (
        "cuda:1 (Tesla V100, compute capability 7.0) is not among those this build has code for: "
        "7.5, 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 12.0 and newer"
    )
    assert no_code_for(gpu("7.0"), ["8.7"]).endswith("has code for: 8.7")


@pytest.fixture
def machine(monkeypatch):
    """A machine with the module and the GPUs that the test puts into the list."""
    from runtime import backend

    gpus, module = (
        [],
        types.SimpleNamespace(architectures=lambda: ALL, runtime_version=lambda: 13000),
    )
    monkeypatch.setattr(backend, "cuda_module", lambda: module)
    monkeypatch.setattr(backend, "cuda_problem", lambda: None)
    monkeypatch.setattr(backend, "cuda_devices", lambda: gpus)
    backend._cuda.cache_clear()
    yield types.SimpleNamespace(gpus=gpus, module=module, backend=backend.backend)
    backend._cuda.cache_clear()


def devices():
    import runtime

    return runtime.devices()


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "0"])
def test_a_gpu_that_can_run_the_module(machine, name):
    machine.gpus.append(gpu("8.7"))
    assert devices() == ["cpu", "cuda"] and machine.backend(name) is machine.module


def test_one_gpu_of_two_can_run_the_module(machine):
    from runtime.errors import DeviceError

    machine.gpus += [gpu("7.0"), gpu("8.9", 1)]
    assert devices() == ["cpu", "cuda"] and machine.backend("cuda:1") is machine.module
    fix = r"for: 7.5, .*\n  fix: SEG_CUDA_ARCHS=70 pip install -e \..*nvcc on PATH"
    with pytest.raises(DeviceError, match=fix):
        machine.backend("cuda")
    machine.gpus.pop()
    assert devices() == ["cpu"]


def test_a_gpu_that_is_not_there(machine):
    from runtime.errors import DeviceError

    machine.gpus += [gpu("8.6", 0, "RTX 3060"), gpu("8.7", 1, "Orin")]
    here = r"no cuda:2; here is cuda:0 \(RTX 3060\), cuda:1 \(Orin\)\n  fix: name one of these"
    with pytest.raises(DeviceError, match=here):
        machine.backend("cuda:2")


def test_a_gpu_that_cannot_be_described(machine, monkeypatch):
    from runtime import backend
    from runtime.errors import DeviceError

    def fail():
        raise DeviceError("the CUDA driver fails: cuDeviceGetName gives 4", fix="nvidia-smi")

    monkeypatch.setattr(backend, "cuda_devices", fail)
    assert devices() == ["cpu"]
    with pytest.raises(DeviceError, match="cuDeviceGetName gives 4"):
        machine.backend("cuda")


def test_no_driver(machine, monkeypatch):
    from runtime import backend
    from runtime.errors import MissingBackend

    problem = MissingBackend("no CUDA driver: libcuda.so.1", fix="install NVIDIA's driver")
    monkeypatch.setattr(backend, "cuda_problem", lambda: problem)
    assert devices() == ["cpu"]
    for name in ("cuda", "cuda:7"):
        with pytest.raises(MissingBackend, match=r"no CUDA driver.*\n  fix: install NVIDIA's"):
            machine.backend(name)


def test_a_driver_older_than_the_build(machine, monkeypatch):
    from runtime import device
    from runtime.errors import DeviceError

    machine.gpus.append(gpu("9.0"))
    for version, able in (("12.9", False), ("13.0", True), ("14.1", True)):
        monkeypatch.setattr(device, "cuda_driver_version", lambda version=version: version)
        assert devices() == ["cpu", "cuda"][: 1 + able]
    monkeypatch.setattr(device, "cuda_driver_version", lambda: "12.9")
    with pytest.raises(DeviceError, match=r"too old: it runs CUDA 12\.9, this build needs 13\.0"):
        machine.backend("cuda")


def test_an_answer_is_asked_for_once_and_a_refusal_again(machine, monkeypatch):
    from runtime import backend
    from runtime.errors import DeviceError

    with pytest.raises(DeviceError, match="no cuda:0"):
        machine.backend("cuda")
    machine.gpus.append(gpu("9.0"))
    assert machine.backend("cuda") is machine.module
    monkeypatch.delattr(backend, "cuda_devices")
    assert machine.backend("cuda") is machine.module


def test_a_module_that_is_not_built(monkeypatch):
    from runtime import backend
    from runtime.errors import MissingBackend

    monkeypatch.setitem(sys.modules, "runtime._cuda", None)
    assert devices() == ["cpu"]
    backend._cuda.cache_clear()
    with pytest.raises(MissingBackend, match=r"CUDA module is not built .*\n  fix: .*nvcc on PATH"):
        backend.backend("cuda")


def test_other_names_are_no_devices():
    from runtime.backend import backend
    from runtime.errors import InputError

    with pytest.raises(InputError, match="device is 'tpu'; wanted 'cpu', 'cuda', or"):
        backend("tpu")
    assert backend("cpu").targets()


# The module, as it is built here

ASK = """
import json, sys
import runtime
assert "runtime._cuda" not in sys.modules
devices = runtime.devices()
from runtime import _cuda
maps = open("/proc/self/maps").read()
print(json.dumps([devices, _cuda.architectures(), _cuda.runtime_version(), "libcuda" in maps]))
"""


def test_the_module_can_be_imported_without_a_driver(tmp_path):
    if importlib.util.find_spec("runtime._cuda") is None:
        pytest.skip("runtime._cuda is not built")
    (tmp_path / "libcuda.so.1").write_bytes(b"")  # hides a real one
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    devices, architectures, version, mapped = json.loads(done.stdout)
    assert devices == ["cpu"] and version >= 11040
    assert not mapped  # the CUDA runtime is inside; the driver is not there
    assert architectures and all(re.fullmatch(r"\d+\.\d(\+ptx)?", a) for a in architectures)
    assert [a for a in architectures if a.endswith("+ptx")] == [f"{architectures[-2]}+ptx"]


if __name__ == "__main__":
    write_table()
