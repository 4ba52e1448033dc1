"""Adapters: what is accepted, what is a view, how memory order and overlap are read off the strides."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest

from fastconv import arrays
from fastconv.problem import ConvError
from tests.compare import foreign_layouts, layouts

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


class Tagged(np.ndarray):
    """A subclass with an attribute, as in NumPy's own guide to subclassing."""

    tag = None

    def __array_finalize__(self, parent):
        self.tag = getattr(parent, "tag", None)


def tagged(array, tag="a tag"):
    view = np.asarray(array).view(Tagged)
    view.tag = tag
    return view


class FakeCudaArray:
    """What any library's CUDA array shows to others."""

    __cuda_array_interface__ = types.MappingProxyType(
        {"shape": (1,) * 4, "typestr": "<f4", "data": (0, False), "version": 3}
    )


class TestAdapt:
    def test_numpy_arrays_stay_themselves(self):
        x, w = np.zeros((2, 3)), np.zeros((4, 2, 3))
        given = {"input": x, "weight": w}
        assert arrays.adapt("conv1d", given) is arrays.NUMPY
        assert given["input"] is x
        assert given["weight"] is w

    def test_subclass_becomes_a_view(self):
        x = tagged(np.zeros((2, 3)))
        given = {"input": x}
        assert arrays.adapt("conv1d", given) is arrays.NUMPY
        assert type(given["input"]) is np.ndarray
        assert np.shares_memory(given["input"], x)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("view", ["plain", "transposed", "sliced", "expanded"])
    def test_torch_tensor_becomes_a_view(self, torch, dtype, view):
        tensor = torch.arange(24).to(getattr(torch, dtype)).reshape(2, 3, 4)
        if view == "transposed":
            tensor = tensor.transpose(0, 2)
        elif view == "sliced":
            tensor = tensor[:, 1:, ::2]
        elif view == "expanded":
            tensor = tensor[:, :1].expand(2, 5, 4)
        given = {"input": tensor}
        assert arrays.adapt("conv1d", given) is arrays.TORCH
        array = given["input"]
        assert array.dtype == DTYPES[dtype]
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
        assert [stride // array.itemsize for stride in array.strides] == list(tensor.stride())
        assert array.astype(float).tolist() == tensor.double().tolist()

    def test_torch_negated_view(self, torch):
        tensor = torch.tensor([[1 + 2j, 3 - 4j]]).conj().imag
        assert tensor.is_neg()
        given = {"input": tensor}
        arrays.adapt("conv1d", given)
        assert given["input"].tolist() == [[-2.0, 4.0]]

    def test_torch_parameter_is_a_tensor(self, torch):
        given = {"input": torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)}
        assert arrays.adapt("conv1d", given) is arrays.TORCH

    def test_torch_without_gradient_mode(self, torch):
        given = {"input": torch.ones(2, 3, requires_grad=True)}
        with torch.no_grad():
            assert arrays.adapt("conv1d", given) is arrays.TORCH

    @pytest.mark.parametrize("value", [None, 1.0, [[1.0]], "x", np.float32(1), object(), memoryview(b"12")])
    def test_no_array(self, value):
        with pytest.raises(
            TypeError,
            match=r"^conv1d: weight must be a NumPy or CuPy array, a torch tensor or an array with __cuda",
        ):
            arrays.adapt("conv1d", {"input": np.zeros((2, 3)), "weight": value})

    def test_given_is_left_alone_by_an_error(self):
        x = tagged(np.zeros((2, 3)))
        given = {"input": x, "weight": np.ma.zeros((4, 2, 3))}
        with pytest.raises(TypeError, match="without a mask"):
            arrays.adapt("conv1d", given)
        assert given["input"] is x

    def test_cuda_array_without_cuda_or_memory_is_refused(self):
        """What is missing depends on the machine; the words for each case are in test_gpu_host.py."""
        given = {"input": FakeCudaArray(), "weight": FakeCudaArray()}
        with pytest.raises(
            ConvError, match=r"^conv1d: (CUDA arrays need|input on a CUDA device must have memory)"
        ):
            arrays.adapt("conv1d", given)

    def test_mixed_devices(self):
        message = (
            "conv1d: weight must be a NumPy array like input, got a CUDA array (input NumPy, weight CUDA)"
        )
        with pytest.raises(TypeError) as caught:
            arrays.adapt("conv1d", {"input": np.zeros((2, 3)), "weight": FakeCudaArray()})
        assert str(caught.value) == message

    def test_half_imported_torch_is_no_torch(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
        with pytest.raises(TypeError, match="got list"):
            arrays.adapt("conv1d", {"input": [1.0]})


class TestWrap:
    def test_array(self):
        result = np.zeros(3)
        assert arrays.NUMPY.wrap(result, np.ones(2)) is result

    def test_subclass_keeps_kind_and_attribute(self):
        result = np.zeros(3)
        wrapped = arrays.NUMPY.wrap(result, tagged(np.ones(2), "kept"))
        assert type(wrapped) is Tagged
        assert wrapped.tag == "kept"
        assert np.shares_memory(wrapped, result)

    def test_memmap_becomes_an_array(self, tmp_path):
        """As in NumPy: the result of an operation on a memmap is in no file."""
        mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(2, 3))
        assert type(arrays.NUMPY.wrap(np.zeros(3), mapped)) is np.ndarray
        assert type(mapped + 1) is np.ndarray

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_torch(self, torch, dtype):
        result = np.arange(6).astype(DTYPES[dtype]).reshape(3, 2).T
        tensor = arrays.TORCH.wrap(result, torch.ones(1))
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.data_ptr() == result.__array_interface__["data"][0]
        assert tensor.stride() == (1, 2)
        assert tensor.double().tolist() == result.astype(float).tolist()


