"""Put the ONNX Runtime library into a wheel, which then is one for machines like this one.

    python -m build --wheel --outdir dist . && python kernels/wheel_with_library.py dist/*.whl --output dist

With --cuda the library has its CUDA kernels, too. It is built as `gspn2convert build-ops` builds it, and needs the same
tools. Whoever installs such a wheel needs none of them.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from gspn2_kernels.build import BuildError, build


def add(wheel: Path, library: Path, output: Path) -> Path:
    """Write a wheel that holds the library, and what is known of it, besides all of another wheel.

    Args:
        wheel: the other one.
        library: `libgspn2_ort.so`; `libgspn2_ort.json` is beside it.
        output: folder of the new wheel.

    Returns:
        The new wheel.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run("unpack", str(wheel), "--dest", str(scratch / "files"))
        (files,) = (scratch / "files").iterdir()
        folder = files / "gspn2_kernels" / "lib"
        folder.mkdir()
        for each in (library, library.with_suffix(".json")):
            shutil.copy2(each, folder)
        (about,) = files.glob("*.dist-info/WHEEL")
        about.write_text(about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false"))
        (scratch / "packed").mkdir()
        run("pack", str(files), "--dest-dir", str(scratch / "packed"))
        (packed,) = (scratch / "packed").iterdir()
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        run("tags", "--remove", "--platform-tag", platform, str(packed))
        (made,) = (scratch / "packed").iterdir()
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(made, output))


def run(*command: str) -> None:
    """Run PyPA's tool for wheels."""
    subprocess.run([sys.executable, "-m", "wheel", *command], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Build the library and put it in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel to start from; it stays as it is")
    parser.add_argument("--output", type=Path, required=True, help="folder for the new one")
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels; takes minutes")
    arguments = parser.parse_args()
    try:
        library = build(cuda=arguments.cuda, report=lambda line: print(line, file=sys.stderr))
    except BuildError as error:
        sys.exit(f"{error}\nthe wheel {arguments.wheel} is as it was; it works without the library")
    print(add(arguments.wheel, library, arguments.output))


if __name__ == "__main__":
    main()
