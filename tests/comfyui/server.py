"""A real ComfyUI server, started from a checkout with this pack linked in, in a directory of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..support.python_path import comfyui_packages, python_path

PACK = Path(__file__).parents[2]
PACK_NAME = "longcat-video"  # the folder's name in custom_nodes, and the group's in the template browser
# glibc gives every freed buffer back at once, so that a server's memory says what it keeps.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
BOOT_SECONDS = 300  # of a cold start on a slow disk; it is given up at once if the process ends
FLAGS = ("--listen", "127.0.0.1", "--disable-api-nodes", "--preview-method", "latent2rgb")


@dataclass(frozen=True)
class Installation:
    """A ComfyUI checkout and the Python that runs it."""

    path: Path
    python: Path

    @classmethod
    def find(cls) -> Installation:
        """COMFYUI_PATH, else comfy-cli's place; COMFYUI_PYTHON, else ../venv. FileNotFoundError says what lacks."""
        path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser().absolute()
        if not (path / "main.py").is_file():
            raise FileNotFoundError(f"no ComfyUI checkout at {path}; set COMFYUI_PATH")
        venv = path.parent / "venv"
        candidates = [venv / "bin" / "python", venv / "Scripts" / "python.exe"]
        if given := os.environ.get("COMFYUI_PYTHON"):
            candidates = [Path(given).expanduser().absolute()]
        for python in candidates:
            if python.is_file():
                return cls(path, python)
        raise FileNotFoundError(f"no Python with ComfyUI's requirements at {candidates[0]}; set COMFYUI_PYTHON")

    @property
    def version(self) -> str:
        return re.search(r'"(.+)"', (self.path / "comfyui_version.py").read_text(encoding="utf-8"))[1]


class Server:
    """One ComfyUI process over a base directory that survives a restart. Models and settings of the user are not seen.

    blocked: packages whose import fails in this server. pack: False leaves the pack out. cpu: False lets ComfyUI choose
    the device. more: variables of its environment.
    """

    def __init__(
        self,
        installation: Installation,
        base: Path,
        *,
        flags: Sequence[str] = (),
        blocked: Sequence[str] = (),
        pack: bool = True,
        cpu: bool = True,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.installation, self.base, self.more = installation, base, dict(more or {})
        self.flags = (*(("--cpu",) if cpu else ()), *flags)
        # Another version of the page than the one that came with ComfyUI: the folder `static` of its package.
        if frontend := os.environ.get("COMFYUI_FRONTEND"):
            self.flags += ("--front-end-root", frontend)
        self.log_path = base / "server.log"
        self.process: subprocess.Popen | None = None
        self.port = 0
        nodes = base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        for folder in ("models", "input", "output", "temp", "user"):
            (base / folder).mkdir(exist_ok=True)
        if pack and not (nodes / PACK_NAME).exists():
            (nodes / PACK_NAME).symlink_to(PACK, target_is_directory=True)
        self.stubs = base / "blocked"
        for name in blocked:
            (self.stubs / name).mkdir(parents=True, exist_ok=True)
            text = f'raise ImportError("{name} is blocked in this test")\n'
            (self.stubs / name / "__init__.py").write_text(text, encoding="utf-8")
        # Without this the Templates dialog opens by itself over the canvas of a new profile.
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def resident_bytes(self) -> int:
        """Memory of its own; mapped files, of which the system keeps as much as it likes, are left out if it tells."""
        memory = psutil.Process(self.process.pid).memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def command(self, *flags: str) -> list[str]:
        main = str(self.installation.path / "main.py")
        # v0.8.0 keeps its database in the checkout, whatever the base directory.
        own = ("--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}")
        return [str(self.installation.python), main, *FLAGS, *own, *self.flags, *flags]

    def environment(self) -> dict[str, str]:
        environment = {**os.environ, **GIVE_BACK, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        # The tests' own Python path and settings of pytest are none of the server's business.
        environment.pop("PYTHONPATH", None)
        stubs = [self.stubs] if self.stubs.exists() else []
        environment |= python_path(*stubs, *comfyui_packages(), inherited=False)
        # Nothing that a test does may reach for a model on the network.
        return {**environment, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **self.more}

    def start(self) -> Server:
        """Start and wait until the server answers. RuntimeError with the end of its log if it does not."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("--port", str(self.port)),
                cwd=self.base,
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + BOOT_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                code = self.process.poll()
                self.stop()
                raise RuntimeError(f"ComfyUI did not start (exit code {code}):\n{self.log[-4000:]}")
            time.sleep(0.2)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End this server and what it started, and nothing else."""
        if self.process is None:
            return
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        self.process.wait(timeout=10)
        self.process = None

    def remove(self) -> None:
        """Stop, and remove what the server wrote. The link to the pack goes first, lest the pack be emptied."""
        self.stop()
        (self.base / "custom_nodes" / PACK_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.base, ignore_errors=True)

    def boot_only(self) -> str:
        """Everything a start that ends by itself prints. RuntimeError if it fails."""
        result = subprocess.run(
            self.command("--quick-test-for-ci"),
            cwd=self.base,
            env=self.environment(),
            capture_output=True,
            timeout=BOOT_SECONDS,
        )
        text = (result.stdout + result.stderr).decode("utf-8", "replace")
        if result.returncode:
            raise RuntimeError(f"ComfyUI ended with {result.returncode}:\n{text[-4000:]}")
        return text

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
