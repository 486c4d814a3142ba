"""Registers, spills and shared memory of every CUDA kernel, compared with a table.

    PYTHONPATH=.:tests/support python tests/cuda/test_kernel_table.py

writes tests/support/cuda_kernels.json afresh: registers and static shared memory of every kernel.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_module
import numpy as np
import pytest
from cuda_build import load_setup

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/support/cuda_kernels.json"
BUILT_FOR = (75, 87, 90)
MORE_REGISTERS = 8  # than the table says, which a small change may take
AGAIN = "if that is meant: PYTHONPATH=.:tests/support python tests/cuda/test_kernel_table.py"


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
    from runtime.core import classes_cuda, resize
    from runtime.device import transfer
    from runtime.prior import network

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
        runtime.joint_upsample(
            picture, soft[::3, ::3].copy(), radius=1, eps=1e-3, device="cuda", **more
        )
    there = transfer.upload(picture, "cuda")
    resize.working_picture(there, 5, 20)
    rule = np.zeros(3, np.float32), np.ones(3, np.float32)
    scores = network.network_input(there, (5, 20), *rule, False)
    guide = resize.resized(network.soft_guide(scores, True, 0), (9, 37))
    classes_cuda.shares(guide)
    classes_cuda.winners(guide)
    labels, _ = classes_cuda.hard(guide)
    classes_cuda.pairs(labels, labels, 3, 3)
    classes_cuda.merge(guide, np.array([0, 1, 0]), 2)
    classes_cuda.keep(guide, classes_cuda.take(guide, np.arange(3), True), hard > 3)
    classes_cuda.colour_counts(resize.working_picture(there, 5, 20))
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


if __name__ == "__main__":
    write_table()
