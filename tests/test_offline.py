"""Stages never use the network."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess:
    setup = (
        "import socket\nfrom prunebench.runtime.offline import forbid_network\nforbid_network()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", setup + code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "code",
    [
        "socket.create_connection(('192.0.2.1', 80), 1)",
        "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))",
        "socket.getaddrinfo('example.org', 443)",
        "import urllib.request; urllib.request.urlopen('http://192.0.2.1/weights.pth')",
        "import torch; torch.hub.download_url_to_file('http://example.org/x.pth', '/tmp/none')",
        "import requests; requests.get('https://example.org')",
    ],
)
def test_every_way_out_is_closed_by_name(code):
    result = run(code)
    assert result.returncode == 1
    assert "stages never use the network" in result.stderr
    assert any(host in result.stderr for host in ("192.0.2.1", "2001:db8::1", "of example.org:"))


def test_libraries_are_told_to_stay_offline():
    code = "import huggingface_hub.constants as c; import sys; sys.exit(not c.HF_HUB_OFFLINE)"
    assert run(code).returncode == 0


def test_connections_within_the_machine_stay_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(f"socket.create_connection(('localhost', {port}), 5).close()")
    assert result.returncode == 0, result.stderr
    assert run("socket.getaddrinfo(socket.gethostname(), 0)").returncode == 0


def test_a_stage_runs_where_there_is_no_network(tmp_path):
    """In a network namespace of its own, which has not even an interface."""
    command = [sys.executable, "-m", "prunebench", "extractor", "--track", "smoke"]
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare for a network namespace")
    isolated = ["unshare", "-n", *command, "--runs", str(tmp_path)]
    result = subprocess.run(isolated, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare failed" in result.stderr:
        pytest.skip(f"no network namespaces here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "smoke" / "extractor" / "extractor.json").exists()


def test_every_stage_command_forbids_the_network(monkeypatch, tmp_path):
    """All commands that compute go through `_prepare`, which must forbid it first."""
    from prunebench import cli

    class ForbiddenError(Exception):
        pass

    def forbid():
        raise ForbiddenError

    monkeypatch.setattr(cli, "forbid_network", forbid)
    monkeypatch.chdir(ROOT)
    cell = ["--method", "magnitude_layers", "--sparsity", "0.25", "--seed", "0"]
    ways = {
        "extractor": [],
        "dense": [],
        "oracle": ["--recovery", "none", "--seed", "0", "--mask", "0"],
        **dict.fromkeys(("select", "cost", "recover", "sample", "score"), cell),
    }
    for stage, arguments in ways.items():
        model = [] if stage == "extractor" else ["--model", "dit"]
        with pytest.raises(ForbiddenError):
            cli.main([stage, "--track", "smoke", "--runs", str(tmp_path), *model, *arguments])
