"""sdk/result.py: regions measured, drawn, and written as pictures, JSON and COCO."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label as connected

from runtime.errors import InputError
from runtime.pictures.load import load_image
from sdk import Segmenter, StreamState
from sdk.result import Result, Segment


def make(labels: Any, /, **changes: Any) -> Result:
    """A Result of these labels, with grey picture and confidence rising along the rows."""
    labels = np.asarray(labels, np.int32)
    fields: dict[str, Any] = {
        "image": np.full((*labels.shape, 3), 100, np.uint8),
        "labels": labels,
        "names": None,
        "confidence": np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape),
        "regions": connected(labels, connectivity=1, background=-(2**31)).astype(np.int32),
        "stats": {},
        "timings": {},
        "device": "cpu",
        "backend": "avx2",
        "warnings": [],
    }
    return Result(**{**fields, **changes})


def blocks(height: int, width: int, cell: int, classes: int = 20) -> Result:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, classes, (-(-height // cell), -(-width // cell)))
    return make(coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width])


def slow_segments(result: Result) -> list[Segment]:
    """Region by region, as the definition says."""
    found = []
    for id in np.unique(result.regions).tolist():
        y, x = np.nonzero(result.regions == id)
        label = int(result.labels[y[0], x[0]])
        name = result.names[label] if result.names and 0 <= label < len(result.names) else None
        left, top = int(x.min()), int(y.min())
        bbox = (left, top, int(x.max()) - left + 1, int(y.max()) - top + 1)
        mean = float(result.confidence[y, x].astype(np.float64).mean())
        found.append(Segment(id, label, name, len(y), bbox, mean))
    return sorted(found, key=lambda segment: (-segment.area, segment.id))


def assert_segments(result: Result) -> None:
    expected = slow_segments(result)
    assert len(result.segments) == len(expected)
    for got, want in zip(result.segments, expected, strict=True):
        assert got == dataclasses.replace(want, confidence=got.confidence)
        assert math.isclose(got.confidence, want.confidence, rel_tol=1e-12, abs_tol=1e-12)


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """COCO's own rule: column-major, background first, alternating."""
    height, width = segmentation["size"]
    mask = np.zeros(height * width, bool)
    position, inside = 0, False
    for count in segmentation["counts"]:
        mask[position : position + count] = inside
        position, inside = position + count, not inside
    assert position == height * width
    return mask.reshape(width, height).T


label_maps = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1)).map(
    lambda t: np.random.default_rng(t[2]).integers(0, 3, t[:2], dtype=np.int32)
)


# Checks


