"""The energy of SegUnify against loops over all pairs, known answers, and finite differences."""

import math

import pytest
from all_pairs import all_pairs, drawn_case
from cases import case

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from export.train.energy import data_term, random_cycle, smoothness  # noqa: E402


def cosine(u, v):
    product = sum(a * b for a, b in zip(u, v, strict=True))
    return product / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def soft_max(values, temperature):
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def loop(features, logits, others, shift, temperature):
    """One term of the smoothness energy, pair by pair, from its published formula."""
    n, _, height, width = features.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    tokens = [[features[i, :, y, x].tolist() for y, x in places] for i in range(n)]
    assigned = [
        [soft_max(logits[i, :, y, x].tolist(), temperature) for y, x in places] for i in range(n)
    ]
    affinity = [[[cosine(p, q) for q in tokens[others[i]]] for p in tokens[i]] for i in range(n)]
    pairs = n * len(places) ** 2
    mean = sum(w for picture in affinity for row in picture for w in row) / pairs
    total = 0.0
    for i in range(n):
        for p, row in enumerate(affinity[i]):
            row_mean = sum(row) / len(row)
            for q, w in enumerate(row):
                delta = 1 - cosine(assigned[i][p], assigned[others[i]][q])
                total += (w - row_mean + mean - shift) * delta
    return total / pairs


def test_equals_a_slow_float64_loop_on_a_5x7_grid():
    features, logits, _, shifts, temperature = drawn_case(3, 6, 4, 5, 7, dtype=torch.float64)
    for others in ([1, 2, 0], [2, 0, 1], [1, 0, 0]):
        within, across = smoothness(features, logits, torch.tensor(others), shifts, temperature)
        expected = loop(features, logits, [0, 1, 2], shifts[0], temperature)
        assert within.item() == pytest.approx(expected, rel=1e-12)
        expected = loop(features, logits, others, shifts[1], temperature)
        assert across.item() == pytest.approx(expected, rel=1e-12)


