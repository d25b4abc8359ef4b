"""Build the site: JupyterLite with Pyodide, this package, the notebooks and a model, as plain files in site/_output.

Any server can serve the folder, at any path. Nothing in it asks for anything outside of it, unless it is built with
--pyodide, which leaves Pyodide and its packages at that address.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import click
from jupyterlite_core.constants import LAB_EXTENSIONS
from jupyterlite_pyodide_kernel.constants import PYODIDE_CDN_URL, PYODIDE_KERNEL_NPM_NAME, PYODIDE_KERNEL_PLUGIN_ID
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gemma_wgpu.bench.run import model_hash
from gemma_wgpu.fetch.hub import find
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parent
CACHE = ROOT / "build"
MODELS = "models"  # the folder of the models, beside the notebooks and in the site
LOCK = "pyodide-lock.json"
KERNEL = Path(LAB_EXTENSIONS, PYODIDE_KERNEL_NPM_NAME, "static")  # the kernel's worker and its own wheels are there
# The browser fetches these while Pyodide starts, rather than one after the other once it has started.
PREFETCHED = ["micropip", "piplite", "ipykernel", "comm", "pyodide-kernel", "jedi", "ipython", "ipywidgets"]
ICON = '<link rel="icon" href="../lab/favicon.ico">'
IN_PYODIDE = {"sys_platform": "emscripten", "platform_system": "Emscripten", "python_version": "3.14", "extra": ""}


@click.command(help=__doc__)
@click.option("--model", default="demo", show_default=True, help="Add this model as 'demo'; 'none' adds none.")
@click.option("--pyodide", metavar="URL", help=f"Use the Pyodide at this address; 'official' is {PYODIDE_CDN_URL}.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=HERE / "_output",
    help="Write the site to this folder.  [default: site/_output]",
)
def main(model: str, pyodide: str | None, output: Path) -> None:  # noqa: D103
    output = output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        jupyter = [sys.executable, "-m", "jupyter", "lite", "build", f"--LiteManager.cache_dir={work}/cache"]
        run(*jupyter, "--lite-dir", str(HERE), "--output-dir", str(output), cwd=Path(work))
    add_python(output, PYODIDE_CDN_URL if pyodide == "official" else pyodide)
    shutil.copytree(HERE / "content" / MODELS, output / MODELS)
    identity = {}
    if model != "none":
        identity = add_model(output / MODELS / "demo", model)
    add_bench(output, PYODIDE_CDN_URL if pyodide == "official" else pyodide, identity)
    shutil.copy(HERE / "index.html", output)
    for app in output.glob("*/index.html"):
        html = app.read_text(encoding="utf-8")
        # JupyterLite names its icon only after the browser has asked the host for one.
        app.write_text(html.replace("<head>", f"<head>{ICON}", 1), encoding="utf-8")
    (output / ".nojekyll").touch()  # GitHub Pages is to serve the files as they are
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    click.echo(f"{output}: {size / 1e6:,.0f} MB")


def add_python(output: Path, distribution: str | None) -> None:
    """Add Pyodide, unless it stays at the URL `distribution`, the wheels, and a lock that says where all of it is."""
    folder = output / "static" / "pyodide"
    folder.mkdir(parents=True)
    if distribution:
        distribution = distribution.rstrip("/")
        with urllib.request.urlopen(f"{distribution}/{LOCK}") as response:
            lock = json.load(response)
        for package in lock["packages"].values():
            package["file_name"] = f"{distribution}/{package['file_name']}"
    else:
        local = CACHE / "pyodide"
        run(sys.executable, str(ROOT / "tools" / "fetch_pyodide.py"), str(local))
        shutil.copytree(local, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        lock = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        lock["packages"] = {
            name: package for name, package in lock["packages"].items() if (folder / package["file_name"]).exists()
        }
    pip = [sys.executable, "-m", "pip", "--quiet"]
    target = ["--only-binary=:all:", "--python-version=3.14", "--implementation=py", "--abi=none", "--platform=any"]
    run(*pip, "download", "--no-deps", *target, "--dest", str(folder), "--requirement", str(HERE / "packages.txt"))
    run(*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    wheels = [*(output / KERNEL / "pypi").glob("*.whl"), *folder.glob("*-py*-none-any.whl")]
    add_wheels(lock, wheels, folder)
    (folder / LOCK).write_text(json.dumps(lock), encoding="utf-8")

    config = json.loads((output / "jupyter-lite.json").read_text(encoding="utf-8"))
    settings = config["jupyter-config-data"]["litePluginSettings"][PYODIDE_KERNEL_PLUGIN_ID]
    settings["pyodideUrl"] = f"{distribution or './static/pyodide'}/pyodide.mjs"
    settings["disablePyPIFallback"] = distribution is None
    settings["loadPyodideOptions"] = {
        "lockFileURL": f"./static/pyodide/{LOCK}",
        "packages": PREFETCHED,
        # The address of the site, relative to the script of the kernel's worker; and that of a model of the site.
        "env": {
            "GEMMA_WGPU_BASE": f"{Path(os.path.relpath('.', KERNEL)).as_posix()}/",
            "GEMMA_WGPU_DEMO": f"./{MODELS}/demo",
        },
    }
    (output / "jupyter-lite.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def add_wheels(lock: dict[str, Any], wheels: Iterable[Path], folder: Path) -> None:
    """Enter `wheels` of pure Python into a Pyodide lock that is to lie in `folder`."""
    entries = [entry(wheel, folder) for wheel in wheels]
    names = {canonicalize_name(name): name for name in lock["packages"]} | {e["name"]: e["name"] for e in entries}
    for found in entries:
        found["depends"] = [names[name] for name in found["depends"] if name in names]
        lock["packages"][names[found["name"]]] = found


def entry(wheel: Path, folder: Path) -> dict[str, Any]:
    """Return what a lock says of a wheel."""
    with ZipFile(wheel) as archive:
        files = archive.namelist()
        metadata = next(file for file in files if file.count("/") == 1 and file.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    needed = map(Requirement, headers.get_all("Requires-Dist", []))
    modules = {file.split("/")[0].removesuffix(".py") for file in files if file.endswith(".py")}
    return {
        "name": canonicalize_name(headers["Name"]),
        "version": headers["Version"],
        "file_name": Path(os.path.relpath(wheel, folder)).as_posix(),
        "install_dir": "site",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "package_type": "package",
        "imports": sorted(modules),
        "depends": [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate(IN_PYODIDE)],
        "unvendored_tests": False,
    }


def add_model(folder: Path, model: str) -> dict[str, str]:
    """Add `model` as a model folder, with its matrices as they are. Returns its SHA-256, and that of the original."""
    kept = CACHE / "model"
    made_of = CACHE / "model.original"
    path = find(model)
    stamp = f"{path.resolve()} {path.stat().st_mtime_ns}"
    if not made_of.is_file() or made_of.read_text() != stamp:
        with open_checkpoint(path) as checkpoint:
            convert(checkpoint, kept, quant="keep", force=True)
        made_of.write_text(stamp)
    shutil.copytree(kept, folder, copy_function=link)
    with open_checkpoint(path) as original, open_checkpoint(kept) as ours:
        return {model_hash(ours.files): model_hash(original.files)}


def add_bench(output: Path, distribution: str | None, identity: dict[str, str]) -> None:
    """Add the benchmark page, with the reference of the site's model; `identity` is what `add_model` returned."""
    folder = output / "bench"
    shutil.copytree(HERE / "bench", folder, ignore=shutil.ignore_patterns("references.json", "__pycache__"))
    chart = CACHE / "chart"
    run(sys.executable, str(ROOT / "tools" / "fetch_chart.py"), str(chart))
    shutil.copytree(chart, folder / "vendor", ignore=shutil.ignore_patterns(".*"))
    references = json.loads((HERE / "bench" / "references.json").read_text(encoding="utf-8"))
    known = {ours: references[original] for ours, original in identity.items() if original in references}
    site = {
        "pyodide": f"{distribution.rstrip('/') if distribution else '../static/pyodide'}/pyodide.mjs",
        "commit": commit(),
        "models": [f"../{MODELS}/demo"] if identity else [],
        "references": known,
    }
    (folder / "site.json").write_text(json.dumps(site), encoding="utf-8")


def commit() -> str:
    """Return the commit of the sources, if git knows it."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return git.stdout.strip() or "unknown"


def link(source: str, target: str) -> None:
    """Give a file a second name, or copy it if that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run(*command: str, cwd: Path | None = None) -> None:
    """Run a command. Raises SystemExit with what it says if it fails."""
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SystemExit(f"{result.stdout}\nsite: {' '.join(command)} failed with code {result.returncode}")


if __name__ == "__main__":
    main()
