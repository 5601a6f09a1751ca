"""What is free of host memory, by folders of control groups as the kernel writes them."""

import ctypes
from types import SimpleNamespace

import psutil
import pytest

from qsvd.memory import device as host_memory
from qsvd.memory.device import free_host_memory, keep_freed_memory, trim_freed_memory

AVAILABLE = 10**12
NO_LIMIT_V1 = "9223372036854771712"  # what version 1 writes where there is none


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with so much memory whose groups are the files that a test writes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=AVAILABLE))
    monkeypatch.setattr(host_memory, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    return tmp_path


def in_groups(system, *lines):
    (system / "own").write_text("".join(f"{line}\n" for line in lines))


def group(system, path, **files):
    folder = system / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def test_without_control_groups_it_is_what_the_system_has(system):
    assert free_host_memory() == AVAILABLE
    in_groups(system, "0::/user.slice")
    assert free_host_memory() == AVAILABLE


def test_a_limit_leaves_what_is_not_used_and_what_is_kept_of_files(system):
    in_groups(system, "0::/user.slice/run.scope")
    group(system, "user.slice/run.scope", max=3000, current=2500, stat="anon 1800\nfile 700\nshmem 200")
    assert free_host_memory() == 3000 - 2500 + (700 - 200)  # files in memory (tmpfs) cannot go


def test_a_group_without_a_limit_is_asked_for_the_ones_around_it(system):
    in_groups(system, "0::/outer/inner")
    group(system, "outer/inner", max="max", current=5, stat="file 0")
    group(system, "outer", max=400, current=100, stat="anon 100")
    group(system, ".", max=350, current=100, stat="anon 100")
    assert free_host_memory() == 250
    group(system, "outer", max=200)
    assert free_host_memory() == 100


def test_a_container_sees_its_own_group_as_the_root(system):
    in_groups(system, "0::/")
    group(system, ".", max=900, current=100, stat="file 10")
    assert free_host_memory() == 810


def test_a_group_that_is_over_its_limit_leaves_nothing(system):
    in_groups(system, "0::/")
    group(system, ".", max=100, current=150, stat="file 20")
    assert free_host_memory() == 0


def test_version_1_has_a_folder_of_its_own_for_memory(system):
    in_groups(system, "12:cpu,cpuacct:/job", "7:memory:/job", "1:name=systemd:/job", "0::/job")
    stat = "cache 1\nrss 2\nshmem 3\ntotal_cache 600\ntotal_shmem 100"
    group(system, "memory/job", limit_in_bytes=2000, usage_in_bytes=1500, stat=stat)
    group(system, "memory", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=1500, stat=stat)
    assert free_host_memory() == 2000 - 1500 + (600 - 100)


def test_version_1_in_a_container_names_a_group_that_is_not_there(system):
    in_groups(system, "7:memory:/docker/4f2a", "0::/docker/4f2a")
    group(system, "memory", limit_in_bytes=2000, usage_in_bytes=1500, stat="total_cache 0\ntotal_shmem 0")
    assert free_host_memory() == 500


def test_a_path_with_a_colon_is_a_path(system):
    in_groups(system, "0::/a:b")
    group(system, "a:b", max=70, current=0, stat="file 0")
    assert free_host_memory() == 70


def test_memory_goes_back_from_a_megabyte_on(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *choice: asked.append(choice))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name is None else None)
    trim_freed_memory()
    assert sorted(asked) == [(-3, 2**20), (-1, 2**20)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())  # musl and macOS have none
    trim_freed_memory()


@pytest.mark.parametrize(("free", "asked"), [(2**30, [(-3, 2**25), (-1, 2**26)]), (2**30 - 1, [])])
def test_free_memory_is_kept_for_reuse_where_there_is_plenty(monkeypatch, free, asked):
    found = []
    library = SimpleNamespace(mallopt=lambda *choice: found.append(choice))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: free)
    keep_freed_memory()
    assert found == asked


def test_what_the_user_has_told_malloc_stands(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=pytest.fail))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    trim_freed_memory()
    keep_freed_memory()
