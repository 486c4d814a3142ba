"""The command protocol on tiny replicas of the official folders, and its errors."""

import json

import cv2
import numpy as np
import pytest
from cases import case
from PIL import Image
from scipy.io import savemat

from benchmarks import __main__ as command
from benchmarks.quality import layouts
from benchmarks.quality.layouts import COCO27, IGNORED, LAYOUTS

HALVES = np.repeat([[0, 1]], 4, axis=0).repeat(3, axis=1)  # (4, 6)


def save(path, labels):
    """Write a grey picture, or one of RGB colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.asarray(labels)
    labels = labels if labels.dtype == np.uint16 else labels.astype(np.uint8)
    assert cv2.imwrite(str(path), labels[..., ::-1] if labels.ndim == 3 else labels)


def write_list(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def voc_colour(number):
    """A colour of VOC's palette, bit by bit."""
    colour = [0, 0, 0]
    for bit in range(8):
        colour[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return colour


def annotation(path, *boxes, size=(4, 6)):
    corners = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    height, width = size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}"
        "</annotation>"
    )


def bsds500(root):
    people = np.empty((1, 2), object)
    for k in range(2):
        people[0, k] = {"Segmentation": (HALVES + 1).astype(np.uint16)}
    for split in ("test", "val"):
        path = root / f"BSR/BSDS500/data/groundTruth/{split}/2018.mat"
        path.parent.mkdir(parents=True)
        savemat(path, {"groundTruth": people})
    return {"2018": HALVES}


def voc2012(root):
    colours = np.array([voc_colour(i) for i in (0, 15)])[HALVES]
    colours[0] = voc_colour(255)
    for name in ("2007_000033", "2007_000042"):
        save(root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png", colours)
    write_list(root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "2007_000033")
    prediction = HALVES.copy()
    prediction[0] = 2  # only where the truth is void
    return {"2007_000033": prediction}


def coco27(root):
    labels = np.array([0, 181])[HALVES]  # a person, and solid stuff
    labels[0] = 255
    save(root / "stuffthingmaps_trainval2017/val2017/000000000139.png", labels)
    return {"000000000139": HALVES}


def cityscapes27(root):
    labels = np.array([7, 33])[HALVES]
    labels[0] = 6
    save(root / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png", labels)
    save(root / "gtFine/val/ulm/ulm_000000_000019_gtFine_color.png", labels)
    return {"ulm/ulm_000000_000019_leftImg8bit": HALVES}


def potsdam3(root):
    tile = np.kron(np.arange(6).reshape(2, 3), np.ones((12, 8), int))  # the six classes
    save(root / "5_Labels_all/a_label.png", layouts.POTSDAM_COLOURS[tile])
    save(root / "5_Labels_all/b_label.tif", tile)
    savemat(root / "5_Labels_all/7.mat", {"gt": tile.astype(np.int32)})
    classes = np.array([0, 1, 2, 2, 0, 1])[tile]
    return {"a": classes, "b": classes, "7": classes}


def saliency(root):
    save(root / "ECSSD/ground_truth_mask/0001.png", 255 * HALVES)
    return {"0001": 255 * HALVES}


def corloc(root):
    annotation(root / "VOCdevkit/VOC2007/Annotations/000005.xml", (4, 1, 6, 4), (1, 1, 1, 1))
    write_list(root / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt", "000005")
    return {"000005": 255 * HALVES}


def instances(root, *boxes, numbers=(9,)):
    """Write pictures of 4 x 6 pixels and (number of the picture, box, crowd) as COCO does."""
    names = {i: f"COCO_train2014_{i:012d}.jpg" for i in numbers}
    images = [{"id": i, "file_name": names[i], "height": 4, "width": 6} for i in numbers]
    objects = [
        {"image_id": i, "bbox": box, "iscrowd": crowd, "segmentation": [[0.5, 1.5]]}
        for i, box, crowd in boxes
    ]
    path = root / "annotations/instances_train2014.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": []}))
    return path


