"""Damaged and hostile .pth files: refused in one line, quickly, in little memory; nothing that they name is called."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama2.checkpoint import pth
from llama2.errors import CheckpointError
from meta_bytes import (
    EMPTY,
    REBUILD,
    PthBytes,
    call,
    long8,
    name,
    numbers,
    pickled,
    storage,
    tensor,
    text,
    tuple_,
    whole,
)
from refusals import MB, assert_refused_cheaply

Edit = Callable[[PthBytes], object]

A = text("a")


def program(code: bytes) -> Edit:
    return lambda file: setattr(file, "program", code)


def value(code: bytes) -> Edit:
    """The dict's one value."""
    return program(pickled(A, code))


def view(**parts: bytes | int) -> Edit:
    return value(tensor(**parts))  # type: ignore[arg-type]


def member(path: str, data: bytes = b"") -> Edit:
    return lambda file: file.members.append((path, data))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch called",)


class Evaluated:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("open('called', 'w')",)


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def doubled(times: int) -> bytes:
    """A tuple of two, both the tuple before: 2^times leaves."""
    return b")q\0" + b"h\0\x86q\0" * times


HOSTILE = "it holds more than weights and may be hostile, find another source"

FAULTS: dict[str, tuple[Edit, str]] = {
    # calls and names
    "os.system": (program(pickle.dumps({"a": Evil()}, 2)), f"has the name 'posix.system'; {HOSTILE}"),
    "eval": (program(pickle.dumps({"a": Evaluated()}, 2)), "has the name '__builtin__.eval'"),
    "os.system, protocol 4": (program(pickle.dumps({"a": Evil()}, 4)), "has the name 'posix.system'"),
    "protocol 6": (program(b"\x80\x06}."), "has a pickle of protocol 6, not 2 to 5"),
    "os.system, protocol 0": (program(pickle.dumps({"a": Evil()}, 0)), "has operation b'd'"),
    "a name from the stack": (
        value(text("os") + text("system") + b"\x93" + tuple_(A) + b"R"),
        "has the name 'os.system'",
    ),
    "a name of numbers": (value(whole(1) + whole(2) + b"\x93"), "has a int where a str should be"),
    "a name with a line break": (value(text("torch\nFloatStorage") + text("x") + b"\x93"), "has the name"),
    "an instance": (value(b"(" + A + b"ios\nsystem\n"), "operation b'i'"),
    "a new object": (value(EMPTY[:-2] + b")\x81"), r"operation b'\\x81'"),
    "an extension": (value(b"\x82\x01"), r"operation b'\\x82'"),
    "a list": (value(b"]"), "its entry 'a' is not a tensor"),
    "a list in itself": (value(b"]q\0h\0a"), "its entry 'a' is not a tensor"),
    "an item for what is no list": (value(b"}" + A + b"a"), "has a dict where a list should be"),
    "items for what is no list": (value(b"}(" + A + b"e"), "has a dict where a list should be"),
    "a set": (value(b"\x8f"), r"operation b'\\x8f'"),
    "a frame without its length": (program(b"\x80\x04\x95\1"), "has a pickle that breaks off"),
    "nothing to memoise": (program(b"\x80\x04\x94."), "has a pickle that breaks off"),
    "bytes": (value(b"\x8e" + bytes(8)), r"operation b'\\x8e'"),
    "a name of many lines": (value(name("os\rx", "system")), r"has the name 'os\\rx.system'"),
    "a long name": (value(name("o" * 9999, "system")), "has the name 'ooo.*…'"),
    "a name that is not ASCII": (value(b"c\xff\nx\n"), "has the name '�.x'"),
    "a name without end": (program(b"\x80\x02ctorch"), "has the name"),
    "a sparse tensor": (
        value(call(name("torch._utils", "_rebuild_sparse_tensor"), b"N", tuple_(b"N", b"N"))),
        "has the name 'torch._utils._rebuild_sparse_tensor'",
    ),
    "another function of torch": (value(name("torch.hub", "load")), "has the name 'torch.hub.load'"),
    "complex numbers": (
        view(data=storage("ComplexFloatStorage")),
        "has numbers of torch.'ComplexFloatStorage'; supported are F32, F16",
    ),
    "a parameter of a number": (
        value(call(name("torch._utils", "_rebuild_parameter"), whole(1), b"\x88", EMPTY)),
        "has a call that makes no tensor",
    ),
    "a conjugate": (value(tensor()[:-2] + b"}tR"), "has a call that makes no tensor"),
    "a call of a storage": (value(call(name("torch", "FloatStorage"), whole(6))), "has a call that makes no tensor"),
    "a call of a text": (value(call(text("torch._utils\n_rebuild_tensor_v2\n"))), "has a str where a name should be"),
    "an OrderedDict of something": (value(call(EMPTY[:-2], tuple_())), "has a call that makes no tensor"),
    "too few arguments": (value(call(REBUILD, storage(), whole(0))), "has a call that makes no tensor"),
    "arguments of other types": (view(offset=0, shape=whole(6)), "has a call that makes no tensor"),
    "attributes of a tensor": (value(tensor() + b"}b"), "has a view where a dict should be"),
    "attributes of another kind": (value(b"}" + A + b"b"), "has a str where a dict should be"),
    # tensors
    "an offset below zero": (view(offset=-1), r"has a tensor of shape \(2, 3\) at -1 in a storage of 6 numbers"),
    "an offset far below zero": (view(offset=-(1 << 62)), r"at -4611686018427387904 in a storage of 6 numbers"),
    "an offset too large": (view(offset=1), r"has a tensor of shape \(2, 3\) at 1 in a storage of 6 numbers"),
    "more rows than there are": (view(shape=numbers(3, 3)), r"has a tensor of shape \(3, 3\) at 0 in a storage of 6"),
    "2^64 numbers": (
        view(shape=numbers(1 << 32, 1 << 32), strides=numbers(1 << 32, 1)),
        r"\(4294967296, 4294967296\) at 0 in a storage of 6 numbers",
    ),
    "2^62 columns": (view(shape=numbers(1, 1 << 62), strides=numbers(1, 1)), "in a storage of 6 numbers"),
    "a shape below zero": (view(shape=numbers(-2, -3)), "whose shape is not up to 8 whole numbers"),
    "nine dimensions": (view(shape=numbers(*[1] * 9), strides=numbers(*[1] * 9)), "whose shape is not"),
    "a shape of texts": (view(shape=tuple_(A, A)), "whose shape is not"),
    "a shape of truths": (view(shape=tuple_(b"\x88", b"\x88")), "whose shape is not"),
    "a step too long": (view(strides=numbers(1, 3)), r"has a tensor of shape \(2, 3\) at 0 in a storage of 6"),
    "2^62 steps": (view(strides=numbers(1 << 62, 1)), "in a storage of 6 numbers"),
    "an expanded tensor": (view(shape=numbers(9, 3), strides=numbers(0, 1)), "in a storage of 6 numbers"),
    "steps backwards": (view(strides=numbers(-3, 1)), r"shape \(2, 3\) without as many strides"),
    "too few strides": (view(strides=numbers(3)), "without as many strides"),
    "strides of texts": (view(strides=tuple_(A, A)), "without as many strides"),
    "tensors that overlap by one": (
        program(
            pickled(A, tensor(shape=numbers(3), strides=numbers(1)), text("b"), tensor(None, 2, numbers(4), numbers(1)))
        ),
        "tensors 'a' and 'b' overlap",
    ),
    # storages
    "a storage that is not there": (view(data=storage(key="1")), "lacks storage '1'"),
    "a storage up the folders": (view(data=storage(key="../data.pkl")), r"lacks storage '\.\./data\.pkl'"),
    "a storage smaller than declared": (
        view(data=storage(count=7)),
        "has 24 bytes in storage '0', and 7 F32 need 28",
    ),
    "a storage larger than declared": (
        view(data=storage(count=5), shape=numbers(5), strides=numbers(1)),
        "has 24 bytes in storage '0', and 5 F32 need 20",
    ),
    "a storage of 2^62 numbers": (view(data=storage(count=1 << 62)), "need 18446744073709551616;"),
    "a storage of -6 numbers": (view(data=storage(count=-6)), "has a persistent object that is not a storage"),
    "a storage of another type": (
        view(data=tuple_(text("storage"), EMPTY[:-2], text("0"), text("cpu"), whole(6)) + b"Q"),
        "has a persistent object that is not a storage",
    ),
    "a persistent object of another kind": (
        value(tuple_(text("module"), name("torch", "FloatStorage"), text("0"), text("cpu"), whole(6)) + b"Q"),
        "has a persistent object that is not a storage",
    ),
    "a persistent text": (value(A + b"Q"), "has a persistent object that is not a storage"),
    "half floats in a storage of floats": (
        view(data=storage("HalfStorage", count=6)),
        "has 24 bytes in storage '0', and 6 F16 need 12",
    ),
    # the machine
    "no pickle": (program(b""), "has a pickle that breaks off"),
    "no end": (program(pickled(A, tensor())[:-1]), "has a pickle that breaks off"),
    "nothing on the stack": (program(b"\x80\x02."), "has a pickle that breaks off"),
    "a tensor alone": (program(b"\x80\x02" + tensor() + b"."), "has a view where a dict should be"),
    "a number alone": (program(b"\x80\x02K\1."), "has a int where a dict should be"),
    "a number for a tensor": (value(whole(1)), "its entry 'a' is not a tensor; save the model's weights alone"),
    "a dict for a tensor": (value(b"}"), "its entry 'a' is not a tensor"),
    "a dict in itself": (program(b"\x80\x02}q\0(" + A + b"h\0u."), "its entry 'a' is not a tensor"),
    "a key twice": (program(pickled(A, tensor(), A, whole(1))), "has 'a' twice"),
    "a key that is a number": (program(pickled(whole(1), tensor())), "has a key that is not text"),
    "a key that is a tower": (program(pickled(doubled(9999), tensor())), "has a key that is not text"),
    "a key without a value": (program(b"\x80\x02}(" + A + b"u."), "has a pickle that breaks off"),
    "items for a text": (program(b"\x80\x02" + A + b"(u."), "has a str where a dict should be"),
    "an item for nothing": (program(b"\x80\x02" + A + A + b"s."), "has a pickle that breaks off"),
    "a mark that is not there": (program(b"\x80\x02t."), "has a pickle that breaks off"),
    "10^5 marks": (program(b"\x80\x02" + b"(" * 10**5 + b"."), "has a pickle that breaks off"),
    "a tower of 10^5 tuples": (value(nested(10**5)), "its entry 'a' is not a tensor"),
    "a tower as a storage": (value(doubled(9999) + b"Q"), "has a persistent object that is not a storage"),
    "a tower as arguments": (value(REBUILD + doubled(9999) + b"R"), "has a call that makes no tensor"),
    "a tower as a shape": (view(shape=doubled(9999)), "whose shape is not"),
    "an object that was not stored": (value(b"h\7"), "has object 7, which it never stored"),
    "object 2^32 - 1": (value(b"j\xff\xff\xff\xff"), "has object 4294967295, which it never stored"),
    "a number of 255 bytes": (value(b"\x8a\xff" + b"\x7f" * 255), "has a number of 255 bytes"),
    "a number longer than the pickle": (value(b"\x8a\x08\x01"), "has a pickle that breaks off"),
    "a text of 2^32 - 1 bytes": (program(b"\x80\x02}(X\xff\xff\xff\xffa"), "has a pickle that breaks off"),
    "a text that is not UTF-8": (program(pickled(text(b"\xff"), tensor())), "has a pickle that breaks off"),
    "a line break in a name": (program(pickled(text("a\nb"), whole(1))), r"its entry 'a\\nb' is not a tensor"),
    "2^19 dicts": (program(b"}" * (1 << 19)), "has a pickle that breaks off"),
    "2^19 stored": (program(b"\x80\x02" + b")r\0\0\0\0" * (1 << 16)), "has a pickle that breaks off"),
    "more than 2^19 bytes": (program(b"N" * ((1 << 19) + 1)), "has a pickle of 524289 bytes, and the limit is 524288"),
    # the zip
    "compressed": (lambda f: setattr(f, "compression", zipfile.ZIP_DEFLATED), "'f/data.pkl' is compressed"),
    "a bomb": (
        lambda f: (f.members.append(("f/data/1", bytes(50 * MB))), setattr(f, "compression", zipfile.ZIP_BZIP2)),
        "'f/data.pkl' is compressed",
    ),
    "a member twice": (member("f/data/0", bytes(24)), "has member 'f/data/0' twice"),
    "up the folders": (member("f/../../x"), r"has a member 'f/\.\./\.\./x', which is not a path"),
    "an absolute path": (member("/etc/passwd"), "has a member '/etc/passwd', which is not a path"),
    "a path of Windows": (member("f\\..\\x"), r"has a member 'f\\\\..\\\\x', which is not a path"),
    "an empty part": (member("f//x"), "has a member 'f//x', which is not a path"),
    "a line break in a path": (member("f/a\nb"), r"has a member 'f/a\\nb', which is not a path"),
    "a path that is not ASCII": (member("f/é"), "has a member 'f/��', which is not a path"),
    "two pickles": (member("g/data.pkl", pickled()), "has 2 members NAME/data.pkl, must have one"),
    "big-endian": (lambda f: setattr(f, "byteorder", b"big"), "has byte order b'big'"),
    "8193 members": (
        lambda f: f.members.extend((f"f/x{i}", b"") for i in range(8189)),
        "claims 8193 members, and the limit is 8192",
    ),
}


