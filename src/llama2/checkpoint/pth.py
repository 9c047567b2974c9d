"""torch.save's files (`.pth`, `.bin`) ⇄ named tensors, without PyTorch and without running what a file names.

A file is a zip whose members are not compressed. `NAME/data.pkl` is a pickle of a dict from names to tensors, and
`NAME/data/KEY` has the numbers of storage KEY. Before PyTorch 1.6 it was five pickles: a magic number, the protocol,
the machine, the dict, the keys of its storages. Then followed the count of each storage in 8 bytes, and its numbers.

A pickle is a program for a stack machine, and torch.load(f, weights_only=False) would call whatever it names. The
machine here has only the operations that torch.save writes for a dict of tensors. The names in such a program are
words to it. Anything else is refused; there is no other way in.

Sources: PKWARE's APPNOTE.TXT 4.3 and 4.5.3, Python's pickletools, torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint.tensor import Tensor
from llama2.errors import CheckpointError
from llama2.files import MappedFile, damaged, first_bytes, quote, refuse_overlaps
from llama2.formats import nbytes

T = TypeVar("T")

_MAX_MEMBERS = 1 << 13  # a Llama of 80 layers has 731
_MAX_PICKLE = 1 << 19  # bytes; that Llama's has up to 160,000

_MAX_AXES = 8

_END = struct.Struct("<4s4H2LH")  # … entries, size and offset of the directory, length of a comment
_LOCATOR = struct.Struct("<4sLQL")  # …, offset of the following, …
_END_64 = struct.Struct("<4sQ2H2L4Q")  # … entries, size and offset of the directory
_ENTRY = struct.Struct("<4s6H3L5H2L")  # …, flags, method, …, sizes, lengths of name, extra and comment, …, offset
_LOCAL = struct.Struct("<4s5H3L2H")  # …, lengths of name and extra
_LOCAL_64 = 20  # bytes of zipfile's extra field with sizes of 64 bits
_ALIGNMENT = 64  # of members, as torch.save aligns them


#: The magic number of the older format as torch.save pickles it, and what follows: its version.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_COUNT = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that a pickle may contain. It is never looked up."""

    text: bytes


_REBUILD = _Name(b"torch._utils\n_rebuild_tensor_v2\n")
_PARAMETER = _Name(b"torch._utils\n_rebuild_parameter\n")
_DICT = _Name(b"collections\nOrderedDict\n")
_STORAGES = {
    "F32": _Name(b"torch\nFloatStorage\n"),
    "F16": _Name(b"torch\nHalfStorage\n"),
    "BF16": _Name(b"torch\nBFloat16Storage\n"),
}
#: Numbers of other kinds, such as position_ids and masks beside the weights: who uses a tensor checks its format.
_OTHERS = {
    "F64": (_Name(b"torch\nDoubleStorage\n"), 8),
    "I64": (_Name(b"torch\nLongStorage\n"), 8),
    "I32": (_Name(b"torch\nIntStorage\n"), 4),
    "I16": (_Name(b"torch\nShortStorage\n"), 2),
    "I8": (_Name(b"torch\nCharStorage\n"), 1),
    "U8": (_Name(b"torch\nByteStorage\n"), 1),
    "BOOL": (_Name(b"torch\nBoolStorage\n"), 1),
}
_FORMATS = {name: format for format, name in _STORAGES.items()} | {name: key for key, (name, _) in _OTHERS.items()}
_SIZES = {format: nbytes(format, (1,)) for format in _STORAGES} | {key: size for key, (_, size) in _OTHERS.items()}
_NAMES = {name.text: name for name in (_REBUILD, _PARAMETER, _DICT, *_FORMATS)}


