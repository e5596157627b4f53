"""Files as they may come from outside: damaged, made by other programs, or made to do harm; the same for a seed."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .conftest import arrays

Make = Callable[[Path], object]  # writes an input to a path

NAMES = (
    "$x_$", r"$\frac{$", "100% [b]rich[/b]", "[/b]", "=cmd|' /C calc'!A0", "@SUM(1)", "-1+1", "'-x", ":smile:", "{0}",
    "<script>alert(1)</script>", "a|b", "line\nbreak", "red\x1b[31m", "no text \udce9", "_under_", "%s", "ünï 数据",
)  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes that were cut off, turned, overwritten, doubled or mixed up."""
    kind = chance.randrange(5)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        turned = bytearray(data)
        for _ in range(chance.choice((1, 3, 30))):
            turned[chance.randrange(len(turned))] ^= 1 << chance.randrange(8)
        return bytes(turned)
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    if kind == 2:
        return data[:first] + chance.randbytes(last - first) + data[last:]
    if kind == 3:
        return data[:last] + data[first:]
    return data[:first] + data[last:]


def _npz_bytes(changes: dict[str, Any], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **(arrays() | changes))
    return file.getvalue()


def _zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def _npy(header: str, data: bytes = b"") -> bytes:
    padded = header.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(padded)) + padded + data


def _entries(**changes: bytes) -> dict[str, bytes]:
    entries = {}
    for name, array in arrays().items():
        file = io.BytesIO()
        np.save(file, array)
        entries[f"{name}.npy"] = file.getvalue()
    return entries | {f"{name}.npy": data for name, data in changes.items()}


def _encrypted() -> bytes:
    data = bytearray(_zipped(_entries()))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(mark, at + 1)
    return bytes(data)


def _with_method(number: int) -> bytes:
    data = bytearray(_zipped(_entries()))
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset : at + offset + 2] = struct.pack("<H", number)
            at = data.find(mark, at + 1)
    return bytes(data)


def npz_files(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Files of arrays, with a name for each."""
    n = len(arrays()["y_train"])
    headers = {
        "petabytes": "{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624, 8, 8, 1), }",
        "more than int64": f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**62}, {2**62}, 8, 1), }}",
        "64 GB": "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 8, 8, 1), }",
        "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 1), }",
        "two negatives": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -8, 8, 1), }",
        "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (80, 8, 8, 1), }",
        "no items": "{'descr': '|V0', 'fortran_order': False, 'shape': (80, 8, 8, 1), }",
        "nested": "[" * 5000,
        "code": "__import__('os')",
        "long": "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1, " * 20_000 + "), }",
        "nulls": "\0" * 60,
        "empty": "",
    }
    for name, header in headers.items():
        yield f"header {name}", _zipped(_entries(x_train=_npy(header)))
        yield f"labels' header {name}", _zipped(_entries(y_train=_npy(header)), zipfile.ZIP_DEFLATED)
    for largest in (4_000_000_000, 2**31, 2**62, 2**63 - 1):
        for labels in ("y_train", "y_test"):
            y = arrays()[labels].astype(np.int64)
            y[-1] = largest
            yield f"{labels} up to {largest}", _npz_bytes({labels: y})
    y = np.repeat(np.arange(4), n // 4).astype(np.uint64)
    y[0] = 2**64 - 1
    for kind in ("<u8", ">i4", ">i8", "<i2", "|u1", "|b1", "<f4", "<c8", "<M8[s]", "<U3", "|S2"):
        yield f"labels of {kind}", _npz_bytes({"y_train": arrays()["y_train"].astype(kind)})
    yield "labels of 2**64 - 1", _npz_bytes({"y_train": y})
    yield "labels of -2**63", _npz_bytes({"y_train": np.full(n, -(2**63))})
    for kind in (">u2", "<f8", "|b1", "|S1"):
        yield f"images of {kind}", _npz_bytes({"x_train": arrays()["x_train"].astype(kind)})
    yield "columns first", _npz_bytes({"x_train": np.asfortranarray(arrays()["x_train"])})
    yield "a number", _npz_bytes({"x_train": np.uint8(3), "y_train": np.int64(3)})
    yield "no images", _npz_bytes({"x_train": np.zeros((0, 8, 8, 1), np.uint8), "y_train": np.zeros(0, int)})
    yield "one class", _npz_bytes({"y_train": np.zeros(n, int), "y_test": np.zeros(n // 2, int)})
    yield "objects", _npz_bytes({"y_train": np.array([{"a": 1}] * n, dtype=object)})
    yield "text", _zipped({f"{name}.npy": b"some text" for name in arrays()})
    yield "text without endings", _zipped(dict.fromkeys(arrays(), b"some text"))
    yield "nothing in it", _zipped({})
    yield "one array twice", _zipped(_entries()) + _zipped(_entries(x_train=b""))
    yield "encrypted", _encrypted()
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compressed by {method}", _zipped(_entries(), method)
    for number in (1, 9, 12, 14, 93, 99):
        yield f"said to be compressed by {number}", _with_method(number)
    yield "a pickle", pickle.dumps(arrays())
    yield "an array alone", _entries()["x_train.npy"]
    yield "empty", b""
    yield (
        "a gigabyte of zeros",
        _zipped(
            _entries(x_train=_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (80, 8, 8, 1), }", bytes(2**25))),
            zipfile.ZIP_DEFLATED,
        ),
    )
    for number in range(60):
        good = _npz_bytes({}, compressed=number % 2 == 0)
        yield f"damaged {number}", damaged(good, chance)


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def images(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Image files, with a name for each."""
    for width, height in ((13_000, 13_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 80_000_000), (0, 5)):
        yield f"{width} x {height}", _png(width, height)
    row = 1 + 3 * 400_000
    yield "a line", _png(400_000, 1, bytes(row))
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100000 100000\n%%EndComments\nshowpage\n"
    yield "text", b"some text"
    yield "empty", b""
    yield "a pickle", pickle.dumps({"a": 1})
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        file = io.BytesIO()
        Image.effect_noise((24, 24), 60).convert("RGB").save(file, kind)
        yield f"{kind}", file.getvalue()
        for number in range(6):
            yield f"damaged {kind} {number}", damaged(file.getvalue(), chance)


def folders(write_good: Make) -> Iterator[tuple[str, Make]]:
    """What stands at the place of an image: links and things that are no files."""

    def link(target: str) -> Make:
        return lambda path: os.symlink(target, path)

    yield "dangling link", link("nowhere.png")
    yield "link to itself", lambda path: os.symlink(path.name, path)
    yield "link to a device", link("/dev/zero")
    yield "pipe", os.mkfifo
    yield "folder", Path.mkdir
    yield "good", write_good


DEEP = 100_000
TEXTS = {
    "empty": "", "a list": "[1]", "a number": "1", "null": "null", "open": "{", "deep list": "[" * DEEP,
    "deep map": "{a: " * DEEP, "deep dashes": "- " * 5_000 + "a", "nameless": "null: 1\n", "numbered": "1: 2\n",
    "laughs": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(40)),
    "itself": "a: &a [*a]\n", "a tag": "a: !!python/object/apply:os.system [exit]\n", "a date": "a: 2024-13-45\n",
    "digits": f"a: {'9' * 5_000}\n", "hexadecimal": f"a: 0x{'f' * 20_000}\n", "binary": "a: !!binary '%'\n",
    "a set": "? a\n? b\n", "a list as a name": "? [a]\n: 1\n", "tabs": "a:\n\t- b\n", "twice": "a: 1\na: 2\n",
    "control": "a: \x07\n", "other document": "a: 1\n---\nb: 2\n", "percent": "%YAML 9.9\n---\na: 1\n",
}  # fmt: skip
OPTIONS = {
    "seeds": ("null", "12345678901234567890", "0", "-1", "1.5", "many", "[1]", "1e400", ".nan", "true", "{a: 1}"),
    "first_seed": ("null", "12345678901234567890", "-1", ".inf"),
    "scale": ("null", "[tiny]", "huge", "1", "{a: 1}"),
    "data": ("null", "[a]", "{a: b}", "1", "\"\\0\"", "'" + "x" * 5_000 + "'", "''", "/dev/null", "/dev/zero.npz"),
    "methods": ("null", "[]", "[null]", "batch_norm", "[[batch_norm]]", "[1]", "{a: 1}"),
    "out": ("null", "[a]", "1", "/dev/null/x", "'" + "x" * 5_000 + "'", "\"\\0\"", "/proc/x"),
    "data_root": ("null", "[a]", "\"\\0\""),
    "average": ("null", "1", "2", ".nan", "-.inf", "x"),
    "momentum": ("null", "1e-400", "1e400", ".nan"),
    "model": ("[]", "1", "resnet" + "9" * 30, "timm/", "torchvision/../x", "mlp\\0"),
    "unknown": ("1",),
    "null": ("1",),
}  # fmt: skip


