"""How processes share the cores of a machine or of a container."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedq.producer import ConfigurationError
from embedq.worker import WorkerSettings, cores, encoders
from embedq.worker.cores import Core, Share, cpu_quota, default_threads, shares, usable_cores
from embedq.worker.supervision import cuda_devices
from embedq.worker.supervision import supervise as supervision
from embedq.worker.supervision.cuda_devices import count_cuda_devices, may_have_gpu
from embedq.worker.supervision.supervise import SupervisorSettings, places


def machine(num_cores: int, threads_a_core: int = 1, packages: int = 1) -> list[Core]:
    """As Linux numbers CPUs: first one thread of each core, then the second."""
    return [
        Core((number * packages // num_cores, number), tuple(range(number, num_cores * threads_a_core, num_cores)))
        for number in range(num_cores)
    ]


def test_cores_are_divided_with_both_their_threads_and_neighbours_stay_together() -> None:
    assert shares(machine(4, 2), None, 2) == [Share(2, frozenset({0, 1, 4, 5})), Share(2, frozenset({2, 3, 6, 7}))]
    assert [share.threads for share in shares(machine(8), None, 3)] == [3, 3, 2]


def test_no_process_spans_two_packages_where_it_need_not() -> None:
    by_package = shares(sorted(machine(8, 2, packages=2), key=lambda core: core.place[1] % 4), None, 2)
    assert by_package[0].cpus == frozenset({0, 1, 2, 3, 8, 9, 10, 11})


def test_within_a_quota_threads_are_divided_and_the_system_places_them() -> None:
    assert shares(machine(64), 4.0, 2) == [Share(2, None), Share(2, None)]
    assert shares(machine(64), 1.5, 1) == [Share(2, None)]
    assert shares(machine(2), 8.0, 1) == [Share(2, frozenset({0, 1}))]


def test_more_processes_than_cores_have_one_thread_each() -> None:
    assert shares(machine(2), None, 5) == [Share(1, None)] * 5


@given(st.integers(1, 64), st.integers(1, 2), st.none() | st.floats(0.1, 100), st.integers(1, 80))
def test_nobody_has_another_ones_core_and_all_threads_fit(
    num_cores: int, threads_a_core: int, quota: float | None, num_processes: int
) -> None:
    divided = shares(machine(num_cores, threads_a_core), quota, num_processes)
    assert len(divided) == num_processes
    threads = sum([share.threads for share in divided])
    assert threads <= max(num_cores, num_processes)
    if quota is not None:
        assert threads < max(quota + 1, num_processes + 1)
    taken = [cpu for share in divided for cpu in share.cpus or ()]
    assert len(taken) == len(set(taken))


def test_this_machines_cores_are_found() -> None:
    found = usable_cores()
    assert found
    assert sorted(cpu for core in found for cpu in core.cpus) == sorted(cores.os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 2.0),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("5:memory:/x", {"x/cpu.max": "100000 100000"}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)
def test_the_least_quota_of_the_control_groups_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], quota: float | None
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "groups")
    assert cpu_quota() == quota


def test_a_worker_of_its_own_has_no_more_threads_than_its_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: 1.5)
    assert default_threads(64) == 2
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert default_threads(64) == 64
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads(64) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_threads(64) == 64


def test_threads_that_were_asked_for_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    try:
        encoders._set_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    for threads in (0, -1, 5000):
        with pytest.raises(ConfigurationError, match="threads must be 1 to 1024"):
            WorkerSettings(threads=threads)


# --- devices


def python(folder: Path, says: str) -> str:
    """A program in the place of Python."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{says}\n")
    script.chmod(0o755)
    return str(script)


def test_cuda_devices_are_counted_elsewhere(tmp_path: Path) -> None:
    assert count_cuda_devices(python(tmp_path, "echo 8")) == 8
    for says, why in (
        ("echo 0 torch sees none", "there is no CUDA device: torch sees none"),
        ("echo broken driver >&2; exit 3", "could not be counted: broken driver"),
        ("exit 3", "could not be counted: 3"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            count_cuda_devices(python(tmp_path, says))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices")
def test_without_cuda_the_reason_is_said() -> None:
    with pytest.raises(ConfigurationError, match="there is no CUDA device: "):
        count_cuda_devices()


def test_a_machine_without_a_drivers_files_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_devices, "_DEVICE_FILES", (str(tmp_path / "none"),))
    assert not may_have_gpu()
    monkeypatch.setattr(cuda_devices, "_DEVICE_FILES", (str(tmp_path),))
    assert may_have_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not may_have_gpu()


def placed(monkeypatch: pytest.MonkeyPatch, num_processes: int, **settings: object) -> Sequence[tuple[str, Share]]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(supervision, "usable_cores", lambda: machine(8))
    monkeypatch.setattr(supervision, "cpu_quota", lambda: None)
    monkeypatch.setattr(supervision, "count_cuda_devices", lambda: 2)
    found = places(WorkerSettings(**settings), num_processes)  # type: ignore[arg-type]
    return [(place.device, place.share) for place in found]


def test_each_device_has_its_processes_and_they_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed(monkeypatch, 1, device="cuda:all") == [("cuda:0", Share(4, None)), ("cuda:1", Share(4, None))]
    doubled = placed(monkeypatch, 2, device="cuda:all", threads=1)
    assert doubled == [(f"cuda:{index}", Share(1, None)) for index in (0, 0, 1, 1)]
    on_cpu = placed(monkeypatch, 2, device="cpu")
    assert on_cpu == [("cpu", Share(4, frozenset(range(4)))), ("cpu", Share(4, frozenset(range(4, 8))))]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"processes": 0}, "processes must be 1 to 1024"),
        ({"hang_timeout_s": 1.0}, "hang_timeout_s must be 5 to 86400"),
        ({"restart_order": "any"}, "restart_order must be auto, start-first, stop-first"),
    ],
)
def test_a_supervisors_settings_are_checked(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        SupervisorSettings(**settings)  # type: ignore[arg-type]
