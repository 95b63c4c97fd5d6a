"""Archives of npm, Debian and PyPI packages, through their ordinary clients.

Each function takes the archive from the folder `packages` where it is there, else downloads it into
`stock`.
"""

import subprocess
import sys
from pathlib import Path

from mmmamba_edge.errors import UserError


def npm_archive(name: str, version: str, packages: Path | None, stock: Path) -> Path:
    """The .tgz of an npm package."""
    file = f"{name.replace('@', '').replace('/', '-')}-{version}.tgz"
    if packages and (packages / file).is_file():
        return packages / file
    call(["npm", "pack", f"{name}@{version}"], stock)
    return stock / file


def debian_archive(name: str, version: str, packages: Path | None, stock: Path) -> Path:
    """The .deb of a Debian package, any revision of `version`."""
    for folder in (packages, stock):
        found = sorted(folder.glob(f"{name}_*{version}*.deb")) if folder else []
        if found:
            return found[-1]
        if folder is packages:
            call(["apt-get", "download", name], stock)
    raise UserError(
        f"{name}: the configured archive has no version {version} (Debian 12 has); "
        "put the .deb into a folder and name it with --packages"
    )


def pypi_archive(name: str, version: str, packages: Path | None, stock: Path) -> Path:
    """The pure-Python wheel of a PyPI package, or its source where there is no wheel."""
    stem = name.replace("-", "_")
    files = (f"{stem}-{version}-py3-none-any.whl", f"{stem}-{version}.tar.gz")
    for place in (packages, stock):
        for file in files:
            if place and (place / file).is_file():
                return place / file
        if place is packages:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", f"{name}=={version}"]
            call(pip, stock)
    raise UserError(f"{name} {version}: pip downloaded neither {files[0]} nor {files[1]}")


def call(command: list[str], folder: Path) -> None:
    """Run a command in a folder; UserError where it fails."""
    print(" ".join(command), file=sys.stderr)
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{' '.join(command)}: {error}; download the package elsewhere and use --packages"
        ) from error
