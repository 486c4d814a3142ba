"""Arrays on a GPU as other libraries export them: by Numba's interface and by DLPack's capsules.

Device memory is host memory here, so that arrays of NumPy stand for those of PyTorch and CuPy.
"""

import ctypes

import numpy as np

CPU, CUDA, ROCM = 1, 2, 10  # DLPack's numbers


class Interface:
    """An array with Numba's interface; keywords replace entries of the interface."""

    def __init__(self, array, **entries):
        self.array = array
        face = {"shape": array.shape, "typestr": array.dtype.str, "version": 3}
        face |= {"data": (array.ctypes.data, False), "strides": None, "stream": None}
        self.__cuda_array_interface__ = face | entries


class Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Plain(ctypes.Structure):
    name = b"dltensor"
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    name = b"dltensor_versioned"
    _fields_ = (
        ("high", ctypes.c_uint32),
        ("low", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


def capsule_functions():
    api = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = (ctypes.py_object,)
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    return api


API = capsule_functions()
DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
GIVEN = []  # producers whose deleter may still be called: they must outlive their consumers


class Producer:
    """An array with DLPack's methods, as in PyTorch and CuPy.

    ``let_go`` counts how often the consumer released it.
    """

    def __init__(self, array, kind=Versioned, *, device=(CUDA, 0), strides=(), offset=0, major=1):
        self.array, self.kind, self.device, self.asked, self.let_go = array, kind, device, [], 0
        self.deleter = DELETER(self.delete)
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*strides) if strides else None
        self.held = held = kind()
        held.deleter = ctypes.cast(self.deleter, ctypes.c_void_p)
        if kind is Versioned:
            held.high, held.flags = major, 1  # read-only
        t = held.tensor
        t.data, t.byte_offset = array.ctypes.data - offset, offset
        t.device.type, t.device.id, t.ndim = *device, array.ndim
        t.code, t.bits, t.lanes = CODES[array.dtype.kind], 8 * array.itemsize, 1
        t.shape = self.shape
        t.strides = self.strides

    def delete(self, pointer):
        assert pointer == ctypes.addressof(self.held)
        self.let_go += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, **options):
        if self.kind is Plain and options:
            raise TypeError("this producer is older than DLPack 1.0")
        self.asked.append((stream, options))
        GIVEN.append(self)
        pointer = ctypes.addressof(self.held)
        self.capsule = API.PyCapsule_New(pointer, self.kind.name, None)
        return self.capsule


class Relabelled:
    """An array of the module that claims to be on the host: NumPy and PyTorch accept it."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return CPU, 0

    def __dlpack__(self, *, max_version=None, **_):
        capsule = self.array.__dlpack__(max_version=max_version)
        kind = Versioned if max_version else Plain
        held = kind.from_address(API.PyCapsule_GetPointer(capsule, kind.name))
        held.tensor.device.type = CPU
        return capsule


WRAPS = (Interface, Producer)  # both make a foreign array of a NumPy array


def arrays(height, width, channels=3, classes=4):
    rng = np.random.default_rng(height)
    guide = rng.random((height, width, channels), dtype=np.float32)
    return guide, rng.random((height, width, classes), dtype=np.float32)


FLOATS = np.zeros((4, 5, 2), np.float32)
