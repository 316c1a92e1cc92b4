"""Runs one program in a box: a script of its own, so that nothing is forked from a process with threads.

It reads a request (JSON) from stdin and writes a reply (JSON) to stdout. Three processes:

launcher     outside of the box: reads the output up to a cap, keeps the time, says how the program ended
supervisor   process 1 of the box's process namespace: makes the box, waits for the program; with it dies every process of the box
program      without privileges, in a session of its own, under limits

mode "root"   namespaces made by root; the program has a user id that nobody else has
mode "user"   namespaces made in a user namespace, for those who are not root
mode "uid"    no namespaces: a user id that nobody else has, a directory of its own
"""
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, HERE, RECURSIVE, READ_ONLY = 442, -100, 0x8000, bytes([1 | NOSUID]) + bytes(31)
DETACH, PDEATHSIG, SUBREAPER, NO_NEW_PRIVILEGES = 2, 1, 36, 38
INSIDE = 1000                                                # the user id that mode "user" shows to the program
COVER = b"/sys"                                              # where the new root is put together, in the private namespace
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/nix", "/etc/ld.so.cache",
          "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(what, *arguments):
    """A call of the C library, or an OSError that says which."""
    if getattr(libc, what)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def main():
    asked, ask = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(ask, b"x"))          # no exception, so that the box is cleared
    call("prctl", PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    call("prctl", SUBREAPER, 1, 0, 0, 0)
    request = json.load(sys.stdin)
    try:
        reply = watch(request, asked)
    except OSError as error:
        reply = {"broken": str(error)}
    json.dump(reply, sys.stdout)


# ------------------------------------------------------------------------------------------------------- the launcher
def watch(request, asked):
    mode = request["mode"]
    uid = None if mode == "user" else 2**30 + os.getpid()
    box = tempfile.mkdtemp(prefix="box-") if mode == "uid" else "/box"
    if mode == "uid":
        os.chown(box, uid, uid)
        os.chmod(box, 0o700)
    else:
        separate(mode)
    stdin, feed = os.pipe()
    out, stdout = os.pipe()
    err, stderr = os.pipe()
    report, tell = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        for ours in (feed, out, err, report):
            os.close(ours)
        supervise(request, uid, box, (stdin, stdout, stderr), tell)
    for theirs in (stdin, stdout, stderr, tell, *request["channel"]):
        os.close(theirs)
    try:
        return follow(request, feed, out, err, report, asked)
    finally:
        os.kill(supervisor, signal.SIGKILL)
        if mode == "uid":
            end_all_of(uid)
            shutil.rmtree(box, ignore_errors=True)
        else:
            os.waitpid(supervisor, 0)                        # comes back when all processes of its namespace are gone


def follow(request, feed, out, err, report, asked):
    """Feed stdin and read output until the program ends, its time is over, it has said too much, or the host asks for its end."""
    began, pending = time.monotonic(), request["stdin"].encode("utf-8", "surrogateescape")
    texts, status, ended = {out: b"", err: b""}, b"", ""
    os.set_blocking(feed, False)
    poll = select.poll()
    for fd in (out, err, report, asked):
        poll.register(fd, select.POLLIN)
    if pending:
        poll.register(feed, select.POLLOUT)
    else:
        os.close(feed)
    waiting = {out, err, report}
    while waiting and not ended:
        left = began + request["seconds"] - time.monotonic()
        for fd, _ in poll.poll(max(0, left) * 1000):
            if fd == feed:
                try:
                    pending = pending[os.write(feed, pending[:65536]):]
                except BrokenPipeError:                      # the program does not read it
                    pending = b""
                if not pending:
                    poll.unregister(feed)
                    os.close(feed)
                continue
            piece = os.read(fd, 65536)
            if fd == asked:
                ended = "asked"
            elif not piece:
                poll.unregister(fd)
                waiting.remove(fd)
            elif fd == report:
                status += piece
            else:
                texts[fd] += piece
                if len(texts[fd]) > request["output"]:
                    ended = "truncated"
        if not ended and time.monotonic() >= began + request["seconds"]:
            ended = "timed_out"
    told = json.loads(status.splitlines()[0]) if status else {}
    if "broken" in told:
        return told
    out, err = (text[:request["output"]].decode("utf-8", "replace") for text in texts.values())
    return {"status": told.get("status"), "stdout": out, "stderr": err, "truncated": ended == "truncated",
            "timed_out": ended == "timed_out", "seconds": time.monotonic() - began}


def end_all_of(uid):
    """Kill a user's processes and bury them, and this process's children."""
    with contextlib.suppress(ChildProcessError):
        while True:
            kill_all_of(uid)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def kill_all_of(uid):
    """SIGKILL to every process of a user at once.

    The killer acts as that user, so that it can hit nobody else, but its own user is another one, so that they cannot hit it.
    """
    killer = os.fork()
    if killer == 0:
        try:
            os.setresuid(uid + 2**30, uid, uid + 2**30)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def separate(mode):
    """New namespaces for this process, and for its children a new process namespace."""
    user, group = os.getuid(), os.getgid()
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    call("unshare", spaces | (NEWUSER if mode == "user" else 0))
    if mode == "user":
        for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


# ----------------------------------------------------------------------------------------------------- the supervisor
def supervise(request, uid, box, streams, tell):
    """Make the box, start the program, wait for it and tell how it ended. Never returns."""
    try:
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if request["mode"] != "uid":
            build(request, uid)
        program = os.fork()
        if program == 0:
            start(request, uid, box, streams)
        for fd in (*streams, *request["channel"]):
            os.close(fd)
        while True:
            child, status = os.wait()                        # also buries the orphans of the namespace
            if child == program:
                break
        if request["mode"] == "uid":
            kill_all_of(uid)
        os.write(tell, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
        os._exit(0)
    except BaseException as error:
        os.write(tell, json.dumps({"broken": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        os._exit(1)


def build(request, uid):
    """A root directory with the interpreter and the system's libraries, read-only, and /box, of limited size."""
    try:
        with open("/proc/sys/kernel/shmall", "w") as file:   # no shared memory of System V, which no limit would count
            file.write("0")
    except OSError:
        pass
    call("mount", None, b"/", None, REC | PRIVATE, None)
    sources = [place for place in dict.fromkeys([*SYSTEM, *request["see"]])
               if os.path.exists(place) and not any(place.startswith(f"{top}/") for top in ("/usr", "/nix"))]
    call("mount", b"none", COVER, b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755")
    root = os.fsdecode(COVER) + "/root"
    for source in sources:
        bind(source, root + source)
    os.makedirs(f"{root}/box")
    os.symlink("box", f"{root}/tmp")
    owner = INSIDE if uid is None else uid
    size = f"size={request['disk']},nr_inodes=10000,mode=700,uid={owner},gid={owner}"
    os.chmod(root, 0o755)
    call("syscall", *map(ctypes.c_long, (MOUNT_SETATTR, HERE)), COVER, ctypes.c_long(RECURSIVE), READ_ONLY,
         ctypes.c_long(len(READ_ONLY)))
    call("mount", b"none", f"{root}/box".encode(), b"tmpfs", NOSUID | NODEV, size.encode())
    os.chdir(COVER)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACH)
    os.chroot("/root")                                       # in a chroot no user namespaces can be made
    os.chdir("/")


def bind(source, target):
    if os.path.islink(source) and not os.path.isabs(os.readlink(source)):
        os.symlink(os.readlink(source), target)              # /bin -> usr/bin
        return
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "x").close()
    call("mount", source.encode(), target.encode(), None, BIND | REC, None)


# -------------------------------------------------------------------------------------------------------- the program
def start(request, uid, box, streams):
    """Give up everything and become the program."""
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (*streams, *request["channel"])]
    for fd, copy in enumerate(copies):
        os.dup2(copy, fd)
    os.setsid()
    os.chdir(box)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for name, text in request["files"].items():
        os.makedirs(os.path.dirname(os.path.join(box, name)), exist_ok=True)
        with open(os.path.join(box, name), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    for limit, value in request["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    os.umask(0o077)
    os.execve(request["command"][0], request["command"],
              {"PATH": "/usr/bin:/bin", "HOME": box, "TMPDIR": box, "LANG": "C.UTF-8"})


if __name__ == "__main__":
    main()