def coco20k(root):
    instances(root, (9, [3, 0, 3, 4], 0), (9, [0, 0, 1, 1], 0))
    return {"train2014/COCO_train2014_000000000009": 255 * HALVES}


def davis(root):
    for name, truth in (("dog", HALVES), ("bear", 1 - HALVES)):
        save(root / f"Annotations/480p/{name}/00000.png", 255 * truth)
    return {"dog/00000": 2 * HALVES, "bear/00000": 1 - HALVES}


REPLICAS = (bsds500, voc2012, coco27, cityscapes27, potsdam3, saliency, corloc, coco20k, davis)
assert [make.__name__ for make in REPLICAS] == [*LAYOUTS]
PERFECT = {
    "bsds500": ("all", "fine", "coarse", "mean", "picture all", "one-to-one"),
    "voc2012": ("best IoU", "picture best IoU", "one-to-one"),
    "coco27": ("acc", "mIoU", "stuff acc", "stuff mIoU"),
    "cityscapes27": ("acc", "mIoU"),
    "potsdam3": ("acc", "mIoU"),
    "saliency": ("acc", "IoU", "max F (MOVE)", "max F (SelfMask)"),
    "corloc": ("CorLoc",),
    "coco20k": ("CorLoc",),
    "davis": ("IoU", "F"),
}