def refusal(path: Path) -> str:
    """The message that reading `path` ends with: one line that begins with the path."""
    with pytest.raises(CheckpointError) as caught:
        pth.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))
    return message


def write(path: Path, edit: Edit = lambda file: None) -> Path:
    file = PthBytes()
    edit(file)
    path.write_bytes(file.encode())
    return path


def test_the_unchanged_file_is_valid(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth")
    assert pth.read(path)["a"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.load(path, weights_only=True)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pth", FAULTS[fault][0])
    assert re.search(FAULTS[fault][1], refusal(path))
    assert os.listdir(tmp_path) == ["a.pth"]  # nothing was called


def test_every_operation_but_those_of_tensors_is_refused(tmp_path: Path) -> None:
    allowed = {*"()tRsub}NKMJXcqrhjQ.]aeU", *map(chr, (0x80, *range(0x85, 0x8B), 0x8C, 0x93, 0x94, 0x95))}
    for operation in map(chr, range(256)):
        path = write(tmp_path / "a.pth", program(b"\x80\x02" + operation.encode("latin-1") + bytes(9) + b"."))
        reason = refusal(path)
        refused = f"has operation {operation.encode('latin-1')!r}, which torch.save does not write" in reason
        assert refused == (operation not in allowed), operation


def test_what_torch_saves_of_other_kinds(tmp_path: Path) -> None:
    kinds: dict[str, tuple[object, str]] = {
        "sparse": ({"a": torch.eye(2).to_sparse()}, "has the name 'torch._utils._rebuild_sparse_tensor'"),
        "a whole module": (torch.nn.Linear(2, 2), "has the name 'torch.nn.modules.linear.Linear'"),
        "complex": ({"a": torch.ones(2).cfloat()}, "has numbers of torch.'ComplexFloatStorage'"),
        "one for all": (dict.fromkeys("abcd", torch.ones(9999)), "has the same numbers as more than two tensors"),
        "a conjugate": ({"a": torch.ones(2).cfloat().conj()}, "has numbers of torch.'ComplexFloatStorage'"),
        "with an optimiser": ({"model": {"a": torch.ones(2)}, "step": 1}, "its entry 'model' is not a tensor"),
        "a list": ([torch.ones(2)], "has a list where a dict should be"),
    }
    for kind, (value, reason) in kinds.items():
        torch.save(value, tmp_path / "a.pth")
        assert re.search(reason, refusal(tmp_path / "a.pth")), kind


def test_cut_short_at_every_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth")
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        refusal(path)


def test_the_older_format_cut_short_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(2, 3)}, path, _use_new_zipfile_serialization=False)
    whole_file = path.read_bytes()
    for size in range(len(whole_file)):
        path.write_bytes(whole_file[:size])
        refusal(path)
    size, key = whole_file.rindex(struct.pack("<q", 6)), text(re.findall(rb"X.\0{3}(\d{6,})", whole_file, re.S)[0])
    for change, reason in [
        (whole_file[:size] + struct.pack("<q", 7) + bytes(28), r"has 28 bytes in storage '\d+', and 6 F32 need 24"),
        (whole_file[:size] + struct.pack("<q", 1 << 60), "and the file ends at"),
        (whole_file[:size] + struct.pack("<q", -6), "and the file ends at"),
        (whole_file.replace(b"little_endianq\2\x88", b"little_endianq\2\x89"), "is not of a little-endian machine"),
        (whole_file[:size].replace(b"]q\0" + key, b"]q\0" + text("9")), "has a storage that belongs to no tensor"),
        (whole_file[: whole_file.rindex(b"]q\0")] + b"]q\0.", r"lacks storage '\d+'"),
        (whole_file[:15] + b"K\1" + whole_file[15:], "is not a file of torch.save"),
    ]:
        assert change != whole_file
        path.write_bytes(change)
        assert re.search(reason, refusal(path)), reason