def configs(chance: random.Random, good: str) -> Iterator[tuple[str, bytes]]:
    """Files of options, with a name for each."""
    for name, text in TEXTS.items():
        yield name, text.encode()
    for name, values in OPTIONS.items():
        for value in values:
            yield f"{name} {value[:30]}", f"{name}: {value}\n".encode()
    yield "other encoding", good.encode("utf-16")
    for number in range(30):
        yield f"damaged {number}", damaged(good.encode(), chance)


def cells(chance: random.Random, good: str) -> Iterator[tuple[str, bytes]]:
    """Tables, with a name for each: one cell of a good one is something else, or the whole is damaged."""
    odd = ("", "nan", "-inf", "1e999", "-1", "9" * 25, "9" * 5_000, "True", "x" * 200_000, "\0", "a\nb", "$x_$", "0x1")
    header, first, *rest = good.splitlines()
    for name, at in zip(header.split(","), range(first.count(",") + 1), strict=False):
        value = chance.choice(odd)
        row = first.split(",")
        row[at] = f'"{value}"' if "\n" in value else value
        yield f"{name} {value[:20]!r}", "\n".join([header, ",".join(row), *rest, ""]).encode()
    yield "empty", b""
    yield "a header alone", (header + "\n").encode()
    yield "no text", bytes(range(256))
    yield "quote", (good + '"').encode()
    for number in range(12):
        yield f"damaged {number}", damaged(good.encode(), chance)


def checkpoints(good: dict[str, Any]) -> Iterator[tuple[str, bytes | None]]:
    """Bytes of checkpoints that are none, with a name for each; None for a folder."""

    def saved(value: object) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    yield "a folder", None
    yield "text", b"some text"
    yield "empty", b""
    yield "a pickle", pickle.dumps({"step": 1})
    yield "code", pickle.dumps(Path("x"))
    yield "an object", saved(torch.nn.Linear(2, 2))
    yield "a list", saved([1, 2])
    yield "a number", saved(3)
    yield "a tensor", saved(torch.zeros(3))
    yield "no keys", saved({})
    for name in good:
        yield f"without {name}", saved({key: value for key, value in good.items() if key != name})
        yield f"{name} is text", saved(good | {name: "text"})
    yield "later than the end", saved(good | {"step": 10**9})
    yield "before the beginning", saved(good | {"step": -1})
    yield "other shapes", saved(good | {"model": {name: torch.zeros(7) for name in good["model"]}})


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