class TestDtypes:
    @pytest.mark.parametrize("name", DTYPES)
    def test_accepted(self, name):
        assert arrays.common_dtype("conv1d", {"input": np.zeros(3, DTYPES[name])}) == name

    def test_byte_order_does_not_count(self):
        given = {"input": np.zeros(3, ">f4"), "weight": np.zeros(3, "<f4")}
        assert arrays.common_dtype("conv1d", given) == "float32"

    @pytest.mark.parametrize(
        "dtype", ["int8", "int64", "uint8", "bool", "complex64", "O", "U3", "S3", "M8[s]", "f4,f4", "V2", "g"]
    )
    def test_refused(self, dtype):
        if np.dtype(dtype) == np.float64:
            pytest.skip("long double is float64 on this platform")
        with pytest.raises(TypeError, match="must be float16, bfloat16, float32 or float64, got "):
            arrays.common_dtype("conv1d", {"input": np.zeros(3, dtype)})

    def test_mixed(self):
        given = {"input": np.zeros(3, "f4"), "weight": np.zeros((2, 2), "f8")}
        with pytest.raises(TypeError) as caught:
            arrays.common_dtype("conv1d", given)
        assert str(caught.value) == (
            "conv1d: weight.dtype must be input.dtype = float32, got float64; convert one of them "
            "(input (3,) float32, weight (2, 2) float64)"
        )


class TestMemory:
    def test_readable_layouts_are_not_copied(self, rng):
        array = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
        for name, view in layouts(array):
            assert arrays.to_computable(view, np.dtype(np.float32)) is view, name

    def test_broadcast_is_not_copied(self):
        view = np.broadcast_to(np.float32(1), (2, 3, 4))
        assert arrays.to_computable(view, np.dtype(np.float32)) is view

    def test_foreign_layouts_are_copied(self, rng):
        array = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
        for name, view in foreign_layouts(array):
            copy = arrays.to_computable(view, np.dtype(np.float32))
            assert copy.dtype.isnative, name
            assert copy.flags.aligned, name
            assert np.array_equal(copy, array), name

    def test_strides_of_no_whole_elements_are_copied(self):
        records = np.zeros(5, dtype=[("x", "f4"), ("y", "u1")])
        records["x"] = range(5)
        assert records["x"].strides == (5,)
        copy = arrays.to_computable(records["x"], np.dtype(np.float32))
        assert copy.strides == (4,)
        assert copy.tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_becomes_float32_in_the_same_order(self, dtype):
        array = np.ones((2, 4, 4, 3), DTYPES[dtype]).transpose(0, 3, 1, 2)
        copy = arrays.to_computable(array, np.dtype(np.float32))
        assert copy.dtype == np.float32
        assert copy.transpose(0, 2, 3, 1).flags.c_contiguous

    def test_storage_is_native_and_free_where_nothing_changes(self):
        array = np.zeros(3, np.float32)
        assert arrays.to_storage(array, np.dtype(np.float32)) is array
        assert arrays.to_storage(array, np.dtype(np.float32).newbyteorder()) is array
        assert arrays.to_storage(array, np.dtype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_overflow_of_storage_is_inf_without_a_warning(self, dtype):
        array = np.array([3.4e38, -3.4e38], np.float32)
        assert arrays.to_storage(array, np.dtype(DTYPES[dtype])).astype(float).tolist() == [np.inf, -np.inf]
        assert arrays.store(array, np.zeros(2, DTYPES[dtype])).astype(float).tolist() == [np.inf, -np.inf]


class TestMemoryOrder:
    @staticmethod
    def order(array, channel_axis=0, default="NCHW"):
        return arrays.memory_order(array.shape, array.strides, channel_axis, default)

    def test_plain(self):
        assert self.order(np.zeros((3, 4, 5))) == "NCHW"
        assert self.order(np.zeros((4, 5, 3)).transpose(2, 0, 1)) == "NHWC"

    def test_views_keep_the_order_of_their_base(self):
        first, last = np.zeros((6, 8, 8)), np.zeros((8, 8, 6)).transpose(2, 0, 1)
        for where in (np.s_[::2], np.s_[:, 1:, ::3], np.s_[::-1, ::-1, ::-1], np.s_[:, :1], np.s_[..., :1]):
            assert self.order(first[where]) == "NCHW"
            assert self.order(last[where]) == "NHWC"

    def test_image_transposed_in_its_plane_is_channels_first(self):
        assert self.order(np.zeros((3, 5, 4)).transpose(0, 2, 1)) == "NCHW"

    def test_channels_between_the_axes_are_no_channels_last(self):
        assert self.order(np.zeros((4, 3, 5)).transpose(1, 0, 2)) == "NCHW"

    @pytest.mark.parametrize("default", ["NCHW", "NHWC"])
    def test_ambiguous_is_the_default(self, default):
        one_channel = np.zeros((4, 5, 1)).transpose(2, 0, 1)
        one_pixel = np.zeros((1, 1, 3)).transpose(2, 0, 1)
        constant = np.broadcast_to(np.float32(0), (3, 4, 5))
        per_channel = np.broadcast_to(np.zeros((3, 1, 1)), (3, 4, 5))
        same_in_all_channels = np.broadcast_to(np.zeros((4, 5)), (3, 4, 5))
        for array in (one_channel, one_pixel, constant, per_channel, same_in_all_channels):
            assert self.order(array, default=default) == default

    def test_shape_with_channels_last(self):
        assert self.order(np.zeros((4, 5, 3)), -1, "NHWC") == "NHWC"
        assert self.order(np.zeros((3, 4, 5)).transpose(1, 2, 0), -1, "NHWC") == "NCHW"

    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 5), (2, 3, 4, 1), (1, 2, 2, 2)])
    @pytest.mark.parametrize("memory", ["contiguous_format", "channels_last"])
    def test_as_torch(self, torch, shape, memory):
        tensor = torch.zeros(shape).to(memory_format=getattr(torch, memory))
        is_last = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        assert self.order(tensor.numpy()[0]) == ("NHWC" if is_last else "NCHW")


