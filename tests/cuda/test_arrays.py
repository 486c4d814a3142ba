"""Arrays of other libraries on a GPU: no copies, and work in the order of the streams.

The CUDA runtime is that of tests/support/cuda_shim.h, where device memory is host memory: arrays of
NumPy stand for those of PyTorch and CuPy.
"""

import ctypes
import gc
from itertools import product

import numpy as np
import pytest
from cases import case
from foreign_arrays import (
    API,
    CPU,
    CUDA,
    FLOATS,
    ROCM,
    WRAPS,
    Interface,
    Plain,
    Producer,
    Relabelled,
    Versioned,
    arrays,
)

import runtime
from runtime.errors import DeviceError, InputError

# ---- Without copies -----------------------------------------------------------------------------


def test_foreign_memory_is_used_as_it_is(cuda):
    for wrap in WRAPS:
        with case(wrap.__name__):
            array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
            view = cuda.as_array(wrap(array))
            assert view.__cuda_array_interface__["data"] == (array.ctypes.data, False)
            assert (view.shape, view.dtype, view.ndim, view.nbytes) == (
                (2, 3, 4),
                np.float32,
                3,
                96,
            )
            assert view.device == 0 and repr(view) == "Array((2, 3, 4), float32, GPU 0)"
            array += 1  # the array is read when it is downloaded, not before
            np.testing.assert_array_equal(view.numpy(), array)


def test_nothing_is_allocated_but_results_and_scratch(cuda, cudart):
    guide, values = map(Interface, arrays(20, 30))
    runtime.guided_filter(guide, values, device="cuda")
    before = cudart.allocations_left(), cudart.synchronisations()
    out = runtime.guided_filter(guide, values, device="cuda")
    assert before[0] - cudart.allocations_left() <= 1  # the first out is alive no more
    assert cudart.synchronisations() == before[1]  # and nothing waits
    out.numpy()
    assert cudart.synchronisations() == before[1] + 1


def test_dlpack_is_asked_before_the_interface(cuda):
    class Both(Producer):
        @property
        def __cuda_array_interface__(self):
            raise AssertionError

    array = Both(arrays(4, 5)[1])
    assert cuda.as_array(array).shape == (4, 5, 4)


def test_numpy_inputs_may_change_after_the_call(cuda):
    guide, values = arrays(9, 11)
    wanted = cuda.guided_filter(guide, values, 2, 1e-3, 1)
    out = cuda.guided_filter(guide, cuda.to_device(values), 2, 1e-3, 1)
    guide[:] = 0
    np.testing.assert_array_equal(out.numpy(), wanted)


# ---- Both protocols, in -------------------------------------------------------------------------


def test_capsules_are_consumed_and_released_once(cuda, cudart):
    for kind in (Plain, Versioned):
        with case(kind.__name__):
            producer = Producer(arrays(5, 6)[1], kind)
            view = cuda.as_array(producer)
            assert API.PyCapsule_GetName(producer.capsule) == b"used_" + kind.name
            again = view.reshape(30, 4)
            out = cuda.shrink(view, 2, 2, 1)
            del view
            out.numpy()
            assert producer.let_go == 0  # ``again`` is alive
            del again
            cuda.to_device(np.zeros(1, np.float32))
            assert producer.let_go == 1
            del producer.capsule
            gc.collect()
            assert producer.let_go == 1


def test_memory_is_kept_until_the_stream_has_read_it(cuda, cudart):
    producer, seen = Producer(arrays(5, 6)[1]), np.ones((5, 6, 4), np.float32)
    interface = Interface(seen)
    references = len(gc.get_referrers(interface))
    stream = ctypes.c_int64()
    number = ctypes.addressof(stream)
    cudart.keep_busy(number)
    cuda.shrink(producer, 2, 2, 1, stream=number)
    cuda.shrink(interface, 2, 2, 1, stream=number)
    cuda.to_device(np.zeros(1, np.float32))
    assert producer.let_go == 0
    cudart.keep_busy(None)
    cuda.to_device(np.zeros(1, np.float32))
    assert producer.let_go == 1 and len(gc.get_referrers(interface)) == references


