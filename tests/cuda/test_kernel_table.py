"""Registers, spills and shared memory of every CUDA kernel, compared with a table.

    PYTHONPATH=.:tests/support python tests/cuda/test_kernel_table.py

writes the table tests/support/cuda_kernels.json: registers and shared memory of every kernel.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_module
import numpy as np
import pytest
from cases import case
from cuda_build import load_setup
from cuda_shim_build import CACHE, built, contents, digest, replaced

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/support/cuda_kernels.json"
BUILT_FOR = (75, 87, 90)  # compute capabilities of the table: 7.5, 8.7 and 9.0
MORE_REGISTERS = 8  # a kernel may use so many more registers than the table says
AGAIN = "if that is meant: PYTHONPATH=.:tests/support python tests/cuda/test_kernel_table.py"


# What the kernels use


def plain_name(demangled):
    """Return a kernel's name and template arguments, without namespaces and parameters."""
    text = re.sub(r"\(anonymous namespace\)::|\bseg::(cuda::)?", "", demangled)
    text = re.sub(r">\s+(?=>)", ">", text.removeprefix("void "))
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:i]
    return text


def parse_usage(told):
    """Return registers, static shared memory and spilled bytes by mangled name, from ptxas -v."""
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


def compile_kernels(nvcc, version, architectures):
    """Return what each kernel uses, by names as "guided_filter.cu sm_90 sum_rows<4, Apply<3>>".

    The output of nvcc is kept in build/shim under a hash of nvcc's version and the sources.
    """
    csrc = ROOT / "runtime/csrc"
    headers = contents(sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.*h")]))

    def compile_one(job):
        arch, source = job
        flags = ["-std=c++17", "-O3", "--Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        kept = CACHE / f"ptxas-{digest(version, flags, headers, contents([source]))}.txt"

        def compile_it(path):
            command = [nvcc, *flags, source, "-o", path.with_suffix(".cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            path.with_suffix(".cubin").unlink()
            path.write_text(done.stdout + done.stderr)

        if not kept.exists():
            replaced(kept, compile_it)
        return parse_usage(kept.read_text())

    sources = sorted((csrc / "cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)
    jobs = [(arch, source) for source in sources for arch in architectures]
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


def built_architectures(project, nvcc):
    """Return the compute capabilities that runtime._cuda is built for, or would be built for."""
    try:
        names = importlib.import_module("runtime._cuda").architectures()
    except ImportError:
        wanted = os.environ.get("SEG_CUDA_ARCHS")
        return project.architectures(project.ask(nvcc, "--list-gpu-arch"), wanted)
    return [int(name.replace(".", "")) for name in names if not name.endswith("+ptx")]


def rows_of(table, architectures):
    """Return the rows of the architectures that were built, and these architectures; the first of
    BUILT_FOR where none of them was built."""
    chosen = [arch for arch in BUILT_FOR if arch in architectures] or [BUILT_FOR[0]]
    keys = [key for key in table if int(re.search(r" sm_(\d+) ", key)[1]) in chosen]
    return {key: table[key] for key in keys}, chosen


def compare(kernels, table):
    """Return one line for each difference that is not allowed."""
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
    kernels = compile_kernels(nvcc, version, BUILT_FOR)
    lines = [
        f'  {json.dumps(key)}: {{"registers": {v["registers"]}, "shared": {v["shared"]}}}'
        for key, v in sorted(kernels.items())
    ]
    module, played = cuda_module.loaded(built())
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda_module.install(monkeypatch, module)
        launches = json.dumps(shared_memory_of_launches(played), indent=1, sort_keys=True)
    head = '{{\n"nvcc": "{}.{}",\n"launches": {},\n"kernels": {{\n'.format(*version, launches)
    TABLE.write_text(head + ",\n".join(lines) + "\n}\n}\n")
    print(f"{TABLE}: {len(kernels)} kernels")
    for key in spilling(kernels):
        print(f"{key} spills {kernels[key]['spills']} bytes, which the test refuses")


def shared_memory_of_launches(played):
    """Return the most bytes of shared memory that a launch of each kernel asks for.

    The bytes grow with the number of channels up to a bound, and not with the picture.
    """
    import runtime
    from runtime.core import classes_cuda, resize
    from runtime.device import transfer
    from runtime.prior import network

    played.shared_memory()
    rng = np.random.default_rng(0)
    image = rng.random((3, 13, 3), np.float32)
    soft = rng.random((3, 13, 14), np.float32) + 0.1
    hard = soft.argmax(-1).astype(np.int32)
    published = {"objective": "dynaguide", "early_stop": 0.9}
    for precision in ("fp32", "fp16"):
        how = {"device": "cuda", "precision": precision, "steps": 1}
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
        runtime.joint_upsample(
            picture, soft[::3, ::3].copy(), radius=1, eps=1e-3, device="cuda", **more
        )
    there = transfer.upload(picture, "cuda")
    resize.working_picture(there, 2, 8)
    rule = np.zeros(3, np.float32), np.ones(3, np.float32)
    scores = network.network_input(there, (2, 8), *rule, False)
    guide = resize.resized(network.soft_guide(scores, True, 0), (3, 13))
    classes_cuda.shares(guide)
    classes_cuda.winners(guide)
    labels, _ = classes_cuda.hard(guide)
    classes_cuda.pairs(labels, labels, 3, 3)
    classes_cuda.merge(guide, np.array([0, 1, 0]), 2)
    classes_cuda.keep(guide, classes_cuda.take(guide, np.arange(3), True), hard > 3)
    classes_cuda.colour_counts(resize.working_picture(there, 5, 20))
    return played.shared_memory()


def test_launches_ask_for_the_shared_memory_of_the_table(cuda, cudart):
    """This memory is not static, so that the output of ptxas does not contain it."""
    found, table = shared_memory_of_launches(cudart), json.loads(TABLE.read_text())["launches"]
    assert found == table, AGAIN
    assert max(found.values()) <= 48 * 1024  # a launch may use that much by default


def test_kernels_take_what_the_table_says_and_spill_nothing(project):
    nvcc = project.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    table = json.loads(TABLE.read_text())
    version = "{}.{}".format(*project.cuda_version(project.ask(nvcc, "--version")))
    if version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}; here is {version}")
    rows, architectures = rows_of(table["kernels"], built_architectures(project, nvcc))
    wrong = compare(compile_kernels(nvcc, version, architectures), rows)
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


NAMES = [
    ("seg::cuda::(anonymous namespace)::mean_areas(float*, int)", "mean_areas"),
    (
        "void seg::cuda::(anonymous namespace)::sum_rows<4, seg::cuda::(anonymous "
        "namespace)::Apply<3> >(float const*, seg::cuda::(anonymous namespace)::Apply<3>)",
        "sum_rows<4, Apply<3>>",
    ),
    ("void seg::step<(seg::Kind)1, A<B<2> > >(int)", "step<(Kind)1, A<B<2>>>"),
]


def test_names_of_kernels():
    for demangled, name in NAMES:
        with case(name):
            assert plain_name(demangled) == name


def test_rows_are_those_of_the_architectures_that_were_built():
    table = json.loads(TABLE.read_text())["kernels"]
    for architectures, chosen in (
        ((75, 90), [75, 90]),
        ((80, 87), [87]),
        ((80, 120), [75]),
        ((75, 87, 90), [75, 87, 90]),
    ):
        with case(architectures):
            rows, found = rows_of(table, architectures)
            assert found == chosen and rows.items() <= table.items()
            assert len(rows) == len(table) * len(chosen) // len(BUILT_FOR)


def test_every_difference_from_the_table_is_named():
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


if __name__ == "__main__":
    write_table()