def patched(offset_of: bytes, shift: int, code: str, number: int) -> bytes:
    """The valid file with a number overwritten, `shift` bytes behind the last place of `offset_of`."""
    data = bytearray(PthBytes().encode())
    struct.pack_into("<" + code, data, data.rindex(offset_of) + shift, number)
    return bytes(data)


DIRECTORY, ENTRY, LOCAL = b"PK\5\6", b"PK\1\2", b"PK\3\4"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"Once upon a time\n", "is not a file of torch.save"),
        (b"PK\3\4", "needs bytes -18 to 4"),
        (patched(DIRECTORY, 10, "H", 9), "entry of a zip's directory needs bytes"),
        (patched(DIRECTORY, 16, "I", 2**32 - 1), "needs bytes 4294967295 to"),
        (patched(DIRECTORY, 16, "I", 0), "has no entry of a zip's directory at byte 0"),
        (PthBytes().encode() + b"\0", "has no end of a zip's directory"),
        (patched(ENTRY, 8, "H", 1), "is compressed or encrypted"),
        (patched(ENTRY, 10, "H", 8), "is compressed or encrypted"),
        (patched(ENTRY, 20, "I", 23), "is compressed or encrypted"),
        (patched(ENTRY, 24, "I", 2**32 - 1), "has a member without its size or place"),
        (patched(ENTRY, 28, "H", 65535), "needs bytes"),
        (patched(ENTRY, 30, "H", 65535), "needs bytes"),
        (patched(ENTRY, 42, "I", 2**31), "needs bytes 2147483648 to"),
        (patched(ENTRY, 42, "I", 0), "has another member where 'f/data/0' should be"),
        (patched(ENTRY, 42, "I", 1), "has no member 'f/data/0' at byte 1"),
        (patched(LOCAL, 26, "H", 65535), "needs bytes"),
        (patched(LOCAL, 28, "H", 65535), "needs bytes"),
    ],
)
def test_zip_that_lies(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    assert reason in refusal(tmp_path / "a.pth")


def wide(entries: int, size: int, start: int, member_size: int = 24, locator: int | None = None) -> bytes:
    """The valid file with its directory, and the size of its last member, in 64 bits."""
    data = PthBytes().encode()
    at, last = data.index(DIRECTORY), data.rindex(ENTRY)
    entry = bytearray(data[last:at])
    struct.pack_into("<IIH", entry, 20, 2**32 - 1, 2**32 - 1, entry[28])
    struct.pack_into("<H", entry, 30, 20)
    entry += struct.pack("<HHQQ", 1, 16, member_size, member_size)
    data = data[:last] + entry
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, start)
    where = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) if locator is None else locator, 1)
    return data + end + where + struct.pack("<4s4H2LH", DIRECTORY, 0, 0, 3, 3, 2**32 - 1, 2**32 - 1, 0)