@dataclass(frozen=True, slots=True)
class _Storage:
    """`count` numbers of a format under a key."""

    format: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor in a storage: number `offset` is its first, and `strides` numbers later is the next along an axis."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """From its first number to behind its last."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether it is row-major and without gaps."""
        return all(
            size == 1 or stride == prod(self.shape[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True))
        )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as views that nobody has touched. Raises CheckpointError for any other content."""
    file = MappedFile(path)
    try:
        entries, storages = (_old if first_bytes(path, len(_OLD)) == _OLD else _zipped)(file)
    except (IndexError, struct.error, UnicodeDecodeError):
        raise damaged(path, "has a pickle that breaks off or contradicts itself") from None

    tensors: dict[str, Tensor] = {}
    spans: dict[tuple[int, int, tuple[int, ...]], str] = {}
    for name, view in entries.items():
        storage, size = view.storage, _SIZES[view.storage.format]
        if storage.key not in storages:
            raise damaged(path, f"lacks storage {quote(storage.key)}")
        start, held = storages[storage.key]
        if held != storage.count * size:
            raise damaged(
                path,
                f"has {held} bytes in storage {quote(storage.key)}, and {storage.count} {storage.format} need "
                f"{storage.count * size}",
            )
        count = prod(view.shape)
        begin, extent = start + view.offset * size, view.extent * size if count else 0
        data = file.view(begin, extent, f"tensor {quote(name)}")
        apart = begin % size or not view.contiguous  # kernels read numbers at multiples of their size
        source = partial(_gather, data, size, view.shape, view.strides) if count and apart else data
        tensors[name] = Tensor(name, storage.format, view.shape, source, (file,))
        spans[begin, begin + extent, view.strides] = name  # a tied head is the embeddings once more
    refuse_overlaps(path, [(begin, end, name) for (begin, end, _), name in spans.items()])
    if sum(prod(tensor.shape) * _SIZES[tensor.format] for tensor in tensors.values()) > 2 * file.size:
        raise damaged(path, "has the same numbers as more than two tensors")
    return tensors


def _gather(data: NDArray[np.uint8], size: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.uint8]:
    """A copy, row-major, of what lies `strides` numbers of `size` bytes apart."""
    steps = [stride * size for stride in strides]
    table = np.lib.stride_tricks.as_strided(data, (*shape, size), (*steps, 1), writeable=False)
    copy = table.copy("C").reshape(-1)
    copy.flags.writeable = False
    return copy


def _views(path: Path, entries: dict[str, Any]) -> dict[str, _View]:
    """The entries, all of which must be tensors."""
    for name, entry in entries.items():
        if type(entry) is not _View:
            raise CheckpointError(f"{path}: its entry {quote(name)} is not a tensor; save the model's weights alone")
    return entries


def _zipped(file: MappedFile) -> tuple[dict[str, _View], dict[str, tuple[int, int]]]:
    """What the pickle of a zip holds, and offset and size of each storage."""
    path, members = file.path, _members(file)
    programs = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(programs) != 1:
        raise damaged(path, f"has {len(programs)} members NAME/data.pkl, must have one")
    folder = programs[0].removesuffix("data.pkl")
    order = file.view(*members.get(f"{folder}byteorder", (0, 0)), "the byte order")[:20].tobytes()
    if order not in (b"", b"little"):
        raise CheckpointError(f"{path}: has byte order {order!r}; save it again on a little-endian machine")
    start, size = members[programs[0]]
    if size > _MAX_PICKLE:
        raise damaged(path, f"has a pickle of {size} bytes, and the limit is {_MAX_PICKLE}")
    below = f"{folder}data/"
    storages = {name.removeprefix(below): place for name, place in members.items() if name.startswith(below)}
    return _views(path, _Machine(file.view(start, size, "the pickle").tobytes(), path).run(dict)), storages


def _old(file: MappedFile) -> tuple[dict[str, _View], dict[str, tuple[int, int]]]:
    """What the older format's dict holds, and offset and size of each storage."""
    path, at, found = file.path, len(_OLD), []
    kinds: tuple[type[Any], ...] = (dict, dict, list)  # the machine, the tensors, the keys of their storages
    for kind in kinds:
        machine = _Machine(file.view(at, min(_MAX_PICKLE, file.size - at), "a pickle").tobytes(), path)
        found.append(machine.run(kind))
        at += machine.at
    system, entries, keys = found[0], _views(path, found[1]), found[2]
    if system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: is not of a little-endian machine; save it again on one")
    if len(keys) > _MAX_MEMBERS:
        raise damaged(path, f"claims {len(keys)} storages, and the limit is {_MAX_MEMBERS}")
    known = {view.storage.key: view.storage for view in entries.values()}
    storages: dict[str, tuple[int, int]] = {}
    for key in keys:
        if type(key) is not str or key not in known or key in storages:
            raise damaged(path, "has a storage that belongs to no tensor, or is there twice")
        (count,) = _COUNT.unpack(file.view(at, _COUNT.size, f"storage {quote(key)}").tobytes())
        at, size = at + _COUNT.size, count * _SIZES[known[key].format]
        file.check(at, size, f"storage {quote(key)}")
        storages[key] = at, size
        at += size
    return entries, storages