def test_producers_are_called_as_the_protocol_says(cuda):
    array = arrays(4, 4)[1]
    new, old = Producer(array), Producer(array, Plain)
    for stream, number in [(0, 1), (1, 1), (2, 2), (77, 77)]:
        cuda.as_array(new, stream=stream)
        cuda.as_array(old, stream=stream)
        assert new.asked.pop() == (number, {"max_version": (1, 0), "copy": False})
        assert old.asked.pop() == (number, {})
    cuda.as_array(new)
    own = cuda.to_device(array).__cuda_array_interface__["stream"]
    assert own > 2 and new.asked == [(own, new.asked[0][1])]


def test_an_error_of_a_producer_is_raised(cuda):
    class Grad(Producer):
        def __dlpack__(self, **options):
            raise BufferError("requires gradient")

    with pytest.raises(BufferError, match="requires gradient"):
        cuda.as_array(Grad(arrays(4, 4)[1]))


def test_the_stream_of_an_interface_is_waited_for(cuda, cudart):
    array, filling = arrays(4, 4)[1], ctypes.c_int64()
    number = ctypes.addressof(filling)
    own = cuda.to_device(array).__cuda_array_interface__["stream"]
    cudart.waits()
    cuda.as_array(Interface(array))
    cuda.as_array(Interface(array, stream=own))
    assert cudart.waits() == []
    cuda.as_array(Interface(array, stream=number))
    assert cudart.waits() == [(own, number)]
    cuda.as_array(Interface(array, stream=1), stream=number)
    assert cudart.waits() == [(number, 1)]


def test_byte_offsets_and_strides_of_compact_arrays(cuda):
    array = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    found = cuda.as_array(Producer(array, strides=(4, 99, 1), offset=16))
    np.testing.assert_array_equal(found.numpy(), array)
    found = cuda.as_array(Interface(array, strides=(16, 99, 4)))
    np.testing.assert_array_equal(found.numpy(), array)
    found = cuda.as_array(Interface(array, version=2, data=(array.ctypes.data, True)))
    np.testing.assert_array_equal(found.numpy(), array)


REFUSED = [
    (Interface(FLOATS, strides=(4, 16, 80)), "x is not C-contiguous; .*\n  fix: .*contiguous"),
    (Producer(FLOATS, strides=(1, 4, 20)), "x is not C-contiguous"),
    (Interface(FLOATS.astype(np.float64)), "x has dtype float64 on the GPU; wanted float32, int32"),
    (Interface(FLOATS.astype(">f4")), "x has dtype float32 on the GPU"),
    (Producer(FLOATS.astype(np.float16)), "x has dtype float16 on the GPU; .*\n  fix: convert it"),
    (Producer(FLOATS.astype(np.int64)), "x has dtype int64 on the GPU"),
    (Producer(FLOATS, Plain, device=(CUDA, 1)), "x is on GPU 1; wanted GPU 0\n  fix: .*cuda:1"),
    (Producer(FLOATS, device=(CUDA, 1)), "x is on GPU 1; wanted GPU 0"),
    (Producer(FLOATS, major=2), "x has DLPack version 2; wanted 1"),
    (Interface(FLOATS[:0]), r"x has shape \(0, 5, 2\), which holds nothing"),
    (Producer(FLOATS[:, :0]), r"x has shape \(4, 0, 2\), which holds nothing"),
    (Interface(FLOATS, version=1), "x has version 1 of __cuda_array_interface__; wanted 2 or 3"),
    (Interface(FLOATS, version=4), "x has version 4"),
    (Interface(FLOATS, mask=FLOATS), "x is masked"),
    (Interface(FLOATS, stream=0), "x names stream 0, which __cuda_array_interface__ forbids"),
    (Interface(FLOATS, data=(FLOATS.ctypes.data + 2, False)), "x begins at an address"),
    (FLOATS, "x is not an array on a GPU"),
    (Producer(FLOATS, device=(ROCM, 0)), "x is not an array on a GPU"),
]


