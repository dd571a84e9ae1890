"""Sampling jobs on a Ray cluster: the same bytes for any number of workers, also if workers die."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from support import few
from tqdit.cli.main import run
from tqdit.console import Console
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.ray_workers import Cluster, ClusterConfig
from tqdit.engines.run.shards import describe_job, open_shards, read_index
from tqdit.errors import TqditError

COUNT, SIZE = 22, 2  # eleven shards
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray closes files and processes when Python ends
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def command(bundle, output, *more):
    return [str(bundle), "-n", str(COUNT), "--shard-size", str(SIZE), "-o", str(output), "-q", *more]


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of(steps=100)


@pytest.fixture(scope="module")
def expected(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "samples"
    assert run("sample", command(bundle, folder)) == 0
    return content(folder)


@pytest.fixture(scope="module")
def machines():
    """A cluster on this machine to which nodes can be added, for all tests."""
    from ray.cluster_utils import Cluster as Machines

    cluster = Machines(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster
    cluster.shutdown()


class Bar:
    """A progress bar that calls `act` after each shard."""

    def __init__(self, act=lambda: None):
        self.act, self.done, self.notes = act, 0, []

    def update(self, count):
        self.done += count
        self.act()

    def set_postfix_str(self, text):
        self.notes.append(text)


def work(bundle, output, machines, bar, engine=None, **config):
    """Sample on the cluster; workers open the path `engine`, this process reads `bundle`."""
    manifest = read_manifest(bundle)
    job = describe_job(bundle, manifest, None, 0, COUNT, SIZE)
    cluster = Cluster(bundle, manifest, ClusterConfig(machines.address, **config), Console(quiet=True))
    cluster.engine = engine or cluster.engine
    with open_shards(output, job) as folder:
        cluster.work(folder, folder.pending(), bar)


def workers():
    """The running processes of our actors."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if "ray::Worker" in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_a_cluster_that_the_command_starts_makes_the_same_bytes(bundle, expected, tmp_path):
    assert run("sample", [*command(bundle, tmp_path / "s"), "--workers", "2", "--ray"]) == 0
    assert content(tmp_path / "s") == expected


@pytest.mark.parametrize("count", few([1, 2], 2))
def test_the_bytes_do_not_depend_on_the_number_of_workers(bundle, expected, tmp_path, machines, count):
    more = ["--ray", machines.address, "--workers", str(count), "--batch", str(count)]
    assert run("sample", command(bundle, tmp_path / "s", *more)) == 0
    assert content(tmp_path / "s") == expected


def test_a_killed_worker_costs_a_retry_and_nothing_else(bundle, expected, tmp_path, machines):
    killed = []

    def act():
        if len(killed) < 2:
            victim = next(process for process in workers() if process.pid not in killed)
            killed.append(victim.pid)
            victim.kill()

    bar = Bar(act)
    work(bundle, tmp_path / "s", machines, bar)
    assert len(killed) == 2
    assert bar.done == COUNT
    assert content(tmp_path / "s") == expected


@pytest.mark.full
def test_workers_join_and_leave_with_the_machines(bundle, expected, tmp_path, machines):
    """A worker takes both CPUs of a machine. The first one stands still until that of a new machine has joined."""
    nodes, still, most = [], [], []
    limit = time.monotonic() + 180
    while workers():  # those of an earlier test are ending
        time.sleep(0.1)

    class Notes(Bar):
        def set_postfix_str(self, text):
            if text == "2 workers" and not most:
                most.append(text)
                machines.remove_node(nodes[0])
            if most or time.monotonic() > limit:
                while still:
                    still.pop().resume()

    def act():
        if not nodes:
            still.extend(workers())
            for process in still:
                process.suspend()
            nodes.append(machines.add_node(num_cpus=2, wait=True))

    bar = Notes(act)
    try:
        work(bundle, tmp_path / "s", machines, bar, threads=2)
    finally:
        for process in still:
            process.resume()
    assert most
    assert bar.done == COUNT
    assert content(tmp_path / "s") == expected


def test_a_bundle_that_a_worker_cannot_see_travels_through_the_object_store(
    bundle, expected, tmp_path, machines, monkeypatch
):
    monkeypatch.chdir(bundle.parent)  # workers have another current folder
    work(bundle, tmp_path / "s", machines, Bar(), engine=Path(bundle.name))
    assert content(tmp_path / "s") == expected


def test_a_shard_that_fails_everywhere_ends_the_job_in_one_line_and_keeps_the_others(bundle, tmp_path, machines):
    manifest = read_manifest(bundle)
    job = replace(describe_job(bundle, manifest, None, 0, COUNT, SIZE), sampler="euler")  # not for this model
    cluster = Cluster(bundle, manifest, ClusterConfig(machines.address), Console(quiet=True))
    with open_shards(tmp_path / "s", job) as folder, pytest.raises(TqditError, match="sampler 'euler'"):
        cluster.work(folder, folder.pending(), Bar())
    assert read_index(tmp_path / "s").done == 0


def test_an_interrupted_job_keeps_its_shards_and_goes_on_with_another_number_of_workers(
    bundle, expected, tmp_path, machines
):
    def act():
        if bar.done >= 6:
            raise KeyboardInterrupt

    bar = Bar(act)
    with pytest.raises(KeyboardInterrupt):
        work(bundle, tmp_path / "s", machines, bar, workers=1)
    assert read_index(tmp_path / "s").done == 3
    bar = Bar()
    work(bundle, tmp_path / "s", machines, bar, workers=2)
    assert bar.done == COUNT - 6
    assert content(tmp_path / "s") == expected


def test_no_cluster_at_an_address_is_one_line(bundle, tmp_path, capsys):
    assert run("sample", command(bundle, tmp_path / "s", "--ray", "127.0.0.1:1")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no Ray cluster at '127.0.0.1:1'" in line
    assert "ray start --head" in line


def test_without_ray_the_command_names_the_package(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("sample", command(bundle, tmp_path / "s", "--ray")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--ray needs ray, which is not installed. Run: pip install 'ray>=2.40'")
    assert not (tmp_path / "s").exists()


def test_an_engine_after_the_flag_is_told_from_an_address(bundle, tmp_path, capsys, monkeypatch):
    assert run("sample", ["-n", "2", "-o", str(tmp_path / "s"), "--ray", str(bundle)]) in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.chdir(bundle.parent)
    assert run("sample", ["-n", "2", "-o", str(tmp_path / "s"), "--ray", bundle.name]) == 2
    assert "Name the engine before --ray" in capsys.readouterr().err
