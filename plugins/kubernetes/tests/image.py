"""The image of deploy/kubernetes/Dockerfile, built as shipped. Needs root, buildah and debootstrap, and networks.

Only the base is another: this machine's release of Debian with this interpreter in /usr/local, so that the same wheels
fit. pip looks where this machine's does, by mounts, which leave nothing in the image.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ("buildah", "debootstrap", "runc", "netavark")
HELPERS = "/usr/lib/podman:/usr/libexec/podman:/usr/local/lib/podman"  # where buildah looks for netavark
BASE = "localhost/base:1"
LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=65536:65536")  # its own are above what root may set here


@dataclass(frozen=True)
class Image:
    """An image whose files are mounted.

    Args:
        root: where its files are
        about: what is recorded of it: the configuration of its processes, and how it was made
    """

    root: Path
    about: dict[str, Any]

    @property
    def env(self) -> dict[str, str]:
        return dict(each.split("=", 1) for each in self.about["config"]["Env"])


def can_build() -> str:
    """Why this machine cannot build an image; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for buildah and debootstrap"
    if missing := [p for p in PROGRAMS if shutil.which(p) is None and shutil.which(p, path=HELPERS) is None]:
        return f"needs {', '.join(missing)}: apt-get install {' '.join(PROGRAMS)}"
    known = Path("/usr/share/debootstrap/scripts", _suite()).exists()
    return "" if known else f"needs a release that debootstrap knows, unlike {_suite()}"


def _suite() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "?")


class Builder:
    """buildah, with a store of its own.

    Args:
        folder: of the store, deleted by ``close``
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> str:
        store = ("--root", str(self.folder / "store"), "--runroot", str(self.folder / "run"))
        done = subprocess.run(["buildah", *store, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()

    def base(self) -> None:
        """Make the base image, in the manner of python:3.11-slim."""
        tree = self.folder / "base"
        subprocess.run(["debootstrap", "--variant=minbase", _suite(), tree], check=True, capture_output=True)
        _put_interpreter(tree)
        made = self("from", "scratch")
        self("add", "--quiet", made, str(tree), "/")
        self("commit", "--quiet", "--rm", made, BASE)
        shutil.rmtree(tree)

    def build(self, tag: str) -> None:
        """Build the Dockerfile as it is shipped, with the extras that its runs here need."""
        self(
            *("build", "--isolation", "chroot", "--network", "host", *LIMITS, "--quiet", "--file"),
            *(
                "deploy/kubernetes/Dockerfile",
                "--tag",
                tag,
                "--build-arg",
                f"BASE={BASE}",
                "--build-arg",
                "EXTRAS=tensorboard",
            ),
            *(*_pip(self.folder / "pip.conf"), "."),
        )

    def mount(self, tag: str) -> Image:
        about = json.loads(self("inspect", "--type", "image", tag))["OCIv1"]
        return Image(Path(self("mount", self("from", tag))), about)

    def close(self) -> None:
        self("umount", "--all")
        self("rm", "--all")
        self("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


def _put_interpreter(tree: Path) -> None:
    """Copy this interpreter, its library, and the libraries that Debian's smallest system lacks."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base, local = Path(sys.base_prefix), tree / "usr/local"
    for name in (version, "python3", "python"):
        shutil.copy2(base / "bin" / version, local / "bin" / name)
    skipped = shutil.ignore_patterns("site-packages", "test", "config-*")
    shutil.copytree(base / "lib" / version, local / "lib" / version, ignore=skipped, symlinks=True)
    extensions = [str(base / "bin" / version), *map(str, (base / "lib" / version / "lib-dynload").glob("*.so"))]
    listed = subprocess.run(["ldd", *extensions], capture_output=True, text=True, check=False).stdout
    for library in {Path(found) for found in re.findall(r"=> (/\S+)", listed)}:
        if not list(tree.glob(f"usr/lib/*-linux-gnu/{library.name}")):
            shutil.copy2(library, local / "lib" / library.name)
    subprocess.run(["ldconfig", "-r", str(tree)], check=True)


def _pip(file: Path) -> list[str]:
    """Mounts that let pip look where this machine's does: its settings, and the places that these name."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    parts = [line.partition("=") for line in listed.stdout.splitlines()]
    given = {name.rpartition(".")[2]: value.strip("'") for name, _, value in parts}
    file.write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in given.items())]))
    places = [value for value in given.values() if Path(value).is_absolute() and Path(value).exists()]
    return [f"--volume={file}:/etc/pip.conf:ro", *(f"--volume={place}:{place}:ro" for place in places)]
