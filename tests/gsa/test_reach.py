"""A server that cannot be reached through a proxy is told with the proxy's variable, and never with its password."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from gsa.errors import RequestError
from gsa.reach import proxy_in_the_way, unreachable, why_no_hub
from gsa.store import refuse_unreachable
from ray_jobs.submit import connected

NAMES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
SECRET = "s3cret"


class Answering(http.server.BaseHTTPRequestHandler):
    """As a server, all is well; as a proxy, nothing can be reached."""

    def do_GET(self) -> None:
        self.send_response(503 if self.path.startswith("http://") else 200)
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield int(server.server_address[1])
    server.shutdown()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["127.0.0.1:1", "a server that reaches nothing"])
def test_the_proxy_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, port: int, name: str, proxy: str
) -> None:
    place = proxy if proxy.startswith("127") else f"127.0.0.1:{port}"
    monkeypatch.setenv(name, f"http://user:{SECRET}@{place}")
    for refuse in (refuse_unreachable, connected):
        with pytest.raises(RequestError) as refused:
            refuse("http://mlflow.example:5000")
        line = str(refused.value)
        assert f"through the proxy http://{place} of {name}: unset it, or add mlflow.example to no_proxy" in line
        assert SECRET not in line
        assert "\n" not in line


def test_what_no_proxy_exempts_is_asked_directly(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@127.0.0.1:2")
    assert "http_proxy" in unreachable(f"http://127.0.0.1:{port}")
    assert proxy_in_the_way("https://h").startswith("; through the proxy http://127.0.0.1:2 of HTTPS_PROXY")
    monkeypatch.setenv("no_proxy", "127.0.0.1,h")
    assert unreachable(f"http://127.0.0.1:{port}") == ""
    assert proxy_in_the_way("https://h") == ""
    assert "proxy" not in unreachable("http://127.0.0.1:1")


@pytest.mark.parametrize("url", ["http://", "http://[x", "http://h:99999", "http://a b", "http://127.0.0.1:1\r\nX: y"])
def test_what_is_no_address_is_one_line(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    reason = unreachable(url)
    assert reason
    assert "\n" not in reason
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    assert unreachable(url)


def test_the_hub_behind_a_proxy_is_told_so_and_a_missing_dataset_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@127.0.0.1:1")
    words = "through the proxy http://127.0.0.1:1 of HTTPS_PROXY: unset it, or add huggingface.co to no_proxy"
    assert why_no_hub(ConnectionError("Couldn't reach 'x' on the Hub")) == f"Couldn't reach 'x' on the Hub; {words}"
    assert why_no_hub(FileNotFoundError("no such dataset")) == "no such dataset"
