"""Redis by TLS: an authority of one's own, certificates of clients, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from embedq.producer import (
    AsyncEmbedQueue,
    ConfigurationError,
    EmbedqError,
    EmbedQueue,
    QueueAccessError,
    QueueConnectionError,
)
from embedq.producer import connection as connections
from embedq.producer.connection import connect, connect_async
from embedq.worker.redis_server import free_port
from tests.conftest import until
from tests.queue.test_worker import EMBEDQ, Start, idle_workers, start  # noqa: F401
from tests.queue.tls_redis import Certificates, TLSRedis, tls_binaries


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=[None, *tls_binaries()], ids=lambda binary: "itself" if binary else "proxy")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[TLSRedis]:
    with TLSRedis(tmp_path_factory.mktemp("redis"), certificates, request.param) as found:
        yield found


@pytest.fixture
def tls_url(server: TLSRedis, certificates: Certificates) -> str:
    with connect(server.plain_url) as client:
        client.flushall()
    return f"rediss://127.0.0.1:{server.port}/0?{certificates.options()}"


def test_clients_commands_and_workers_meet_by_tls(tls_url: str, start: Start) -> None:  # noqa: F811
    worker = start(at=tls_url)
    with EmbedQueue(tls_url) as queue:
        until(lambda: idle_workers(queue) == 1)
        assert queue.embed(["a", "b"], timeout=20).vectors.shape == (2, 8)
        # Large ones go another way.
        assert queue.embed([str(number) for number in range(5000)], timeout=20).vectors.shape == (5000, 8)

    async def awaited() -> None:
        async with AsyncEmbedQueue(tls_url) as queue:
            jobs = await queue.enqueue_many(str(number) for number in range(100))
            assert len(await queue.results([job.id for job in jobs], timeout=20)) == 100

    asyncio.run(awaited())
    shown = subprocess.run([*EMBEDQ, "embed", "a text", "--url", tls_url], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    # Idle, it waits on a connection that may have words of TLS on it, and must hear the signal.
    worker.send(signal.SIGTERM)
    status, output = worker.ended(10)
    assert status == 0, output
    assert "Traceback" not in output


def test_an_idle_worker_by_tls_wakes_at_once_when_a_job_comes(tls_url: str, start: Start) -> None:  # noqa: F811
    start(at=tls_url)
    with EmbedQueue(tls_url) as queue:
        until(lambda: idle_workers(queue) == 1)
        began_at = time.monotonic()
        queue.embed("text", timeout=20)
        assert time.monotonic() - began_at < 5


@pytest.mark.parametrize("binary", tls_binaries())
def test_master_and_sentinel_are_reached_by_tls_alike(
    short_path: Path,
    certificates: Certificates,
    start: Start,  # noqa: F811
    binary: str,
) -> None:
    port = free_port()
    with TLSRedis(short_path, certificates, binary) as server:
        configuration = short_path / "sentinel.conf"
        configuration.write_text(
            f"port 0\nbind 127.0.0.1\ndir {short_path}\ntls-replication yes{certificates.directives(port)}"
            f"sentinel monitor otters 127.0.0.1 {server.port} 1\n"
        )
        sentinel = subprocess.Popen([binary, str(configuration), "--sentinel"], stdout=subprocess.DEVNULL)
        try:
            hosts = f"127.0.0.1:{port}/otters/0"
            right = f"rediss+sentinel://{hosts}?{certificates.options()}"
            with EmbedQueue(right) as queue:
                until(lambda: _is_served(queue))
                start(at=right)
                assert len(queue.embed("text", timeout=20)) == 1
            for wrong, kind in (
                (right.replace(str(certificates.ca), str(certificates.other_ca)), QueueAccessError),
                (f"redis+sentinel://{hosts}", QueueConnectionError),
            ):
                with EmbedQueue(wrong) as queue, pytest.raises(kind):
                    queue.depth()
        finally:
            sentinel.terminate()
            sentinel.wait(20)


def _is_served(queue: EmbedQueue) -> bool:
    with contextlib.suppress(QueueConnectionError):
        return queue.depth() >= 0
    return False


Wrong = Callable[[TLSRedis, Certificates], str]


def wrong_authority(server: TLSRedis, made: Certificates) -> str:
    options = made.options().replace(str(made.ca), str(made.other_ca))
    return f"rediss://ann:s3cret@127.0.0.1:{server.port}/0?{options}"


def no_authority(server: TLSRedis, made: Certificates) -> str:
    return f"rediss://ann:s3cret@127.0.0.1:{server.port}/0?ssl_certfile={made.client}&ssl_keyfile={made.client_key}"


def wrong_name(server: TLSRedis, made: Certificates) -> str:
    return f"rediss://ann:s3cret@localhost:{server.port}/0?{made.options()}"


def no_certificate(server: TLSRedis, made: Certificates) -> str:
    return f"rediss://ann:s3cret@127.0.0.1:{server.port}/0?ssl_ca_certs={made.ca}"


def plain_to_tls(server: TLSRedis, made: Certificates) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


@pytest.mark.parametrize(
    ("wrong", "kind", "reason"),
    [
        (wrong_authority, QueueAccessError, "its certificate is not accepted: .*self.signed certificate"),
        (no_authority, QueueAccessError, "its certificate is not accepted: "),
        (wrong_name, QueueAccessError, "its certificate is not accepted: .*localhost"),
        # Whether the refusal or the end of the connection is seen first is a matter of chance.
        (no_certificate, QueueConnectionError, "certificate required|hung up"),
        (plain_to_tls, QueueConnectionError, "rediss://"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_at_once(
    server: TLSRedis, certificates: Certificates, wrong: Wrong, kind: type[EmbedqError], reason: str
) -> None:
    url = wrong(server, certificates)

    async def awaited() -> int:
        async with AsyncEmbedQueue(url) as queue:
            return await queue.depth()

    def blocking() -> int:
        with EmbedQueue(url) as queue:
            return queue.depth()

    for call in (blocking, lambda: asyncio.run(awaited())):
        began_at = time.monotonic()
        with pytest.raises(kind, match=reason) as caught:
            call()
        assert time.monotonic() - began_at < connections.CONNECT_TIMEOUT_S
        assert "s3cret" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [wrong_authority, wrong_name])
def test_a_worker_does_not_wait_for_a_certificate_to_become_right(
    server: TLSRedis,
    certificates: Certificates,
    start: Start,  # noqa: F811
    wrong: Wrong,
) -> None:
    status, output = start(at=wrong(server, certificates)).ended()
    assert status == 5
    assert output.startswith("error: no TLS with Redis at ")
    assert len(output.splitlines()) == 1
    assert "s3cret" not in output


def test_tls_to_a_port_that_speaks_none_ends_with_the_connect_timeout(
    server: TLSRedis, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT_S", 1.0)
    plain_port = server.plain_url.rpartition(":")[2].partition("/")[0]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (plain_port, silent.getsockname()[1]):
            url = f"rediss://127.0.0.1:{port}/0?{certificates.options()}"

            async def awaited(at: str = url) -> int:
                async with AsyncEmbedQueue(at) as queue:
                    return await queue.depth()

            def blocking(at: str = url) -> int:
                with EmbedQueue(at) as queue:
                    return queue.depth()

            for call in (blocking, lambda: asyncio.run(awaited())):
                began_at = time.monotonic()
                with pytest.raises(QueueConnectionError, match="TLS"):
                    call()
                assert time.monotonic() - began_at < 3


def test_the_defaults_are_the_safe_ones() -> None:
    for make in (connect, connect_async):
        connection = make("rediss://somewhere/0").connection_pool.make_connection()
        assert connection.check_hostname
        assert connection.cert_reqs.name == "CERT_REQUIRED"


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_cannot_be_used_is_found_out_before_anything_is_sent(
    certificates: Certificates, tmp_path: Path, option: str
) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    for path in (nonsense, tmp_path / "missing.pem"):
        with pytest.raises(ConfigurationError, match="cannot be used"):  # of two the first counts
            EmbedQueue(f"rediss://ann:s3cret@127.0.0.1/0?{option}={path}&{certificates.options()}")


def test_a_key_with_a_password_is_asked_of_nobody(certificates: Certificates, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    key = serialization.load_pem_private_key(certificates.client_key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"s3cret")
    locked.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, encryption)
    )
    url = f"rediss://127.0.0.1/0?{certificates.options()}".replace(str(certificates.client_key), str(locked))
    with pytest.raises(ConfigurationError, match="cannot be used"):
        EmbedQueue(url)
    EmbedQueue(f"{url}&ssl_password=s3cret").close()
