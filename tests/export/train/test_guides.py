"""GuideSource and GuideBatches, on tiny networks whose answers are known."""

import json
import logging
import shutil

import cv2
import numpy as np
import pytest
from bundles import tiny_bundle
from drawn_pictures import COLOURS

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
torch = pytest.importorskip("torch", reason="batches are tensors: pip install torch")
pytest.importorskip("onnxruntime", reason="guides are computed by ONNX Runtime")
from one_layer_networks import NAMES, nearest_colour, save  # noqa: E402 (after importorskip)

import runtime  # noqa: E402
from export.models.stated import Stated  # noqa: E402
from export.train.feature_cache import FeatureCache  # noqa: E402
from export.train.guide_source import GuideSource, open_guide_source, reopen  # noqa: E402
from export.train.guides import GuideBatches, PictureLabels, input_sizes, light  # noqa: E402
from runtime.core.classes import frequent_classes, restricted  # noqa: E402
from runtime.core.config import RefineConfig  # noqa: E402
from runtime.core.guide import Guide  # noqa: E402
from runtime.core.resize import working_picture  # noqa: E402
from runtime.errors import BundleError, InputError  # noqa: E402
from runtime.prior.network import NetworkPrior  # noqa: E402
from sdk import Segmenter  # noqa: E402
from sdk.timing import Clock  # noqa: E402

SIZES = ((31, 47), (47, 31), (48, 32), (40, 96), (20, 13))
META = {"input_size": {"width": 48, "height": 48}, "size_multiple": 4, "classes": NAMES}
SOFTMAX = ("Softmax", {"axis": 1})
ARGMAX = ("ArgMax", {"axis": 1, "keepdims": 0})
INT64 = onnx.TensorProto.INT64
CONFIG = RefineConfig()


def network(path, *tail, **meta):
    """A network of one layer whose long side is 48 pixels."""
    return save(path, *nearest_colour(), tail=tail, **META | meta)


def labels_network(path, *tail, **meta):
    return network(path, ARGMAX, *tail, out=INT64, **meta)


def opened(path, *tail, **meta):
    return open_guide_source(str(network(path / "prior.onnx", *tail, **meta)), threads=1)


def picture_of(height, width, number=0):
    """Blocks of COLOURS with noise: (height, width, 3) uint8. Odd numbers have two colours only."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(2 if number % 2 else 4, size=(4, 3)).astype(np.uint8)
    truth = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
    noise = rng.integers(-20, 21, (height, width, 3))
    return np.clip(COLOURS[truth].astype(int) + noise, 0, 255).astype(np.uint8)


def drawn(folder, count=4, sizes=SIZES):
    """Write pictures of different sizes; returns their files."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:02}.png" for number in range(count)]
    for number, file in enumerate(files):
        picture = picture_of(*sizes[number % len(sizes)], number)
        assert cv2.imwrite(str(file), picture[..., ::-1])
    return files


def batches_of(files, source, config=CONFIG, **options):
    return GuideBatches(files, source, config, **{"batch": 1, "seed": 0} | options)


def equal(one, two):
    """Whether two lists of Guided have the same bits."""
    return len(one) == len(two) and all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
        for first, second in zip(one, two, strict=True)
        for a, b in zip(first, second, strict=True)
    )


# --- the guide is that of the SDK --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logits", "softmax", "half", "labels", "bundle"])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_image_guide_and_classes_have_the_bits_of_the_segmenter(tmp_path, kind, scale):
    path = tmp_path / "prior.onnx"
    if kind == "bundle":
        path = tiny_bundle(tmp_path / "prior.bundle", with_network=True).path
    elif kind == "labels":
        labels_network(path)
    elif kind == "half":
        network(path, dtype=onnx.TensorProto.FLOAT16)
    else:
        network(path, *[SOFTMAX] * (kind == "softmax"))
    config = RefineConfig(scale=scale)
    source = open_guide_source(str(path), threads=1)
    pipeline = Segmenter(path, refine=config, threads=1).pipeline
    files = drawn(tmp_path / "pictures", len(SIZES))
    found = batches_of(files, source, config).of(range(len(files)))
    for number, (size, guided) in enumerate(zip(SIZES, found, strict=True)):
        picture = pipeline.prepare(picture_of(*size, number), Clock())
        guide = pipeline.guide(picture, Clock())[0].array
        classes = frequent_classes(guide)
        assert np.array_equal(guided.image.numpy().transpose(1, 2, 0), picture.working)
        assert guided.classes.tolist() == classes.tolist()
        assert np.array_equal(guided.guide.numpy().transpose(1, 2, 0), restricted(guide, classes))
        assert guided.labels is None and guided.classes.dtype == torch.int64
        assert source.guide(picture.pixels, *guide.shape[:2]).dtype == np.float32
    if kind != "bundle":  # its network is never sure
        assert [len(guided.classes) for guided in found[:2]] == [4, 2]