def test_unsupported_arrays_are_refused(cuda):
    for array, message in REFUSED:
        with case(message):
            before = getattr(array, "let_go", None)
            with pytest.raises(InputError, match=message):
                cuda.as_array(array, "x")
            cuda.to_device(np.zeros(1, np.float32))
            if getattr(array, "asked", None):  # an accepted capsule is released
                assert array.let_go == before + 1


def test_a_pointer_of_another_device_is_refused(cuda, cudart):
    cudart.lie_on_device(1)
    with pytest.raises(InputError, match="x is on GPU 1; wanted GPU 0"):
        cuda.as_array(Interface(FLOATS), "x")
    assert cuda.as_array(Interface(FLOATS), device=1).device == 1
    cudart.lie_on_device(-1)
    with pytest.raises(InputError, match="x is not in the memory of a GPU"):
        cuda.as_array(Interface(FLOATS), "x")


def test_a_used_capsule_is_refused(cuda):
    class Twice(Producer):
        def __dlpack__(self, **options):
            return getattr(self, "capsule", None) or super().__dlpack__(**options)

    producer = Twice(FLOATS)
    kept = cuda.as_array(producer)
    with pytest.raises(InputError, match="x returned no DLPack capsule that can be used"):
        cuda.as_array(producer, "x")
    assert kept.shape == FLOATS.shape


# ---- Both protocols, out ------------------------------------------------------------------------


def test_upload_and_download(cuda):
    for dtype in (np.float32, np.int32, np.uint8):
        with case(dtype.__name__):
            array = np.arange(60).reshape(3, 4, 5).astype(dtype)
            there = cuda.to_device(array.transpose(2, 0, 1))
            assert there.dtype == dtype and there.shape == (5, 3, 4)
            np.testing.assert_array_equal(there.numpy(), array.transpose(2, 0, 1))
            np.testing.assert_array_equal(np.asarray(there), array.transpose(2, 0, 1))
            assert np.asarray(there, np.float64).dtype == np.float64
            face = there.__cuda_array_interface__
            assert face["typestr"] == np.dtype(dtype).str and face["strides"] is None
            assert (face["version"], face["shape"]) == (3, (5, 3, 4))


def test_numpy_and_torch_import_exported_arrays(cuda):
    torch = pytest.importorskip("torch", reason="pip install torch")
    for dtype, version in product((np.float32, np.int32, np.uint8), (None, (1, 1))):
        with case(dtype.__name__, version):
            array = np.arange(60).reshape(3, 4, 5).astype(dtype)
            there = cuda.to_device(array)
            pointer = there.__cuda_array_interface__["data"][0]

            class Named(Relabelled):
                max_version = version

                def __dlpack__(self, **_):
                    return super().__dlpack__(max_version=self.max_version)

            taken = np.from_dlpack(Named(there))
            assert taken.ctypes.data == pointer
            tensor = torch.from_dlpack(Named(there))
            assert tensor.data_ptr() == pointer
            del there  # the memory is still used
            gc.collect()
            cuda.guided_filter(*arrays(30, 30), 2, 1e-3, 1)
            np.testing.assert_array_equal(taken, array)
            np.testing.assert_array_equal(tensor.numpy(), array)


def test_capsules_of_numpy_are_imported(cuda):
    """NumPy is another producer than the one of these tests."""

    class Numpys:
        def __init__(self, array):
            self.array = array

        def __dlpack_device__(self):
            return CUDA, 0

        def __dlpack__(self, *, stream, **options):
            options.pop("copy", None)
            capsule = self.array.__dlpack__(**options)
            kind = next(k for k in (Plain, Versioned) if k.name == API.PyCapsule_GetName(capsule))
            held = kind.from_address(API.PyCapsule_GetPointer(capsule, kind.name))
            held.tensor.device.type = CUDA
            return capsule

    array = arrays(6, 7)[1]
    np.testing.assert_array_equal(cuda.as_array(Numpys(array)).numpy(), array)


