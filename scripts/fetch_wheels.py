"""Fetches the wheels of scripts/wheels.txt into a folder: `fetch_wheels.py FOLDER SET...`.

Python's standard library only, because a bare machine's python3 often comes without pip; a wheel is a zip
file. The package index, its certificates and logins are the ones pip would use (PIP_INDEX_URL, pip.conf,
netrc, proxies). A cut download continues where it stopped; every file is checked against its pinned sha256.
"""

import fnmatch
import hashlib
import http.client
import json
import shutil
import socket
import sys
import time
import urllib.error
import zipfile
from pathlib import Path

from package_index import PackageIndex

# Enough to link and run on the CPU: 0.5 GB of the 1.2 GB that the wheels unpack to.
CPU_FILES = ["torch/include/*", "torch/version.py"] + [
    f"torch/lib/{name}" for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1")
] + ["nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13"]
UNPACKED_OVER_PACKED = {"cpu": 1.0, "cuda": 1.6, "nvcc": 3.0}  # measured, rounded up
ATTEMPTS = 3  # in a row without a new byte


def fail(line):
    sys.exit(f"setup: {line}")


class Progress:
    """`name  123 of 531 MB  23 %  11 MB/s`: one moving line on a terminal; elsewhere a line each 50 MB."""

    def __init__(self, name, done, total):
        self.name, self.start, self.total, self.shown = name, done, total, done // 50_000_000
        self.began, self.moving = time.monotonic(), sys.stdout.isatty()

    def show(self, done):
        percent = done * 100 // self.total
        step = percent if self.moving else done // 50_000_000
        if step == self.shown and done < self.total:
            return
        self.shown = step
        rate = (done - self.start) / max(time.monotonic() - self.began, 1e-3)
        left = f", {(self.total - done) / rate:.0f} s left" if rate and done < self.total else ""
        line = f"  {self.name}  {done / 1e6:.1f} of {self.total / 1e6:.1f} MB  {percent} %  {rate / 1e6:.1f} MB/s{left}"
        print(f"\r{line:<100}" if self.moving else line, end="" if self.moving else "\n", flush=True)
        if self.moving and done >= self.total:
            print()


def receive(index, wheel, size, part):
    """Appends to `part` what it lacks of `wheel`; returns the sha256 of the whole."""
    digest, done = hashlib.sha256(), 0
    if part.exists() and part.stat().st_size <= size:
        with part.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
                done += len(block)
    name = "-".join(wheel.split("-")[:2])
    if done:
        print(f"  {name}: continuing a download cut at {done / 1e6:.1f} MB", flush=True)
    if done < size:
        headers = {"Range": f"bytes={done}-"} if done else {}
        with index.open(index.find(wheel), headers) as reply:
            if done and getattr(reply, "status", None) != 206:  # the server cannot continue: begin again
                digest, done = hashlib.sha256(), 0
            progress = Progress(name, done, size)
            with part.open("ab" if done else "wb") as file:
                for block in iter(lambda: reply.read(1 << 18), b""):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    progress.show(min(done, size))
    if done < size:
        raise ConnectionError(f"the connection ended after {done / 1e6:.1f} of {size / 1e6:.1f} MB")
    return digest.hexdigest()


def download(index, wheel, size, sha256, part):
    attempt = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            found = receive(index, wheel, size, part)
        except urllib.error.HTTPError as error:
            login = " (a login goes into PIP_INDEX_URL or netrc)" if error.code in (401, 403) else ""
            problem = f"the package index answered {error.code} {error.reason}{login}"
            if error.code < 500:
                fail(f"could not download {wheel}: {problem}")
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, socket.timeout) as error:
            problem = f"{getattr(error, 'reason', error)}"
        else:
            if found == sha256:
                return
            part.unlink()
            problem = f"damaged: sha256 {found[:12]}.., expected {sha256[:12]}.."
        attempt = 1 if part.exists() and part.stat().st_size > before else attempt + 1
        if attempt == ATTEMPTS:
            fail(f"could not download {wheel}: {problem}. Check the network (or PIP_INDEX_URL, https_proxy), then "
                 "run the same command again: it continues where this one stopped")
        print("\n" * sys.stdout.isatty() + f"  {problem}; trying again", flush=True)
        time.sleep(attempt)


def unpack(wheel_file, folder, wanted):
    """Writes the members matching `wanted` (all when None) and returns their sizes by name."""
    sizes = {}
    with zipfile.ZipFile(wheel_file) as archive:
        for member in archive.infolist():
            if member.is_dir() or wanted and not any(fnmatch.fnmatchcase(member.filename, one) for one in wanted):
                continue
            target = folder / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(target.name + ".new")
            with archive.open(member) as source, beside.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            if (member.external_attr >> 16) & 0o111:  # a program, such as nvcc
                beside.chmod(0o755)
            beside.replace(target)  # never in place: a running program may have the old file mapped
            sizes[member.filename] = member.file_size
    return sizes


def is_unpacked(record, folder):
    """Whether every file that `record` lists is there in its full size."""
    try:
        sizes = json.loads(record.read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def main(folder, sets):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [line.split() for line in Path(__file__).with_name("wheels.txt").read_text().splitlines()
            if line and not line.startswith("#")]
    wanted = None if "cuda" in sets else CPU_FILES
    missing = []
    for of_sets, size, sha256, wheel in rows:
        chosen = [name for name in sets if name in of_sets.split(",")]
        files = wanted if chosen == ["cpu"] else None
        whole, pruned = (folder / f".{wheel}.{kind}" for kind in ("whole", "pruned"))
        if chosen and not is_unpacked(whole, folder) and not (files and is_unpacked(pruned, folder)):
            missing.append((wheel, int(size), sha256, files, pruned if files else whole, chosen[-1]))
    if not missing:
        return
    packed = sum(row[1] for row in missing)
    needed = max(row[1] for row in missing) + sum(int(row[1] * UNPACKED_OVER_PACKED[row[5]]) for row in missing)
    free = shutil.disk_usage(folder).free
    print(f"fetching {len(missing)} wheels, {packed / 1e6:.0f} MB (up to {needed / 1e9:.1f} GB on disk; "
          f"{free / 1e9:.1f} GB free)", flush=True)
    if free < needed:
        fail(f"not enough disk: {needed / 1e9:.1f} GB needed in {folder}, {free / 1e9:.1f} GB free")
    index = PackageIndex()
    for wheel, size, sha256, files, record, _ in missing:
        part = folder / f".{wheel}.part"
        download(index, wheel, size, sha256, part)
        sizes = unpack(part, folder, files)
        record.write_text(json.dumps(sizes))
        part.unlink()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except KeyboardInterrupt:
        fail("interrupted; run the same command again: it continues where this one stopped")
    except LookupError as error:
        fail(error.args[0])
    except ValueError as error:
        fail(f"{error} (PIP_INDEX_URL, pip.conf)")
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or sys.argv[1]}")
