"""Members of a sample, against NumPy's own npy reader."""

import io

import numpy as np
import pytest

from ldm.data.members import decode_array, decode_caption, decode_floats


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=version, allow_pickle=False)
    return out.getvalue()


@pytest.mark.parametrize("version", [None, (1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "u1", "<i8"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4)])
def test_arrays_are_those_that_numpy_reads(shape: tuple, dtype: str, version: tuple[int, int] | None) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    for order in (array, np.asfortranarray(array)):
        data = npy(order, version)
        read = decode_array(data, "x.npy")
        expected = np.load(io.BytesIO(data), allow_pickle=False)
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == expected.dtype
        assert read.shape == expected.shape


def test_every_truncation_and_extension_of_an_array_is_an_error() -> None:
    data = npy(np.ones((2, 3), np.float16))
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"member \.x\.npy"):
            decode_array(data[:length], "x.npy")
    with pytest.raises(ValueError, match="needs others"):
        decode_array(data + b"\0", "x.npy")


def test_floats_are_finite_and_of_the_shape_asked_for() -> None:
    array = np.linspace(-6e4, 6e4, 6, dtype=np.float16).reshape(2, 3)
    np.testing.assert_array_equal(decode_floats({"a.npy": npy(array)}, "a.npy", (2, 3)), array)
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in (np.float16, np.float32):
            values = array.astype(dtype)
            values[1, 1] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                decode_floats({"a.npy": npy(values)}, "a.npy", (2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(3, 2\)"):
        decode_floats({"a.npy": npy(array)}, "a.npy", (3, 2))
    with pytest.raises(ValueError, match="no member"):
        decode_floats({}, "a.npy", (3, 2))


def test_the_caption_is_the_text_or_one_of_several() -> None:
    several = {"txt": b" first\n", "json": b'{"captions": ["a", "b", "c"]}'}
    assert decode_caption({"txt": "caf\u00e9 \n".encode()}) == "caf\u00e9"
    assert [decode_caption(several, choice) for choice in (0.0, 0.34, 0.999)] == ["a", "b", "c"]
    # Stored text states are those of .txt.
    assert decode_caption(several | {"text.npy": b""}, 0.999) == "first"
    assert decode_caption({"txt": b"x", "json": b'{"captions": []}'}) == "x"
    # Several captions that training cannot read are no reason to take another.
    with pytest.raises(ValueError, match="not JSON"):
        decode_caption({"txt": b"x", "json": b'{"captions": ["a"'})
