"""The smoothness energy from matrices of all pairs of positions, as it was published.

Run as a program, it compares this form with :func:`export.train.energy.smoothness`, which has no
such matrices: time of the energy and its gradient, memory, and errors of float32.
"""

import subprocess
import sys
import time

import torch
from torch.nn.functional import normalize


def all_pairs(features, logits, others, shifts, temperature):
    """(within, across); arguments as those of :func:`export.train.energy.smoothness`."""
    x = normalize(features.detach().flatten(2), dim=1)
    a = normalize((logits.flatten(2) / temperature).softmax(1), dim=1)

    def term(j, shift):
        with torch.no_grad():
            w = x.transpose(1, 2) @ x[j]
            w = w - w.mean(2, keepdim=True) + w.mean()
        return ((w - shift) * (1 - a.transpose(1, 2) @ a[j])).mean()

    return term(torch.arange(len(x)), shifts[0]), term(others, shifts[1])


def drawn_case(n, channels, clusters, height, width, seed=0, dtype=torch.float32):
    """Features whose mean cosine is above zero, as those of real backbones, and smooth logits."""
    torch.manual_seed(seed)
    features = torch.randn(n, channels, height, width) + torch.rand(n, channels, 1, 1)
    logits = torch.nn.functional.avg_pool2d(torch.randn(n, clusters, height, width), 3, 1, 1)
    return features.to(dtype), logits.to(dtype), torch.arange(n).roll(1), (-0.02, 0.48), 0.1


def _measure(form, side, channels):
    """Print one row of the table: milliseconds, memory in MiB, and errors of the energy and of its
    gradient, relative to their largest values in float64."""
    import resource

    from export.train.energy import smoothness

    torch.set_num_threads(2)
    function = smoothness if form == "sums" else all_pairs
    case = drawn_case(32, channels, 27, side, side)

    def run(features, logits, *rest):
        logits = logits.clone().requires_grad_()
        start = time.perf_counter()
        energy = sum(function(features, logits, *rest))
        energy.backward()
        return 1e3 * (time.perf_counter() - start), energy.item(), logits.grad

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    milliseconds = min(run(*case)[0] for _ in range(10))  # the fastest: other programs run too
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    _, energy, gradient = run(*case)
    exact = (case[0].double(), case[1].double(), *case[2:])
    _, energy64, gradient64 = run(*exact)
    error = abs(energy - energy64) / abs(energy64)
    error_of_gradient = ((gradient - gradient64).abs().max() / gradient64.abs().max()).item()
    print(
        f"{side}x{side}, C {channels}, {form:9} {milliseconds:6.1f} ms {memory:6.0f} MiB, "
        f"energy {error:.1e}, gradient {error_of_gradient:.1e}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        for size in (("14", "320"), ("14", "384"), ("28", "320"), ("28", "384")):
            for name in ("all pairs", "sums"):  # each in a process of its own, for its memory
                subprocess.run([sys.executable, __file__, name, *size], check=True)
