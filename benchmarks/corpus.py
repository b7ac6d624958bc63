"""A corpus of source code that anyone can rebuild: `python benchmarks/corpus.py OUT`.

`corpus.json` beside this file pins packages of a public distribution: version, SHA-256, licence and split. They are
loaded (or found in OUT/packages), checked, and read: text files by extension, at most 400 kB each, UTF-8, without NUL.
Exact copies go, and near copies: 5-line shingles of what follows a file's first comment, 64 minima (MinHash, Broder
1997), 8 bands of 8; out at an estimated Jaccard similarity of 0.85. Held out and test text are whole packages, read
first, so that what is near to theirs leaves the training text. A document is a directory: its files in order, each
behind a line with its path; so that some are longer than 128k tokens. Their order is that of a hash.

Written: OUT/{train,validation,test}.jsonl.gz, a document a line with "text", "name" and "package", for
`moemamba prepare`, and OUT/corpus.json, with what was kept and dropped of each package.
"""

import argparse
import collections
import gzip
import hashlib
import io
import json
import multiprocessing
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

PACKAGES = Path(__file__).with_name("corpus.json")
ENDINGS = """
.c .h .cc .cpp .hpp .cxx .S .s .l .y .m .mm .d .def .td .ll .inc .exp .dts .dtsi .rs .go .java .js .hs .py .pl .pm .t
.sh .erl .hrl .el .pas .pp .ads .adb .f90 .sql .css .am .ac .m4 .yaml .txt .md .rst .texi .sgml
"""
TEXT = frozenset(ENDINGS.split())
LARGEST = 400_000  # bytes: beyond are tables of registers and generated files
SHINGLE, MINIMA, BANDS, SIMILAR = 5, 64, 8, 0.85
DRAWN = np.random.default_rng(0).integers(1, 2**63, (2, MINIMA), dtype=np.uint64) | np.uint64(1)
COMMENTS = ("/*", "*", "//", "#", ";", "--", "(*", "{-", "@c", "dnl", "..", "%")


class File(NamedTuple):
    path: str
    packed: bytes  # zlib
    size: int  # bytes
    digest: bytes  # (32,) SHA-256
    minima: np.ndarray  # (MINIMA,) uint32


