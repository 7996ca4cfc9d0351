import copyreg
import os
import pickle
import struct

import numpy as np
import pytest

from ragstone.errors import InputError
from ragstone.knowledge.exchange.pickles import read_pickle

PLAIN = {
    "1": ("text", "title"),
    2: [1, 2.5, None, True, b"bytes", 10**30],
    "nested": {"set": {1, 2}, "frozen": frozenset("a")},
}


class Attack:
    def __init__(self, *call):
        self._call = call

    def __reduce__(self):
        return self._call


class Own:
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(tmp_path, protocol):
    plain = PLAIN if protocol >= 4 else {key: value for key, value in PLAIN.items() if key == "1"}
    (tmp_path / "p").write_bytes(pickle.dumps(plain, protocol))
    assert read_pickle(tmp_path / "p") == plain


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Attack(os.system, ("touch ran",)), "system"),
        (Attack(eval, ("open('ran', 'w')",)), "builtins.*eval|__builtin__.eval"),
        (Attack(getattr, ("", "join")), "getattr"),
        (Own(), "_reconstructor|Own"),
        (np.arange(3), "numpy"),
        (np.float32(1.0), "numpy"),
        (np.str_("1"), "numpy"),
        (os.getcwd, "getcwd"),
        (ValueError, "ValueError"),
    ],
)
def test_whatever_has_a_name_is_refused_and_nothing_runs(tmp_path, monkeypatch, value, name, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_bytes(pickle.dumps(["1", value, "2"], protocol))
    with pytest.raises(InputError, match=rf"is refused: it names .*({name})"):
        read_pickle(tmp_path / "p")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),  # GLOBAL, REDUCE
        (b"(S'touch ran'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'touch ran'\no.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x02ccopy_reg\n_reconstructor\n.", "copyreg._reconstructor|copy_reg._reconstructor"),
        (b"\x80\x04cbuiltins\nexec\n.", "builtins.exec"),
    ],
)
def test_hand_made_programs_are_refused(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(InputError, match=f"names ({name})"):
        read_pickle(tmp_path / "p")
    assert not (tmp_path / "ran").exists()


def test_a_registered_extension_is_a_name_too_even_if_it_was_used_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("os", "system", 200)
    try:
        pickle.loads(b"\x80\x02\x82\xc8.")  # now it is in the cache
        (tmp_path / "p").write_bytes(b"\x80\x02\x82\xc8\x8c\x09touch ran\x85R.")
        with pytest.raises(InputError, match=r"names os\.system|posix"):
            read_pickle(tmp_path / "p")
    finally:
        copyreg.remove_extension("os", "system", 200)
    assert not (tmp_path / "ran").exists()


def test_references_to_outside_are_refused(tmp_path):
    (tmp_path / "p").write_bytes(b"\x80\x02X\x03\x00\x00\x00abcQ.")
    with pytest.raises(InputError, match="refers to an object 'abc' outside"):
        read_pickle(tmp_path / "p")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello world",
        pickle.dumps(PLAIN)[:-20],
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",  # a string of a terabyte
        b"\x80\x04]K\x00b.",  # a state for a list
        b"\x80\x63.",
        b"\x80\x04h\x07.",  # something never put
    ],
)
def test_damaged_ones_get_one_sentence(tmp_path, data):
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged or no pickle \(.*fetch it again"):
        read_pickle(tmp_path / "p")


def test_a_missing_one_too(tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        read_pickle(tmp_path / "nowhere")