def test_what_is_refined_is_what_the_runtime_refines(tmp_path):
    source = opened(tmp_path)
    (guided,) = batches_of(drawn(tmp_path / "pictures", 1), source).of([0])
    image, guide = (
        np.ascontiguousarray(t.numpy().transpose(1, 2, 0)) for t in (guided.image, guided.guide)
    )
    result = Segmenter(source.source, threads=1, filter=None)(tmp_path / "pictures/00.png")
    own = runtime.Refiner(*guide.shape[:2], classes=guide.shape[2], threads=1).run(
        image, Guide(guide)
    )
    assert own.stats["losses"] == result.stats["losses"]


def test_the_input_sizes_of_some_pictures(tmp_path):
    files = drawn(tmp_path / "pictures", 3, [(48, 32)]) + drawn(tmp_path / "more", 2, [(40, 96)])
    files[3].write_bytes(b"broken")
    assert input_sizes(files, opened(tmp_path)) == [[48, 32], [20, 48]]
    assert input_sizes(files[:1] * 99 + files[4:], opened(tmp_path)) == [[48, 32]]  # 25 are read


# --- batches -----------------------------------------------------------------------------------


def test_a_step_depends_on_the_seed_and_its_number_alone(tmp_path):
    files, source = drawn(tmp_path / "pictures"), opened(tmp_path)
    labels = drawn_labels(tmp_path / "labels", files)
    options = {"batch": 3, "seed": 7, "augment": "light", "labels": labels}
    every = list(batches_of(files, source, **options).batches(0, 5))
    resumed = list(batches_of(files, source, **options).batches(3, 5))
    assert [len(batch) for batch in every] == [3] * 5
    assert all(map(equal, every[3:], resumed))
    in_workers = list(batches_of(files, source, workers=2, **options).batches(0, 5))
    assert all(map(equal, every, in_workers))
    other = list(batches_of(files, source, **options | {"seed": 8}).batches(0, 5))
    assert not all(map(equal, every, other))
    assert not equal(every[0], every[4])


def test_a_picture_gets_another_augmentation_in_each_epoch(tmp_path):
    files, source = drawn(tmp_path / "pictures", 1), opened(tmp_path)
    steps = [one for (one,) in batches_of(files, source, augment="light").batches(0, 6)]
    assert len({tuple(one.image.shape) for one in steps}) > 2
    for one in steps:
        assert one.image.shape[1:] == one.guide.shape[1:]
        assert one.guide.sum(0).allclose(torch.ones(()))


def test_the_classes_of_a_part_are_those_that_are_frequent_in_it(tmp_path):
    """A part without the class of a corner does not have it."""
    picture = np.full((64, 64, 3), COLOURS[0], np.uint8)
    picture[:8, :8] = COLOURS[1]
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures/a.png"
    assert cv2.imwrite(str(file), picture[..., ::-1])
    data = batches_of([file], opened(tmp_path), augment="light")
    (whole,) = data.of([0])  # without augmentation
    assert whole.classes.tolist() == [0, 1] and whole.image.shape == (3, 32, 32)
    found = {tuple(one.classes.tolist()) for (one,) in data.batches(0, 20)}
    assert found == {(0,), (0, 1)}


def test_broken_pictures_are_replaced_up_to_five_percent(tmp_path, caplog):
    files, source = drawn(tmp_path / "pictures", 20), opened(tmp_path)
    files[3].write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = batches_of(files, source)
    with caplog.at_level(logging.WARNING, "dg.train"):
        assert sum(len(batch) for batch in data.batches(0, 20)) == 20
    assert list(data.broken) == [files[3]] and "03.png" in caplog.text
    files[4].write_bytes(b"")
    with pytest.raises(InputError, match="2 of 20 pictures cannot be used"):
        list(batches_of(files, source).batches(0, 20))