class TestOut:
    @staticmethod
    def check(out, shape=None, **others):
        given = {"input": np.zeros((2, 3)), **others, "out": out}
        arrays.check_out("conv1d", given, out.shape if shape is None else shape)

    def test_any_writeable_memory_of_its_own(self, rng):
        for _, view in layouts(rng.standard_normal((2, 3, 4))):
            if view.flags.writeable:
                self.check(view)
        self.check(np.zeros((4, 4))[::-1, ::-2])
        self.check(np.lib.stride_tricks.as_strided(np.zeros(16), (4,), (40,)))  # a diagonal
        self.check(np.zeros((0, 3)))

    def test_neighbours_in_one_buffer_do_not_overlap(self):
        buffer = np.zeros((4, 6))
        self.check(buffer[:, ::2], input=buffer[:, 1::2])
        self.check(buffer[2:], input=buffer[:2])

    @pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
    def test_overlap(self, name):
        buffer = np.zeros(10)
        with pytest.raises(
            ConvError, match=f"^conv1d: out must not share memory with {name}, got overlapping "
        ):
            self.check(buffer[4:], **{name: buffer[:5]})

    def test_undecided_overlap_counts_as_overlap(self, monkeypatch):
        """Whether two strided arrays share an element is a knapsack problem: giving up must not mean no."""
        base = np.zeros(200_000, np.uint8)
        strides = (9973, 7919, 6007, 4001, 3001)
        views = [np.lib.stride_tricks.as_strided(base[start:], (4,) * 5, strides) for start in (0, 1)]
        assert not arrays._overlap(*views)
        monkeypatch.setattr(arrays, "_MAX_OVERLAP_WORK", 1)
        assert arrays._overlap(*views)

    @pytest.mark.parametrize(
        "out",
        [
            np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,)),
            np.lib.stride_tricks.as_strided(np.zeros(5), (3, 3), (8, 8)),
            np.lib.stride_tricks.as_strided(np.zeros(8), (2, 3), (16, 8)),
        ],
    )
    def test_overlap_with_itself(self, out):
        with pytest.raises(ConvError, match="elements of out must not share memory, got strides"):
            self.check(out)

    def test_read_only(self):
        out = np.zeros((2, 3))
        out.setflags(write=False)
        with pytest.raises(ConvError, match="out must be writeable, got a read-only array"):
            self.check(out)

    def test_shape(self):
        with pytest.raises(ConvError) as caught:
            self.check(np.zeros((2, 4)), shape=(2, 3))
        assert str(caught.value) == (
            "conv1d: out.shape must be result.shape = (2, 3), got (2, 4) "
            "(input (2, 3) float64, out (2, 4) float64)"
        )