def test_zip_of_64_bits_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    start = PthBytes().encode().index(ENTRY)
    path.write_bytes(wide(4, 200, start))
    assert pth.read(path)["a"].dequantize()[1, 2] == 5
    for data, reason in [
        (wide(2**64 - 1, 200, start), "claims 18446744073709551615 members, and the limit is 8192"),
        (wide(4, 200, 2**64 - 46), "needs bytes 18446744073709551570 to 18446744073709551616"),
        (wide(4, 200, start, member_size=2**64 - 1), "member 'f/data/0' needs bytes"),
        (wide(4, 200, start, member_size=2**60), "member 'f/data/0' needs bytes"),
        (wide(4, 200, start, locator=2**64 - 1), "needs bytes 18446744073709551615 to"),
        (wide(4, 200, start, locator=0), "has no end of a zip's directory of 64 bits at byte 0"),
    ]:
        path.write_bytes(data)
        assert reason in refusal(path)


@pytest.mark.parametrize("options", [[], ["-O"]])
def test_time_and_memory(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second and 64 MB beyond the file's size, for everything above; also where `assert` does nothing."""
    monkeypatch.chdir(tmp_path)
    folders = []
    for i, (edit, _) in enumerate(FAULTS.values()):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        write(folders[-1] / "consolidated.00.pth", edit)
    assert_refused_cheaply(folders, options)
    assert not (tmp_path / "called").exists()


def test_the_largest_whole_number_is_read_as_torch_writes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", view(shape=tuple_(long8(2), long8(3))))
    assert pth.read(path)["a"].shape == (2, 3)
