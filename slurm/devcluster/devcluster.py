"""A real Slurm of two nodes on one machine, for tests and for trying out.

    slurm/devcluster/start --install     # as root on Debian or Ubuntu: install the packages, start
    slurm/devcluster/start               # start again; jobs and accounting of before are kept
    slurm/devcluster/status              # exit status 0 if it is up, 1 if not
    slurm/devcluster/stop
    slurm/devcluster/stop --only slurmctld     # one daemon, as if it had failed; start --only ...

Everything it keeps lies in one folder (``--dir``, default ``<repository>/work/devcluster``), which
may be deleted once the cluster is stopped. Nodes ``gpu1`` and ``gpu2`` are two slurmd on this host
with 4 CPUs and 8 pretended V100 each; accounting is a slurmdbd on a MariaDB that listens on no
network. One thing lies outside the folder: munge's default socket, which slurmdbd insists on. That
is why ``start`` refuses a machine with a munge of its own.

No systemd is needed, so it works in a container. Standard library only.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = (
    "slurm-wlm",
    "slurmctld",
    "slurmd",
    "slurm-client",
    "munge",
    "slurmdbd",
    "mariadb-server",
)
OURS = Path("/var/lib/clue-scaling-devcluster")
"""Marks that the packages were installed by ``start --install``, for nothing but this."""
FOREIGN = ("/etc/munge/munge.key", "/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf")
"""Files that an administrator's munge or Slurm would have."""
DAEMONS = ("munged", "slurmctld", "slurmdbd", "slurmd")
MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
PORTS = {"slurmctld": 26817, "slurmdbd": 26819, "gpu1": 26821, "gpu2": 26822}
ORDER = ("slurmd-gpu1", "slurmd-gpu2", "slurmctld", "slurmdbd", "mariadbd", "munged")
"""Pid files, in the order in which their daemons are stopped."""
STATE = "cluster.json"
ALONE = ("slurmctld", "slurmdbd", "slurmd-gpu1", "slurmd-gpu2")
"""What ``--only`` may name: a cluster lives on without one of them."""


class Refused(Exception):
    """The cluster cannot or must not be started here; the message says why and what to do."""


def slurm_conf(home: Path) -> str:
    return f"""\
ClusterName=cluedev
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={PORTS["slurmctld"]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start again once the credential of its last start has expired.
AuthInfo=socket={MUNGE_SOCKET},cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/run/slurmctld.pid
SlurmdPidFile={home}/run/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2
# Small, so that an ordinary sweep needs more than one array.
MaxArraySize=12
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=60
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={PORTS["slurmdbd"]}
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/none
NodeName=gpu1 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={PORTS["gpu1"]} \
CPUs=4 RealMemory=8000 Gres=gpu:v100:8
NodeName=gpu2 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={PORTS["gpu2"]} \
CPUs=4 RealMemory=8000 Gres=gpu:v100:8
PartitionName=main Nodes=gpu[1-2] Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=gpu[1-2] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
"""


def slurmdbd_conf(home: Path) -> str:
    return f"""\
AuthType=auth/munge
AuthInfo=socket={MUNGE_SOCKET}
DbdHost=localhost
DbdPort={PORTS["slurmdbd"]}
SlurmUser=root
PidFile={home}/run/slurmdbd.pid
LogFile={home}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=cluedev
"""


# processes of ours: a pid file names one only if the process still runs our command


def command_line(pid: int) -> str:
    """Command line of a living process; empty once it has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def processes(home: Path) -> dict[str, int]:
    """Running daemons of this cluster by pid file name.

    The process must be that daemon, and have this folder in its arguments or (slurmdbd, which
    takes none) its environment: ids are used again.
    """
    found = {}
    for file in sorted((home / "run").glob("*.pid")):
        with contextlib.suppress(ValueError, OSError):
            pid = int(file.read_text())
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            if daemon_name(pid) == file.stem.partition("-")[0] and (
                f"{home}/" in command_line(pid) + environment
            ):
                found[file.stem] = pid
    return found


def daemon_name(pid: int) -> str:
    """Name of the program a process runs; empty once it has ended."""
    return Path(command_line(pid).split("\0")[0]).name


def foreign_daemons(ours: set[int]) -> list[str]:
    """Slurm and munge daemons on this machine that are not this cluster's."""
    found = []
    for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()):
        name = daemon_name(pid)
        if pid not in ours and name in DAEMONS:
            found.append(f"{name} (process {pid})")
    return sorted(found)


