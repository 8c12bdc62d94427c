"""ComfyUI and the packages that a CUDA machine without a network lacks, as files small enough to carry.

    python -m tests.gpu.bundle make FOLDER --python 3.12 --have have.txt --also flash-attn-4==4.0.0b36 NAME
    python tests/gpu/bundle.py unpack FOLDER TARGET

`make` runs where there is a network and a ComfyUI checkout (COMFYUI_PATH); have.txt is the other machine's
`python3 -m pip list --format=freeze`. `unpack` needs nothing but Python. TARGET then holds

    ComfyUI/    the sources, without the nodes of paid services
    site/       the packages, for PYTHONPATH; site.addsitedir also reads their .pth files, as nvidia-cutlass-dsl needs
    front/      an empty page for `--front-end-root`, in place of the front end
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path

PACK = Path(__file__).parents[2]
SUMS = "sums.txt"
# The nodes of paid services reach for the network; the rest is not needed to run.
LEFT_OUT = {".git", ".github", "__pycache__", "comfy_api_nodes", "tests", "tests-unit", "blueprints"}
# What holds a user's own files in a checkout.
OWN = {"models", "input", "output", "temp", "user", "custom_nodes"}
# An empty page takes the front end's place, and both packages beside it belong to the page.
PAGE = {"comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs"}
# Triton and CUDA's own libraries come with the other machine's PyTorch.
WITH_TORCH = re.compile(r"torch(vision|audio)?|triton|nvidia-(?!cudnn-frontend|cutlass-dsl).*|cuda-.*")
GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)


def make(folder: Path, python: str, have: Collection[str], part_bytes: int, also: Sequence[str] = ()) -> list[Path]:
    """Write the parts and their sums into a new or empty `folder` and return them.

    python: "3.12", of the other machine. have: names of packages that it has. also: more requirements, of kernels say.
    """
    from ..comfyui.server import Installation

    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    installation = Installation.find()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch, "root")
        shutil.copytree(installation.path, root / "ComfyUI", ignore=_left_out(installation.path))
        (root / "front").mkdir()
        (root / "front" / "index.html").write_text("<!doctype html><title>ComfyUI</title>\n", encoding="utf-8")
        text = (installation.path / "requirements.txt").read_text(encoding="utf-8")
        # First, because a version that is asked for by name counts.
        wanted = [*also, *text.splitlines(), *_own_requirements()]
        for wheel in download(wanted, Path(scratch, "wheels"), python, {canonical(name) for name in have}):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / "site")
        whole = Path(scratch, "whole.tar.xz")
        with tarfile.open(whole, "w:xz", preset=5) as archive:
            archive.add(root, arcname=".")
        return split(whole, folder, part_bytes)


def _left_out(checkout: Path):
    def ignored(folder: str, names: list[str]) -> set[str]:
        own = OWN if Path(folder) == checkout else set()
        return {name for name in names if name in LEFT_OUT | own}

    return ignored


def _own_requirements() -> list[str]:
    import tomllib

    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [line for extra in ("headless", "bench", "test") for line in project["optional-dependencies"][extra]]


def canonical(name: str) -> str:
    """A package's name as an index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def download(wanted: Iterable[str], folder: Path, python: str, have: Collection[str]) -> list[Path]:
    """Wheels of `wanted` and of all that they require, less what the machine has or what comes with its PyTorch."""
    from packaging.requirements import InvalidRequirement, Requirement

    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    # Every line with the extras of the package that requires it.
    waiting: list[tuple[str, Collection[str]]] = [(line, ()) for line in wanted]
    left_out, wheels, seen = set(have) | PAGE | {"longcat-video"}, dict[str, Path](), set[tuple[str, str]]()
    while waiting:
        line, extras = waiting.pop(0)
        try:
            requirement = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue  # an empty line, a comment, or an option of pip
        name, marker = canonical(requirement.name), requirement.marker
        applies = marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in ("", *extras))
        # A package that is there already may be wanted once more with other extras.
        new = {(name, extra) for extra in ("", *requirement.extras)} - seen
        if name in left_out or WITH_TORCH.fullmatch(name) or not applies or not new:
            continue
        seen |= new
        if name not in wheels:
            wheels[name] = _wheel(f"{requirement.name}{requirement.specifier}", folder / name, python)
        waiting += [(each, requirement.extras) for each in _requires(wheels[name])]
    return list(wheels.values())


def _wheel(requirement: str, folder: Path, python: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in ("any", "manylinux1_x86_64", "manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in GLIBC)):
        command += ["--platform", platform]
    constraints = ["--constraint", str(PACK / "constraints.txt")]
    # ComfyUI's own bounds count where they exclude the versions that our tests run with.
    if subprocess.run([*command, *constraints, requirement], capture_output=True).returncode:
        subprocess.run([*command, requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _requires(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])


def split(whole: Path, folder: Path, part_bytes: int) -> list[Path]:
    """The bytes of `whole` as parts in `folder`, with their SHA-256 in SUMS."""
    parts = []
    with whole.open("rb") as source:
        while block := source.read(part_bytes):
            parts.append(folder / f"part-{len(parts):02}")
            parts[-1].write_bytes(block)
    lines = (f"{_sum(part)}  {part.name}\n" for part in parts)
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return parts


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(folder: Path, target: Path) -> None:
    """Join the parts in `folder`, check them, and unpack them into a new or empty `target`."""
    if target.exists() and any(target.iterdir()):
        raise SystemExit(f"{target} is not empty; give a new folder")
    lines = (folder / SUMS).read_text(encoding="utf-8").split("\n")
    listed = [line.split() for line in lines if line]
    for known, name in listed:
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing; carry all {len(listed)} parts")
        if _sum(folder / name) != known:
            raise SystemExit(f"{folder / name} is damaged; carry it again")
    with tarfile.open(fileobj=_Joined(folder / name for _, name in listed), mode="r|xz") as archive:
        archive.extractall(target, filter="data")


class _Joined:
    """Files read one after another as a single one."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.blocks, self.rest = self._read(paths), b""

    @staticmethod
    def _read(paths: Iterable[Path]) -> Iterator[bytes]:
        for path in paths:
            yield path.read_bytes()

    def read(self, size: int) -> bytes:
        while len(self.rest) < size and (block := next(self.blocks, b"")):
            self.rest += block
        out, self.rest = self.rest[:size], self.rest[size:]
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="download, pack and split")
    making.add_argument("folder", type=Path)
    making.add_argument("--python", default="3.12", help="version of the other machine's Python (default: 3.12)")
    making.add_argument("--have", type=Path, help="its `pip list --format=freeze`")
    making.add_argument("--also", nargs="+", default=[], metavar="NAME", help="more packages, kernels for example")
    making.add_argument("--part", type=float, default=40, help="size of a part in MB (default: 40)")
    unpacking = commands.add_parser("unpack", help="join, check and unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "unpack":
        return unpack(args.folder, args.target)
    text = args.have.read_text(encoding="utf-8") if args.have else ""
    have = {re.split(r"[=<> @]", line)[0] for line in text.splitlines() if line.strip()}
    for part in make(args.folder, args.python, have, round(args.part * 1e6), args.also):
        print(part)


if __name__ == "__main__":
    main()