def test_a_picture_whose_guide_is_unknown_everywhere_is_named(tmp_path):
    minus = ("Sub", {}, np.array(1, np.int64))
    source = open_guide_source(str(labels_network(tmp_path / "prior.onnx", minus)), threads=1)
    picture = np.full((24, 32, 3), COLOURS[0], np.uint8)
    file = tmp_path / "a.png"
    assert cv2.imwrite(str(file), picture[..., ::-1])
    with pytest.raises(InputError, match=r"a\.png: guide is unknown"):
        batches_of([file], source).of([0])
    picture[:, 20:] = COLOURS[2]
    picture = cv2.resize(picture, (48, 36), interpolation=cv2.INTER_NEAREST)
    assert cv2.imwrite(str(file), picture[..., ::-1])
    for scale in (0.5, 1.0):  # another size than the network's, and the same
        (guided,) = batches_of([file], source, RefineConfig(scale=scale)).of([0])
        assert guided.classes.tolist() == [1]  # the label 2, minus 1
        assert guided.guide[0, :, 0].max() == 0 and guided.guide[0, :, -1].min() == 1


# --- the cache ---------------------------------------------------------------------------------


def test_guides_have_the_same_bits_from_the_cache(tmp_path, monkeypatch):
    files, source = drawn(tmp_path / "pictures"), opened(tmp_path)
    calls = []
    call = NetworkPrior.__call__
    monkeypatch.setattr(
        NetworkPrior, "__call__", lambda *args: calls.append(1) or call(*args), raising=True
    )
    plain = list(batches_of(files, source, augment="light").batches(0, 6))
    calls.clear()

    def cached(**options):
        cache = FeatureCache(tmp_path / "cache", 2**30)
        options = {"augment": "light", "cache": cache} | options
        return list(batches_of(files, options.pop("source", source), **options).batches(0, 6))

    assert all(map(equal, plain, cached())) and len(calls) == 4  # once for each picture
    assert all(map(equal, plain, cached())) and len(calls) == 4
    assert all(map(equal, plain, cached(workers=1))) and len(calls) == 4
    data = batches_of(files, source, cache=FeatureCache(tmp_path / "cache", 2**30))
    read, _ = data.reads.item(files[0], 0, 0, (0, 0, 0))
    assert read.picture is None and read.known.shape == (16, 24, 4)
    # Another content, working size or network has other guides.
    assert cv2.imwrite(str(files[0]), picture_of(31, 47, 9)[..., ::-1])
    cached()
    assert len(calls) == 5
    cached(config=RefineConfig(scale=1.0))
    assert len(calls) == 9
    cached()
    assert len(calls) == 9  # both sizes are stored
    colder = opened(tmp_path, ("Mul", {}, np.array(0.5, np.float32)))
    calls.clear()
    cached(source=colder)
    assert len(calls) == 4
    assert not colder.key == source.key


def test_the_key_names_all_that_can_change_a_guide(tmp_path):
    path = str(network(tmp_path / "prior.onnx"))
    source = open_guide_source(path, threads=1)
    shutil.copy(path, tmp_path / "moved.onnx")
    assert open_guide_source(str(tmp_path / "moved.onnx"), threads=1).key == source.key
    for other in (
        open_guide_source(path, threads=2),
        open_guide_source(path, Stated(mean=(0.5, 0.5, 0.5)), threads=1),
    ):
        assert other.key != source.key
    json.dumps(source.key)


# --- augmentation ------------------------------------------------------------------------------


