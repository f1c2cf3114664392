"""The GPU's side of the runtime on a device that is late: copies happen only when somebody waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FinishedEvent
from tiny import random_sequences
from torch import Tensor
from torch.overrides import TorchFunctionMode

from embedq.model import SentenceEncoder, TokenizedText, runtime
from embedq.model.runtime import CudaRuntime, HostRuntime, Memory, runtime_for

CPU = torch.device("cpu")


class LateDevice(TorchFunctionMode):
    """Puts non-blocking copies off, as a GPU that is busy would, until an event behind them is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], object]] = []
        self.num_waits = 0

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.copy_ and kwargs.get("non_blocking"):
            self.waiting.append(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **kwargs)

    def catch_up(self, upto: int | None = None) -> None:
        done, self.waiting = self.waiting[:upto], self.waiting[upto:] if upto is not None else []
        for copy in done:
            copy()


class LateEvent:
    """`torch.cuda.Event` of the one LateDevice."""

    device: LateDevice

    def __init__(self, blocking: bool = False) -> None:
        assert blocking
        self._last: Callable[[], object] | None = None

    def record(self, stream: object) -> None:
        assert stream == "the stream of cpu"
        self._last = self.device.waiting[-1]

    def synchronize(self) -> None:
        if self._last in self.device.waiting:
            self.device.num_waits += 1
            self.device.catch_up(self.device.waiting.index(self._last) + 1)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    device = LateDevice()
    monkeypatch.setattr(LateEvent, "device", device, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(runtime, "_pinned", lambda num_bytes: torch.full((num_bytes,), 255, dtype=torch.uint8))
    with device:
        yield device


def batch(number: int) -> list[np.ndarray[Any, Any]]:
    """Arrays of several types, whose sizes need alignment."""
    return [
        np.arange(3, dtype=np.int32) + number,
        np.array([[True, False, number % 2 == 0]]),
        np.arange(5, dtype=np.int64) * number,
        np.full((2, 2), number, dtype=np.float32),
    ]


def test_uploads_keep_values_types_and_shapes(late: LateDevice) -> None:
    arrays = batch(7)
    tensors = CudaRuntime(CPU).upload(arrays)
    assert len(late.waiting) == 1, "one copy for all"
    late.catch_up()
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_a_staging_buffer_is_not_filled_before_the_copy_from_it_is_done(late: LateDevice) -> None:
    gpu = CudaRuntime(CPU)
    uploads = [gpu.upload(batch(number)) for number in range(7)]
    assert late.num_waits == 7 - runtime.NUM_STAGING_BUFFERS
    late.catch_up()
    for number, tensors in enumerate(uploads):
        for tensor, array in zip(tensors, batch(number), strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array)


def test_without_the_wait_the_device_would_read_the_next_batch(
    late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(LateEvent, "synchronize", lambda _event: None)
    gpu = CudaRuntime(CPU)
    uploads = [gpu.upload(batch(number)) for number in range(3)]
    late.catch_up()
    assert uploads[0][0].tolist() == batch(2)[0].tolist()


def test_two_batches_are_uploaded_before_the_host_waits(late: LateDevice) -> None:
    gpu = CudaRuntime(CPU)
    for number in range(runtime.NUM_STAGING_BUFFERS):
        gpu.upload(batch(number))
    assert late.num_waits == 0


def test_the_callers_arrays_may_change_at_once(late: LateDevice) -> None:
    array = np.arange(4, dtype=np.int32)
    [tensor] = CudaRuntime(CPU).upload([array])
    array[:] = 0
    late.catch_up()
    assert tensor.tolist() == [0, 1, 2, 3]


def test_a_staging_buffer_grows_and_is_kept(late: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    allocate = runtime._pinned
    monkeypatch.setattr(runtime, "_pinned", lambda num_bytes: (sizes.append(num_bytes), allocate(num_bytes))[1])
    gpu = CudaRuntime(CPU)
    for num_bytes in (100, 100, 90, 90, 1000, 1000, 30, 30):
        gpu.upload([np.zeros(num_bytes, dtype=np.uint8)])
    assert sizes == [128, 128, 1024, 1024]


def test_downloads_arrive_when_they_are_read_in_any_order(late: LateDevice) -> None:
    gpu = CudaRuntime(CPU)
    reads = [gpu.download(torch.full((2, 3), float(number))) for number in range(4)]
    assert late.num_waits == 0
    assert [reads[number]().tolist() for number in (1, 0, 3, 2)] == [[[float(n)] * 3] * 2 for n in (1, 0, 3, 2)]


def test_what_was_read_survives_the_next_download(late: LateDevice) -> None:
    gpu = CudaRuntime(CPU)
    first = gpu.download(torch.ones(3))()
    second = gpu.download(torch.zeros(3))()
    assert (first.tolist(), second.tolist()) == ([1.0] * 3, [0.0] * 3)
    assert len(gpu._for_downloads) == 1, "one buffer is enough for one at a time"


def test_a_column_is_downloaded_as_it_looks(late: LateDevice) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    assert CudaRuntime(CPU).download(matrix[:, 1])().tolist() == [1.0, 4.0]


def test_an_encoder_gives_the_same_through_pinned_buffers_and_from_several_threads(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [
        [TokenizedText(ids, False) for ids in random_sequences([length, 64 - length, 7, 1])]
        for length in range(1, 64, 3)
    ]
    encoder = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32", max_batch_tokens=66)
    expected = [encoder.encode_tokens(batch) for batch in batches]
    monkeypatch.setattr(torch.cuda, "Event", FinishedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(runtime, "_pinned", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    encoder._embedder.runtime = encoder._embedder.model._runtime = CudaRuntime(CPU)
    with ThreadPoolExecutor(4) as pool:
        for ours, wanted in zip(pool.map(encoder.encode_tokens, batches), expected, strict=True):
            np.testing.assert_allclose(ours, wanted, atol=2e-6 * np.abs(wanted).max())


def test_the_gpu_is_current_and_tf32_off_inside_the_scope_only(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", lambda **_options: None)
    monkeypatch.setattr(torch.cuda, "device", made_current)
    second = torch.device("cuda:1")
    with tf32_set_by_the_process():
        with CudaRuntime(second).scope():
            assert current == [second]
            assert not runtime._is_tf32()
        assert current == []
        assert runtime._is_tf32()


@contextmanager
def tf32_set_by_the_process() -> Iterator[None]:
    runtime._set_tf32(True)
    try:
        yield
    finally:
        runtime._set_tf32(False)


def test_tf32_is_on_only_where_it_was_asked_for() -> None:
    assert not runtime._is_tf32()
    with runtime._float32_products.held(allow_tf32=True):
        assert runtime._is_tf32()
    assert not runtime._is_tf32()


def test_full_precision_wins_while_one_of_several_threads_wants_it() -> None:
    products = runtime._Float32Products()
    seen: list[bool] = []
    inside, leave = threading.Event(), threading.Event()

    def exact() -> None:
        with products.held(allow_tf32=False):
            inside.set()
            leave.wait(20)

    with products.held(allow_tf32=True):
        thread = threading.Thread(target=exact)
        thread.start()
        inside.wait(20)
        seen.append(runtime._is_tf32())
        leave.set()
        thread.join(20)
        seen.append(runtime._is_tf32())
    seen.append(runtime._is_tf32())
    assert seen == [False, True, False]


def test_memory_that_torch_keeps_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda **_options: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 50)
    assert CudaRuntime(torch.device("cuda:0")).memory() == Memory(free=120, total=1000, reserved=70, allocated=50)


def test_each_device_has_its_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda **_options: None)
    assert isinstance(runtime_for(torch.device("cuda:1"), allow_tf32=True), CudaRuntime)
    assert isinstance(runtime_for(torch.device("mps")), HostRuntime)


def test_the_cpu_shares_the_hosts_memory() -> None:
    host = runtime_for(CPU)
    array = np.arange(3, dtype=np.int32)
    with host.scope():
        [tensor] = host.upload([array])
        host.synchronize()
        host.release_cache()
        assert host.memory() is None
    assert tensor.data_ptr() == array.ctypes.data
    assert host.download(tensor)().tolist() == [0, 1, 2]
