"""Two hosts on one machine: network namespaces with names and addresses of their own, joined by one cable.

Enters: nothing but the right to make namespaces (root). Leaves: two `Host`s, whose `command` makes any command line one
that runs there, under a host name that both resolve; a cable to cut and to mend; and nothing of it after the block.
What runs there still shares the machine's disks, as hosts with a shared file system do.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

INTERFACE = "cable0"
"""Name of the veth's end on each host; no interface of a real machine has it."""


@dataclass(frozen=True)
class Host:
    """One of the two: its name, which is also its host name, and its address on the cable."""

    name: str
    address: str

    def command(self, *words: str | Path) -> list[str]:
        """The words that run a command line on this host; the process that is started becomes the command itself."""
        # A host name of its own: `platform.node()` in an error or in status.json tells the hosts apart.
        named = ["unshare", "--uts", "sh", "-c", 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named, *map(str, words)]

    @property
    def environment(self) -> dict[str, str]:
        """What gloo, tensorpipe and NCCL want to know: the interface over which the hosts reach each other."""
        return dict.fromkeys(("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), INTERFACE)

    def processes(self) -> list[int]:
        """Ids of all processes on this host."""
        return [int(word) for word in _run("ip", "netns", "pids", self.name).split()]

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """A signal to every process on this host, as when the machine dies; until none is left where it is SIGKILL."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, sign)
            if sign != signal.SIGKILL:
                return

    def cut(self) -> None:
        """Pulls the cable out of this host: packets of both sides are lost without an answer."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Puts it back."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, "up")


@cache
def why_not() -> str | None:
    """Why this machine cannot have two hosts, for a skipped test; None where it can."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"two hosts are network namespaces: {', '.join(missing)} is not installed (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "two hosts are network namespaces, which need root"
    try:
        with two_hosts() as (first, second):
            subprocess.run(first.command("sh", "-c", f"getent hosts {second.name}"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        return f"two hosts are network namespaces, which this machine refuses: {error} {said!r}"
    return None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, reachable from each other alone; at the end all that still runs there is killed.

    Raises:
        OSError, subprocess.CalledProcessError: the machine cannot have them; `why_not` says it in words.
    """
    token = os.urandom(3).hex()
    hosts = Host(f"host-a-{token}", "10.77.0.1"), Host(f"host-b-{token}", "10.77.0.2")
    # `ip netns exec` mounts what lies here over /etc: the names that a cluster's name server would know.
    folders = [Path("/etc/netns", host.name) for host in hosts]
    try:
        for host, folder in zip(hosts, folders, strict=True):
            _run("ip", "netns", "add", host.name)
            folder.mkdir(parents=True)
            names = [f"{one.address} {one.name}\n" for one in hosts]
            (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
        ends = ["add", INTERFACE, "netns", hosts[0].name, "type", "veth", "peer", INTERFACE, "netns", hosts[1].name]
        _run("ip", "link", *ends)
        for host in hosts:
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _run("ip", "-n", host.name, "link", "set", "lo", "up")
            host.mend()
        yield hosts
    finally:
        for host, folder in zip(hosts, folders, strict=True):
            with suppress(subprocess.CalledProcessError):  # it was never made
                host.kill()
                _run("ip", "netns", "delete", host.name)
            shutil.rmtree(folder, ignore_errors=True)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