def wait_for(what: str, ready: Callable[[], bool], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"
            raise Refused(f"{what} did not come up within {seconds:.0f} s; {log} ends:\n{tail}")
        time.sleep(0.1)


def answers(*command: str, env: dict[str, str] | None = None) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return (
            subprocess.run(
                command,
                env=env,
                timeout=20,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            ).returncode
            == 0
        )
    return False


def run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


# installing


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Keep package installation from starting the packages' own daemons (Debian policy 9.3.3)."""
    policy = Path("/usr/sbin/policy-rc.d")
    kept = policy.read_bytes() if policy.exists() else None
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        if kept is None:
            policy.unlink(missing_ok=True)
        else:
            policy.write_bytes(kept)


def install() -> None:
    """Install Debian's Slurm, munge and MariaDB, and mark them as ours."""
    if os.geteuid() != 0:
        raise Refused(
            "installing packages needs root; ask an administrator for:\n  apt-get install"
            f" --no-install-recommends {' '.join(PACKAGES)}"
        )
    OURS.mkdir(parents=True, exist_ok=True)
    (OURS / "installed").write_text("\n".join(PACKAGES) + "\n")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ("apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES)
    with no_services():
        try:
            run(*command, env=env)
        except Refused:
            run("apt-get", "update", "-q", env=env)
            run(*command, env=env)


def missing() -> list[str]:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    return [
        c for c in (*DAEMONS, "mariadbd", "sbatch", "sacctmgr") if not shutil.which(c, path=path)
    ]


def check_machine(home: Path) -> None:
    """Refuse a machine where a Slurm or munge lives or runs that is not this cluster's."""
    running = foreign_daemons(set(processes(home).values()))
    if running:
        raise Refused(
            f"this machine already runs {', '.join(running)}, not started from {home}: it belongs "
            "to a cluster, or another devcluster is up. Nothing was touched."
        )
    foreign = [f for f in FOREIGN if Path(f).exists()]
    if foreign and not (OURS / "installed").exists():
        raise Refused(
            f"{', '.join(foreign)} exists: a munge or Slurm is set up on this machine. The "
            "devcluster would get in its way (both need munge's default socket), so it is not "
            "started. Use a container or another machine."
        )


# starting and stopping


def is_up(home: Path) -> bool:
    """Whether this cluster was started and all its daemons run."""
    return (home / STATE).exists() and processes(home).keys() == set(ORDER)


def start(home: Path, do_install: bool) -> None:
    check_machine(home)
    if is_up(home):
        print(f"already up; to use it:\n  export SLURM_CONF={home / 'etc' / 'slurm.conf'}")
        return
    if missing():
        if not do_install:
            raise Refused(
                f"not installed: {', '.join(missing())}. `start --install` (as root) installs "
                "Debian's packages."
            )
        install()
    os.environ["PATH"] += ":/usr/sbin:/usr/local/sbin"
    if os.geteuid() != 0:
        raise Refused("starting needs root: munge's default socket lies in /run/munge")
    stop(home)
    for folder in ("etc", "run", "log", "state", "spool/gpu1", "spool/gpu2", "munge", "dev"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    (home / "munge").chmod(0o700)
    for n in range(8):
        (home / "dev" / f"nvidia{n}").touch()
    conf = home / "etc" / "slurm.conf"
    conf.write_text(slurm_conf(home))
    (home / "etc" / "gres.conf").write_text(
        f"NodeName=gpu[1-2] Name=gpu Type=v100 File={home}/dev/nvidia[0-7]\n"
    )
    dbd = home / "etc" / "slurmdbd.conf"
    dbd.write_text(slurmdbd_conf(home))
    dbd.chmod(0o600)
    env = {**os.environ, "SLURM_CONF": str(conf)}
    _start_munge(home)
    _start_database(home)
    _start_daemon(home, "slurmdbd")
    if not answers_with("cluedev", "sacctmgr", "-nP", "list", "cluster", "format=cluster", env=env):
        run("sacctmgr", "-i", "add", "cluster", "cluedev", env=env)
    for name in ("slurmctld", "slurmd-gpu1", "slurmd-gpu2"):
        _start_daemon(home, name)
    wait_for(
        "the two nodes",
        lambda: (
            not answers_with("unk", "sinfo", "-h", "-N", "-o", "%N %t", env=env)
            and not answers_with("down", "sinfo", "-h", "-N", "-o", "%N %t", env=env)
        ),
        home / "log" / "slurmd-gpu1.log",
    )
    (home / STATE).write_text(json.dumps({"slurm_conf": str(conf), "partition": "main"}) + "\n")
    print(f"two nodes up; to use them:\n  export SLURM_CONF={conf}\n  sinfo", flush=True)


def _start_daemon(home: Path, name: str) -> None:
    """Start one of ``ALONE`` as configured, and wait until it answers."""
    conf = home / "etc" / "slurm.conf"
    env = {**os.environ, "SLURM_CONF": str(conf)}
    if name == "slurmdbd":
        # It finds the database's private socket through libmariadb's environment variable.
        run("slurmdbd", env={**env, "MYSQL_UNIX_PORT": str(home / "run" / "mysql.sock")})
        log = home / "log" / "slurmdbd.log"
        wait_for("slurmdbd", lambda: answers("sacctmgr", "-n", "list", "cluster", env=env), log)
    elif name == "slurmctld":
        run("slurmctld", "-f", str(conf), env=env)
        wait_for(
            "slurmctld",
            lambda: answers_with("UP", "scontrol", "ping", env=env),
            home / "log" / "slurmctld.log",
        )
    else:
        run("slurmd", "-f", str(conf), "-N", name.partition("-")[2], env=env)


def only(home: Path, action: str, name: str) -> None:
    """Start or stop one daemon of a cluster that was started; jobs go on as Slurm has it."""
    if not (home / STATE).exists():
        raise Refused("not up; --only starts and stops single daemons of a running devcluster")
    running = processes(home)
    if action == "start" and name not in running:
        os.environ["PATH"] += ":/usr/sbin:/usr/local/sbin"
        _start_daemon(home, name)
    elif action == "stop" and name in running:
        _end(running[name])
        (home / "run" / f"{name}.pid").unlink(missing_ok=True)


def answers_with(text: str, *command: str, env: dict[str, str]) -> bool:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode == 0 and text in done.stdout


def _start_munge(home: Path) -> None:
    key = home / "munge" / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
    MUNGE_SOCKET.parent.mkdir(parents=True, exist_ok=True)
    MUNGE_SOCKET.parent.chmod(0o755)
    run(
        "munged",
        "--force",
        f"--key-file={key}",
        f"--pid-file={home}/run/munged.pid",
        f"--log-file={home}/log/munged.log",
        f"--seed-file={home}/munge/seed",
        f"--socket={MUNGE_SOCKET}",
    )
    wait_for("munged", lambda: answers("munge", "-n"), home / "log" / "munged.log")


def _start_database(home: Path) -> None:
    data, sock, log = home / "mysql", home / "run" / "mysql.sock", home / "log" / "mariadb.log"
    if not (data / "mysql").is_dir():
        shutil.rmtree(data, ignore_errors=True)
        run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            "--user=root",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
    with log.open("ab") as out:
        subprocess.Popen(
            [
                "mariadbd",
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={sock}",
                f"--pid-file={home}/run/mariadbd.pid",
                "--skip-networking",
                "--user=root",
                "--innodb-buffer-pool-size=64M",
            ],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    wait_for(
        "the database",
        lambda: answers("mariadb-admin", "--no-defaults", f"--socket={sock}", "ping"),
        log,
    )


def stop(home: Path) -> None:
    """End this cluster's jobs and daemons; nothing else, and nothing if none runs."""
    running = processes(home)
    conf = home / "etc" / "slurm.conf"
    if "slurmctld" in running and (home / STATE).exists():
        env = {**os.environ, "SLURM_CONF": str(conf)}
        answers("scancel", "--me", env=env)
        end = time.monotonic() + 15
        while time.monotonic() < end and answers_with(
            "\n", "squeue", "-h", "-t", "running,completing", env=env
        ):
            time.sleep(0.5)
    (home / STATE).unlink(missing_ok=True)
    for name in ORDER:
        if name in running:
            _end(running[name])
        (home / "run" / f"{name}.pid").unlink(missing_ok=True)


def _end(pid: int) -> None:
    """SIGTERM, and after 20 s SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(200):
            if not command_line(pid):
                return
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("start", "status", "stop"))
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(__file__).resolve().parents[2] / "work" / "devcluster",
        help="folder for everything the cluster keeps",
    )
    parser.add_argument(
        "--install", action="store_true", help="install Debian's packages if they are missing"
    )
    parser.add_argument("--only", choices=ALONE, help="start or stop only this daemon")
    args = parser.parse_args()
    home = args.dir.resolve()
    try:
        if args.only and args.action != "status":
            only(home, args.action, args.only)
        elif args.action == "start":
            start(home, args.install)
        elif args.action == "status":
            up = is_up(home)
            print("up" if up else "not up")
            return 0 if up else 1
        else:
            stop(home)
    except Refused as e:
        print(f"devcluster: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
