"""Put Chart.js, which draws the plots of the benchmark page, into a folder: fetch_chart.py [FOLDER].

It comes, with its licence, out of a package on PyPI that carries it; its hash is pinned. FOLDER is left alone where
it is whole.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from fetch_pyodide import download

CARRIER, CARRIED_IN = "django-unfold==0.91.0", "unfold/static/unfold/js/chart/"  # Chart.js 4.4.0
SHA256 = "486a468ec4788e0668a9e73686796b04450709171af4ac213b6d229a8015676a"
FILES = {"chart.js": "chart.js", "LICENSE": "chart.js.LICENSE"}
FOLDER = Path(__file__).parents[1] / "build" / "chart"


def fetch(folder: Path) -> None:
    """Fill `folder`; the stamp comes last."""
    stamp = folder / ".stamp"
    if stamp.is_file() and stamp.read_text() == SHA256:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, ZipFile(download(CARRIER, SHA256, Path(work))) as carrier:
        for name, ours in FILES.items():
            (folder / ours).write_bytes(carrier.read(CARRIED_IN + name))
    stamp.write_text(SHA256)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
