"""Training of the refinement network: one step against the runtime's, settings, scores, and what a
few steps on made pictures find. No trained prior is used."""

import argparse
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from cases import case
from drawn_pictures import COLOURS
from exactness import relative_error
from refinements import one_torch_thread
from scenes import scene

import runtime
from runtime.core import parameters, reference
from runtime.core.guide import Guide
from runtime.core.refiner import Refiner, maker, refine_with
from runtime.errors import InputError
from runtime.pictures.load import load_image
from sdk import Segmenter
from sdk.timing import Clock

torch = pytest.importorskip("torch", reason="the network is trained by torch: pip install torch")
pytest.importorskip("onnx", reason="the priors are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="guides are computed by ONNX Runtime")
from one_layer_networks import NAMES, nearest_colour, save  # noqa: E402 (after importorskip)

from export.train.config import LoopConfig  # noqa: E402
from export.train.refine import (  # noqa: E402
    Refine,
    RefineTraining,
    add_options,
    check,
    cold_score,
    from_settings,
    label_numbers,
    objective_score,
    prepare,
    state,
)

CLASSES = 7  # of the prior; CHOSEN take part, as the others are at no pixel
CHOSEN = np.array([0, 2, 3, 5, 6])
SMALL = {"channels": 8}


@pytest.fixture(autouse=True)
def one_thread():
    with one_torch_thread():
        yield


def planes(array):
    """(H, W, C) to (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def drawn(seed=3, size=(18, 24), classes=CLASSES, chosen=CHOSEN):
    """A picture and its guide, as runtime.refine takes them."""
    image, soft, _ = scene(*size, classes=len(chosen), seed=seed)
    guide = np.zeros((*size, classes), np.float32)
    guide[..., chosen] = soft
    return image, guide


def guided(image, guide, labels=None):
    """The same for the training: the classes that occur in the guide."""
    classes = np.flatnonzero(guide.any((0, 1)))
    return SimpleNamespace(
        image=planes(image),
        guide=planes(guide[..., classes]),
        classes=torch.from_numpy(classes),
        labels=None if labels is None else torch.from_numpy(labels),
    )


def method(classes=CLASSES, **changes):
    return Refine(RefineTraining(**SMALL | changes), classes)


def update(method, optimiser, *pictures):
    """One step; returns its losses."""
    optimiser.zero_grad()
    terms = method.losses(pictures)
    sum(terms.values()).backward()
    optimiser.step()
    return {name: float(term.detach()) for name, term in terms.items()}


def started(seed=5, **changes):
    """A method with random weights and momenta, its optimiser, and its state with momenta."""
    torch.manual_seed(seed)
    own = method(**changes)
    optimiser = own.optimiser(0.05)
    with torch.no_grad():
        for name, parameter in own.module.named_parameters():
            if name.startswith("conv3"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            momentum = 0.01 * torch.randn(parameter.shape)
            optimiser.state[parameter]["momentum_buffer"] = momentum
    momenta = {
        f"momentum.{name}": optimiser.state[p]["momentum_buffer"].numpy().copy()
        for name, p in own.module.named_parameters()
    }
    return own, optimiser, {k: v.copy() for k, v in state(own.module).items()} | momenta


def native_step(initial, image, guide, **options):
    """One step of the runtime; returns its losses, and its state of the classes that took part."""
    kept = []
    config = runtime.RefineOptions(**options, steps=1)

    def new(height, width, count):
        kept.append(Refiner(height, width, classes=count, **options, steps=1))
        return kept[-1]

    result = refine_with(maker(new, config, initial), config, image, guide, warm=True)
    np.testing.assert_array_equal(result.classes, CHOSEN)
    return result.stats["losses"], kept[0].state_dict()


def weights(tensors):
    """All weights, without statistics and momenta, as one vector."""
    others = ("momentum.", "running_", "num_batches_")
    names = sorted(name for name in tensors if not any(word in name for word in others))
    return np.concatenate([np.ravel(tensors[name]) for name in names]).astype(np.float64)


def test_a_step_changes_the_weights_as_one_of_the_runtime_and_of_the_reference():
    for options in ({}, {"blocks": 3}):
        with case(options):
            image, guide = drawn()
            own, optimiser, initial = started(**options)
            terms = update(own, optimiser, guided(image, guide))
            options = SMALL | options
            losses, native = native_step(initial, image, guide, **options)
            config = runtime.RefineOptions(**options)
            selected = parameters.select_classes(config, initial, CHOSEN)
            *_, rows, _, _, exact = reference.run(
                config, selected, image.astype(np.float64), guide[..., CHOSEN], steps=1
            )
            lam, begin = config.lam, weights(selected)
            for pair, by_guide in (
                (losses["pair"][0], losses["guide"][0]),
                (rows[0, 2], rows[0, 3]),
            ):
                np.testing.assert_allclose(terms["guide"], by_guide, rtol=1e-5)
                np.testing.assert_allclose(terms["pair"], lam * pair, rtol=1e-5)
            after = {k: v.copy() for k, v in state(own.module).items()}
            ours = weights(parameters.select_classes(config, after, CHOSEN)) - begin
            assert relative_error(ours, weights(exact) - begin) < 2e-5
            assert relative_error(ours, weights(native) - begin) < 4e-5
            gradient = np.concatenate(
                [
                    np.ravel(parameters.select_classes(config, grads(own), CHOSEN)[name])
                    for name in sorted(grads(own))
                ]
            )
            momenta = {k[9:]: v for k, v in exact.items() if k.startswith("momentum.")}
            before = {k[9:]: v for k, v in selected.items() if k.startswith("momentum.")}
            wanted = weights(momenta) - 0.9 * weights(before)
            assert relative_error(gradient, wanted) < 2e-5


def grads(method):
    return {name: p.grad.numpy() for name, p in method.module.named_parameters()}


def test_classes_that_do_not_take_part_have_no_gradient():
    own, optimiser, _ = started()
    update(own, optimiser, guided(*drawn()))
    rows = own.module.conv3.weight.grad.abs().sum((1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(rows), CHOSEN)


def test_a_batch_is_the_mean_of_its_pictures():
    pictures = [guided(*drawn(seed, size)) for seed, size in ((1, (18, 24)), (2, (9, 30)))]
    own, _, _ = started()
    together, alone = own.losses(pictures), [own.losses([picture]) for picture in pictures]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(terms[name] for terms in alone) / 2)


def test_without_a_step_the_runtime_computes_the_output_of_the_network():
    image, guide = drawn()
    own, _, initial = started()
    found = runtime.refine(image, guide, steps=0, initial=state(own.module), **SMALL)
    scores = own.scores(guided(image, guide)).softmax(0).detach().numpy()
    np.testing.assert_allclose(found.scores, scores.transpose(1, 2, 0), atol=2e-6)
    assert np.abs(found.scores - guide[..., CHOSEN]).max() > 0.01
    # The running statistics are not used: those of any other pictures change nothing.
    for name in initial:
        if "running" in name:
            initial[name] = initial[name] + 3
    other = runtime.refine(image, guide, steps=0, initial=initial, **SMALL)
    np.testing.assert_array_equal(other.scores, found.scores)


def test_a_new_network_returns_the_prior():
    image, guide = drawn()
    scores = method().scores(guided(image, guide)).softmax(0).detach().numpy()
    np.testing.assert_allclose(scores.transpose(1, 2, 0), guide[..., CHOSEN], atol=2e-4)


def test_the_last_layer_alone_decays():
    image, guide = drawn()
    plain, first, _ = started()
    decaying, second, initial = started(decay=0.5)
    for own, optimiser in ((plain, first), (decaying, second)):
        update(own, optimiser, guided(image, guide))
    for name, value in state(plain.module).items():
        wanted = value
        if name.startswith("conv3."):
            wanted = value - 0.05 * 0.5 * initial[name]
        np.testing.assert_allclose(state(decaying.module)[name], wanted, atol=1e-7, err_msg=name)


def test_labels_add_the_cross_entropy_of_the_classes_that_take_part():
    image, guide = drawn()
    truth = CHOSEN[guide[..., CHOSEN].argmax(-1)].astype(np.int64)
    truth[:4] = -1  # unknown
    truth[4:6] = 1  # a class of the prior that does not take part
    own, _, _ = started(label_weight=2.0)
    picture = guided(image, guide, truth)
    terms = own.losses([picture])
    logs = own.scores(picture).log_softmax(0).detach().numpy()[:, 6:]
    channel = np.searchsorted(CHOSEN, truth[6:])
    wanted = -np.take_along_axis(logs, channel[None], 0).mean()
    np.testing.assert_allclose(float(terms["labels"].detach()), 2 * wanted, rtol=1e-5)
    for labels in (None, np.full(truth.shape, -1), np.ones_like(truth)):
        terms = own.losses([guided(image, guide, labels)])
        assert float(terms["labels"].detach()) == 0
        sum(terms.values()).backward()
    terms.pop("labels")
    plain = started()[0].losses([picture])
    assert plain.keys() == terms.keys() == {"guide", "pair"}
    np.testing.assert_allclose(
        own.held_out([picture]), float(sum(plain.values()).detach()), rtol=1e-6
    )


# --- settings and options ------------------------------------------------------------------------


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(["--model", "prior.onnx", *words])


def test_settings_make_the_method_again():
    own = method(blocks=3, scale=0.25, decay=0.1, label_weight=1.0, seed=4)
    again = from_settings(own.settings(), CLASSES)
    assert again.config == own.config
    for name, value in state(again.module).items():
        np.testing.assert_array_equal(value, state(own.module)[name])
    with pytest.raises(InputError, match=r"settings of refine: .*depth"):
        from_settings(own.settings() | {"depth": 3}, CLASSES)


def test_the_command_line_names_the_settings():
    assert check(parsed()) == RefineTraining()
    assert check(parsed("--refine", "fast")).scale == 0.25
    assert check(parsed("--refine", "fast", "--scale", "0.3")).scale == 0.3
    labels = ("--labels", "masks", "--classes", "names.json")
    assert check(parsed(*labels)).label_weight == 1
    assert check(parsed(*labels, "--label-weight", "3")).label_weight == 3
    found = check(parsed("--blocks", "3", "--channels", "16", "--augment", "light"))
    assert (found.refine.blocks, found.refine.channels, found.augment) == (3, 16, "light")
    assert check(parsed("--decay", "0.2", "--seed", "9")) == RefineTraining(decay=0.2, seed=9)


def test_wrong_settings_are_refused():
    for words, message in (
        (("--scale", "0"), "scale is 0.0"),
        (("--blocks", "1"), "blocks is 1; wanted a whole number from 2"),
        (("--channels", "0"), "channels is 0; wanted"),
        (("--decay", "-1"), "decay is -1.0; wanted a number from 0 to 1000"),
        (("--label-weight=nan", "--labels=a", "--classes=a"), "label-weight is nan; wanted a"),
        (("--label-weight", "3"), "label-weight is for pictures with labels, and there are none"),
        (("--classes", "a"), "labels need both the folder of the labels and the file"),
        (("--labels", "a"), "labels need both the folder of the labels and the file"),
    ):
        with case(" ".join(words)), pytest.raises(InputError, match=message) as caught:
            check(parsed(*words))
        assert caught.value.fix
    with pytest.raises(InputError, match="augment is 'much'; wanted one of none, light"):
        RefineTraining(augment="much")
    words = parsed()
    words.model = None
    with pytest.raises(InputError, match="model is not set"):
        check(words)


# --- the choice of a checkpoint ------------------------------------------------------------------


class Held:
    """Stands for GuideBatches with held-out pictures."""

    def __init__(self, *pictures):
        self.pictures, self.reads = pictures, SimpleNamespace(views=len(pictures))

    def of(self, numbers):
        return [self.pictures[number] for number in numbers]


def test_the_energy_is_the_mean_objective_of_the_held_out_pictures():
    pictures = [guided(*drawn(seed)) for seed in (1, 2)]
    own, _, _ = started()
    wanted = [float(sum(own.losses([picture]).values()).detach()) for picture in pictures]
    np.testing.assert_allclose(objective_score(own, Held(*pictures))(), np.mean(wanted), rtol=1e-6)


def test_the_cold_score_is_the_share_of_labels_that_differ_from_a_cold_refinement():
    one_class = drawn(seed=4, chosen=np.array([3]))
    maps = [drawn(seed) for seed in (1, 2)] + [one_class]
    own = method(seed=2)
    score = cold_score(own, Held(*(guided(*m) for m in maps)), threads=1)
    differ = []
    for image, guide in maps:
        cold = runtime.refine(image, guide, seed=2, **SMALL)
        differ.append(np.mean(cold.classes[cold.labels] != guide.argmax(-1)))
    assert 0 < np.mean(differ) < 1 and differ[2] == 0
    np.testing.assert_allclose(score(), np.mean(differ))  # a new network returns the prior
    first, optimiser = guided(*maps[0]), own.optimiser(0.05)
    score = cold_score(own, Held(first), threads=1)
    for _ in range(10):  # what the cold refinement does on the first picture
        update(own, optimiser, first)
    assert score() < 0.005 < differ[0]


def test_the_cold_refinement_takes_the_guide_as_it_is(monkeypatch):
    """Pixels that resizing made from known and unknown ones sum to less than 1."""
    image, guide = drawn()
    guide[::2] *= 0.5
    kept, run = [], Refiner.run

    def record(self, image, guide, **options):
        kept.append(guide)
        return run(self, image, guide, **options)

    monkeypatch.setattr(Refiner, "run", record)
    cold_score(method(), Held(guided(image, guide)), threads=1)
    (found,) = kept
    assert isinstance(found, Guide)
    np.testing.assert_array_equal(found.array, guide[..., CHOSEN])


# --- what training finds -------------------------------------------------------------------------


def striped(seed, size=(32, 40)):
    """A picture of one kind, a guide that is blurred and noisy, and the truth (h, w).

    The kind: class 0 is bluish, above; class 1 reddish, below; class 2 a green disc. The guide is
    wrong in about a fifth of the pixels.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    truth = (y > height * rng.uniform(0.35, 0.65)).astype(int)
    top, left = rng.uniform(8, height - 8), rng.uniform(8, width - 8)
    truth[(y - top) ** 2 + (x - left) ** 2 < 49] = 2
    colours = np.array([[0.3, 0.4, 0.8], [0.7, 0.3, 0.3], [0.3, 0.7, 0.3]])
    image = colours[truth] + rng.normal(0, 0.06, (height, width, 3))
    noise = rng.normal(0, 1, (height // 4, width // 4, 3)).repeat(4, 0).repeat(4, 1)
    logits = 1.2 * np.eye(3)[truth] + noise
    guide = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return image.clip(0, 1).astype(np.float32), guide.astype(np.float32), truth


def test_after_training_zero_steps_are_better_than_the_prior_on_new_pictures():
    own = Refine(RefineTraining(channels=8), 3)
    optimiser = own.optimiser(0.05)
    for _ in range(4):
        for seed in range(20):
            update(own, optimiser, guided(*striped(100 + seed)[:2]))
    prior, trained = [], []
    for seed in range(8):
        image, guide, truth = striped(seed)
        found = runtime.refine(image, guide, channels=8, steps=0, initial=state(own.module))
        prior.append((guide.argmax(-1) == truth).mean())
        trained.append((found.classes[found.labels] == truth).mean())
    assert np.mean(prior) < 0.85, np.mean(prior)
    assert np.mean(trained) > np.mean(prior) + 0.1, (np.mean(prior), np.mean(trained))
    assert (np.array(trained) > np.array(prior)).all()


# --- from a prior and a folder of pictures -------------------------------------------------------


def noisy(number, size=(48, 64)):
    """A picture of blocks of COLOURS with so much noise that the prior, which sees one pixel at a
    time, is often wrong; and the class of each pixel."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(4, size=(3, 4)).astype(np.uint8)
    truth = cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST)
    picture = COLOURS[truth] + rng.normal(0, 90, (*size, 3))
    return picture.clip(0, 255).astype(np.uint8), truth


def written(folder, numbers, labels=None):
    """Write such pictures, and their labels into another folder; returns the files."""
    folder.mkdir()
    files = [folder / f"{number:03}.png" for number in numbers]
    for number, file in zip(numbers, files, strict=True):
        picture, truth = noisy(number)
        assert cv2.imwrite(str(file), picture[..., ::-1])
        if labels is not None:
            assert cv2.imwrite(str(labels / file.name), truth + 10)
    return files


def prepared(folder, files, *words, held=(), select="last", entry=None):
    """What the loop gets of the method, for a prior of one layer with four classes."""
    prior = folder / "prior.onnx"
    if not prior.exists():
        weight, bias = nearest_colour()
        save(prior, weight / 10, bias / 10, size_multiple=4, classes=NAMES)
    args = parsed("--channels", "8", "--scale", "1", *map(str, words))
    args.model = str(prior)
    config = LoopConfig(batch=1, select=select, holdout=0.5 if held else 0.0)
    return prepare(
        SimpleNamespace(
            args=args, config=config, files=files, held=list(held), entry=entry, cache=None,
            broken=lambda part: [],
        )
    )  # fmt: skip


def fitted(parts, steps):
    """Train the method for some steps."""
    optimiser = parts.method.optimiser(0.05)
    for batch in parts.batches.batches(0, steps):
        losses = update(parts.method, optimiser, *batch)
    return losses


def test_the_guides_and_the_output_are_those_of_the_segmenter_and_the_runtime(tmp_path):
    files = written(tmp_path / "pictures", range(3))
    parts = prepared(tmp_path, files)
    fitted(parts, 2)
    config = parts.method.config.refine
    pipeline = Segmenter(str(tmp_path / "prior.onnx"), refine=config, threads=1).pipeline
    for file, guided in zip(files, parts.batches.of([0, 1, 2]), strict=True):
        picture = pipeline.prepare(load_image(file)[0], Clock())
        guide = pipeline.guide(picture, Clock())[0].array
        options = config.options() | {"steps": 0, "initial": state(parts.method.module)}
        found = runtime.refine(picture.working, guide, **options)
        np.testing.assert_array_equal(found.classes, guided.classes)
        ours = parts.method.scores(guided).softmax(0).detach().numpy()
        np.testing.assert_allclose(ours.transpose(1, 2, 0), found.scores, atol=5e-6)


def test_what_is_stored_opens_the_prior_again(tmp_path):
    files = written(tmp_path / "pictures", range(3))
    parts = prepared(tmp_path, files, "--blocks", "3", "--decay", "0.1")
    assert parts.entry.keys() == {"settings", "prior"} and parts.libraries.keys() == {"onnxruntime"}
    entry = json.loads(json.dumps(parts.entry))
    again = prepared(tmp_path, files, entry=entry)
    assert again.method.config == parts.method.config and again.entry == entry
    save(tmp_path / "prior.onnx", 2 * nearest_colour()[0], size_multiple=4, classes=NAMES)
    with pytest.raises(InputError, match="changed since the run was started"):
        prepared(tmp_path, files, entry=entry)


def test_labels_are_those_of_the_pictures(tmp_path):
    labels, classes = tmp_path / "labels", tmp_path / "classes.json"
    labels.mkdir()
    classes.write_text(json.dumps({str(10 + i): name for i, name in enumerate(NAMES)}))
    files = written(tmp_path / "pictures", range(2), labels)
    more = written(tmp_path / "more", range(2, 3))
    words = ("--labels", labels, "--classes", classes, "--label-weight", "2")
    parts = prepared(tmp_path, files + more, *words)
    for number, guided in enumerate(parts.batches.of([0, 1, 2])):
        if number == 2:
            assert guided.labels is None
        else:
            np.testing.assert_array_equal(guided.labels, noisy(number)[1])
    assert fitted(parts, 3).keys() == {"guide", "pair", "labels"}
    classes.write_text(json.dumps({"10": "brick", "11": "moon"}))
    with pytest.raises(
        InputError, match="does not fit the prior: it has moon; the prior has brick"
    ):
        prepared(tmp_path, files, *words)


def test_ids_are_the_numbers_of_classes_without_names(tmp_path):
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"0": "road", "3": "sky"}))
    assert label_numbers(file, 4, None) == {0: 0, 3: 3}
    with pytest.raises(InputError, match="it has id 3; the prior has no names, and its classes"):
        label_numbers(file, 3, None)
    file.write_text(json.dumps({"0": "a", "1": "b", "7": "b"}))
    assert label_numbers(file, 2, ["b", "a"]) == {0: 1, 1: 0, 7: 0}


def test_held_out_pictures_are_scored(tmp_path):
    files = written(tmp_path / "pictures", range(2))
    held = written(tmp_path / "held", range(2, 4))
    assert prepared(tmp_path, files).score is None
    for select in ("energy", "cold"):
        with case(select):
            parts = prepared(tmp_path, files, held=held, select=select)
            before = parts.score()
            fitted(parts, 10)
            assert parts.score() < before and parts.held.broken == {}


def test_k_means_is_refused(tmp_path):
    files = written(tmp_path / "pictures", range(2))
    args = parsed()
    args.model = "kmeans"
    start = SimpleNamespace(args=args, config=LoopConfig(), entry=None, files=files)
    with pytest.raises(InputError, match="k-means has no classes"):
        prepare(start)