def test_affinities_are_centred_per_row_with_the_mean_of_all_restored():
    """Three positions, of which the first two are equal and the third is orthogonal. By hand: the
    means of the rows of W are 2/3, 2/3, 1/3 and that of all is 5/9, so W centred is -1/9 at the
    pairs (1, 3), (2, 3) and 2/9 at (3, 1), (3, 2). Only these four of nine pairs differ in
    assignment, so the energy is (2 * (-1/9 - b) + 2 * (2/9 - b)) / 9. Without centring it would be
    -4 b / 9."""
    tokens = torch.tensor([[2.0, 5.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    features = tokens.reshape(1, 2, 1, 3).repeat(2, 1, 1, 1)
    logits = torch.where(features > 0, 1.0, -1.0).double()
    for b in (0.0, 0.5, -0.25):
        within, across = smoothness(features, logits, torch.tensor([1, 0]), (b, b), 0.05)
        assert within.item() == pytest.approx((2 / 9 - 4 * b) / 9, abs=1e-12)
        assert across.item() == pytest.approx(within.item(), abs=1e-12)


def test_the_mean_that_is_restored_is_that_of_the_batch():
    """One picture of equal positions and one of two opposite ones: the means of W are 1 and 0, so
    each centred row of the first picture is 1 - 1 + 1/2."""
    equal, opposite = [[1.0, 1.0]], [[1.0, -1.0]]
    features = torch.tensor([equal, opposite], dtype=torch.float64).reshape(2, 1, 1, 2)
    hard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    within, _ = smoothness(features, hard.repeat(2, 1, 1, 1), torch.tensor([1, 0]), (0, 0), 0.05)
    first = 2 * 0.5 / 4  # the two pairs that differ, of four
    second = 2 * (-1 + 0.5) / 4
    assert within.item() == pytest.approx((first + second) / 2, abs=1e-12)


def energy_and_gradient(function, drawn, dtype):
    """The two terms, and the gradient of their sum with respect to the logits, in float64."""
    features, logits, *rest = drawn
    logits = logits.to(dtype, copy=True).requires_grad_()
    terms = torch.stack(function(features.to(dtype), logits, *rest))
    terms.sum().backward()
    return terms.detach().double(), logits.grad.double()


def test_as_exact_in_float32_as_the_form_with_all_pairs():
    """The root mean square error of six batches is at most twice that of the published form."""
    for shape in ((6, 27, 5, 7), (320, 27, 14, 14), (384, 3, 14, 9)):
        with case(shape):
            errors = torch.zeros(2, 6, 2)  # form, batch, energy or gradient
            for seed in range(6):
                drawn = drawn_case(4, *shape, seed)
                exact = energy_and_gradient(all_pairs, drawn, torch.float64)
                same = energy_and_gradient(smoothness, drawn, torch.float64)
                for form, function in enumerate((smoothness, all_pairs)):
                    found = energy_and_gradient(function, drawn, torch.float32)
                    for what in range(2):
                        assert (same[what] - exact[what]).abs().max() < 1e-13
                        errors[form, seed, what] = (found[what] - exact[what]).norm()
            ours, published = errors.norm(dim=1)
            assert (ours <= 2 * published).all(), (ours, published)


def test_no_tensor_is_as_large_as_the_pairs_of_positions():
    """The largest tensors are as large as the features."""

    class Largest(torch.overrides.TorchFunctionMode):
        numbers = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    features, logits, *rest = drawn_case(2, 16, 5, 24, 24)
    with Largest() as ours:
        sum(smoothness(features, logits.requires_grad_(), *rest)).backward()
    with Largest() as published:
        all_pairs(features, logits, *rest)
    assert ours.numbers == features.numel()
    assert published.numbers == 2 * 24**4


def test_gradient_equals_finite_differences_and_features_get_none():
    features, logits, *rest = drawn_case(3, 4, 3, 2, 3, dtype=torch.float64)
    features.requires_grad_()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: smoothness(features, z, *rest), [logits])
    sum(smoothness(features, logits, *rest)).backward()
    assert features.grad is None and logits.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["segunify", "smooseg"])
def test_gradient_of_the_projector_equals_finite_differences(kind):
    """From the weights through batch norm, SiLU, cosines and soft-max to the energy."""
    from export.models.segunify import SegUnifyHead, cosines

    features, _, *rest = drawn_case(2, 3, 3, 2, 3, dtype=torch.float64)
    head = SegUnifyHead(3, 3, dim=2, kind=kind, dropout=0).double()
    names, values = zip(*head.projector.named_parameters(), strict=True)

    def energy(*weights):
        weights = dict(zip(names, weights, strict=True))
        codes = torch.func.functional_call(head.projector, weights, features)
        return smoothness(features, cosines(codes, head.teacher), *rest)

    assert torch.autograd.gradcheck(energy, values)


def test_data_term_is_the_cross_entropy_with_the_choice_of_the_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    total = 0.0
    for i in range(2):
        for y in range(4):
            for x in range(5):
                choice = teacher[i, :, y, x].argmax()
                total -= math.log(soft_max(student[i, :, y, x].tolist(), 1)[choice])
    student.requires_grad_()
    teacher.requires_grad_()
    found = data_term(student, teacher)
    assert found.item() == pytest.approx(total / 40, rel=1e-12)
    found.backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None


def test_each_picture_is_compared_with_another_one():
    torch.manual_seed(0)
    for n in range(2, 9):
        for _ in range(20):
            cycle = random_cycle(n).tolist()
            assert sorted(cycle) == list(range(n))
            visited, at = [], 0
            for _ in range(n):
                visited.append(at)
                at = cycle[at]
            assert sorted(visited) == list(range(n)), "one cycle passes through all pictures"


def test_each_other_picture_is_as_likely():
    """Of 3,000 draws for 4 pictures 1,000 +- 5 standard deviations choose each other picture."""
    torch.manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(3000):
        counts[torch.arange(4), random_cycle(4)] += 1
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert (off_diagonal - 1000).abs().max() < 5 * math.sqrt(3000 * 2 / 9)