def test_exports_wait_in_the_consumers_stream(cuda, cudart):
    there = cuda.to_device(FLOATS)
    own = there.__cuda_array_interface__["stream"]
    other = ctypes.c_int64()
    number = ctypes.addressof(other)
    cudart.waits()
    for stream, expected in [(None, [(1, own)]), (2, [(2, own)]), (number, [(number, own)])]:
        there.__dlpack__(stream=stream)
        assert cudart.waits() == expected
    there.__dlpack__(stream=-1)
    there.__dlpack__(stream=own)
    assert cudart.waits() == []
    for forbidden in (0, -2):
        with pytest.raises(ValueError, match=f"stream is {forbidden}; DLPack forbids it"):
            there.__dlpack__(stream=forbidden)
    assert there.__dlpack_device__() == (CUDA, 0)
    there.__dlpack__(dl_device=(CUDA, 0), copy=False)
    for elsewhere in [(CPU, 0), (CUDA, 1)]:
        with pytest.raises(BufferError, match="its own GPU only"):
            there.__dlpack__(dl_device=elsewhere)


def test_streams_of_arrays_wait_for_each_other(cuda, cudart):
    values = arrays(8, 8)[1]
    first, second = 0x1000, 0x2000
    there = cuda.to_device(values, stream=first)
    assert there.__cuda_array_interface__["stream"] == first
    cudart.waits()
    same = cuda.shrink(there, 2, 2, 1, stream=first)
    assert cudart.waits() == []
    other = cuda.shrink(there, 2, 2, 1, stream=second)
    assert cudart.waits() == [(second, first)]
    default = cuda.shrink(there, 2, 2, 1, stream=0)
    assert default.__cuda_array_interface__["stream"] == 1  # the protocol's number for it
    assert cudart.waits() == [(0, first)]
    np.testing.assert_array_equal(same.numpy(), other.numpy())
    out = runtime.guided_filter(values[..., :3], there, device="cuda", stream=second)
    assert out.__cuda_array_interface__["stream"] == second


def test_a_requested_copy_has_its_own_memory(cuda):
    there = cuda.to_device(FLOATS + 5)
    capsule = there.__dlpack__(max_version=(1, 0), copy=True)
    held = Versioned.from_address(API.PyCapsule_GetPointer(capsule, Versioned.name))
    assert held.tensor.data != there.__cuda_array_interface__["data"][0]
    assert (held.flags, held.high, held.low) == (2, 1, 0)
    assert held.tensor.shape[:3] == [4, 5, 2] and held.tensor.strides[:3] == [10, 2, 1]
    assert (held.tensor.code, held.tensor.bits, held.tensor.lanes) == (2, 32, 1)
    copied = (ctypes.c_float * 40).from_address(held.tensor.data)
    assert list(copied) == [5.0] * 40
    plain = there.__dlpack__(max_version=(0, 8))
    assert API.PyCapsule_GetName(plain) == b"dltensor"


def test_shapes_can_change_but_not_sizes(cuda):
    there = cuda.to_device(FLOATS)
    assert there.reshape(4, 10).shape == (4, 10)
    with pytest.raises(InputError, match=r"of shape \(4, 5, 2\) cannot have shape \(4, 9\)"):
        there.reshape(4, 9)
    with pytest.raises(ValueError, match="cannot become a NumPy array without a copy"):
        np.array(there, copy=False)


def test_to_device_refuses(cuda):
    with pytest.raises(InputError, match="array has dtype float64; wanted float32, int32 or uint8"):
        cuda.to_device(np.zeros(3))
    with pytest.raises(InputError, match=r"array has shape .*, which holds nothing"):
        cuda.to_device(FLOATS[:0])


# ---- Memory -------------------------------------------------------------------------------------


def test_blocks_are_used_again(cuda, cudart):
    guide, values = arrays(30, 40)
    for array in (values, cuda.to_device(values)):
        for _ in range(3):
            cuda.guided_filter(guide, array, 2, 1e-3, 1)
            out = cuda.shrink(array, 5, 6, 1)
        before = cudart.allocations_left()
        for _ in range(1000):
            out = cuda.shrink(array, 5, 6, 1)
        for _ in range(20):
            out = cuda.guided_filter(guide, array, 2, 1e-3, 1)
        assert cudart.allocations_left() == before and out is not None


