"""The server engine without vLLM: addresses, the client's deadlines and errors, unsuitable servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlswitch.command.checks import problems
from rlswitch.config.sections import EngineConfig, ServerEngineConfig
from rlswitch.engines.vllm.address import Address, parse_listen, parse_url
from rlswitch.engines.vllm.watch import Deadline
from rlswitch.errors import ConfigError, EngineError

pytestmark = pytest.mark.processes

LOCAL = ["http://127.0.0.1:8000", "http://localhost:80", "http://[::1]:80", "unix:/tmp/vllm.sock"]


def complaints(make_run, **settings) -> list[str]:
    return list(problems(make_run(engine=ServerEngineConfig(**settings))))


@pytest.mark.parametrize("url", LOCAL)
def test_sockets_and_loopback_are_welcome(make_run, url: str) -> None:
    assert not complaints(make_run, url=url)
    assert parse_url(url).is_local and str(parse_url(url)) == url


def test_others_are_refused_unless_allowed(make_run) -> None:
    for remote in ({"url": "http://10.0.0.1:8000"}, {"listen": "0.0.0.0:8000"}, {"listen": "myhost:80"}):
        (line,) = complaints(make_run, **remote)
        assert "no authentication" in line
        assert not complaints(make_run, **remote, allow_remote=True)
    for fine in ("socket", "127.0.0.1:0", "localhost:8000", "[::1]:1"):
        assert not complaints(make_run, listen=fine)
    assert parse_listen("socket") is None and parse_listen("[::1]:7") == Address(host="::1", port=7)


@pytest.fixture
def fake() -> Iterator[Callable]:
    """fake(answer): an HTTP server that answers every request with answer(path, body) -> (status, text)."""
    servers = []

    def start(answer: Callable) -> Address:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, text = answer(self.path, json.loads(body) if body else None)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                with suppress(BrokenPipeError):  # the client may have disconnected
                    self.wfile.write(text.encode())

            do_GET = do_POST

            def log_message(self, *args) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024  # the standard library's 5 would drop connections

        server = Server(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Address(host="127.0.0.1", port=server.server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client_of(address: Address, timeout_s: float = 300.0):
    from rlswitch.engines.vllm.client import Client

    return closing(Client(address, Deadline("engine.request_timeout_s", timeout_s)))


def test_each_of_many_answers_comes_with_the_index_of_its_question(fake) -> None:
    address = fake(lambda path, body: (200, json.dumps({"twice": 2 * body["n"], "exact": 2**64 - body["n"]})))
    with client_of(address) as client:
        came: dict[int, dict] = {}
        client.post_all("/x", [{"n": n} for n in range(600)], came.__setitem__)
    assert {n: answer["twice"] for n, answer in came.items()} == {n: 2 * n for n in range(600)}
    assert came[599]["exact"] == 2**64 - 599  # a fingerprint survives JSON


def test_what_came_before_a_failure_is_not_lost(fake) -> None:
    came: dict[int, dict] = {}

    def answer(path: str, body: dict) -> tuple[int, str]:
        if body["n"] < 2:
            return 200, json.dumps(body)
        while len(came) < 2:  # the client has accepted the others
            time.sleep(0.01)
        return 500, "broken"

    with client_of(fake(answer)) as client, pytest.raises(EngineError, match="answered 500"):
        client.post_all("/x", [{"n": n} for n in range(3)], came.__setitem__)
    assert came == {n: {"n": n} for n in range(2)}


def test_a_silent_server_is_given_up(fake) -> None:
    answered = threading.Event()

    def never(path: str, body: object) -> tuple[int, str]:
        answered.wait(60)
        return 200, ""

    with client_of(fake(never), timeout_s=0.2) as client:
        with pytest.raises(EngineError, match=r"silent for engine\.request_timeout_s = 0\.2"):
            client.post("/sleep", level=2)
        answered.set()


def test_errors_name_the_server_and_repeat_its_reason(fake) -> None:
    address = fake(lambda path, body: (500, json.dumps({"error": {"message": "out of paper\nat line 7"}})))
    with client_of(address) as client:
        with pytest.raises(EngineError) as error:
            client.post("/sleep")
        assert f"{address} answered 500: out of paper (/sleep)" in str(error.value)
        assert client.status("/sleep") == 500
    with client_of(Address(socket="/no/such.sock")) as client:
        with pytest.raises(EngineError, match=r"unix:/no/such.sock cannot be reached"):
            client.model()
        assert client.status("/health") is None


def test_a_redirect_leads_nowhere(fake) -> None:
    asked = []
    address = fake(lambda path, body: (asked.append(path), (307, ""))[1])
    with client_of(address) as client, pytest.raises(EngineError, match="answered 307"):
        client.post("/sleep")
    assert asked == ["/sleep"]


@pytest.mark.parametrize(
    ("statuses", "reason"),
    [({}, "no vLLM server answers"), ({"/health": 200}, "its control endpoints are off")],
)
def test_an_unfit_server_is_refused_with_the_command_that_starts_a_fit_one(
    make_run, fake, statuses: dict[str, int], reason: str
) -> None:
    from rlswitch.engines.vllm.server import check_server
    from rlswitch.planning.policy import policy_spec
    from rlswitch.switch.device import Device

    address = fake(lambda path, body: (statuses.get(path, 404), ""))
    run = make_run(engine=ServerEngineConfig(url=str(address)))
    with pytest.raises(ConfigError) as error:
        check_server(policy_spec(run, run.model.path, Device("cpu")), run.model.path)
    (line,) = error.value.problems
    assert line.startswith(f"engine.url = {address}: {reason}") and "\n" not in line
    assert "VLLM_SERVER_DEV_MODE=1" in line and f"--model={run.model.path}" in line
    assert f"--host=127.0.0.1 --port={address.port}" in line and "--worker-cls=" in line


def test_a_taken_port_is_refused_before_anything_starts(fake) -> None:
    from rlswitch.engines.vllm.address import choose_address

    taken = fake(lambda path, body: (200, ""))
    with pytest.raises(ConfigError, match="cannot listen there"):
        choose_address(f"127.0.0.1:{taken.port}", "/tmp")
    assert choose_address("127.0.0.1:0", "/tmp").port > 0


def test_one_run_at_a_time_is_attached_to_a_server(tmp_path) -> None:
    from rlswitch.engines.vllm.server import claimed

    address = Address(socket=str(tmp_path / "socket"))
    with claimed(address), pytest.raises(ConfigError, match="another run is attached"), claimed(address):
        pass
    with claimed(address):
        pass


def test_pickle_over_the_wire_stays_off_whatever_the_environment_says(monkeypatch, tmp_path) -> None:
    from rlswitch.engines.vllm.arguments import environment
    from rlswitch.switch.device import Device

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    made = environment(EngineConfig(), Device("cpu"), tmp_path, "/s")
    assert made["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


@pytest.mark.parametrize(
    ("name", "kinds", "ranks", "users"),
    [
        ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", {"cpu"}, {1, 2}, "1024"),
        ("VLLM_USE_FLASHINFER_SAMPLER", {"cuda"}, {1, 2}, "1"),
        ("GLOO_SOCKET_IFNAME", {"cpu", "cuda"}, {2}, "eth0"),
    ],
)
def test_a_users_own_environment_wins_over_what_is_usual(
    name: str, kinds: set[str], ranks: set[int], users: str, monkeypatch, tmp_path
) -> None:
    from rlswitch.engines.vllm.arguments import environment
    from rlswitch.switch.device import Device

    def made(kind: str, size: int) -> dict[str, str]:
        return environment(EngineConfig(tensor_parallel_size=size), Device(kind), tmp_path, "/s")

    cases = [(kind, size) for kind in ("cpu", "cuda") for size in (1, 2)]
    monkeypatch.delenv(name, raising=False)
    for kind, size in cases:
        assert (name in made(kind, size)) == (kind in kinds and size in ranks)
    monkeypatch.setenv(name, users)
    assert {made(kind, size)[name] for kind, size in cases} == {users}
