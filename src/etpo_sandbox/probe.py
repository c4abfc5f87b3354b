"""Self-test: a program that attacks its sandbox and fails if an attack succeeds."""

PROGRAM = """
import os
import signal
import socket

from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier


def read_file():
    open("/etc/passwd").close()


def read_environment():
    open(f"/proc/{os.getppid()}/environ").close()


def write_file():
    open("/tmp/etpo-sandbox-probe", "w").close()


def make_socket():
    socket.socket().close()


def fork():
    if os.fork() == 0:
        os._exit(0)


def send_signal():
    os.kill(os.getppid(), 0)


def build_model(x_train, y_train):
    attacks = (
        read_file, read_environment, write_file, make_socket, fork, send_signal, load_breast_cancer
    )
    for attack in attacks:
        try:
            attack()
        except Exception:
            continue
        raise RuntimeError(f"a program can {attack.__name__}")
    return DummyClassifier().fit(x_train, y_train)
"""
