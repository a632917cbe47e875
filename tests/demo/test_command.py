"""The command `vicmae demo`: how it fails before a page is open."""

import socket

from launching import run_here

import vicmae_command
from vicmae_hf.demo import command


def run_demo(*flags):
    process = run_here(vicmae_command.__file__, "demo", *flags)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    return process.stderr


def test_gradio_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run_demo(tmp_path) == 'error: vicmae demo needs Gradio: pip install "vicmae-hf[demo]".\n'


def test_a_port_that_is_taken_and_an_address_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run_demo(tmp_path, "--port", port).startswith(
            f"error: --host 127.0.0.1 --port {port}: cannot listen there (Address already in use)"
        )
    assert "--host 999.0.0.1 --port 7860: cannot listen there" in run_demo(tmp_path, "--host", "999.0.0.1")


def test_a_checkpoint_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert f"{tmp_path}: no encoder can be loaded from there" in run_demo(tmp_path, "--port", port)


def test_addresses_that_only_this_machine_reaches():
    assert all(map(command.is_loopback, ["127.0.0.1", "127.8.0.1", "::1", "localhost"]))
    assert not any(map(command.is_loopback, ["0.0.0.0", "::", "192.168.0.7", "example.org"]))
