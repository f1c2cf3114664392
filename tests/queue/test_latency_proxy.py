"""The network that the benchmarks put before Redis: it delays, and changes nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.bench.latency_proxy import LatencyProxy

TIMEOUT_S = 20.0
DELAY_S = 0.02
#: What a busy machine may add to a round trip.
SLACK_S = 1.0


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """`serve(handle)` answers each connection by `handle(connection)` on a thread; returns the port."""
    with contextlib.ExitStack() as stack:

        def start(handle: Callable[[socket.socket], None]) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        threading.Thread(target=talk, args=(connection,), daemon=True).start()

            def talk(connection: socket.socket) -> None:
                with connection, contextlib.suppress(OSError):
                    handle(connection)

            threading.Thread(target=accept, daemon=True).start()
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield start


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def _answer_lines(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(b"." * data.count(b"\n"))


def _sum_at_the_end(connection: socket.socket) -> None:
    """Speaks only after the client has closed its half."""
    connection.sendall(str(len(_all(connection))).encode())


def _say_nothing(connection: socket.socket) -> None: ...


def _all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(65536):
        parts.append(data)
    return b"".join(parts)


def _connected(proxy: LatencyProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S)


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    answer = b""
    while len(answer) < num_bytes:
        answer += connection.recv(num_bytes - len(answer))
    return answer


def test_bytes_arrive_whole_and_in_order_both_ways(serve: Callable[..., int]) -> None:
    sent = os.urandom(8_000_000)
    with LatencyProxy(serve(_echo), 0.001) as proxy, _connected(proxy) as connection:
        writer = threading.Thread(target=lambda: (connection.sendall(sent), connection.shutdown(socket.SHUT_WR)))
        writer.start()
        assert _all(connection) == sent
        writer.join()


def test_each_direction_takes_the_delay(serve: Callable[..., int]) -> None:
    port = serve(_echo)
    with LatencyProxy(port, DELAY_S) as proxy, _connected(proxy) as connection:
        took_s = []
        for _ in range(9):
            began_at = time.perf_counter()
            connection.sendall(b"ping")
            assert _exactly(connection, 4) == b"ping"
            took_s.append(time.perf_counter() - began_at)
    assert min(took_s) >= 2 * DELAY_S
    assert statistics.median(took_s) < 2 * DELAY_S + SLACK_S


def test_the_delay_is_no_limit_to_what_is_under_way(serve: Callable[..., int]) -> None:
    """A hundred chunks sent one after the other arrive after one delay, not after a hundred."""
    with LatencyProxy(serve(_sum_at_the_end), 0.2) as proxy, _connected(proxy) as connection:
        began_at = time.perf_counter()
        for _ in range(100):
            connection.sendall(b"x" * 1000)
            time.sleep(0.001)  # so that they are chunks
        connection.shutdown(socket.SHUT_WR)
        assert _all(connection) == b"100000"
        assert 0.4 <= time.perf_counter() - began_at < 100 * 0.2


def test_a_closed_half_leaves_the_other_open(serve: Callable[..., int]) -> None:
    with LatencyProxy(serve(_sum_at_the_end), 0.001) as proxy, _connected(proxy) as connection:
        connection.sendall(b"abc")
        connection.shutdown(socket.SHUT_WR)
        assert _all(connection) == b"3"


def test_many_connections_are_served_at_once(serve: Callable[..., int]) -> None:
    with LatencyProxy(serve(_echo), 0.001) as proxy, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(_connected(proxy)) for _ in range(200)]
        for number, connection in enumerate(connections):
            connection.sendall(b"%04d" % number)
        for number, connection in enumerate(connections):
            assert _exactly(connection, 4) == b"%04d" % number
        assert proxy.num_round_trips() == 200


def test_a_server_that_hangs_up_and_one_that_is_not_there_end_the_connection(serve: Callable[..., int]) -> None:
    with LatencyProxy(serve(_say_nothing), 0.001) as proxy, _connected(proxy) as connection:
        assert connection.recv(1) == b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with LatencyProxy(free, 0.001) as proxy, _connected(proxy) as connection:
        assert connection.recv(1) == b""


def test_round_trips_are_the_times_a_client_had_to_wait(serve: Callable[..., int]) -> None:
    with LatencyProxy(serve(_answer_lines), 0.3) as proxy, _connected(proxy) as connection:
        assert proxy.num_round_trips() == 0
        for question in (b"\n", b"x" * 1_000_000 + b"\n"):  # one of them in many chunks
            connection.sendall(question)
            assert connection.recv(1) == b"."
        assert proxy.num_round_trips() == 2
        connection.sendall(b"\n")
        time.sleep(0.01)
        connection.sendall(b"\n")  # long before the first is answered
        assert _exactly(connection, 2) == b".."
        assert proxy.num_round_trips() == 3