def scored(capsys, data, *argv):
    """The document that the command prints."""
    options = ["--data", str(data), "--predictions", str(data / "found"), "--json"]
    code = command.main(["protocol", *argv, *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(params=REPLICAS, ids=lambda make: make.__name__)
def replica(request, tmp_path):
    predictions = request.param(tmp_path)
    for name, labels in predictions.items():
        save(tmp_path / f"found/{name}.png", labels)
    return request.param.__name__, tmp_path, predictions


def test_the_truth_itself_is_perfect(replica, capsys):
    name, root, predictions = replica
    code, document = scored(capsys, root, name)
    assert code == 0
    assert document["pictures"] == len(predictions) and document["unused predictions"] == 0
    assert document["split"] == LAYOUTS[name].split and document["protocol"] == name
    assert document["published pictures"] == list(LAYOUTS[name].pictures)
    assert {k: document["scores"][k] for k in PERFECT[name]} == dict.fromkeys(PERFECT[name], 1)


def test_a_wrong_prediction_is_not_perfect(replica, capsys):
    name, root, predictions = replica
    for picture, labels in predictions.items():
        save(root / f"found/{picture}.png", np.where(np.indices(labels.shape)[0] % 2, 255, 0))
    _, document = scored(capsys, root, name)
    assert document["scores"][PERFECT[name][0]] < 1


def test_sizes_that_differ_are_errors(replica, capsys):
    name, root, predictions = replica
    for picture in predictions:
        save(root / f"found/{picture}.png", np.full((5, 6), 255))
    code, document = scored(capsys, root, name)
    assert code == 1
    assert "has 6 x 5 pixels, the picture " in document["error"]
    assert document["fix"] == "save predictions at the size of the picture"


def test_a_missing_prediction_is_named(replica, capsys):
    name, root, predictions = replica
    first = min(predictions)
    (root / f"found/{first}.png").unlink()
    code, document = scored(capsys, root, name)
    assert code == 1
    assert f"1 of {len(predictions)} pictures have no prediction" in document["error"]
    assert document["error"].endswith(f"the first is {first}") and first in document["fix"]


def test_missing_data_is_named(replica, capsys, tmp_path):
    name = replica[0]
    (tmp_path / "empty/found").mkdir(parents=True)
    code, document = scored(capsys, tmp_path / "empty", name)
    assert code == 1 and "contains none of" in document["error"]
    for data, message in (("none", "none does not exist"), ("file", "file is a file, wanted a ")):
        (tmp_path / "file").touch()
        options = ["--data", str(tmp_path / data), "--predictions", str(tmp_path), "--json"]
        assert command.main(["protocol", name, *options]) == 1
        assert message in json.loads(capsys.readouterr().out)["error"]


def test_predictions_after_the_cut_and_at_full_size(tmp_path, capsys):
    labels = np.kron(np.array([[0, 7, 181, 91]]), np.ones((6, 5), int))  # (6, 20)
    save(tmp_path / "annotations/val2017/1.png", labels)
    whole = np.kron(np.arange(4)[None], np.ones((6, 5), int))
    save(tmp_path / "found/1.png", whole)
    _, document = scored(capsys, tmp_path, "coco27")
    assert document["scores"]["acc"] == 1 and document["scores"]["clusters"] == 2  # in the middle
    save(tmp_path / "found/1.png", np.repeat([[1] * 160 + [2] * 160], 320, axis=0))
    _, document = scored(capsys, tmp_path, "coco27")
    assert document["scores"]["acc"] > 0.99
    save(tmp_path / "found/1.png", np.repeat([[1] * 256 + [2] * 256], 512, axis=0))
    _, document = scored(capsys, tmp_path, "coco27", "--compat", "diffseg")
    assert document["scores"]["compat diffseg acc"] > 0.99 and document["compat"] == "diffseg"
    channels = np.repeat([[3] * 120 + [4] * 120 + [20] * 120 + [21] * 120], 640, axis=0)
    for stretched in (channels, channels[:6, ::24]):  # after the cut, and at full size
        save(tmp_path / "found/1.png", stretched)
        _, document = scored(capsys, tmp_path, "coco27", "--compat", "dynaseg")
        assert document["scores"]["compat dynaseg acc"] == 1 and document["compat"] == "dynaseg"


def test_label_maps_of_all_kinds_are_the_same_regions(tmp_path, capsys):
    bsds500(tmp_path)
    for labels in (HALVES, np.uint16(60000 * HALVES), np.array([[9, 8, 7], [0, 0, 99]])[HALVES]):
        with case(labels.dtype, labels.shape):
            save(tmp_path / "found/2018.png", labels)
            _, document = scored(capsys, tmp_path, "bsds500", "--compat", "dynaguide")
            scores = document["scores"]
            assert scores["all"] == scores["compat dynaguide"] == 1 and scores["segments"] == 2
    for wrong in (np.dstack([HALVES] * 4), np.uint16(np.dstack([HALVES] * 3))):
        save(tmp_path / "found/2018.png", wrong)
        assert "is no label map" in scored(capsys, tmp_path, "bsds500")[1]["error"]
    palette = Image.fromarray(HALVES.astype(np.uint8), "P")
    palette.putpalette([9, 9, 9] * 2)  # the indices are the labels, also if two colours are equal
    palette.save(tmp_path / "found/2018.png", transparency=0)
    assert scored(capsys, tmp_path, "bsds500")[1]["scores"]["all"] == 1
    Image.fromarray(HALVES == 1).save(tmp_path / "found/2018.png")
    assert "grey PNG of 1 bit" in scored(capsys, tmp_path, "bsds500")[1]["error"]
    (tmp_path / "found/2018.png").write_bytes((tmp_path / "found/2018.png").read_bytes()[:60])
    assert scored(capsys, tmp_path, "bsds500")[0] == 1


def test_truths_with_other_numbers_or_forms_are_errors(tmp_path, capsys):
    save(tmp_path / "found/1.png", 255 * HALVES)
    save(tmp_path / "annotations/val2017/1.png", HALVES + 200)
    assert "has the number 200, which is no class" in scored(capsys, tmp_path, "coco27")[1]["error"]
    save(tmp_path / "labels/1.png", np.array([[1, 2, 3], [0, 0, 255]])[HALVES])
    assert "has the colour (1, 2, 3), which" in scored(capsys, tmp_path, "potsdam3")[1]["error"]
    save(tmp_path / "labels/1.png", HALVES)
    assert "are no tile of Potsdam-3" in scored(capsys, tmp_path, "potsdam3")[1]["error"]
    write_list(tmp_path / "ImageSets/Main/trainval.txt", "1")
    write_list(tmp_path / "Annotations/1.xml", "<annotation>")
    assert "is no annotation of VOC" in scored(capsys, tmp_path, "corloc")[1]["error"]
    (tmp_path / "Annotations/1.xml").unlink()
    assert "1.xml does not exist" in scored(capsys, tmp_path, "corloc")[1]["error"]
    write_list(tmp_path / "ImageSets/Segmentation/val.txt", "1")
    save(tmp_path / "SegmentationClass/1.png", np.full((4, 6), IGNORED))
    assert "1.png has no pixel to score" in scored(capsys, tmp_path, "voc2012")[1]["error"]
    (tmp_path / "gtFine/val").mkdir(parents=True)
    assert "contains no truth of city" in scored(capsys, tmp_path, "cityscapes27")[1]["error"]
    (tmp_path / "gt").mkdir()
    assert "labels, " in scored(capsys, tmp_path, "potsdam3")[1]["error"]


# The class of each id of COCO-Stuff, as PiCIE and STEGO have it.
STUFF = """
    17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15
    22 21 21 24 20 22 15 17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26
    15 23 20 21 24 15 24 22 25 15 20 17 17 22 14 18 18 18 18 18 18 18 26 26 19 19 24
"""
THINGS = (  # number of ids, class
    (1, 9), (8, 11), (6, 8), (10, 7), (8, 6), (10, 10), (8, 5), (10, 2), (10, 3), (6, 0), (6, 1),
    (8, 4),
)  # fmt: skip


def test_the_tables_of_classes(tmp_path):
    """Each id of COCO-Stuff has one class; the palette is VOC's; 27 ids of Cityscapes are used."""
    things = [number for count, number in THINGS for _ in range(count)]
    save(tmp_path / "coco.png", np.arange(182)[None])
    found = LAYOUTS["coco27"].read(tmp_path / "coco.png")[0].tolist()
    assert found == things + [int(word) for word in STUFF.split()]
    assert sorted(i for _, ids in COCO27 for i in ids) == list(range(182)) and len(COCO27) == 27
    names = [name for name, _ in COCO27]
    assert names[layouts.FIRST_STUFF :][0] == "ceiling" and len(names[layouts.FIRST_STUFF :]) == 15
    assert len(layouts.CITYSCAPES) == 27


def test_reading_the_classes(tmp_path):
    """Every colour of VOC, every id of the others."""
    wide = np.arange(256)[None]
    save(tmp_path / "voc.png", np.array([voc_colour(i) for i in range(256)])[wide])
    save(tmp_path / "grey.png", wide)
    for name in ("voc.png", "grey.png"):
        assert np.array_equal(LAYOUTS["voc2012"].read(tmp_path / name), wide)
    save(tmp_path / "coco.png", np.append(np.arange(182), 255)[None])
    classes = LAYOUTS["coco27"].read(tmp_path / "coco.png")[0].tolist()
    assert classes[182] == IGNORED
    assert (classes[0], classes[8], classes[94], classes[152], classes[181]) == (9, 11, 20, 14, 24)
    save(tmp_path / "city.png", np.append(np.arange(34), 255)[None])
    found = LAYOUTS["cityscapes27"].read(tmp_path / "city.png")[0].tolist()
    assert found == [IGNORED] * 7 + [*range(27)] + [IGNORED]


SPLITS = {
    "bsds500": "test", "voc2012": "val", "coco27": "val2017", "cityscapes27": "val",
    "potsdam3": "", "saliency": "", "corloc": "trainval", "coco20k": "train2014", "davis": "",
}  # fmt: skip


def test_data_sets_are_read_from_each_official_folder(tmp_path):
    """And the part that publications score is the default."""
    assert {name: layout.split for name, layout in LAYOUTS.items()} == SPLITS
    voc = [(f"{p}SegmentationClass", f"{p}ImageSets/Segmentation/val.txt") for p in (
        "", "VOC2007/", "VOC2012/", "VOCdevkit/VOC2007/", "VOCdevkit/VOC2012/"
    )]  # fmt: skip
    bsds = ("", "data/", "BSDS500/data/", "BSR/BSDS500/data/")
    duts = ("", "DUTS-TE/", "ECSSD/", "DUT-OMRON/")
    kinds = ("DUTS-TE-Mask", "ground_truth_mask", "pixelwiseGT-new-PNG")
    coco = ("annotations/", "stuffthingmaps_trainval2017/", "stuffthingmaps/", "")
    cases = [
        *(("bsds500", f"{root}groundTruth/test/a.mat", "") for root in bsds),
        *(("voc2012", f"{folder}/a.png", names) for folder, names in voc),
        *(("coco27", f"{root}val2017/a.png", "") for root in coco),
        *(("saliency", f"{root}{kind}/a.png", "") for root in duts for kind in kinds),
        *(("davis", f"{root}/a.png", "") for root in (
            "Annotations/480p", "DAVIS/Annotations/480p", "masks"
        )),
        *(("potsdam3", f"{root}/a_label.png", "") for root in ("5_Labels_all", "labels", "gt")),
    ]  # fmt: skip
    for i, (name, file, names) in enumerate(cases):
        with case(name, file):
            root = tmp_path / str(i)
            for path in {root / file, root / (names or file)}:
                path.parent.mkdir(parents=True)
                path.write_text("a\n")
            found = LAYOUTS[name].find(root, LAYOUTS[name].split)
            assert found == [("a", root / file)]


def test_other_files_of_cityscapes_and_coco_are_left_out(tmp_path):
    cityscapes27(tmp_path)
    for end in ("labelTrainIds", "instanceIds"):
        save(tmp_path / f"gtFine/val/ulm/ulm_000000_000019_gtFine_{end}.png", HALVES)
    assert len(LAYOUTS["cityscapes27"].find(tmp_path, "val")) == 1
    save(tmp_path / "val2017/1.png", HALVES)  # beside the folder of the truth: no truth
    coco27(tmp_path)
    assert [t.name for t in LAYOUTS["coco27"].find(tmp_path, "val2017")] == ["000000000139"]


def test_boxes_of_voc_begin_at_one(tmp_path):
    annotation(tmp_path / "1.xml", (1, 1, 6, 4), (2, 3, 2, 3))
    found = LAYOUTS["corloc"].read(tmp_path / "1.xml")
    assert found.size == (4, 6) and found.boxes.tolist() == [[0, 0, 6, 4], [1, 2, 2, 3]]


def test_boxes_of_coco_are_rounded_and_have_no_crowds(tmp_path, capsys):
    """As in LOST, whose list of COCO20K names files of pictures."""
    boxes = (9, [2.5, 0.5, 3.25, 3.25], 0), (12, [3, 0, 3, 4], 1), (12, [3.1, 1, 0.2, 1], 0)
    instances(tmp_path, *boxes, numbers=(9, 12, 25))
    found = {name: truth for name, truth in LAYOUTS["coco20k"].find(tmp_path, "train2014")}
    names = [f"train2014/COCO_train2014_{i:012d}" for i in (9, 12, 25)]
    assert [*found] == names and {truth.size for truth in found.values()} == {(4, 6)}
    expected = [[[2, 0, 6, 4]], [[3, 1, 3, 2]], []]  # Python rounds 2.5 and 0.5 to even numbers
    assert [truth.boxes.tolist() for truth in found.values()] == expected
    for name in names:
        save(tmp_path / f"found/{name}.png", 255 * HALVES)
    _, document = scored(capsys, tmp_path, "coco20k")
    assert document["scores"] == {"CorLoc": pytest.approx(1 / 3), "empty": 0}
    write_list(tmp_path / "coco_20k_filenames.txt", *(f"{name}.jpg" for name in names[:2]))
    listed = ["coco20k", "--list", str(tmp_path / "coco_20k_filenames.txt")]
    _, document = scored(capsys, tmp_path, *listed)
    assert (document["scores"]["CorLoc"], document["pictures"]) == (0.5, 2)
    assert document["unused predictions"] == 1


def test_files_of_instances_with_another_form_are_errors(tmp_path, capsys):
    path = instances(tmp_path)
    (tmp_path / "found").mkdir()
    good = path.read_text()
    for text in (
        "[]", "[[1]]", "3", "{}", '{"images": 3, "annotations": []}', "[" * 10**5, good[:-1],
        good.replace('"id": 9', '"id": []'), good.replace('"height": 4', '"height": "x"'),
        good.replace('"annotations": []', '"annotations": [{"iscrowd": 0, "bbox": [1, 2]}]'),
        good.replace('[]', '[{"iscrowd": 0, "bbox": [1, 2, 3, 1e999], "image_id": 9}]', 1),
        good.replace('[]', '[{"iscrowd": 0, "bbox": [1, 2, 3, 4], "image_id": 7}]', 1),
    ):  # fmt: skip
        with case(text[:60]):
            path.write_text(text)
            code, document = scored(capsys, tmp_path, "coco20k")
            assert code == 1 and "contains no instances of COCO" in document["error"]
    path.write_text(good.replace("[]", '[{"iscrowd": 0, "bbox": [1, 2, -3, 4], "image_id": 9}]', 1))
    assert "a box whose right or lower edge" in scored(capsys, tmp_path, "coco20k")[1]["error"]
    path.write_text('{"images": [], "annotations": []}')
    assert "contains no truth of coco20k" in scored(capsys, tmp_path, "coco20k")[1]["error"]


def test_tiles_of_iic(tmp_path, capsys):
    """Arrays of six numbers with the name "gt"; the list of the tiles to score."""
    tile = np.kron(np.arange(6).reshape(2, 3), np.ones((12, 8), np.int32)).astype(np.int32)
    for name in ("11", "4", "7"):
        (tmp_path / "gt").mkdir(exist_ok=True)
        savemat(tmp_path / f"gt/{name}.mat", {"gt": tile})
        save(tmp_path / f"found/{name}.png", tile)
    write_list(tmp_path / "labelled_test.txt", "4", "11")
    listed = ["potsdam3", "--list", str(tmp_path / "labelled_test.txt")]
    _, document = scored(capsys, tmp_path, *listed)
    assert document["pictures"] == 2 and document["unused predictions"] == 1
    assert document["scores"]["acc"] == pytest.approx(
        0.5, abs=0.01
    )  # three of the six numbers match one class each
    for array, message in (
        ({"gt": tile + 0.5}, "has another form"),
        ({"gt": tile[None]}, "has another form"),
        ({"gt": tile - 1}, "has another form"),
        ({"gt": tile + 65536}, "has another form"),
        ({"gt": np.zeros((0, 0), np.uint8)}, "has another form"),
        ({"gt": {"deep": 1}}, "has another form"),
        ({"gt": tile + 6}, "has the number 6, which is no class"),
        ({"img": tile}, "contains no array 'gt'"),
    ):
        with case(message):
            savemat(tmp_path / "gt/4.mat", array)
            code, document = scored(capsys, tmp_path, *listed)
            assert code == 1 and message in document["error"]
    for data in (b"", b"MATLAB 5.0", (tmp_path / "gt/7.mat").read_bytes()[:300]):
        with case(data[:9]):
            (tmp_path / "gt/4.mat").write_bytes(data)
            code, document = scored(capsys, tmp_path, *listed)
            assert code == 1 and "4.mat is no MATLAB file" in document["error"]
    (tmp_path / "gt/4.mat").unlink()
    assert "names 4, of which there is no" in scored(capsys, tmp_path, *listed)[1]["error"]


def test_annotators_of_another_form_are_errors(tmp_path, capsys):
    bsds500(tmp_path)
    save(tmp_path / "found/2018.png", HALVES)
    path = tmp_path / "BSR/BSDS500/data/groundTruth/test/2018.mat"
    person = np.empty((1, 1), object)
    person[0, 0] = {"Boundaries": HALVES}
    for truth in (person, HALVES, 7, np.zeros((1, 0))):
        with case(str(truth)):
            savemat(path, {"groundTruth": truth})
            code, document = scored(capsys, tmp_path, "bsds500")
            assert code == 1 and "'groundTruth'" in document["error"] and document["fix"]


def test_two_truths_of_a_picture_are_an_error(tmp_path, capsys):
    potsdam3(tmp_path)
    save(tmp_path / "5_Labels_all/b.png", HALVES)
    code, document = scored(capsys, tmp_path, "potsdam3")
    assert code == 1 and "contains 2 truths of picture b" in document["error"]


def test_definitions_in_annotations_are_refused(tmp_path, capsys):
    write_list(tmp_path / "ImageSets/Main/trainval.txt", "1")
    annotation(tmp_path / "Annotations/1.xml", (1, 1, 6, 4))
    save(tmp_path / "found/1.png", 255 * HALVES)
    path = tmp_path / "Annotations/1.xml"
    good = path.read_text()
    path.write_text(f'<!DOCTYPE a [<!ENTITY b "4">]>{good}')
    assert "VOC: it has a DOCTYPE" in scored(capsys, tmp_path, "corloc")[1]["error"]
    for wrong in ("nan", "1e999", "0"):
        path.write_text(good.replace("<xmax>6", f"<xmax>{wrong}"))
        with case(wrong):
            document = scored(capsys, tmp_path, "corloc")[1]
            assert ("a box whose" in document.get("error", "")) == (wrong != "0")


def test_the_command_quality_hands_protocols_over(tmp_path, capsys):
    bsds500(tmp_path)
    save(tmp_path / "found/2018.png", HALVES)
    rest = ["--data", str(tmp_path), "--predictions", str(tmp_path / "found"), "--json"]
    printed = []
    for argv in (
        ["protocol", "bsds500", *rest],
        ["quality", "--protocol", "bsds500", *rest],
        ["quality", *rest, "--protocol=bsds500"],
    ):
        assert command.main(argv) == 0
        printed.append(json.loads(capsys.readouterr().out)["scores"])
    assert printed[0] == printed[1] == printed[2]
    for argv in (["--protocol"], ["--protocol", "--data", "x"], ["--protocol", "voc"]):
        with case(str(argv)), pytest.raises(SystemExit) as end:
            command.main(["quality", *argv])
        assert end.value.code == 2
        assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["quality", "--help"])
    assert "--protocol NAME" in capsys.readouterr().out


def test_options_and_the_table(tmp_path, capsys):
    bsds500(tmp_path)
    save(tmp_path / "found/2018.png", HALVES)
    save(tmp_path / "found/other.png", HALVES)
    paths = ["--data", str(tmp_path), "--predictions", str(tmp_path / "found")]
    out = tmp_path / "made/result.json"
    argv = ["protocol", "bsds500", *paths, "--split", "val", "-o", str(out)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert "bsds500 val, 1 pictures" in printed and "| one-to-one     | 1.0000 |" in printed
    assert "1 PNG files belong to no picture" in printed
    assert "publications score 200 pictures of the part test" in printed
    document = json.loads(out.read_text())
    assert document["split"] == "val" and "cpu" in document["environment"]
    assert command.main(["protocol", "bsds500", *paths[:3], "none", "-o", str(tmp_path)]) == 1
    assert "is a folder, wanted a file name" in capsys.readouterr().err  # before all other work
    assert "BSR/BSDS500/data/groundTruth/all" in scored(
        capsys, tmp_path, "bsds500", "--split", "all"
    )[1]["error"]  # fmt: skip
    assert "has no parts" in scored(capsys, tmp_path, "davis", "--split", "val")[1]["error"]
    for wrong in (["davis", "--compat", "diffseg"], ["bsds500", "--compat", "dynaseg"], ["voc"]):
        with case(str(wrong)), pytest.raises(SystemExit) as end:
            command.main(["protocol", *wrong, *paths])
        assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "--compat diffseg is unknown for davis, which has no such mode" in printed
    assert "--compat dynaseg is unknown for bsds500; wanted dynaguide" in printed