def test_image_guide_and_labels_are_cut_at_the_same_place():
    labels = np.arange(40 * 60).reshape(40, 60)
    image = np.repeat(np.linspace(0.3, 0.6, labels.size).reshape(40, 60, 1), 3, 2)
    image = image.astype(np.float32)
    guide = np.stack([labels, labels], -1).astype(np.float32) + 1
    shares, places, middles = [], set(), []
    for number in range(300):
        rng = np.random.default_rng([0, number, 0])
        own_image, own_guide, own_labels = light(image, guide, labels, rng)
        height, width = own_labels.shape
        assert own_image.shape == (height, width, 3) and own_image.dtype == np.float32
        assert (own_guide == own_labels[..., None] + 1).all()
        assert (np.diff(own_labels, axis=1) == 1).all() and (
            np.diff(own_labels, axis=0) == 60
        ).all()
        ranks = own_image[..., 0].ravel()[np.argsort(own_labels.ravel())]
        assert (np.diff(ranks) > -1e-6).all() and np.ptp(ranks) > 0
        # The colours are a function of the old ones, with g, c and b in their ranges.
        old = image[0, 0, 0] + own_labels.ravel()[[0, -1]] * (0.3 / (labels.size - 1))
        low = (old ** np.exp(0.3) - 0.5) * np.exp(0.25 * np.array([1, -1])) + 0.5
        assert own_image[0, 0, 0] > low[0] - 0.11 and own_image.min() >= 0 and own_image.max() <= 1
        shares += [height / 40, width / 60]
        places.add(int(own_labels[0, 0]))
        middles.append(float(own_image.mean() - image.mean()))
    assert 0.59 < min(shares) < 0.62 and 0.98 < max(shares) <= 1
    assert len(places) > 120 and min(middles) < -0.15 and max(middles) > 0.15


def test_colours_stay_between_zero_and_one():
    image = np.linspace(0, 1, 900, dtype=np.float32).reshape(10, 30, 3)
    parts = [light(image, image, None, np.random.default_rng(i))[0] for i in range(30)]
    assert min(part.min() for part in parts) == 0 and max(part.max() for part in parts) == 1


def test_a_part_has_known_pixels():
    image, guide = np.full((20, 30, 3), 0.5, np.float32), np.zeros((20, 30, 2), np.float32)
    guide[0, 0] = 1
    shapes = set()
    for number in range(40):
        own = light(image, guide, None, np.random.default_rng(number))
        assert own[1].any() and own[0].shape[:2] == own[1].shape[:2] and own[2] is None
        shapes.add(own[0].shape)
    assert (20, 30, 3) in shapes and len(shapes) > 1


def test_small_pictures_keep_a_pixel():
    one = np.full((1, 1, 3), 0.5, np.float32)
    image, guide, labels = light(one, one, np.zeros((1, 1), np.int64), np.random.default_rng(0))
    assert image.shape == guide.shape == (1, 1, 3) and labels.shape == (1, 1)


# --- labels ------------------------------------------------------------------------------------


