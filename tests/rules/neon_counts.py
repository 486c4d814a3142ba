"""Counts the instructions of the NEON convolution; exits 1 when they got worse.

tests/rules/aarch64.sh runs it on the core that it has compiled. Counts, for an emulator has no
times: of the inner loops of product_tile in the disassembly, and of one conv3 as qemu-user executes
it.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/aarch64/obj"
OBJECT = BUILD / "runtime/csrc/cpu/target_base.cpp.o"

# Of product_tile<P, V>, by V: P as tile_rows has it, and the most other instructions per fmla.
TILES = {
    4: (6, 0.57),  # measured 13 / 24 = 0.54 with GCC 12; 14 would be 0.58
    3: (8, 0.65),  # 15 / 24 = 0.63
    2: (12, 0.78),  # 18 / 24 = 0.75
    1: (14, 1.45),  # 20 / 14 = 1.43
}
CHANNELS, STRIP = 100, 24  # of dynaguide; tiles that are whole rows of every product_tile
MOST_PER_FMLA = 2.0  # of conv3, its transforms included: measured 1.93

KINDS = {
    "fmla": r"fmla",
    "loads": r"ld.*",
    "address, branch": r"add|sub|subs|cmp|lsl|b\..*|cbn?z",
    "other": r".*",
    "stack": None,  # whatever has sp for an operand: a spill, in such a loop
}


def disassembly(path):
    """Each function's instructions as (address, name, operands)."""
    command = ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    functions = {}
    for line in text.splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            code = functions.setdefault(start[1], [])
        elif row := re.match(r" *([0-9a-f]+):\t(\S+)\s*(.*)", line):
            code.append((int(row[1], 16), row[2], row[3]))
    return functions


def loops(code):
    """The runs of instructions that end with a branch to their first one, with no other branch."""
    first = 0  # of the straight run that the next branch ends
    for i, (_, name, operands) in enumerate(code):
        if not re.fullmatch(r"b|b\..*|cbn?z|tbn?z|ret", name):
            continue
        target = re.search(r"\b([0-9a-f]+) <", operands)
        for j in range(first, i + 1):
            if target and code[j][0] == int(target[1], 16):
                yield code[j : i + 1]
        first = i + 1


def kind(name, operands):
    """The one of KINDS that an instruction is."""
    if re.search(r"\bsp\b", operands):
        return "stack"
    return next(kind for kind, names in KINDS.items() if re.fullmatch(names, name))


def check_loops():
    """Print a row per loop of a whole tile; return what is wrong."""
    print(" | ".join(["loop", *KINDS, "fmla share"]))
    functions, wrong = disassembly(OBJECT), []
    for v, (p, most) in TILES.items():
        found = set()  # equal ones once: there is a copy for a[p, k] side by side in k
        for name, code in functions.items():
            if f"product_columns<{v}>" in name:
                for loop in loops(code):
                    counts = Counter(kind(*row[1:]) for row in loop)
                    found.add(tuple(counts[k] for k in KINDS))
        tile, fmlas = f"product_tile<{p}, {v}>", max((row[0] for row in found), default=0)
        if fmlas == 0 or fmlas % (p * v):
            wrong.append(f"{tile}: {fmlas} fmla in its loop, not {p * v} per step of k")
        for row in sorted(row for row in found if fmlas and row[0] == fmlas):
            others, stack = (sum(row) - fmlas) / fmlas, row[-1]
            print(" | ".join([tile, *map(str, row), f"{fmlas / sum(row):.2f}"]))
            if stack:
                wrong.append(f"{tile}: {stack} instructions of its loop use the stack")
            if others > most:
                wrong.append(f"{tile}: {others:.2f} other instructions per fmla, at most {most}")
    return wrong


def executed(program, *arguments):
    """How many instructions a run takes: the emulator logs a line for each."""
    command = ["qemu-aarch64", "-singlestep", "-d", "exec,nochain", program, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as run:
        lines = sum(line.startswith(b"Trace") for line in run.stderr)
    if run.returncode:
        raise SystemExit(f"neon_counts.py: {program} failed with {run.returncode}")
    return lines


def check_conv3():
    """Print the count of one conv3; return what is wrong."""
    program = str(BUILD / "neon_conv3")
    sources = [str(ROOT / "tests/rules/neon_conv3.cpp"), str(OBJECT)]
    flags = ["-O2", "-std=c++17", "-static", f"-I{ROOT / 'runtime/csrc/cpu'}"]
    subprocess.run(["aarch64-linux-gnu-g++", *flags, *sources, "-o", program], check=True)
    one, none = (executed(program, CHANNELS, STRIP, times) for times in (1, 0))
    products = 16 * STRIP * CHANNELS * (CHANNELS // 4)  # of a scalar and a vector
    ratio = (one - none) / products
    print(
        f"conv3, {CHANNELS} to {CHANNELS} channels, {STRIP} tiles: {one - none} instructions, "
        f"{products} fmla of the products, {ratio:.2f} per fmla"
    )
    if ratio > MOST_PER_FMLA:
        return [f"conv3: {ratio:.2f} instructions per fmla, at most {MOST_PER_FMLA}"]
    return []


if __name__ == "__main__":
    wrong = check_loops() + check_conv3()
    for line in wrong:
        print(f"neon_counts.py: {line}", file=sys.stderr)
    sys.exit(bool(wrong))