def members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Path and content of what may be text; archives inside are opened."""
    for member in archive:
        name = member.name.removeprefix("./")
        content = archive.extractfile(member) if member.isfile() else None
        if content is None:
            continue
        if ".tar." in PurePosixPath(name).name:
            with tarfile.open(fileobj=io.BytesIO(content.read())) as inner:
                yield from members(inner)
        elif PurePosixPath(name).suffix in TEXT:
            yield name, content.read() if member.size <= LARGEST else b"\0"


def minima(text: str) -> np.ndarray:
    """(MINIMA,) uint32: the least hash of the file's shingles under each of as many hash functions."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    first = next((k for k, line in enumerate(lines) if not line.startswith(COMMENTS)), 0)
    hashes = np.array([zlib.crc32(line.encode()) for line in lines[first:]] or [0], np.uint64)
    places = max(1, len(hashes) - SHINGLE + 1)
    shingles = np.zeros(places, np.uint64)
    for k in range(min(SHINGLE, len(hashes))):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + hashes[k : k + places]
    least = np.full(MINIMA, 2**32 - 1, np.uint32)
    for part in np.array_split(np.unique(shingles), 1 + places // 1024):
        mixed = part[:, None] * DRAWN[0] + DRAWN[1]
        least = np.minimum(least, (mixed >> np.uint64(32)).astype(np.uint32).min(0, initial=2**32 - 1))
    return least


def read(package: Path) -> tuple[list[File], collections.Counter[str]]:
    """The text files of a package, and how many bytes or files were dropped, by reason."""
    files, dropped = [], collections.Counter[str]()
    with tarfile.open(package) as archive:
        for path, content in members(archive):
            if b"\0" in content:
                dropped["binary or too large"] += 1
                continue
            try:
                text = content.decode()
            except UnicodeDecodeError:
                dropped["not UTF-8"] += 1
                continue
            if text.strip():
                packed = zlib.compress(content, 1)
                files.append(File(path, packed, len(content), hashlib.sha256(content).digest(), minima(text)))
    return sorted(files, key=lambda file: file.path), dropped


class Seen:
    """The files kept so far; tells whether another is one of them, or nearly."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()
        self.bands: dict[tuple[int, bytes], list[np.ndarray]] = collections.defaultdict(list)

    def copy_of(self, file: File) -> str | None:
        """ "exact copy", "near copy" or None; what is new counts as kept from now on."""
        if file.digest in self.digests:
            return "exact copy"
        self.digests.add(file.digest)
        keys = [(band, rows.tobytes()) for band, rows in enumerate(file.minima.reshape(BANDS, -1))]
        for key in keys:
            if any(float(np.mean(file.minima == other)) >= SIMILAR for other in self.bands.get(key, ())):
                return "near copy"
        for key in keys:
            if len(self.bands[key]) < 4:
                self.bands[key].append(file.minima)
        return None


def documents(package: str, files: list[File]) -> Iterator[tuple[bytes, bytes]]:
    """A document's place in the order, and itself as a packed line of JSON."""
    directories = collections.defaultdict(list)
    for file in files:
        directories[f"{PurePosixPath(file.path).parent}"].append(file)
    for name, inside in directories.items():
        text = "".join(f"=== {file.path}\n{zlib.decompress(file.packed).decode().rstrip()}\n\n" for file in inside)
        line = json.dumps({"text": text, "name": name, "package": package}, ensure_ascii=False) + "\n"
        yield hashlib.sha256(f"{package}/{name}".encode()).digest(), zlib.compress(line.encode(), 1)


def loaded(package: dict[str, Any], mirror: str, folder: Path) -> Path:
    """The package's archive, loaded unless it is there; ends the program where it cannot be had as pinned."""
    path = folder / package["file"]
    address = f"{mirror}/{package['directory']}/{package['file']}"
    if not path.exists():
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                path.write_bytes(answer.read())
        except (urllib.error.URLError, OSError) as error:
            sys.exit(
                f"{package['name']}: {package['file']} cannot be had from {mirror} ({error}). The mirror may have a"
                f" newer version only; older ones are kept by https://snapshot.debian.org: put the file into {folder}."
            )
    if hashlib.sha256(path.read_bytes()).hexdigest() != package["sha256"]:
        sys.exit(f"{path} is not the file that {PACKAGES.name} pins (SHA-256); delete it to load it again.")
    return path


def write(path: Path, lines: list[tuple[bytes, bytes]]) -> None:
    with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as out:
        for _, line in sorted(lines):
            out.write(zlib.decompress(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--mirror", default="https://deb.debian.org/debian", help="where packages are loaded from")
    parser.add_argument("--only", nargs="*", help="names of packages, instead of all")
    parser.add_argument("--jobs", type=int, default=2, help="packages that are read at a time")
    options = parser.parse_args()
    (options.out / "packages").mkdir(parents=True, exist_ok=True)
    pinned = [p for p in json.loads(PACKAGES.read_text()) if not options.only or p["name"] in options.only]
    pinned.sort(key=lambda package: package["split"] == "train")
    paths = [loaded(package, options.mirror, options.out / "packages") for package in pinned]
    seen, splits, report = Seen(), collections.defaultdict(list), []
    with multiprocessing.Pool(options.jobs) as pool:
        for package, (files, dropped) in zip(pinned, pool.imap(read, paths), strict=True):
            kept = []
            for file in files:
                copy = seen.copy_of(file)
                if copy is None:
                    kept.append(file)
                else:
                    dropped[copy] += 1
            splits[package["split"]] += documents(package["name"], kept)
            sizes = {"files": len(kept), "bytes": sum(file.size for file in kept), "dropped": dict(dropped)}
            report.append(package | sizes)
            print(
                f"{package['name']:20} {sizes['files']:7} files {sizes['bytes'] / 1e6:8.1f} MB; out: {dict(dropped)}",
                flush=True,
            )
    for split, lines in splits.items():
        write(options.out / f"{split}.jsonl.gz", lines)
    (options.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