def drawn_labels(folder, files, of_id=None):
    """Labels of all pictures but the last one."""
    folder.mkdir()
    for file in files[:-1]:
        height, width = cv2.imread(str(file)).shape[:2]
        ids = (np.arange(height * width).reshape(height, width) // 5 % 4 + 7).astype(np.uint8)
        assert cv2.imwrite(str(folder / file.name), ids)
    return PictureLabels.find(files, folder, {7: 2, 8: 0, 9: 3} if of_id is None else of_id)


def test_labels_have_the_priors_numbers_at_working_size(tmp_path):
    files = drawn(tmp_path / "pictures")
    labels = drawn_labels(tmp_path / "labels", files)
    found = batches_of(files, opened(tmp_path), labels=labels).of(range(4))
    assert found[3].labels is None
    for (height, width), guided in zip(SIZES, found[:3], strict=False):
        ids = np.arange(height * width).reshape(height, width) // 5 % 4
        full = np.array([2, 0, 3, -1])[ids]  # the id 10 is no class
        h, w = guided.image.shape[1:]
        centres = [(np.arange(n) * 2 + 1) * m // (2 * n) for n, m in ((h, height), (w, width))]
        assert np.array_equal(guided.labels.numpy(), full[np.ix_(*centres)])
        assert guided.labels.dtype == torch.int64


def test_labels_of_another_size_count_as_a_broken_picture(tmp_path):
    files = drawn(tmp_path / "pictures")
    labels = drawn_labels(tmp_path / "labels", files)
    assert cv2.imwrite(str(tmp_path / "labels/00.png"), np.zeros((9, 9), np.uint8))
    data = batches_of(files, opened(tmp_path), labels=labels)
    text = "1 of 4 pictures cannot be used; .*: 00.png; the first one: .*labels/00.png has 9 x 9"
    with pytest.raises(InputError, match=text):
        data.of([0], most_broken=0)
    assert "00.png has 9 x 9 pixels, and" in data.broken[files[0]]


def test_few_labels_are_enough_and_none_are_an_error(tmp_path):
    files = drawn(tmp_path / "pictures")
    folder = tmp_path / "labels"
    folder.mkdir()
    with pytest.raises(InputError, match="0 of 4 pictures"):
        PictureLabels.find(files, folder, {0: 0})
    with pytest.raises(InputError, match="does not exist"):
        PictureLabels.find(files, tmp_path / "nowhere", {0: 0})
    np.save(folder / "02.npy", np.zeros((48, 32), np.int64))
    assert PictureLabels.find(files, folder, {0: 1}).files == {files[2]: folder / "02.npy"}


# --- which priors can be used ------------------------------------------------------------------


def test_what_run_json_stores_opens_the_prior_again(tmp_path):
    path = network(tmp_path / "prior.onnx", mean=None, std=None, classes=None)
    with pytest.raises(BundleError, match="metadata 'mean' is missing"):
        open_guide_source(str(path))
    stated = Stated(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), names=NAMES, output="logits")
    source = open_guide_source(str(path), stated, threads=1)
    entry = json.loads(json.dumps(source.entry()))
    assert (source.names, source.classes, source.name) == (NAMES, 4, "prior.onnx")
    assert entry["stated"] == {
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "names": NAMES, "output": "logits"
    }  # fmt: skip
    again = reopen(entry, threads=1)
    assert again.entry() == source.entry() and again.key == source.key
    moved = tmp_path / "elsewhere" / "city.onnx"
    moved.parent.mkdir()
    path.rename(moved)
    with pytest.raises(InputError, match=r"prior\.onnx of the run does not exist") as failed:
        reopen(entry)
    assert "--model PATH" in failed.value.fix and "--weights PATH" in failed.value.fix
    assert reopen(entry, str(moved), threads=1).sha256 == source.sha256
    network(path, ("Mul", {}, np.array(2, np.float32)), mean=None, std=None, classes=None)
    with pytest.raises(InputError, match=r"changed since the run was started: sha256\n"):
        reopen(entry)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"names": ["a", "b", "c", "d"]}, r"does not describe the prior .*prior\.onnx: names\n"),
        ({"classes": 5, "output": "labels"}, r"prior\.onnx: classes, output\n"),
        ({"stated": {"mean": [9, 9, 9]}}, r"prior\.onnx: preprocess\n"),
        ({"stated": {"std": [0, 0, 0]}}, "prior: stated: std is .0, 0, 0.; wanted"),
        ({"stated": {"output": "no"}}, "prior: stated: output is 'no'; wanted"),
        ({"stated": {"names": ["a"]}}, "returned 4 classes, but has 2 names"),
    ],
)
def test_an_entry_that_is_wrong(tmp_path, changes, text):
    """run.json was edited, and the prior is that of the run."""
    entry = opened(tmp_path).entry()
    assert reopen(entry).entry() == entry
    with pytest.raises(BundleError, match=text) as failed:
        reopen(entry | changes)
    assert failed.value.fix


def test_weights_in_another_file_are_hashed(tmp_path):
    model = onnx.load(network(tmp_path / "a.onnx"))
    for tensor in model.graph.initializer:
        tensor.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
    path = tmp_path / "prior.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    before = open_guide_source(str(path)).sha256
    weights = bytearray((tmp_path / "w.bin").read_bytes())
    weights[2] ^= 1
    (tmp_path / "w.bin").write_bytes(weights)
    assert open_guide_source(str(path)).sha256 != before


def test_a_bundle_is_known_by_its_network(tmp_path):
    bundle = tiny_bundle(tmp_path / "prior.bundle", with_network=True)
    source = open_guide_source(str(bundle.path))
    assert source.sha256 == bundle.manifest["graphs"]["prior"]["sha256"]
    assert (source.kind, source.classes, source.output) == ("bundle", 3, "logits")
    assert source.names == ["brick", "grass", "sea"] and isinstance(source, GuideSource)
    assert reopen(json.loads(json.dumps(source.entry()))).key == source.key
    with pytest.raises(InputError, match=r"--mean: the bundle .* states these itself"):
        open_guide_source(str(bundle.path), Stated(mean=(0, 0, 0)))
    (bundle.path / "prior.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"prior\.onnx has 7 bytes"):
        open_guide_source(str(bundle.path))


def test_priors_that_have_no_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="k-means has no classes"):
        open_guide_source("kmeans")
    bundle = tiny_bundle(tmp_path / "prior.bundle")
    with pytest.raises(InputError, match=r"is a bundle of k-means; k-means has no classes"):
        open_guide_source(str(bundle.path))