def _members(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Offset and size of each member of a zip, by its name."""
    path = file.path

    def fields(layout: struct.Struct, at: int, magic: bytes, what: str) -> list[Any]:
        file.check(at, layout.size, what)
        found, *values = layout.unpack_from(file.buffer, at)
        if found != magic:
            raise damaged(path, f"has no {what} at byte {at}")
        return values

    if file.view(0, min(4, file.size), "the magic").tobytes() != b"PK\3\4":
        raise CheckpointError(f"{path}: is not a file of torch.save; save the weights again with PyTorch")
    at = file.size - _END.size
    *_, entries, size, start, _ = fields(_END, at, b"PK\5\6", "end of a zip's directory")
    locator = at - _LOCATOR.size
    if locator >= 0 and file.view(locator, 4, "the locator").tobytes() == b"PK\6\7":
        _, at, _ = fields(_LOCATOR, locator, b"PK\6\7", "locator")
        *_, entries, size, start = fields(_END_64, at, b"PK\6\6", "end of a zip's directory of 64 bits")
    if entries > _MAX_MEMBERS:
        raise damaged(path, f"claims {entries} members, and the limit is {_MAX_MEMBERS}")

    members: dict[str, tuple[int, int]] = {}
    at = start
    for _ in range(entries):
        _, _, flags, method, _, _, _, packed, size, *lengths, _, _, _, offset = fields(
            _ENTRY, at, b"PK\1\2", "entry of a zip's directory"
        )
        ends = [*accumulate(lengths, initial=at + _ENTRY.size)]
        name_bytes, extra, _ = (
            file.view(begin, length, "an entry of the zip's directory").tobytes()
            for begin, length in zip(ends, lengths, strict=False)
        )
        at = ends[-1]
        name = name_bytes.decode("ascii", "replace")
        if (
            not name.isprintable()
            or "\ufffd" in name
            or "\\" in name
            or {"", ".", ".."} & {*name.removesuffix("/").split("/")}
        ):
            raise damaged(path, f"has a member {quote(name)}, which is not a path in a folder of its own")
        if name in members:
            raise damaged(path, f"has member {quote(name)} twice")
        size, packed, offset = _wide(path, extra, [size, packed, offset])
        if flags & 1 or method or packed != size:
            raise CheckpointError(
                f"{path}: member {quote(name)} is compressed or encrypted; save it again with torch.save"
            )
        *_, n_name, n_extra = fields(_LOCAL, offset, b"PK\3\4", f"member {quote(name)}")
        offset += _LOCAL.size
        if file.view(offset, n_name, "a member's name").tobytes() != name_bytes:
            raise damaged(path, f"has another member where {quote(name)} should be")
        offset += n_name + n_extra
        file.check(offset, size, f"member {quote(name)}")
        members[name] = offset, size
    return members


def _wide(path: Path, extra: bytes, numbers: list[int]) -> list[int]:
    """`numbers`, each 0xFFFFFFFF replaced by the next of the 64-bit numbers in extra field 1."""
    wide: Iterator[tuple[int]] = iter(())
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            wide = struct.iter_unpack("<Q", body[: len(body) // 8 * 8])
        at += 4 + length
    try:
        return [next(wide)[0] if number == 0xFFFFFFFF else number for number in numbers]
    except StopIteration:
        raise damaged(path, "has a member without its size or place") from None


class _Machine:
    """Runs a pickle of protocol 2 to 5: an operation is a byte, and takes and gives objects of the stack.

    Objects are numbers, texts, tuples, lists and dicts, and what stands for names, storages and tensors; no more than
    the pickle has bytes. They are compared by type only, since a few of them can be nested to any depth. `run` raises
    CheckpointError; IndexError, struct.error or UnicodeDecodeError for a pickle that breaks off, or takes from an empty
    stack.
    """

    def __init__(self, program: bytes, path: Path) -> None:
        self.program, self.path = program, path
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack under each mark
        self.memo: dict[int, Any] = {}

    def run(self, kind: type[T]) -> T:
        """What the pickle ends with, which must be of this type."""
        while (operation := self.take(1)) != b".":
            self.step(operation)
        return self.pop(kind)

    # long: one case for each operation that torch.save writes; apart, they would only be harder to compare
    def step(self, operation: bytes) -> None:
        push = self.stack.append
        match operation:
            case b"\x80":  # PROTO
                if not 2 <= (protocol := self.number("B")) <= 5:
                    raise self.refuse(f"a pickle of protocol {protocol}, not 2 to 5")
            case b"\x95":  # FRAME, whose length nobody needs
                self.number("Q")
            case b"}":  # EMPTY_DICT
                push({})
            case b"(":  # MARK
                self.below.append(self.stack)
                self.stack = []
            case b"N":  # NONE
                push(None)
            case b"\x88" | b"\x89":  # NEWTRUE, NEWFALSE
                push(operation == b"\x88")
            case b"K" | b"M" | b"J":  # BININT1, BININT2, BININT
                push(self.number({b"K": "B", b"M": "H", b"J": "i"}[operation]))
            case b"\x8a":  # LONG1
                if (size := self.number("B")) > 8:
                    raise self.refuse(f"a number of {size} bytes")
                push(int.from_bytes(self.take(size), "little", signed=True))
            case b"X" | b"\x8c" | b"U":  # BINUNICODE, SHORT_BINUNICODE, SHORT_BINSTRING of Python 2
                push(self.take(self.number("I" if operation == b"X" else "B")).decode())
            case b"c":  # GLOBAL
                push(self.name())
            case b"\x93":  # STACK_GLOBAL
                attribute, module = self.pop(str), self.pop(str)
                push(self.known(f"{module}\n{attribute}\n".encode()))
            case b"q" | b"r":  # BINPUT, LONG_BINPUT
                self.memo[self.number("B" if operation == b"q" else "I")] = self.stack[-1]
            case b"\x94":  # MEMOIZE
                self.memo[len(self.memo)] = self.stack[-1]
            case b"h" | b"j":  # BINGET, LONG_BINGET
                index = self.number("B" if operation == b"h" else "I")
                if index not in self.memo:
                    raise self.refuse(f"object {index}, which it never stored")
                push(self.memo[index])
            case b"]":  # EMPTY_LIST
                push([])
            case b"a":  # APPEND
                item = self.stack.pop()
                self.pop(list, keep=True).append(item)
            case b"e":  # APPENDS
                items = self.above()
                self.pop(list, keep=True).extend(items)
            case b")":  # EMPTY_TUPLE
                push(())
            case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                count = operation[0] - 0x84
                push(tuple([self.stack.pop() for _ in range(count)][::-1]))
            case b"t":  # TUPLE
                items = self.above()
                self.stack.append(tuple(items))
            case b"Q":  # BINPERSID
                push(self.storage(self.stack.pop()))
            case b"R":  # REDUCE
                arguments, name = self.pop(tuple), self.pop(_Name)
                push(self.reduce(name, arguments))
            case b"s":  # SETITEM
                value, key = self.stack.pop(), self.stack.pop()
                self.set([key, value])
            case b"u":  # SETITEMS
                self.set(self.above())
            case b"b":  # BUILD, by which a state_dict gets attributes that say nothing of its weights
                self.pop(dict)
                self.pop(dict, keep=True)
            case _:
                raise self.refuse(f"operation {operation!r}, which torch.save does not write for tensors")

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        if self.at + count > len(self.program):
            raise IndexError
        self.at += count
        return self.program[self.at - count : self.at]

    def number(self, code: str) -> int:
        layout = struct.Struct("<" + code)
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def pop(self, kind: type[T], *, keep: bool = False) -> T:
        """The top of the stack, which must be of this type."""
        value = self.stack[-1] if keep else self.stack.pop()
        if type(value) is not kind:
            found, wanted = (t.__name__.strip("_").lower() for t in (type(value), kind))
            raise self.refuse(f"a {found} where a {wanted} should be")
        return value

    def above(self) -> list[Any]:
        """The objects above the last mark, which goes with them."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its pickle has {what}; it holds more than weights and may be hostile, find another source"
        )

    def name(self) -> _Name:
        """A module and what is in it, each on a line."""
        end = self.program.find(b"\n", self.program.find(b"\n", self.at) + 1) + 1
        return self.known(self.take(max(end - self.at, 1)))

    def known(self, text: bytes) -> _Name:
        """The name that these two lines are. Raises CheckpointError for any that is not a word of the machine's."""
        if text not in _NAMES:
            module, _, attribute = text.decode("utf-8", "replace").rstrip("\n").partition("\n")
            if module == "torch" and attribute.endswith("Storage"):
                raise CheckpointError(
                    f"{self.path}: has numbers of torch.{quote(attribute)}; supported are {', '.join(_STORAGES)}"
                )
            raise self.refuse(f"the name {quote(f'{module}.{attribute}')}")
        return _NAMES[text]

    def storage(self, identity: Any) -> _Storage:
        """The storage that `("storage", its type, its key, its device, its length)` stands for; the older format adds
        a None.
        """
        if type(identity) is tuple and len(identity) == 6 and identity[5] is None:
            identity = identity[:5]
        kind, name, key, _, count = identity if _are(identity, str, _Name, str, str, int) else ("", _DICT, "", "", 0)
        if kind != "storage" or name not in _FORMATS or count < 0:
            raise self.refuse("a persistent object that is not a storage of tensors")
        return _Storage(_FORMATS[name], key, count)

    def reduce(self, name: _Name, arguments: tuple[Any, ...]) -> dict[str, Any] | _View:
        """What a call would give: an empty dict, or the tensor at an offset in a storage, of a shape, with strides."""
        if name is _DICT and not arguments:
            return {}
        if name is _PARAMETER and _are(arguments, _View, bool, dict):
            view: _View = arguments[0]
            return view
        if name is not _REBUILD or not _are(arguments, _Storage, int, tuple, tuple, bool, dict):
            raise self.refuse("a call that makes no tensor")
        storage, offset, shape, strides, _, _ = arguments
        if not (len(shape) <= _MAX_AXES and _are(shape, *[int] * len(shape)) and min(shape, default=0) >= 0):
            raise damaged(self.path, f"has a tensor whose shape is not up to {_MAX_AXES} whole numbers")
        if not _are(strides, *[int] * len(shape)) or min(strides, default=0) < 0:
            raise damaged(self.path, f"has a tensor of shape {shape} without as many strides")
        view = _View(storage, offset, shape, strides)
        if prod(shape) > storage.count or not 0 <= offset <= offset + view.extent * bool(prod(shape)) <= storage.count:
            raise damaged(
                self.path, f"has a tensor of shape {shape} at {offset} in a storage of {storage.count} numbers"
            )
        return view

    def set(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into the dict on top of the stack."""
        target: dict[str, Any] = self.pop(dict, keep=True)
        if len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise self.refuse("a key that is not text")
            if key in target:
                raise damaged(self.path, f"has {quote(key)} twice")
            target[key] = value


def _are(values: Any, *kinds: type) -> bool:
    """Whether `values` is a tuple of exactly these types."""
    return type(values) is tuple and [*map(type, values)] == [*kinds]


@contextmanager
def writing(
    file: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Write a file that torch.load(weights_only=True) opens, of tensors given as format and shape by name.

    What it yields is called with the bytes of one tensor after another, in their order.
    """
    from zipfile import ZipFile, ZipInfo

    def member(name: str, data: bytes | memoryview) -> None:
        info = ZipInfo(f"archive/{name}")
        start = file.tell() + _LOCAL.size + len(info.filename) + _LOCAL_64 + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        with archive.open(info, "w", force_zip64=True) as target:
            target.write(data)

    with ZipFile(file, "w") as archive:
        member("data.pkl", _program(tensors))
        member("byteorder", b"little")
        keys = count()
        yield lambda data: member(f"data/{next(keys)}", data.data)
        member("version", b"3\n")


def _program(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The pickle of a dict of tensors, each in the storage of its number."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def whole(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def tuple_(*parts: bytes) -> bytes:
        return b"(" + b"".join(parts) + b"t"

    def call(name: _Name, *arguments: bytes) -> bytes:
        return b"c" + name.text + tuple_(*arguments) + b"R"

    program = b"\x80\x02}("
    for key, (name, (format, shape)) in enumerate(tensors.items()):
        storage = tuple_(
            text("storage"), b"c" + _STORAGES[format].text, text(str(key)), text("cpu"), whole(prod(shape))
        )
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        sizes = tuple_(*map(whole, shape)), tuple_(*map(whole, strides))
        program += text(name) + call(_REBUILD, storage + b"Q", whole(0), *sizes, b"\x89", call(_DICT))
    return program + b"u."