def test_a_block_is_not_reused_while_another_stream_uses_it(cuda, cudart):
    slow, fast = 0x1000, 0x2000
    there = cuda.to_device(FLOATS, stream=slow)
    pointer = there.__cuda_array_interface__["data"][0]
    cudart.keep_busy(slow)
    del there
    other = cuda.to_device(FLOATS, stream=fast)
    assert other.__cuda_array_interface__["data"][0] != pointer
    cudart.waits()
    again = cuda.to_device(FLOATS, stream=slow)  # the stream has an order of its own
    assert again.__cuda_array_interface__["data"][0] == pointer
    del again
    cudart.keep_busy(None)
    taken = [cuda.to_device(FLOATS, stream=fast) for _ in range(8)]
    assert pointer in [t.__cuda_array_interface__["data"][0] for t in taken]


@pytest.mark.parametrize("stream", [None, 0x3000])
def test_a_block_is_not_reused_while_a_consumer_uses_it(cuda, cudart, stream):
    there = cuda.to_device(FLOATS)
    pointer = there.__cuda_array_interface__["data"][0]
    capsule = there.__dlpack__(stream=stream)
    cudart.keep_busy(stream or 1)
    del there, capsule
    taken = [cuda.to_device(FLOATS) for _ in range(8)]
    assert pointer not in [t.__cuda_array_interface__["data"][0] for t in taken]
    cudart.keep_busy(None)
    taken += [cuda.to_device(FLOATS) for _ in range(8)]
    assert pointer in [t.__cuda_array_interface__["data"][0] for t in taken]


def test_a_destroyed_stream_of_a_consumer_is_waited_for_at_once(cuda, cudart):
    there = cuda.to_device(FLOATS)
    capsule = there.__dlpack__(stream=0x3000)
    cudart.plant(400)  # cudaErrorInvalidResourceHandle
    del capsule
    np.testing.assert_array_equal(there.numpy(), FLOATS)


def test_unused_blocks_are_freed_when_memory_is_full(cuda, cudart):
    sizes = [np.zeros(1 << n, np.uint8) for n in range(10, 20)]
    for array in sizes:
        cuda.to_device(array)
    cudart.allow_allocations(0)
    with pytest.raises(DeviceError, match="out of memory"):
        cuda.to_device(np.zeros(3 << 20, np.uint8))
    cudart.allow_allocations(2)  # the array, and the page-locked block
    there = cuda.to_device(np.zeros(3 << 20, np.uint8))
    with pytest.raises(DeviceError, match="out of memory"):  # the small blocks were freed as well
        cuda.to_device(sizes[0])
    del there


def test_a_second_allocation_leaves_no_error_of_the_first(cuda, cudart):
    """The CUDA runtime keeps the error of a failed call, and the next launch would report it."""
    there, alive, absorbed = cuda.to_device(np.ones((300, 301, 3), np.float32)), [], 0
    for spared in range(8):
        cudart.plant(2, spared=spared)
        try:
            alive.append(cuda.shrink(there, 300, 300, 1))
        except DeviceError:
            continue
        absorbed += cudart.planted() == 0
        cudart.plant(0)
        np.testing.assert_allclose(alive[-1].numpy(), 1, rtol=1e-6)
    assert absorbed == 1


def test_the_current_device_is_unchanged(cuda, cudart):
    there = cuda.to_device(FLOATS, device=1)
    assert cudart.current_device() == 0 and there.device == 1
    assert there.__dlpack_device__() == (CUDA, 1)
    with pytest.raises(InputError, match="planes is on GPU 1; wanted GPU 0"):
        cuda.shrink(there, 1, 1, 1)
    np.testing.assert_array_equal(cuda.shrink(there, 1, 1, 1, device=1).numpy(), 0)
    with pytest.raises(InputError, match=r"values is on GPU 1; wanted GPU 0\n  fix: .*cuda:1"):
        runtime.guided_filter(FLOATS[..., :1], there, device="cuda")
    out = runtime.guided_filter(FLOATS[..., :1], there, device="cuda:1")
    assert out.device == 1 and cudart.current_device() == 0
