"""The limits of the comparison with the original network, met exactly and just missed."""

import numpy as np
import pytest
from cases import case
from one_layer_networks import save

from export.check_prior import check_prior
from export.frozen import Frozen
from export.models.onnx_file import onnx_file
from export.pictures import Pictures
from runtime.errors import VerificationFailed

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")

HEIGHT, WIDTH = 40, 50  # 2000 pixels
FAR = 1000.0  # the score of a third class, with its sign changed
# precision -> the least share of equal labels, the largest difference divided by FAR
LIMITS = {
    "fp32": (0.999, 1e-3),
    "fp16": (0.995, 5e-2),
    "int8": (0.95, 0.5),
    "int8+fp16": (0.95, 0.5),
}


def network(path, threshold, far=FAR, slope=1.0):
    """Label 1 where red is above the threshold, else 0; class 2 has the score -far everywhere."""
    weight, bias = [[0, 0, 0], [slope, 0, 0], [0, 0, 0]], [0, -threshold / 255, -far]
    size = (HEIGHT, WIDTH)
    save(path, weight, bias, inputs=((1, 3, *size),), mean=[0, 0, 0], std=[1, 1, 1])
    model = onnx.load(path)
    shape = onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, (1, 3, *size))
    model.graph.output[0].CopyFrom(shape)
    onnx.save(model, path)
    return path


def picture(count):
    """Red is 0 or 255, and 120 in ``count`` pixels: networks of thresholds 100 and 140 give these
    pixels different labels."""
    red = np.where(np.arange(HEIGHT * WIDTH) % 2, 255, 0)
    red[:count] = 120
    return np.repeat(red.reshape(HEIGHT, WIDTH, 1), 3, axis=2).astype(np.uint8)


@pytest.fixture
def compared(tmp_path):
    """Compare a network with another one in a precision, and return the numbers of the report."""

    def compare(precision, other, counts, kept="fp32"):
        model = onnx_file(network(tmp_path / "one.onnx", 100))
        data = network(tmp_path / "two.onnx", *other).read_bytes()
        if kept == "fp16":  # a file with weights of FP16, one of which is unused
            graph = onnx.load_from_string(data)
            graph.graph.initializer.add(name="half", data_type=10, dims=[1], raw_data=b"\0\0")
            data = graph.SerializeToString()
        pictures = Pictures([picture(n) for n in counts], [f"{n}.png" for n in counts])
        first = Frozen("first", data=model.onnx)
        second = Frozen("second", data=data)
        frozen = first if precision != kept else second
        with first, second:
            report = check_prior(model, frozen, second, precision, model.preprocess, pictures)
        return report.report[precision if precision != kept else "frozen"]

    return compare


def test_the_least_share_of_equal_labels(compared):
    for precision, (least, _) in LIMITS.items():
        most = round(HEIGHT * WIDTH * (1 - least))
        with case(precision):
            assert compared(precision, [140], [most])["agreement"] == pytest.approx(least)
            # the mean over the pictures counts
            assert compared(precision, [140], [0, 2 * most])["worst"] < least
            with pytest.raises(VerificationFailed, match=f"; wanted {least:.2%}"):
                compared(precision, [140], [most + 1])


def test_the_largest_difference_of_scores(compared):
    for precision, (_, most) in LIMITS.items():
        with case(precision):
            found = compared(precision, [100, FAR * (1 + 0.99 * most)], [0])
            assert found["max_abs"] == pytest.approx(0.99 * most * FAR, rel=1e-3)
            assert found["largest"] == FAR
            with pytest.raises(VerificationFailed, match=f"at most {most:g} of that"):
                compared(precision, [100, FAR * (1 + 1.01 * most)], [0])


def test_a_file_of_fp16_is_compared_by_the_limits_of_fp16(compared):
    """Freezing rounds its weights again, so the limits of FP32 would be too narrow."""
    least, most = LIMITS["fp16"]
    count = round(HEIGHT * WIDTH * (1 - least))
    assert compared("fp16", [140], [count], kept="fp16")["agreement"] == pytest.approx(least)
    for other, counts in [([140], [count + 1]), ([100, FAR * (1 + 1.01 * most)], [0])]:
        with pytest.raises(VerificationFailed, match="in fp16"):
            compared("fp16", other, counts, kept="fp16")


def test_the_worst_picture(compared):
    for counts in ([10, 20, 0], [20, 0, 10], [0, 10, 20]):
        with case(counts):
            found = compared("int8", [140], counts)
            assert found["worst"] == 1 - 20 / (HEIGHT * WIDTH)
            assert found["worst_picture"] == "20.png"
            assert found["agreement"] == pytest.approx(1 - 10 / (HEIGHT * WIDTH))


def test_the_largest_difference_of_all_pictures(compared, tmp_path):
    """The differences of these networks grow with red."""
    model = onnx_file(network(tmp_path / "one.onnx", 100, far=0.5))
    path = network(tmp_path / "two.onnx", 100, far=0.5, slope=1.1)
    dark, bright = np.zeros((HEIGHT, WIDTH, 3), np.uint8), picture(0)
    for arrays in ([dark, bright], [bright, dark]):
        pictures = Pictures(arrays, ["a", "b"])
        with Frozen("one", data=model.onnx) as one, Frozen("two", data=path.read_bytes()) as two:
            report = check_prior(model, one, two, "int8", model.preprocess, pictures).report
        assert report["int8"]["max_abs"] == pytest.approx(0.1, rel=1e-4)
        assert report["int8"]["largest"] == pytest.approx(155 / 255)
