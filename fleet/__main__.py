"""Many videos from one table, on the GPUs of this machine or of a Ray cluster.

  python3 run.py fleet batch.jsonl --into results
  python3 run.py fleet batch.csv --into results --workers 2 --threads 1
  python3 run.py fleet batch.jsonl --into s3://bucket/batch --work /shared/batch --address auto
  python3 run.py fleet batch.jsonl --into results --host http://gpu1:8188 --host http://gpu2:8188 --host-output /shared/output

docs/fleet.md says what a table looks like, and what is promised.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from tools.setup_host import CACHE

from . import cluster
from .driver import Driver, Settings
from .errors import FleetError
from .host import GivenHosts, HostSpec
from .manifest import Row, read_manifest
from .results import RESULTS, Books, OneDriver
from .store import Store, is_address
from .worker import Hosts

VIDEOS = "videos"  # the hosts' output folder, in the batch's folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="run.py fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("manifest", type=Path, help="a .jsonl or .csv table, a row a video")
    made.add_argument("--into", required=True, help="a folder, or an address that fsspec knows (s3://, gs://, file://)")
    made.add_argument(
        "--work", type=Path, help="with an address: the folder that videos are made in; shared by all machines"
    )
    made.add_argument("--workers", type=int, default=0, help="how many; without, one a GPU")
    made.add_argument(
        "--threads", type=int, default=0, help="processors a worker; without, on a CPU, its share of them"
    )
    made.add_argument(
        "--address", help="of a Ray cluster: auto, HOST:6379, ray://HOST:10001; without, this machine alone"
    )
    made.add_argument("--runtime-env", type=Path, help="a YAML file with Ray's runtime environment, for a cluster")
    made.add_argument(
        "--host", action="append", default=[], metavar="URL", help="a ComfyUI that runs already; a worker each"
    )
    made.add_argument("--host-output", type=Path, help="the output folder that all of --host share")
    made.add_argument(
        "--base", type=Path, default=CACHE / "base", help="has the models, input and custom_nodes of all workers"
    )
    made.add_argument(
        "--same-device", action="store_true", help="a row goes on only on the kind of device it was begun on"
    )
    made.add_argument(
        "--tries", type=int, default=2, help="how many tries in a row may end without having come further"
    )
    made.add_argument("--dashboard", action="store_true", help="Ray's dashboard, on this machine")
    made.add_argument("--check", action="store_true", help="read the table, say what is to be made, and end")
    return made


def check(options: argparse.Namespace) -> None:
    """FleetError for arguments that do not go together."""
    if options.host_output and not options.host:
        raise FleetError("--host-output goes with --host; workers that are started here write to the folder of --into")
    if options.host and (options.workers or options.threads):
        raise FleetError("--host is a worker each, with its own processors, so leave --workers and --threads out")
    if len({each.rstrip("/") for each in options.host}) < len(options.host):
        raise FleetError("--host names one host twice; it runs one row at a time, so give each once")
    for each in options.host:
        if not each.startswith(("http://", "https://")):
            raise FleetError(f"--host is {each}; it must be an address such as http://gpu1:8188")
    if options.host and is_address(options.into) and not options.host_output:
        raise FleetError(
            f"--into {options.into} needs --host-output, the folder from which finished videos are copied there"
        )
    if options.work and not is_address(options.into):
        raise FleetError(f"--work goes with an address; videos are made in {options.into} itself")
    if options.address and is_address(options.into) and not options.work:
        raise FleetError(
            "--address with an address in --into needs --work, a folder that all machines of the cluster share"
        )
    for name, least in (("workers", 0), ("threads", 0), ("tries", 1)):
        if getattr(options, name) < least:
            raise FleetError(f"--{name} is {getattr(options, name)}; it must be at least {least}")


def folder_of(options: argparse.Namespace) -> Path:
    """The batch's folder: its books and, of workers that are started here, its videos."""
    if not is_address(options.into):
        return Path(options.into).expanduser().resolve()
    if options.work:
        return options.work.expanduser().resolve()
    return CACHE / "fleet" / hashlib.sha256(options.into.encode()).hexdigest()[:12]


def fleet(options: argparse.Namespace) -> int:
    """Run a batch; 0 when every row is finished."""
    check(options)
    rows, folder = read_manifest(options.manifest), folder_of(options)
    store = Store(options.into) if is_address(options.into) else None
    try:
        books = Books(folder)
    except OSError as error:
        raise FleetError(f"{folder} cannot be used as the batch's folder: {error}") from error
    with OneDriver(folder):
        if store is not None:
            store.check()
            books.take_records(store.finished())
        left = books.unfinished(rows)
        say(
            f"{len(rows)} rows, {len(rows) - len(left)} of them finished before; {sum(row.frames for row in left)} frames to make."
        )
        if options.check or not left:
            return 0
        bad = make(options, books, left, folder)
        if store is not None:
            store.write(RESULTS, (folder / RESULTS).read_bytes() if (folder / RESULTS).is_file() else b"")
    say(f"{len(left) - bad} rows finished, {bad} not. {folder / RESULTS} has a line a row.")
    return int(bad > 0)


def make(options: argparse.Namespace, books: Books, left: list[Row], folder: Path) -> int:
    """Start workers, run the rows that are left; how many were not finished."""
    settings = Settings(
        same_device=options.same_device,
        tries=options.tries,
        prefix=folder.name if options.host else "",
        output=str(options.host_output or "") if options.host else VIDEOS,
    )
    machines = cluster.Cluster(options.address, options.runtime_env, options.dashboard)
    with machines:
        if options.host:
            names, share = [each.rstrip("/") for each in options.host], cluster.Share()
            count = len(names)
            output = options.host_output.expanduser().resolve() if options.host_output else None
            hosts: Hosts = GivenHosts(tuple(names), prefix=settings.prefix)
        else:
            count, share = machines.workers(options.workers, options.threads)
            names, count, output = None, min(count, len(left)), folder / VIDEOS
            base = options.base.expanduser().resolve()
            hosts = HostSpec(base, output, folder / "logs", share.threads, pin=not options.address)
        into = options.into if is_address(options.into) else ""
        actors = machines.start(count, share, hosts, output, into, names=names)
        driver, ended = Driver(books, left, actors, settings=settings, output=output), False
        try:
            with cluster.two_signals(driver.stop, driver.end):
                bad = driver.run()
            ended = True
        finally:
            machines.end(actors, at_once=ended)
    return bad


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """The exit status."""
    try:
        return fleet(parser().parse_args(arguments))
    except FleetError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("\nEnded. The same command goes on from what is kept.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