def test_what_is_no_prior_is_named(tmp_path):
    with pytest.raises(InputError, match=r"which does not exist; wanted an \.onnx file"):
        open_guide_source(str(tmp_path / "city.bundle"))
    with pytest.raises(InputError, match=r"no\.onnx"):
        open_guide_source(str(tmp_path / "no.onnx"))
    with pytest.raises(InputError, match="is no file of this machine"):
        open_guide_source("https://example.com/prior.onnx")
    file = tmp_path / "prior.pt"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"prior\.pt'; wanted an \.onnx file or a bundle folder"):
        open_guide_source(str(file))
    with pytest.raises(BundleError, match="is no bundle"):
        open_guide_source(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a run of the trainer, which is not exported yet"):
        open_guide_source(str(tmp_path))


def test_labels_need_names(tmp_path):
    path = str(labels_network(tmp_path / "prior.onnx", classes=None))
    with pytest.raises(InputError, match="returns labels and no names") as failed:
        open_guide_source(path)
    assert "--names" in failed.value.fix
    source = open_guide_source(path, Stated(names=NAMES))
    assert (source.classes, source.output) == (4, "labels")
    few = open_guide_source(path, Stated(names=NAMES[:2]))
    picture = np.full((48, 48, 3), COLOURS[3], np.uint8)
    for size in (48, 24):
        assert source.guide(picture, size, size)[..., 3].min() == 1
        assert source.guide(picture // 255 + COLOURS[0], size, size).shape == (size, size, 4)
        with pytest.raises(InputError, match="returned the label 3, but has only 2 names"):
            few.guide(picture, size, size)


def test_names_must_fit_the_number_of_classes(tmp_path):
    with pytest.raises(BundleError, match="returned 4 classes, but has 3 names"):
        opened(tmp_path, classes=NAMES[:3])


def test_the_kind_of_the_output_is_fixed_before_the_first_picture(tmp_path):
    """Values that look like probabilities for one picture and not for another one are an error,
    because which picture is first would decide what the guides are."""
    # Two channels, 1/2 + 2 (red - green) and one minus that: grey has the probabilities 1/2.
    meta = META | {"classes": ["a", "b"], "mean": [0, 0, 0], "std": [1, 1, 1]}
    path = save(tmp_path / "prior.onnx", [[2, -2, 0], [-2, 2, 0]], [0.5, 0.5], **meta)
    source = open_guide_source(str(path))
    assert source.output == "probabilities"
    assert source.guide(np.full((24, 24, 3), 90, np.uint8), 12, 12) == pytest.approx(0.5)
    saturated = np.zeros((24, 24, 3), np.uint8)
    saturated[..., 0] = 255
    with pytest.raises(InputError, match="returned values that are no probabilities") as failed:
        source.guide(saturated, 12, 12)
    assert "--output logits" in failed.value.fix
    stated = open_guide_source(str(path), Stated(output="logits"))
    assert stated.guide(saturated, 12, 12).sum(-1) == pytest.approx(1)


def test_zeros_and_ones_leave_the_kind_open(tmp_path):
    step = ("Clip", {}, np.array(0, np.float32), np.array(0, np.float32))
    path = save(tmp_path / "prior.onnx", np.ones((1, 3)), tail=[step], **META | {"classes": None})
    with pytest.raises(InputError, match="one channel of zeros and ones") as failed:
        open_guide_source(str(path))
    assert "--output labels" in failed.value.fix
    source = open_guide_source(str(path), Stated(output="probabilities"))
    assert source.classes == 2  # background and foreground


def test_the_picture_at_working_size_is_that_of_the_runtime(tmp_path):
    (file,) = drawn(tmp_path / "pictures", 1)
    (guided,) = batches_of([file], opened(tmp_path), RefineConfig(scale=0.3)).of([0])
    wanted = working_picture(picture_of(*SIZES[0], 0), 9, 14)
    assert np.array_equal(guided.image.numpy().transpose(1, 2, 0), wanted)