def test_wrong_arrays_are_refused() -> None:
    for changes, match in [
        ({"image": np.zeros((2, 3, 4), np.uint8)}, r"image is \(2, 3, 4\) uint8, wanted \(2, 3, 3"),
        ({"image": np.zeros((2, 3, 3), np.float32)}, r"image is .* float32, wanted .* uint8"),
        ({"image": [[[0, 0, 0]] * 3] * 2}, "image is a list, wanted a uint8 array"),
        ({"labels": np.zeros((3, 2), np.int32)}, r"labels is \(3, 2\) int32, wanted \(2, 3\)"),
        ({"labels": np.zeros((2, 3), np.int64)}, r"labels is .* int64, wanted .* int32"),
        ({"confidence": np.zeros((2, 3))}, r"confidence is .* float64, wanted .* float32"),
        ({"confidence": None}, "confidence is a NoneType, wanted a float32 array"),
        ({"regions": np.ones((2, 4), np.int32)}, r"regions is \(2, 4\) int32, wanted \(2, 3\)"),
        ({"regions": np.zeros((2, 3), np.int32)}, "regions starts at 0, wanted ids from 1"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            make([[0, 0, 1], [0, 1, 1]], **changes)


def test_empty_picture_is_refused() -> None:
    with pytest.raises(InputError, match=r"image is \(0, 3, 3\), wanted at least one pixel"):
        make(np.zeros((0, 3)), regions=np.zeros((0, 3), np.int32))


def test_result_and_segment_are_frozen() -> None:
    result = make([[0, 1]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.device = "cuda"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.segments[0].area = 7  # type: ignore[misc]
    assert result == result and {result}  # by identity: arrays have no single truth


# Segments


def test_segments_of_a_known_picture() -> None:
    result = make(
        [[0, 0, 2, 0], [0, 2, 2, 0], [1, 1, 1, 0]],
        names=["sky", "sea"],
        confidence=np.full((3, 4), 0.25, np.float32),
    )
    assert result.segments == (
        Segment(1, 0, "sky", 3, (0, 0, 2, 2), 0.25),
        Segment(2, 2, None, 3, (1, 0, 2, 2), 0.25),
        Segment(3, 0, "sky", 3, (3, 0, 1, 3), 0.25),
        Segment(4, 1, "sea", 3, (0, 2, 3, 1), 0.25),
    )
    assert result.segments is result.segments


def test_segments_are_plain_python() -> None:
    (segment,) = make([[5]]).segments
    kinds = {name: type(value) for name, value in vars(segment).items() if name != "name"}
    assert kinds == {"id": int, "label": int, "area": int, "bbox": tuple, "confidence": float}
    assert [type(value) for value in segment.bbox] == [int] * 4


def test_segments_of_small_and_thin_pictures() -> None:
    for size in [(1, 1), (1, 13), (13, 1), (2, 2), (31, 17)]:
        with case(size):
            assert_segments(make(np.random.default_rng(1).integers(0, 2, size)))
            assert_segments(make(np.zeros(size)))
            assert_segments(make(np.arange(size[0] * size[1]).reshape(size)))


@settings(max_examples=100, deadline=None)
@given(label_maps)
def test_segments_match_the_definition(labels: np.ndarray) -> None:
    assert_segments(make(labels))


def test_ids_with_gaps_negative_labels_and_strided_arrays() -> None:
    labels = np.array([[-1, -1, 7], [7, 7, 7]], np.int32)
    regions = np.array([[3, 3, 9], [9, 9, 9]], np.int32)
    assert_segments(make(labels, regions=regions, names=["a"]))
    strided = make(
        np.asfortranarray(labels),
        regions=np.repeat(regions, 2, axis=1)[:, ::2],
        confidence=np.ones((3, 2), np.float32).T,
        image=np.full((2, 6, 3), 100, np.uint8)[::-1, ::-2],
    )
    assert_segments(strided)
    assert_coco(strided)
    assert np.array_equal(strided.overlay(), make(labels).overlay())


# Drawing


def test_overlay_blends_the_colour_of_each_label() -> None:
    result = make([[0, 0, 1, 1]])
    full = result.overlay(alpha=1, boundaries=False)
    assert full.shape == (1, 4, 3) and full.dtype == np.uint8
    assert (full[0, 0] == full[0, 1]).all() and (full[0, 1] != full[0, 2]).any()
    assert np.array_equal(result.overlay(alpha=0, boundaries=False), result.image)
    half = result.overlay(boundaries=False).astype(int)
    assert np.abs(2 * half - full.astype(int) - 100).max() <= 1
    assert (result.image == 100).all()


def test_boundaries_are_white_and_one_pixel_thin() -> None:
    labels = np.zeros((6, 7), np.int32)
    labels[2:, 3:] = 1
    drawn = make(labels).overlay(alpha=0)
    white = (drawn == 255).all(axis=-1)
    expected = np.zeros_like(white)
    expected[1, 3:] = expected[2:, 2] = True
    assert np.array_equal(white, expected)
    assert (drawn[~expected] == 100).all()


def test_a_label_has_one_colour_in_every_picture() -> None:
    a = make([[3, 4], [4, 9]]).overlay(alpha=1, boundaries=False)
    b = make([[9, 9, 3]], image=np.zeros((1, 3, 3), np.uint8)).overlay(alpha=1, boundaries=False)
    assert np.array_equal(a[0, 0], b[0, 2]) and np.array_equal(a[1, 1], b[0, 0])


def test_large_and_negative_labels_are_drawn() -> None:
    drawn = make([[-1, 255, 70_000, 70_000 % 256]]).overlay(alpha=1, boundaries=False)
    assert np.array_equal(drawn[0, 0], drawn[0, 1])  # colours repeat every 256 labels
    assert np.array_equal(drawn[0, 2], drawn[0, 3])


def colours_as_seen() -> list[np.ndarray]:
    """The first colours in CIELAB, as seen by most, by protanopes, deuteranopes, tritanopes."""
    palette = make(np.arange(16)[None]).overlay(alpha=1, boundaries=False) / np.float32(255)
    linear = np.where(palette <= 0.04045, palette / 12.92, ((palette + 0.055) / 1.055) ** 2.4)
    sights = (  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
        np.eye(3).tolist(),
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    )
    seen = [(linear @ np.array(sight).T).clip(0, 1).astype(np.float32) for sight in sights]
    return [cv2.cvtColor(rgb, cv2.COLOR_LRGB2Lab)[0] for rgb in seen]


def test_first_colours_are_far_apart_for_every_eye() -> None:
    for lab in colours_as_seen():
        for count, apart in ((8, 14), (16, 10)):  # the 8 of Okabe and Ito are 16 apart
            distance = np.linalg.norm(lab[:count, None] - lab[None, :count], axis=-1)
            assert distance[~np.eye(count, dtype=bool)].min() > apart


def test_alpha_out_of_range_is_refused() -> None:
    for alpha in [-0.1, 1.1, math.nan]:
        with (
            case(alpha),
            pytest.raises(InputError, match=r"alpha is .*, wanted a number in \[0, 1\]"),
        ):
            make([[0, 1]]).overlay(alpha=alpha)


def test_save_writes_the_overlay_with_its_options(tmp_path: Path) -> None:
    result = blocks(40, 60, 7)
    result.save(tmp_path / "a.png")
    result.save(str(tmp_path / "b.png"), alpha=0.2, boundaries=False)
    assert np.array_equal(load_image(tmp_path / "a.png")[0], result.overlay())
    expected = result.overlay(alpha=0.2, boundaries=False)
    assert np.array_equal(load_image(tmp_path / "b.png")[0], expected)
    with pytest.raises(InputError, match=r"suffix is '\.gif', wanted one of"):
        result.save(tmp_path / "c.gif")
    with pytest.raises(InputError, match="does not exist"):
        result.save(tmp_path / "no" / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_labels_as_png_are_exact(tmp_path: Path) -> None:
    for top, dtype in [(255, np.uint8), (256, np.uint16), (65535, np.uint16)]:
        with case(top, dtype):
            result = make([[0, 1, 2], [7, top, 3]])
            result.save_labels(tmp_path / "labels.png")
            back = cv2.imread(str(tmp_path / "labels.png"), cv2.IMREAD_UNCHANGED)
            assert back.dtype == dtype and np.array_equal(back, result.labels)


def test_labels_as_npy_are_int32(tmp_path: Path) -> None:
    result = make([[-1, 70_000]])
    result.save_labels(tmp_path / "labels.NPY")
    back = np.load(tmp_path / "labels.NPY")
    assert back.dtype == np.int32 and np.array_equal(back, result.labels)


def test_labels_that_png_cannot_hold(tmp_path: Path) -> None:
    for labels in [[[-1, 0]], [[0, 65536]]]:
        with case(labels):
            with pytest.raises(InputError, match=r"(?s)wanted 0\.\.65535 for \.png.*fix: .*\.npy"):
                make(labels).save_labels(tmp_path / "labels.png")
            with pytest.raises(InputError, match=r"suffix is '\.jpg', wanted \.png or \.npy"):
                make(labels).save_labels(tmp_path / "labels.jpg")
            assert list(tmp_path.iterdir()) == []


# JSON


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))


def test_json_is_strict_and_complete() -> None:
    result = make(
        [[0, 1, 1]],
        names=["sky", "sea é"],
        confidence=np.array([[math.nan, 0.5, 1]], np.float32),
        stats={
            "steps": np.int64(3),
            "loss": np.array([[1.5, math.nan], [math.inf, -math.inf]], np.float32),
            "clusters": (4, np.int32(2)),
            "score": np.float32(0.5),
            "nested": {7: [None, True, np.bool_(False), math.nan]},
        },
        timings={"total": 1.25, "unaccounted": np.float64(math.nan)},
        warnings=["Something was odd."],
    )
    assert strict(result.to_json()) == {
        "size": {"height": 1, "width": 3},
        "names": ["sky", "sea é"],
        "segments": [
            {
                "id": 2,
                "label": 1,
                "name": "sea é",
                "area": 2,
                "bbox": [1, 0, 2, 1],
                "confidence": 0.75,
            },
            {
                "id": 1,
                "label": 0,
                "name": "sky",
                "area": 1,
                "bbox": [0, 0, 1, 1],
                "confidence": None,
            },
        ],
        "stats": {
            "steps": 3,
            "loss": [[1.5, None], [None, None]],
            "clusters": [4, 2],
            "score": 0.5,
            "nested": {"7": [None, True, False, None]},
        },
        "timings": {"total": 1.25, "unaccounted": None},
        "device": "cpu",
        "backend": "avx2",
        "warnings": ["Something was odd."],
    }


def test_json_indent_and_no_names() -> None:
    result = make([[0]])
    assert "\n  " in result.to_json(indent=2) and "\n" not in result.to_json()
    assert strict(result.to_json(indent=2)) == strict(result.to_json())
    assert strict(result.to_json())["names"] is None


def test_json_refuses_what_it_cannot_hold() -> None:
    for value in [object(), {1, 2}, 1j, np.array([object()])]:
        with case(value), pytest.raises(InputError, match="which JSON cannot hold"):
            make([[0]], stats={"odd": value}).to_json()


# COCO


def assert_coco(result: Result) -> None:
    coco = json.loads(json.dumps(result.to_coco()))
    assert len(coco["annotations"]) == len(result.segments)
    for annotation, segment in zip(coco["annotations"], result.segments, strict=True):
        mask = decode_rle(annotation["segmentation"])
        assert np.array_equal(mask, result.regions == segment.id)
        assert 0 not in annotation["segmentation"]["counts"][1:]
        assert annotation["id"] == segment.id and annotation["iscrowd"] == 0
        assert annotation["area"] == segment.area == mask.sum()
        assert annotation["bbox"] == list(segment.bbox)
        assert annotation["category_id"] == segment.label
        assert annotation["score"] == segment.confidence


def test_coco_of_a_known_picture() -> None:
    coco = make([[0, 0, 5], [0, 5, 5]], names=["sky", "sea"]).to_coco(7, "a.jpg")
    assert coco["images"] == [{"id": 7, "file_name": "a.jpg", "height": 2, "width": 3}]
    assert coco["categories"] == [
        {"id": 0, "name": "sky"},
        {"id": 1, "name": "sea"},
        {"id": 5, "name": "label 5"},
    ]
    first, second = coco["annotations"]
    assert first["image_id"] == second["image_id"] == 7
    assert first["segmentation"] == {"size": [2, 3], "counts": [0, 3, 3]}
    assert second["segmentation"] == {"size": [2, 3], "counts": [3, 3]}


@settings(max_examples=100, deadline=None)
@given(label_maps)
def test_coco_masks_are_the_regions(labels: np.ndarray) -> None:
    assert_coco(make(labels))


def test_coco_of_small_and_thin_pictures() -> None:
    for size in [(1, 1), (1, 13), (13, 1), (31, 17)]:
        with case(size):
            assert_coco(make(np.zeros(size)))
            assert_coco(make(np.arange(size[0] * size[1]).reshape(size)))


def test_coco_with_gaps_in_the_ids() -> None:
    assert_coco(make([[-1, -1, 7]], regions=np.array([[3, 3, 9]], np.int32)))


# Size


def test_many_regions_take_seconds_not_minutes() -> None:
    result = blocks(650, 650, 4)
    begin = time.process_time()
    assert len(result.segments) > 20_000
    coco = result.to_coco()
    assert time.process_time() - begin < 2.5  # about 0.15 s; a mask per region takes minutes
    assert sum(segment.area for segment in result.segments) == result.labels.size
    for annotation in coco["annotations"][::2_500]:
        mask = decode_rle(annotation["segmentation"])
        assert np.array_equal(mask, result.regions == annotation["id"])


def test_no_memory_to_encode_is_not_a_limit_of_the_file_type(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        error = cv2.error("Failed to allocate 9 bytes")
        error.code = cv2.Error.StsNoMem
        raise error

    monkeypatch.setattr(cv2, "imencode", full)
    for save in (make([[0, 1]]).save, make([[0, 1]]).save_labels):
        with pytest.raises(MemoryError, match="no memory to encode 2 x 1 pixels"):
            save(tmp_path / "a.png")
    assert not [*tmp_path.iterdir()]


def test_a_result_is_saved_under_a_name_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = Segmenter(refine=None)(np.zeros((8, 8, 3), np.uint8))
    for save, name in ((result.save, b"x.png"), (result.save_labels, b"x.npy")):
        save(name)
        assert Path(os.fsdecode(name)).is_file()
        for wrong in (None, io.BytesIO()):
            with pytest.raises(InputError, match="wanted the name of a file"):
                save(wrong)
    with pytest.raises(InputError, match="wanted the name of a file"):
        StreamState.load(None)
